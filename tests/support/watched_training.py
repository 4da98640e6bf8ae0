"""Train as a script does, in two processes, and print what every step sends: python watched_training.py FOLDER FLAGS...

Started by itself, because a second process is started by the first one's command line. The last line of the first process
is a JSON object: `collectives`, by step the number of each kind and dtype, and `graphs`, how many torch.compile made.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_gpt.training import loop
from tests.support.training_runs import make_packed_data, pretraining_command, run_python


class Collectives(TorchDispatchMode):
    """Counts what this process sends, by kind and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sent = next(leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.found[f"{func.overloadpacket.__name__.strip('_')} {str(sent.dtype).removeprefix('torch.')}"] += 1
        return func(*args, **(kwargs or {}))


def watch(script: str, folder: Path, **flags: object) -> dict[str, Any]:
    """Train in processes of their own, in `folder`; what the first one printed."""
    make_packed_data(folder / "data")
    path, *words = pretraining_command(script, folder, **flags)
    done = run_python(folder, __file__, path, *words)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Train, then print."""
    path, *words = sys.argv[1:]
    real, steps = loop._Trainer._train_step, []

    def counted(*args: Any) -> None:
        if "--compile=on" in words:
            # Below a dispatch mode torch.compile neither compiles nor runs what it has compiled.
            return real(*args)
        with Collectives() as mode:
            real(*args)
        steps.append(dict(mode.found))

    spec = importlib.util.spec_from_file_location("watched_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with mock.patch.object(loop._Trainer, "_train_step", counted):
        module.main(words)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        print(json.dumps({"collectives": steps, "graphs": graphs}))


if __name__ == "__main__":
    main()
