"""Flags that the preparations of training data share; plain dataclasses, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field

# Tokens that are held in memory until a file is full.
_LARGEST_CHUNK = 1 << 28
EXECUTORS = ("local", "slurm", "ray")


@dataclass
class PreparationFlags:
    """What every preparation of training data can be told."""

    source_path: list[str] = field(default_factory=list)
    """Files, folders, glob patterns, or places on the hub (hf://datasets/OWNER/NAME/FOLDER, or OWNER/NAME); several follow one
    flag or stand as [A, B]."""
    destination_path: str = ""
    """Folder of the packed files; made if it is missing."""
    tokenizer_path: str = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    """Folder or file of a tokenizer, or its name on the hub."""
    percentage: float = 1.0
    """The first part of the files, from 0 to 1 (as in TinyLlama's scripts, 1 means all)."""
    chunk_size: int = 2049 * 1024
    """Tokens per file; blocks do not cross files."""
    drop_last: bool = False
    """Leave out the last file of a series, of each shard's too, if tokens do not fill it; else it is padded, which is never
    trained on."""
    shards: int = 1
    """Parts that are made apart, each of whole source files; decides the files. With 1, all cores work on one series."""
    executor: str = "local"
    """Who makes several shards: local (this machine), slurm (an array job; the same command then says how far it is) or ray."""
    num_workers: int | None = None
    """Processes, or shards at a time; all cores by default, on Slurm and Ray all shards. Changes the time, never the result."""
    slurm_partition: str = ""
    """Slurm's partition."""
    slurm_time: str = "24:00:00"
    """Slurm's time limit of a shard."""
    slurm_args: dict[str, str] = field(default_factory=dict)
    """Other options of sbatch, such as {account: mine, qos: long}."""
    overwrite: bool = False
    """Replace another result in the destination."""

    def limit_shards(self, files: int) -> None:
        """Lower the shards to the number of source files, and say so."""
        if files < self.shards:
            if files > 1:
                print(f"{files} shards instead of --shards {self.shards}: the corpus has {files} files")
            self.shards = files

    def problems(self) -> list[str]:
        """What is impossible about these values, one line each."""
        found = []
        if not self.source_path:
            found.append("--source_path is missing: files, folders or patterns of text")
        if not self.destination_path:
            found.append("--destination_path is missing: the folder for the packed files")
        if self.chunk_size < 2:
            found.append(
                f"--chunk_size {self.chunk_size}: expected at least the tokens of one training block, such as 2049"
            )
        if self.chunk_size > _LARGEST_CHUNK:
            found.append(f"--chunk_size {self.chunk_size}: at most {_LARGEST_CHUNK}")
        if not 0 < self.percentage <= 1:
            found.append(
                f"--percentage {self.percentage:g}: expected a share of the files in (0, 1], such as 0.5 for half"
            )
        if self.num_workers is not None and self.num_workers < 1:
            found.append(f"--num_workers {self.num_workers}: expected at least 1")
        if self.shards < 1:
            found.append(f"--shards {self.shards}: expected at least 1")
        if self.executor not in EXECUTORS:
            found.append(f"--executor {self.executor}: expected {', '.join(EXECUTORS)}")
        elif self.executor != "local" and self.shards == 1:
            found.append(f"--executor {self.executor} needs several --shards: each is a task of its own")
        return found
