"""One fault from beginning to end: a run is started, hurt, started again until it is finished, and compared."""

from __future__ import annotations

import contextlib
import csv
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.faults import kinds
from tests.faults.setups import SETUPS, Start, make_folder
from tests.support.training_runs import final_state

# Lines that a run may print on standard error: warnings, and one that says why it ended.
WARNING = re.compile(r"warning: (?!.*/gloo/)\S")  # a library's own words say nothing to users
ENDING = re.compile(
    r"error: \S|SIG[A-Z]+: stopped at step \d+ of \d+ and saved; |interrupted$|stopping when the processes"
)
# A damaged run that is not resumed says what to do about a file.
DELETE, MOVE = re.compile(r"; delete it,"), re.compile(r"move it away,")
# Starts after the one that is hurt, each of which may refuse once.
MOST_STARTS = 3


@dataclass
class Finished:
    """What a finished run left behind."""

    state: dict[str, torch.Tensor]
    """Model and optimizer of the last checkpoint."""
    exported: dict[str, torch.Tensor]
    """The exported weights."""
    rows: dict[tuple[str, str], str]
    """(step, column) to what the log says of the losses."""
    files: Counter[str]
    """All of them, but those of the data; by their names without numbers, how many."""


@dataclass
class Report:
    """How a fault went."""

    what: str = "the run ended before"
    """The moment and what was done."""
    ends: list[str] = field(default_factory=list)
    """Of each start, in a few words."""
    problems: list[str] = field(default_factory=list)
    """What must not be."""


def read_finished(folder: Path) -> Finished:
    """A finished run's weights, losses and files."""
    (export,) = folder.glob("models/*.safetensors")
    (record,) = folder.glob("workdir/*/*/run.json")
    log = folder / json.loads(record.read_text())["log_path"]
    columns = ("metric/train_loss", "metric/grad_norm", "metric/val_loss", "total_tokens")
    with log.open(newline="") as file:
        rows = {(row["step"], name): row[name] for row in csv.DictReader(file) for name in columns if row[name]}
    return Finished(_last_state(folder), load_file(export), rows, _files(folder))


def _last_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, be it a file or a folder of shards."""
    if not (shards := sorted(folder.glob("workdir/*/*/iter-*-ckpt/*.safetensors"))):
        return final_state(folder)
    last = [path for path in shards if path.parent == shards[-1].parent]
    return {f"{path.name} {name}": value for path in last for name, value in load_file(path).items()}


def run_unbroken(setup: str, folder: Path) -> Finished:
    """A run that nothing happens to."""
    start = Start(SETUPS[setup], make_folder(folder), str(folder))
    problem = start.wait()
    text = "".join(start.lines["out"] + start.lines["err"])
    assert problem is None and start.process.returncode == 0, f"{setup}: the unbroken run failed: {problem}\n{text}"
    return read_finished(folder)


def try_fault(kind_name: str, setup_name: str, seed: str, folder: Path, unbroken: Finished) -> Report:
    """Hurt a run, start it again until it is finished, and compare it with the unbroken one.

    Args:
        kind_name: of KINDS.
        setup_name: of SETUPS.
        seed: decides the moment and everything else.
        folder: a new one.
        unbroken: of the same setup.
    """
    kind, setup = kinds.KINDS[kind_name], SETUPS[setup_name]
    chance, report = random.Random(seed), Report()
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        strike = kind.strike
        if strike is kinds.fill_disk and not stack.enter_context(kinds.small_disk(folder)):
            strike = kinds.limit_files
        make_folder(folder)
        start = Start(setup, folder, f"{folder} 0")
        stack.callback(lambda: start.end())
        moment = kinds.wait_for_moment(start, chance, kind.fails_saves)
        struck = None
        if moment is not None:
            struck = strike(start, chance)
            report.what = f"{moment}: {struck.what}"
        _await_end(start, report, hurt=True)
        if kind.fails_saves and (struck is None or start.process.returncode == 0):
            report.problems.append("the fault did not strike: every save went well")
        if struck is not None and struck.undo is not None:
            struck.undo()
        damaged = kinds.damage(folder, chance) if kind.damages and moment is not None else None
        report.what += f", {damaged[0]}" if damaged else ""
        for number in range(1, MOST_STARTS + 1):
            start = Start(setup, folder, f"{folder} {number}")
            refusal = _await_end(start, report, hurt=False)
            if start.process.returncode == 0 or report.problems:
                break
            if damaged is None:
                report.problems.append(f"not resumed: {refusal}")
                break
            _obey(refusal, damaged[1], damaged[2])
        if start.process.returncode == 0:
            # A full disk takes rows from the log; a run whose run.json was deleted begins a new one.
            new_log = damaged is not None and damaged[1].name == "run.json" and len(report.ends) > 2
            _compare(folder, unbroken, report, whole_log=not kind.fails_saves and not new_log)
    return report


def _await_end(start: Start, report: Report, hurt: bool) -> str:
    """Wait for a start's end, and check its output and its code; returns the line that says why it ended."""
    problem = start.wait()
    code = start.process.returncode
    endings, others = read_output(start.lines["err"], start.setup.launcher)
    if problem:
        report.problems.append(problem)
    if others:
        report.problems.append("standard error holds more than lines for the user:\n" + "\n".join(others))
    if any("Traceback" in line for line in start.lines["out"]):
        report.problems.append("a traceback on standard output:\n" + "".join(start.lines["out"][-30:]))
    if len(endings) > start.setup.attempts:
        report.problems.append("more than one line says why it ended:\n" + "\n".join(endings))
    if not hurt and code not in (0, 2) and "torch.distributed.run" not in start.setup.launcher:
        report.problems.append(f"started again, it ended with code {code}:\n{''.join(start.lines['err'][-20:])}")
    if not hurt and code and not endings:
        report.problems.append(f"started again, it ended with code {code} and did not say why")
    warnings = [line.strip() for line in start.lines["err"] if WARNING.match(line)]
    report.ends.append(f"code {code}" + "".join(f" | {line.strip()[:230]}" for line in warnings + endings))
    return endings[0] if endings else ""


