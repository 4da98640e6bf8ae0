"""The runs of a scaling study, one after the other or as a Slurm array, and their losses as rows of a CSV.

Every run is a training script in a stage of its own: interrupted it goes on, finished it is skipped. The rows are read from
the stages, so that runs of several machines that share the folder need no other meeting place.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_gpt.evaluation.result_pages import changed_flags
from lit_gpt.files import make_folder, read_json_object, write_file
from lit_gpt.pipeline import ROOT, Pipeline, Stage
from lit_gpt.randomness import hash_int
from lit_gpt.studies.scaling_plan import SCALING_KINDS, PlannedRun, plan_rows
from lit_gpt.studies.scaling_settings import ScalingFlags
from lit_gpt.studies.study_pages import write_csv
from lit_gpt.studies.text_corpus import packed_text
from lit_gpt.studies.trained_models import stage_settings, train_model
from lit_gpt.training.measured_speed import STEPS, probe_rows, tokens_per_second

if TYPE_CHECKING:
    from rich.console import Console

ROWS_NAME = "scaling_laws.csv"
# Pieces of text that are dealt out: long enough for many sequences, short enough that the validation text is of all parts.
_PIECE_CHARACTERS = 20_000
# Start of Python, compilation and validation of a small run on 2 cores; replaced by what finished runs say.
_START_S = 20.0
# Some seconds: of one core, and of a GPU.
_MOST_TIMED_FLOPS = {"cpu": 1e12, "cuda": 1e15}
_NUMBERS = ("val_loss", "val_loss_se", "val_loss_draws_se", "val_bits_per_byte", "minutes")


def prepare_text(flags: ScalingFlags, pipeline: Pipeline) -> Stage:
    """The corpus as packed tokens; its pieces are put in the order of a hash, so that the last tenth is a sample of all.

    Raises:
        FileNotFoundError, ValueError: there is no such text, it is damaged, or a script's own message.
    """
    path = Path(flags.text)
    stage = pipeline.begin("pieces", "deal out the text's pieces", _pieces_settings(flags))
    dealt = stage.folder / "text.txt"
    if stage.result is None:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            try:
                content = gzip.decompress(content)
            except (EOFError, OSError) as error:
                raise ValueError(f"--text {path}: damaged gzip file ({error})") from error
        pieces = text_pieces(content.decode("utf-8", errors="replace"))
        order = sorted(range(len(pieces)), key=lambda number: hash_int(number))
        dealt.write_bytes("\n\n".join(pieces[number] for number in order).encode())
        stage.finish({"characters": sum(map(len, pieces)), "pieces": len(pieces)})
    return packed_text(pipeline, dealt, flags.vocab_size, flags.block_size, 3)


def _pieces_settings(flags: ScalingFlags) -> dict[str, Any]:
    path = Path(flags.text)
    if not path.is_file():
        default = flags.text == ScalingFlags().text
        remedy = "apt-get install dict-gcide, or name a text with --text" if default else "name a text file"
        raise FileNotFoundError(f"--text {path}: no such file; {remedy}")
    return {"text": _file_digest(path), "piece": _PIECE_CHARACTERS}


def _file_digest(path: Path) -> str:
    found = path.stat()
    return _digest_of_version(path, found.st_size, found.st_mtime_ns)


@functools.cache
def _digest_of_version(path: Path, size: int, changed_ns: int) -> str:
    """Size and time of the last change tell versions of the file apart: every run of a plan asks for the same ones."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def packed_settings(flags: ScalingFlags) -> dict[str, Any] | None:
    """The settings of the packed text as `prepare_text` gave them; None where it was not prepared, or from other flags.

    Raises:
        FileNotFoundError: there is a prepared text, and the one that it was made from is missing.
    """
    out = Path(flags.out)
    dealt, pieces, packed = out / "pieces" / "text.txt", _stage(out / "pieces"), _stage(out / "packed")
    if None in (pieces.get("result"), packed.get("result")) or pieces["settings"] != _pieces_settings(flags):
        return None
    wanted = {"text": _file_digest(dealt), "vocab_size": flags.vocab_size, "block_size": flags.block_size}
    return wanted if packed["settings"] == wanted else None


