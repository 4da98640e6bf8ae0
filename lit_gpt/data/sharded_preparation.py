"""A large corpus to packed tokens in shards, by datatrove's executors: here, as a Slurm array, or on Ray.

Decisions: a shard is a run of source files with packed files, an index and a manifest of its own, so that shards are made
in any order, on any machines, and each goes on by itself after an interruption; which files a shard holds depends on the
sources and the number of shards alone. datatrove runs and counts the tasks; the files are read by our own readers, which
refuse what its readers would log and leave out. Which shards are finished is asked of their manifests, not of the log.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_gpt.data.packed_format import data_set, index_path
from lit_gpt.data.preparation import pack_texts
from lit_gpt.data.preparation_plan import SHARDS_FOLDER, PackingPlan
from lit_gpt.files import folder_lock, make_folder, read_json_object, write_json

# Beside the logs: the Slurm job that makes the shards, and what of.
_JOB_NAME = "job.json"


@dataclass(frozen=True)
class ExecutorChoice:
    """Who makes the shards."""

    name: str = "local"
    """One of `preparation_settings.EXECUTORS`."""
    workers: int = 1
    """Shards that are made at a time; on Slurm and Ray, -1 is all."""
    slurm_partition: str = ""
    """Of Slurm: the partition."""
    slurm_time: str = "24:00:00"
    """Of Slurm: the time limit of a shard."""
    slurm_args: dict[str, str] = field(default_factory=dict)
    """Of Slurm: other options of sbatch."""


@dataclass(frozen=True)
class ShardedResult:
    """What lies in the destination."""

    manifests: list[dict[str, Any]]
    """Of the shards that are finished, by prefix and shard."""
    unfinished: list[int]
    """Shards that are not."""
    was_finished: bool
    """An earlier run had made all; nothing was done."""


class ShardPacker:
    """What a task does: a step of datatrove's pipelines, sent to the process or machine that runs it."""

    def __init__(self, plans: list[PackingPlan], overwrite: bool) -> None:
        self._plans, self._overwrite = plans, overwrite

    def __call__(self, _: Any, rank: int = 0, world_size: int = 1) -> None:
        """Make the shard of a task, or go on with it."""
        from loguru import logger

        pack_texts(self._plans[rank], 1, self._overwrite, lambda progress: None, logger.info)

    def __repr__(self) -> str:
        return f"ShardPacker({len(self._plans)} shards of {self._plans[0].destination})"


def pack_shards(
    plan: PackingPlan,
    count: int,
    executor: ExecutorChoice,
    overwrite: bool,
    report: Callable[[int, int, int], object],
) -> ShardedResult:
    """Make the shards of a corpus that are not finished, or give them to the cluster.

    Args:
        plan: of the whole corpus.
        count: shards; decides which files lie together.
        executor: who works. On Slurm this returns when the job is submitted; while it is queued or runs, at once.
        overwrite: replace other shards of the same prefix.
        report: told (finished shards, all shards, packed files) every few seconds.

    Raises:
        ValueError: the destination holds something else; a source is malformed; datatrove or the executor is missing.
    """
    if count > len(plan.sources):
        raise ValueError(f"--shards {count}: the corpus has {len(plan.sources)} file(s); at most one shard each")
    plans = plan.split(count)
    folder = plan.destination / SHARDS_FOLDER / plan.prefix
    make_folder(folder)
    asked = {**plan.identity, "shards": count}
    with folder_lock(folder):
        job = folder / _JOB_NAME
        was_submitted = executor.name == "slurm" and job.is_file()
        todo: list[int] = []
        if not (was_submitted and _is_queued(job, asked)):
            _check_destination(plan, plans, overwrite)
            plan.copy_tokenizer(overwrite)
            # What a submitted job was to replace, it has replaced.
            anew = overwrite and not was_submitted
            todo = [index for index, one in enumerate(plans) if anew or one.finished() is None]
            job.unlink(missing_ok=True)
        if todo:
            job_id = _run([plans[index] for index in todo], executor, overwrite, folder / "log", report)
            if job_id is not None:
                write_json(job, {"job_id": job_id, "made_from": asked})
        manifests = [one.finished() for one in plans]
    unfinished = [index for index, made in enumerate(manifests) if made is None]
    flat = [manifest for made in manifests if made for manifest in made.values()]
    if not unfinished and not any(manifest["documents"] for manifest in flat):
        raise ValueError(f"the {len(plan.sources)} source file(s), from {plan.sources[0].path} on, hold no documents")
    full = any(made[one.prefix]["files"] for one, made in zip(plans, manifests, strict=True) if made)
    if plan.drop_last and not unfinished and not full:
        raise ValueError(
            f"--drop_last drops all {sum(manifest.get('dropped_tokens', 0) for manifest in flat):,} tokens: those of no shard "
            "fill a file; leave it out, or give fewer --shards or a smaller --chunk_size (and --overwrite)"
        )
    return ShardedResult(flat, unfinished, was_finished=not todo)


