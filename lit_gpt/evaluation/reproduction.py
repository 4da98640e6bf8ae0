"""The paper's claims, each as the commands that test it, and our numbers beside the published ones.

Decisions: what runs are the published scripts with their published settings, as processes of their own, so that a claim is
tested by what users type; the published numbers are data (`data/published_results.json`), and what is not known there is
said to be so. A share's tolerance is the 95 % interval of that share on as many questions as were asked here: it counts
the questions as a sample, so that two runs on the same questions should differ less. A perplexity's is that of its rows
as a sample; to either comes half a unit of the published last digit.
"""

from __future__ import annotations

import datetime
import math
import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from lit_gpt.evaluation.claims import CLAIMS, Evaluation, Measured
from lit_gpt.evaluation.generated_answers import wilson_interval
from lit_gpt.evaluation.progress import read_told
from lit_gpt.evaluation.settings import ReproduceFlags
from lit_gpt.evaluation.versions import commit, versions
from lit_gpt.evaluation.work import Work, total_work
from lit_gpt.files import file_sha256, make_folder, read_json_object, write_file, write_json
from lit_gpt.pipeline import ROOT, run_script

PUBLISHED = ROOT / "data" / "published_results.json"
_NORMAL_QUANTILE = 1.959963984540054
# From so many up the widest 95 % interval, of a share of a half, is within 10 points: 1.96^2 / (4 * 0.1^2) = 96.04.
_FEWEST_QUESTIONS = 97
# Below so many right or wrong answers the normal interval is too narrow (at 0 and 1 it has no width), the usual rule.
_FEWEST_EXPECTED = 5
_REPORTED_VERSIONS = ("smdm", "torch", "lm_eval", "numpy", "sentencepiece", "tokenizers")


@dataclass(frozen=True)
class Comparison:
    """A number of ours beside the published one."""

    name: str
    ours: float | None
    published: float | None
    tolerance: float | None
    """What sampling error allows between them; None where it is not known."""
    verdict: str
    source: str | None
    """Of the published number."""


@dataclass
class _Done:
    """What the evaluations of a claim gave."""

    measured: list[Measured] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    found: int = 0
    """Requests whose results an earlier run had left."""
    elapsed_s: float = 0.0


def reproduce(claim: str, flags: ReproduceFlags) -> list[Comparison]:
    """Test a claim, print ours beside the published numbers, and write `{out}/{claim}.json` and `.md`.

    Returns:
        The comparisons; none in a dry run, which writes nothing.

    Raises:
        ValueError, OSError: anything a user can get wrong, among it what the evaluations say.
    """
    if claim not in CLAIMS:
        raise ValueError(f"{claim!r} is no claim: choose from {', '.join(CLAIMS)}")
    published = read_json_object(PUBLISHED)["claims"][claim]
    print(f"{claim}: {published['statement']} ({published['source']})", flush=True)
    described = CLAIMS[claim](flags)
    done = _Done()
    for evaluation in described.evaluations:
        _run(evaluation, flags, done)
    if flags.dry_run:
        return []
    done.measured += described.combine(done.measured)
    compared = [compare(one, published["results"]) for one in done.measured]
    compared += [
        compare(Measured(name), published["results"]) for name in published["results"] if name not in _names(compared)
    ]
    for line in [*table(compared), *described.remarks]:
        print(line)
    _write(claim, flags, published, compared, {"done": done, "checkpoints": described.checkpoints})
    return compared


def compare(measured: Measured, published: dict[str, Any]) -> Comparison:
    """A number of ours beside the published one of the same name, if that is known."""
    known = published.get(measured.name) or {}
    value, ours = known.get("value"), measured.value
    made = Comparison(measured.name, ours, value, None, "", known.get("source"))
    if ours is None:
        return replace(made, verdict="not measured here")
    if value is None:
        return replace(made, verdict="the published number is not known here")
    # Half a unit of the last digit that is published.
    rounding = 10.0 ** int(Decimal(str(value)).as_tuple().exponent) / 2
    if measured.questions:
        # Shares are published in percent; a 1.0 in the file does not say to how many digits.
        tolerance = math.hypot(_share_tolerance(value, measured.questions), min(rounding, 0.005))
    elif measured.standard_error is not None:
        tolerance = math.hypot(_NORMAL_QUANTILE * measured.standard_error, rounding)
    else:
        return replace(made, verdict="no sampling error is known")
    agrees = abs(ours - value) <= tolerance
    verdict = f"{'agrees within' if agrees else 'differs by more than'} sampling error"
    if agrees and measured.questions and measured.questions < _FEWEST_QUESTIONS:
        verdict += "; too few questions to tell"
    return replace(made, tolerance=tolerance, verdict=verdict)