def _stage(folder: Path) -> dict[str, Any]:
    path = folder / "stage.json"
    return read_json_object(path) if path.exists() else {}


def text_pieces(text: str) -> list[str]:
    """The text in pieces of some 20,000 characters, cut at blank lines."""
    pieces: list[str] = []
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + _PIECE_CHARACTERS)
        end = len(text) if end < 0 else end
        pieces.append(text[start:end].strip("\n"))
        start = end + 2
    return pieces


def plan_lines(flags: ScalingFlags, runs: Sequence[PlannedRun]) -> list[str]:
    """The plan for a console: a line a run, then the sum."""
    speed, start_s, source = machine_speed(flags, runs)
    table = plan_rows(flags, runs, speed, start_s)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        number, name, *numbers = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([number, name.strip().ljust(widths[1]), *numbers]))
    hours = sum(run.computed_flops / speed + start_s for run in runs) / 3600
    price = "" if flags.price_per_hour is None else f", price {hours * flags.price_per_hour:,.2f}"
    done = sum(finished_record(flags, run) is not None for run in runs)
    lines.append(f"{len(runs)} runs, {done} of them done; {sum(run.flops for run in runs):.3g} FLOPs (6 N D) in all")
    lines.append(f"time: {hours * 60:.0f} minutes one after the other{price}")
    return [*lines, f"speed: {speed:.3g} FLOPs/s with head and attention, and {start_s:.0f} s a run besides ({source})"]


def sweep(flags: ScalingFlags, runs: Sequence[PlannedRun], console: Console) -> None:
    """Train the runs one after the other, or write the job array that does.

    Raises:
        ValueError, Interrupted: a script's.
    """
    out = Path(flags.out)
    pipeline = Pipeline(out, console)
    if not flags.slurm:
        run_sweep(flags, runs, pipeline)
        return
    prepare_text(flags, pipeline)
    # The array's tasks start in this project's folder, whatever this command's is.
    absolute = dataclasses.replace(flags, text=str(Path(flags.text).resolve()), out=str(out.resolve()))
    text = slurm_script(flags, runs, typed_command(absolute, "sweep"))
    write_file(out / "sweep.sbatch", lambda file: file.write(text.encode()))
    console.print(f"{len(runs)} runs; start them with: sbatch {out / 'sweep.sbatch'}")


def typed_command(flags: ScalingFlags, action: str) -> str:
    """The command with these flags, as a user types it."""
    words = ["python", "scripts/scaling_laws.py", action]
    for name, value in changed_flags(flags, but=("slurm", "only")).items():
        words += [f"--{name}", f"[{','.join(map(_typed, value))}]" if isinstance(value, list) else str(value)]
    return shlex.join(words)


def _typed(value: float | str) -> str:
    """An item of a list, as short as it can be read back."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return f"'{value}'" if "," in value else value


def run_sweep(flags: ScalingFlags, runs: Sequence[PlannedRun], pipeline: Pipeline) -> None:
    """Train what is not done, and say how far the whole is by FLOPs.

    Raises:
        ValueError, Interrupted: a script's.
    """
    packed = prepare_text(flags, pipeline)
    chosen = runs if flags.only is None else [_chosen(runs, flags.only)]
    total = sum(run.computed_flops for run in chosen)
    done = waited = 0.0
    for number, run in enumerate(chosen, 1):
        started = time.monotonic()
        before = finished_record(flags, run) is not None
        if waited:
            left = (total - done) * waited / max(1.0, _trained(flags, chosen[: number - 1]))
            pipeline.console.print(f"{done / total:.0%} of the sweep's FLOPs done, about {left / 60:.0f} minutes left")
        title = f"run {number} of {len(chosen)}: {run.name}"
        script = SCALING_KINDS[run.kind].script
        train_model(pipeline, f"runs/{run.name}", title, packed, (script, run.script_flags(flags)))
        done += run.computed_flops
        if not before:
            waited += time.monotonic() - started
        collect_rows(flags, runs)


def _trained(flags: ScalingFlags, runs: Sequence[PlannedRun]) -> float:
    """FLOPs of these runs."""
    return sum(run.computed_flops for run in runs if finished_record(flags, run) is not None)


def _chosen(runs: Sequence[PlannedRun], number: int) -> PlannedRun:
    if not 0 <= number < len(runs):
        raise ValueError(f"--only {number}: the plan has runs 0 to {len(runs) - 1}")
    return runs[number]


def finished_record(flags: ScalingFlags, run: PlannedRun) -> dict[str, Any] | None:
    """What a finished run's stage holds; None where it is not finished, or was run with other flags or on another text."""
    packed, stage = packed_settings(flags), _stage(Path(flags.out) / "runs" / run.name)
    if packed is None or "settings" not in stage:
        return None
    result, wanted = (
        stage.get("result"),
        stage_settings(packed, (SCALING_KINDS[run.kind].script, run.script_flags(flags))),
    )
    return result if isinstance(result, dict) and stage["settings"] == wanted else None