def _is_queued(job: Path, asked: dict[str, Any]) -> bool:
    """Whether Slurm still has the job that was submitted for these shards.

    Raises:
        ValueError: it has, but the job makes something else than what is asked for; it cannot be asked.
    """
    submitted = read_json_object(job)
    number = str(submitted.get("job_id"))
    try:
        answer = subprocess.run(["squeue", "--noheader", "--jobs", number], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(
            f"job {number} was submitted for these shards, and whether it runs cannot be asked ({error}): run this where "
            f"squeue is, or delete {job} if it does not"
        ) from error
    # Slurm forgets a job some minutes after its end.
    forgotten = "invalid job id" in answer.stderr.lower()
    if answer.returncode and not forgotten:
        raise ValueError(f"job {number} was submitted for these shards; squeue: {answer.stderr.strip()[:200]}")
    if forgotten or not answer.stdout.strip():
        return False
    if submitted.get("made_from") != asked:
        raise ValueError(
            f"job {number} makes these files from other sources or settings: wait for it, or scancel {number}"
        )
    return True


def _check_destination(plan: PackingPlan, plans: list[PackingPlan], overwrite: bool) -> None:
    """Refuse, or with `overwrite` remove, what training would read beside these shards."""
    prefixes = plan.prefixes
    read_as = tuple(map(data_set, prefixes))
    allowed = {prefix for one in plans for prefix in one.prefixes}
    series = re.compile(r"(.*)(?:_\d{10}\.bin|\.manifest\.json|\.progress\.json)")
    for path in sorted(plan.destination.glob("*")):
        found = series.fullmatch(path.name)
        if found is None or not path.name.startswith(read_as) or found[1] in allowed:
            continue
        is_shard = re.fullmatch(rf"({'|'.join(map(re.escape, prefixes))})_\d+", found[1])
        if not (overwrite and is_shard):
            part = plan.prefix if path.name.startswith(plan.prefix) else data_set(found[1])
            raise ValueError(
                f"{path}: training would read this as part of {part}; move it, or give another --destination_path"
                + (", or --overwrite" if is_shard else "")
            )
        path.unlink()
        index_path(path).unlink(missing_ok=True)


def _run(
    plans: list[PackingPlan],
    choice: ExecutorChoice,
    overwrite: bool,
    log: Path,
    report: Callable[[int, int, int], object],
) -> str | None:
    """Make shards, or submit them; returns the number of the Slurm job, if it is one."""
    if choice.name == "slurm":
        # An earlier job's tasks may still read which shards are theirs.
        number = sum(1 for _ in log.parent.glob(f"{log.name}*"))
        log = log.with_name(f"{log.name}-{number + 1}") if number else log
    # datatrove's marks of finished tasks may outlive the files, which alone are asked.
    shutil.rmtree(log / "completions", ignore_errors=True)
    executor = _executor(plans, choice, overwrite, log)
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(plans, report, stop), daemon=True)
    watcher.start()
    try:
        executor.run()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        if choice.name != "slurm":
            raise
        raise ValueError(
            f"--executor slurm: the job could not be submitted ({error}); run this where sbatch is"
        ) from error
    except Exception as error:
        # Ray's errors hold the one of the task.
        if isinstance(cause := getattr(error, "cause", None), ValueError | OSError):
            raise cause from error
        raise
    finally:
        stop.set()
        watcher.join()
    return str(executor.job_id) if choice.name == "slurm" else None


def _watch(plans: list[PackingPlan], report: Callable[[int, int, int], object], stop: threading.Event) -> None:
    """Report what lies in the destination, every few seconds."""
    prefixes = tuple(f"{one.prefix}_" for one in plans)
    while not stop.wait(5):
        finished = sum(one.manifest_path(one.prefix).is_file() for one in plans)
        with os.scandir(plans[0].destination) as entries:
            files = sum(entry.name.endswith(".bin") and entry.name.startswith(prefixes) for entry in entries)
        report(finished, len(plans), files)


def _executor(plans: list[PackingPlan], choice: ExecutorChoice, overwrite: bool, log: Path) -> Any:
    """datatrove's executor of that name."""
    try:
        from datatrove import executor as executors
        from loguru import logger
    except ImportError as error:
        raise ValueError(
            f"shards are made by datatrove, which cannot be imported ({error}): ./setup.sh data"
        ) from error
    # What its tasks say is in their logs; what goes wrong is raised.
    logger.remove()
    common = {"pipeline": [ShardPacker(plans, overwrite)], "logging_dir": str(log), "tasks": len(plans)}
    if choice.name == "slurm":
        if not choice.slurm_partition:
            raise ValueError("--slurm_partition is missing: where the jobs of --executor slurm are queued")
        root = Path(__file__).resolve().parents[2]
        return executors.SlurmPipelineExecutor(
            **common,
            time=choice.slurm_time,
            partition=choice.slurm_partition,
            workers=choice.workers,
            job_name=f"pack-{plans[0].prefix.rpartition('_')[0]}",
            qos="",
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={root}:$PYTHONPATH",
            sbatch_args=dict(choice.slurm_args),
        )
    if choice.name == "ray":
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                f"--executor ray: the package ray cannot be imported ({error}): pip install ray"
            ) from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="error")
        return executors.RayPipelineExecutor(**common, workers=choice.workers)
    from lit_gpt.data.local_executor import quiet_local_executor

    return quiet_local_executor(**common, workers=min(choice.workers, len(plans)), start_method="spawn")
