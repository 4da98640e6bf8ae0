"""datatrove's executor on this machine, with a console that stays ours.

Its tasks log to files; what goes wrong is raised in the process that started them, as one line for the user.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

from lit_gpt.data.preparation import follow_parent


def quiet_local_executor(**options: Any) -> Any:
    """datatrove's `LocalPipelineExecutor` whose tasks write to their logs alone, and end with the process that started them."""
    import multiprocess
    from datatrove.executor import LocalPipelineExecutor
    from multiprocess.managers import SyncManager

    def following_manager() -> Any:
        """As `multiprocess.Manager()`: the process that keeps the tasks' queue, but it ends with this one."""
        manager = SyncManager(ctx=multiprocess.get_context())
        manager.start(lambda: follow_parent(multiprocess.parent_process()))
        return manager

    class QuietLocalExecutor(LocalPipelineExecutor):
        def run(self) -> Any:
            # By itself it would wait for ever after a kill -9 of this process, with our output open.
            before = multiprocess.Manager
            multiprocess.Manager = following_manager
            try:
                return LocalPipelineExecutor.run(self)
            finally:
                multiprocess.Manager = before

        def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
            if (parent := multiprocess.parent_process()) is not None:
                # Ctrl-C is the launcher's, which ends its workers.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                follow_parent(parent)
            # Imported here: the class travels to the workers by value, with what it refers to.
            from loguru import logger

            # The library's log would print each task's steps, and a traceback for each mistake in the data.
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                try:
                    return LocalPipelineExecutor._run_for_rank(self, rank, local_rank, node_rank)
                finally:
                    logger.remove()  # it writes to what closes here

    return QuietLocalExecutor(**options)