def collect_rows(flags: ScalingFlags, runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """The finished runs as rows, written to scaling_laws.csv in the study's folder."""
    rows = []
    for run in runs:
        record, given = finished_record(flags, run), run.script_flags(flags)
        if record is None or record.get("val_loss") is None:
            continue
        rows.append(
            {
                "kind": run.kind,
                "size": run.config.non_embedding_params,
                "layers": run.config.n_layer,
                "width": run.config.n_embd,
                "budget": run.budget,
                "flops": 6.0 * run.config.non_embedding_params * record["total_tokens"],
                "flops_per_token": run.flops_per_token,
                "tokens": record["total_tokens"],
                "steps": given["max_steps"],
                "batch_size": given["batch_size"],
                "learning_rate": given["learning_rate"],
                "rate_factor": run.rate_factor,
                **{name: record.get(name) for name in _NUMBERS},
            }
        )
    if rows:
        make_folder(Path(flags.out))
        write_csv(Path(flags.out) / ROWS_NAME, rows)
    return rows


def machine_speed(flags: ScalingFlags, runs: Sequence[PlannedRun]) -> tuple[float, float, str]:
    """(computed FLOPs a second, seconds of a run beside its steps, where from in words)."""
    if flags.flops_per_s is not None:
        return flags.flops_per_s, _START_S, "--flops_per_s"
    timed = [(run.computed_flops, float(record["minutes"]) * 60) for run in runs
             if (record := finished_record(flags, run)) is not None]  # fmt: skip
    if len(timed) >= 3:
        flops, seconds = zip(*timed, strict=True)
        slope, start = statistics.linear_regression(flops, seconds)
        if slope > 0:
            return 1 / slope, max(0.0, start), f"{len(timed)} finished runs"
    run = timed_run(runs)
    print(f"measuring the speed on {STEPS} steps of the model of {run.name}", file=sys.stderr, flush=True)
    speed = tokens_per_second(run.config, SCALING_KINDS[run.kind].causal) * run.computed_flops / run.tokens
    return speed, _START_S, f"steps of the model of {run.name}, uncompiled"


def timed_run(runs: Sequence[PlannedRun]) -> PlannedRun:
    """The run with the largest model of which some steps take seconds; the smallest one where none does."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def cost(run: PlannedRun) -> float:
        block_size = run.config.block_size
        return STEPS * probe_rows(block_size) * block_size * run.computed_flops / run.tokens

    return max((run for run in runs if cost(run) <= _MOST_TIMED_FLOPS[device]), key=cost, default=min(runs, key=cost))


def slurm_script(flags: ScalingFlags, runs: Sequence[PlannedRun], command: str) -> str:
    """A job array with one run a task; Slurm's own limits (partition, time, account) are added by hand or by sbatch's flags."""
    out = Path(flags.out).resolve()
    script = shlex.quote(sys.executable) + command.removeprefix("python")
    return (
        "#!/bin/bash\n"
        f"#SBATCH --job-name=scaling_laws\n#SBATCH --array=0-{len(runs) - 1}\n"
        "#SBATCH --ntasks=1\n#SBATCH --cpus-per-task=8\n#SBATCH --gpus-per-task=1\n#SBATCH --requeue\n"
        f"#SBATCH --output={out}/slurm-%a.log\n"
        f"cd {shlex.quote(str(ROOT))}\nexec {script} --only $SLURM_ARRAY_TASK_ID\n"
    )