def _share_tolerance(share: float, questions: int) -> float:
    """How far another share of so many questions may be off, with a chance of 95 %."""
    normal = _NORMAL_QUANTILE * math.sqrt(share * (1 - share) / questions)
    if questions * min(share, 1 - share) >= _FEWEST_EXPECTED:
        return normal
    low, high = wilson_interval(share * questions, questions)
    return max(normal, share - low, high - share)


def table(compared: Sequence[Comparison]) -> list[str]:
    """The comparisons as lines of text."""
    rows = [("result", "ours", "published", "tolerance", "verdict")]
    rows += [
        (one.name, _number(one.ours), _number(one.published), _number(one.tolerance), one.verdict) for one in compared
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows]


def _run(evaluation: Evaluation, flags: ReproduceFlags, done: _Done) -> None:
    """Run one evaluation's script and read what it found."""
    command = [*evaluation.command, *(["--dry_run"] if flags.dry_run else [])]
    launcher = [] if flags.processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(flags.processes)]
    done.commands.append(shlex.join(["python", *launcher, *command]))
    print(f"$ {done.commands[-1]}", flush=True)
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        # Progress bars are for terminals.
        if line.strip() and "%|" not in line:
            print(f"  {line}", flush=True)

    script, *arguments = command
    started = time.monotonic()
    run_script([*launcher, str(ROOT / script), *arguments], on_line)
    elapsed_s = time.monotonic() - started
    done.elapsed_s += elapsed_s
    for told in filter(None, map(read_told, lines)):
        done.work.append(told[0])
        done.found += told[1]
    if not flags.dry_run:
        done.measured += evaluation.read(lines, elapsed_s)


def _write(
    claim: str, flags: ReproduceFlags, published: dict[str, Any], compared: Sequence[Comparison], made: dict[str, Any]
) -> None:
    """One JSON and one Markdown row."""
    done: _Done = made["done"]
    cost = {**asdict(total_work(done.work)), "found": done.found, "seconds": round(done.elapsed_s, 1)}
    hashes = {path: file_sha256(path) for path in made["checkpoints"] if Path(path).is_file()}
    record = {
        "claim": claim,
        "statement": published["statement"],
        "source": published["source"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "limit": flags.limit,
        "results": [asdict(one) for one in compared],
        "commands": done.commands,
        "checkpoints": [{"path": path, "sha256": hashes.get(path)} for path in made["checkpoints"]],
        "commit": commit(),
        "versions": {"python": platform.python_version(), **versions(_REPORTED_VERSIONS)},
        "cost": cost,
    }
    folder = Path(flags.out)
    make_folder(folder)
    write_json(folder / f"{claim}.json", record)
    results = "; ".join(f"{one.name} {_number(one.ours)} (published {_number(one.published)})" for one in compared)
    names = ", ".join(f"{Path(path).name} {(hashes.get(path) or 'no hash')[:12]}" for path in made["checkpoints"])
    part = "all" if flags.limit is None else f"first {flags.limit}"
    cells = (
        claim,
        results,
        part,
        names,
        f"{cost['flops']:.3g} FLOPs, {cost['seconds']:.0f} s",
        str(record["commit"])[:12],
        f"torch {record['versions'].get('torch')}",  # type: ignore[attr-defined]
    )
    row = f"| {' | '.join(cells)} |\n"
    write_file(folder / f"{claim}.md", lambda file: file.write(row.encode()))
    print(f"written: {folder / claim}.json and .md")


def _names(compared: Sequence[Comparison]) -> set[str]:
    return {one.name for one in compared}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