def read_output(lines: list[str], launcher: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """Sort standard error: lines that say why the run ended, and lines that should not be there.

    torchrun's own report about its processes is left out; nobody but torch can change it.
    """
    text = "".join(lines)
    if "torch.distributed.run" in launcher:
        text = re.sub(r"^[WEI]\d{4} .*torch/distributed/.*\n", "", text, flags=re.MULTILINE)
        text = re.sub(
            r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*?.*torch/distributed/(?:.*\n)*",
            "",
            text,
            flags=re.MULTILINE,
        )
    endings, others = [], []
    for line in text.splitlines():
        if ENDING.match(line):
            endings.append(line)
        elif line.strip() and not WARNING.match(line):
            others.append(line)
    return endings, others


def _obey(refusal: str, file: Path, whole: bytes) -> None:
    """Do what the line says about a damaged file; where it says nothing, bring back the undamaged one."""
    if DELETE.search(refusal) or MOVE.search(refusal):
        file.unlink()
    else:
        file.write_bytes(whole)


def _compare(folder: Path, unbroken: Finished, report: Report, whole_log: bool) -> None:
    """Weights, optimizer and losses are those of the unbroken run, bit for bit; so are the files."""
    files = _files(folder)
    if files != unbroken.files:
        differ = sorted(name for name in files | unbroken.files if files[name] != unbroken.files[name])
        report.problems.append(f"other files than the unbroken run's: {', '.join(differ)}")
        return
    finished = read_finished(folder)
    for name in ("state", "exported"):
        ours, theirs = getattr(finished, name), getattr(unbroken, name)
        different = [key for key in theirs if key not in ours or not torch.equal(ours[key], theirs[key])]
        if different:
            report.problems.append(f"{name}: {len(different)} of {len(theirs)} tensors differ, first {different[0]}")
    wrong = [key for key, value in finished.rows.items() if unbroken.rows.get(key) != value]
    if whole_log:
        wrong += [key for key in unbroken.rows if key not in finished.rows and key[1] != "metric/val_loss"]
    if wrong:
        report.problems.append(f"the log differs at {len(wrong)} places, first step {wrong[0][0]}, {wrong[0][1]}")


def _files(folder: Path) -> Counter[str]:
    """How many files of each name there are, but for the data's.

    Numbers do not count: a signal saves between two checkpoints, and a run that ended before its first one begins a new log,
    which is one more.
    """
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = (str(path) for path in paths if path.parts[0] != "data" or path.suffix == ".tmp")
    counts = Counter(re.sub(r"(version_|iter-)\d+", r"\1N", name) for name in names)
    return Counter({name: 1 if "version_N" in name else count for name, count in counts.items()})
