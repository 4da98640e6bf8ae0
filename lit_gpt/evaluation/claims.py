"""The commands of the paper's claims, and how their output is read.

Decisions: settings are the published README's and eval_mdm.sh's; a checkpoint that is named counts before one of the folder
of models, and that before the hub.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_gpt.checkpoints.export import SUFFIX, read_record
from lit_gpt.cli import warn
from lit_gpt.evaluation.settings import ReproduceFlags
from lit_gpt.files import parse_json
from lit_gpt.pipeline import ROOT

HUB_REPOSITORY = "nieshen/SMDM"
_CRAWLS = ("CC-MAIN-2024-10", "CC-MAIN-2024-18")
# From the published README: which released model each claim is about.
_GSM8K = "mdm-1028M-3300e18-rsl-gsm8k"
_REVERSE = "mdm-1028M-1600e18-reverse"
_ZERO_SHOT = "mdm-1028M-3300e18-rsl-0.01-bs-1024"
_DIALOGUE = {"arm": "ar-1028M-100e18-sharegpt", "mdm": "mdm-1028M-1600e18-sharegpt"}
_FINEWEB = {"arm": "ar-170M-6e18", "mdm": "mdm-170M-100e18"}
# From so many rows up their mean is taken as normally distributed, the usual rule.
_FEWEST_ROWS = 30
_PRETRAINED = re.compile(r"(ar|mdm)-(\d+)M-([\d.]+)e18")


@dataclass(frozen=True)
class Measured:
    """A number of ours."""

    name: str
    """As in the file of published numbers."""
    value: float | None = None
    questions: int | None = None
    """Behind a share; None for what is no share."""
    standard_error: float | None = None
    """Of what is no share; None where it is not known."""


@dataclass(frozen=True)
class Evaluation:
    """A script with its arguments, and what its output says."""

    command: list[str]
    read: Callable[[list[str], float], list[Measured]]
    """Lines that it printed and the seconds that it took, to numbers."""


@dataclass(frozen=True)
class Claim:
    """What tests a claim."""

    evaluations: list[Evaluation]
    checkpoints: list[str]
    combine: Callable[[list[Measured]], list[Measured]] = lambda measured: []
    """Numbers that follow from those of all evaluations."""
    remarks: list[str] = field(default_factory=list)
    """Lines for the reader."""


def zero_shot(flags: ReproduceFlags) -> Claim:
    """The seven settings of eval_mdm.sh."""
    (path,) = _checkpoints(flags, [_ZERO_SHOT])
    script = (ROOT / "eval_mdm.sh").read_text()
    settings = dict(re.findall(r'^evaluate (\S+) "(.*)" "\$@"$', script, re.MULTILINE))
    by_task = {task: how for tasks, how in settings.items() for task in tasks.split(",")}
    asked = dict(word.partition("=")[::2] for word in flags.tasks) or dict.fromkeys(by_task, "")
    if unknown := [word for word, like in asked.items() if (like or word) not in by_task]:
        raise ValueError(f"--tasks {' '.join(unknown)}: choose from {', '.join(by_task)}, or give MINE=PUBLISHED")
    evaluations = []
    for task, like in asked.items():
        output = Path(flags.out) / "zero_shot" / task
        words = ["evaluate_diff.py", "--tasks", task, "--include_path", str(ROOT / "tasks"), "--model", "mdlm"]
        words += ["--batch_size", "16", "--device", flags.device, "--output_path", str(output)]
        words += [*_limit("limit", flags), "--model_args", f"ckpt_path='{path}',{by_task[like or task]}"]
        evaluations.append(Evaluation(words, lambda lines, _, task=task, output=output: _harness_results(output, task)))  # type: ignore[misc]
    return Claim(evaluations, [path])


def gsm8k(flags: ReproduceFlags) -> Claim:
    """The published grader's accuracy."""
    (path,) = _checkpoints(flags, [_GSM8K])
    answers = Path(flags.out) / "gsm8k" / f"{Path(path).stem}.jsonl"
    words = ["evaluate_gsm8k.py", "--ckpt_path", path, "--grader", "published", "--output", str(answers)]

    def read(lines: list[str], elapsed_s: float) -> list[Measured]:
        (line,) = (line for line in lines if line.startswith("Acc: "))
        count = next(int(found[1]) for line in lines if (found := re.match(r"grader published: \d+ of (\d+) ", line)))
        return [Measured("accuracy", float(line.split()[1]), count)]

    return Claim([Evaluation([*words, "--device", flags.device, *_limit("limit", flags)], read)], [path])


def reverse(flags: ReproduceFlags) -> Claim:
    """Both kinds of questions in both directions."""
    (path,) = _checkpoints(flags, [_REVERSE])
    evaluations = []
    for kind in ("ntd", "dtn"):
        answers = Path(flags.out) / "reverse" / f"{Path(path).stem}-{kind}.jsonl"
        words = ["evaluate_reverse.py", "--qs_type", kind, "--ckpt-path", path, "--output", str(answers)]
        words += ["--device", flags.device, *_limit("limit", flags)]
        words += ["--data_dir", flags.reverse_data] if flags.reverse_data else []
        evaluations.append(Evaluation(words, lambda lines, _, kind=kind: _reversal_results(lines, kind)))  # type: ignore[misc]
    return Claim(evaluations, [path])


def mt_bench(flags: ReproduceFlags) -> Claim:
    """The answers; judging them is paid for at another service."""
    dialogue = _dialogue(flags)
    judge = "--judge-model gpt-4o-2024-05-13"
    remarks = [
        f"not judged: copy {Path(flags.out) / 'mt_bench'}/*.jsonl to data/mt_bench/model_answer, then, with "
        f"OPENAI_API_KEY, python eval/gen_judgment.py --parallel 10 {judge} and python eval/show_result.py {judge}"
    ]
    return Claim(dialogue.evaluations, dialogue.checkpoints, remarks=remarks)


def speed(flags: ReproduceFlags) -> Claim:
    """How long an ARM with its cache and an MDM write at the same questions, on this machine."""
    dialogue = _dialogue(flags, "speed")

    def combine(measured: list[Measured]) -> list[Measured]:
        seconds = {one.name: one.value for one in measured}
        arm, mdm = seconds.get("arm seconds"), seconds.get("mdm seconds")
        return [Measured("arm time over mdm time", arm / mdm if arm and mdm else None)]

    remarks = [
        "the ratio depends on the machine, the batch and the steps (128 here); answers that were there already take no "
        "time: give a fresh --out"
    ]
    return Claim(dialogue.evaluations, dialogue.checkpoints, combine, remarks)


def fineweb(flags: ReproduceFlags) -> Claim:
    """Perplexity on newer text, of an ARM and an MDM of about equal loss on the old one."""
    paths = _by_kind(flags, _FINEWEB)
    folder = Path(flags.data or "data/fineweb")
    crawls = [folder.name] if flags.data and any(folder.glob("validation*.bin")) else _CRAWLS
    folder = folder.parent if crawls == [folder.name] else folder
    evaluations = [
        _perplexity(flags, kind, path, folder, crawl, f"{kind} {crawl} perplexity")
        for kind, path in paths.items()
        for crawl in crawls
    ]
    return Claim(evaluations, list(paths.values()))


def scaling(flags: ReproduceFlags) -> Claim:
    """The compute at which an MDM has an ARM's loss, from a power law of each kind's losses."""
    paths = flags.checkpoint or [str(path) for path in sorted(Path(flags.models).glob(f"*{SUFFIX}"))]
    budgets = {path: match for path in paths if (match := _PRETRAINED.fullmatch(Path(path).name.removesuffix(SUFFIX)))}
    if left := [path for path in flags.checkpoint if path not in budgets]:
        raise ValueError(
            f"scaling: {', '.join(left)}: expected names such as mdm-170M-10e18{SUFFIX}, which say the compute"
        )
    if not budgets:
        raise ValueError(f"scaling: no pretrained checkpoints in {flags.models}: put some there, or give --checkpoint")
    if flags.data is None:
        raise ValueError("scaling: --data is missing: the folder of packed validation text (validation*.bin)")
    data = Path(flags.data)
    kinds = {path: "arm" if match[1] == "ar" else "mdm" for path, match in budgets.items()}
    evaluations = [
        _perplexity(flags, kinds[path], path, data.parent, data.name, f"{Path(path).stem} perplexity")
        for path in budgets
    ]

    def combine(measured: list[Measured]) -> list[Measured]:
        points: dict[str, list[tuple[float, float]]] = {"arm": [], "mdm": []}
        for (path, match), one in zip(budgets.items(), measured, strict=True):
            points[kinds[path]].append((float(match[3]), math.log(one.value or math.nan)))
        return [Measured("mdm compute over arm compute", compute_gap(points["arm"], points["mdm"]))]

    return Claim(evaluations, list(budgets), combine)


CLAIMS: dict[str, Callable[[ReproduceFlags], Claim]] = {
    claim.__name__: claim for claim in (zero_shot, gsm8k, reverse, mt_bench, fineweb, speed, scaling)
}


def compute_gap(arm: Sequence[tuple[float, float]], mdm: Sequence[tuple[float, float]]) -> float | None:
    """C_mdm / C_arm at equal loss, in the middle of the ARMs' budgets, from loss = a C^b of each kind, by least squares.

    Args:
        arm: (compute, loss in nats) of each ARM.
        mdm: of each MDM.

    Returns:
        None where a kind has fewer than two budgets, or its loss does not fall.

    Raises:
        ValueError: a loss is 0 or below, or no number; it has no power law.
    """
    for _, loss in (*arm, *mdm):
        if not 0 < loss < math.inf:
            raise ValueError(f"scaling: a loss of {loss:g} nats: expected a finite number above 0")
    fits = []
    for points in (arm, mdm):
        x, y = [math.log(compute) for compute, _ in points], [math.log(loss) for _, loss in points]
        if len(set(x)) < 2:
            warn("scaling: at least two budgets of each kind are needed for a compute gap")
            return None
        middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
        slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum(
            (a - middle_x) ** 2 for a in x
        )
        fits.append((slope, middle_x, middle_y))
    (arm_slope, arm_x, arm_y), (slope, mdm_x, mdm_y) = fits
    return math.exp(mdm_x + (arm_y - mdm_y) / slope - arm_x) if arm_slope < 0 and slope < 0 else None


# --- checkpoints ------------------------------------------------------------------------------------------------------


def find_released(name: str, folder: Path) -> str:
    """A released checkpoint by its name: from the folder, else from the hub.

    Raises:
        FileNotFoundError: it is in neither, or the hub cannot be reached.
    """
    local = folder / f"{name}{SUFFIX}"
    if local.is_file():
        return str(local)
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        (path,) = (path for path in list_repo_files(HUB_REPOSITORY) if Path(path).name == local.name)
        return str(hf_hub_download(HUB_REPOSITORY, path))
    # The hub's client has a dozen errors of its own for no network, no such file and offline mode.
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise FileNotFoundError(
            f"{name}{SUFFIX} is not in {folder}, and not to be had from the hub's {HUB_REPOSITORY} ({reason}): put it there, "
            "or name another checkpoint by --checkpoint"
        ) from None


def _checkpoints(flags: ReproduceFlags, names: Sequence[str]) -> list[str]:
    """The checkpoints that are named, or the released ones."""
    if flags.checkpoint and len(flags.checkpoint) != len(names):
        raise ValueError(f"--checkpoint: {len(flags.checkpoint)} were given, this claim is about {len(names)}")
    return flags.checkpoint or [find_released(name, Path(flags.models)) for name in names]


def _by_kind(flags: ReproduceFlags, names: dict[str, str]) -> dict[str, str]:
    """An ARM and an MDM; of those that are named, perhaps one alone."""
    if not flags.checkpoint:
        return dict(zip(names, _checkpoints(flags, list(names.values())), strict=True))
    found = {_kind(path): path for path in flags.checkpoint}
    if len(found) < len(flags.checkpoint):
        raise ValueError("--checkpoint: this claim is about one ARM and one MDM")
    return found


def _kind(path: str) -> str:
    """`arm` or `mdm`: what the checkpoint says, else its name."""
    record = read_record(path) if Path(path).is_file() and path.endswith(SUFFIX) else None
    if record is not None:
        return record.kind
    name = Path(path).name
    if not name.startswith(("ar-", "arm-", "mdm-")):
        raise ValueError(f"{path} does not say whether it is an ARM or an MDM: name it ar-... or mdm-...")
    return "mdm" if name.startswith("mdm-") else "arm"


# --- evaluations that claims share ------------------------------------------------------------------------------------


def _dialogue(flags: ReproduceFlags, folder: str = "mt_bench") -> Claim:
    """MT-bench's questions, answered by an ARM and by an MDM with the published settings."""
    paths = _by_kind(flags, _DIALOGUE)
    evaluations = []
    for kind, path in paths.items():
        answers = Path(flags.out) / folder / f"{kind}.jsonl"
        words = ["eval/gen_model_answer.py", "--model-id", "1028", "--model-type", kind, "--model-path", path]
        words += ["--steps", "128", "--cfg-scale", "0.6"] if kind == "mdm" else []
        words += ["--answer-file", str(answers), "--device", flags.device, *_limit("question-end", flags)]
        evaluations.append(Evaluation(words, lambda lines, _, kind=kind: _seconds(lines, kind)))  # type: ignore[misc]
    return Claim(evaluations, list(paths.values()))


def _perplexity(flags: ReproduceFlags, kind: str, path: str, folder: Path, crawl: str, name: str) -> Evaluation:
    words = ["evaluate_fineweb.py", "--type", kind, "--ckpt-path", path, "--data-dir", str(folder), "--fineweb", crawl]
    words += ["--mc-samples", "128", "--cache", str(Path(flags.out) / "cache"), "--device", flags.device]

    def read(lines: list[str], elapsed_s: float) -> list[Measured]:
        value = float(next(line for line in reversed(lines) if ", ppl=" in line).rpartition("=")[2])
        text = "\n".join(lines)
        spread, rows = (
            re.search(r"the rows' standard deviation ([\d.e-]+)", text),
            re.search(r", (\d+) rows$", text, re.M),
        )
        if not spread or not rows or int(rows[1]) < _FEWEST_ROWS:
            return [Measured(name, value)]
        # The rows as a sample of the text: it holds the estimator's error, too. d exp(loss) = ppl d loss
        return [Measured(name, value, standard_error=value * float(spread[1]) / math.sqrt(int(rows[1])))]

    return Evaluation([*words, *_limit("rows", flags)], read)


def _limit(flag: str, flags: ReproduceFlags) -> list[str]:
    return [] if flags.limit is None else [f"--{flag}", str(flags.limit)]


def _harness_results(output: Path, task: str) -> list[Measured]:
    """Accuracies of the harness's newest results file."""
    newest = max(output.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    record = parse_json(newest.read_bytes(), finite=False)  # the harness writes NaN where it has no number
    count = record["n-samples"][task]["effective"]
    return [
        Measured(f"{task} {metric}", value, count)
        for metric in ("acc", "acc_norm")
        if isinstance(value := record["results"][task].get(f"{metric},none"), float)
    ]


def _reversal_results(lines: list[str], kind: str) -> list[Measured]:
    line = next(line for line in reversed(lines) if line.startswith("qs_type: "))
    values = {name: float(value) for name, value in re.findall(r"(\w+): ([\d.e-]+)", line)}
    counts = {
        direction: int(found[1])
        for direction in ("same direction", "reverse")
        for text in lines
        if (found := re.match(rf"{direction}: \d+ of (\d+) right", text))
    }
    measured = [
        Measured(f"{kind} same", values["accs"], counts["same direction"]),
        Measured(f"{kind} reverse", values["accs_reverse"], counts["reverse"]),
    ]
    if "blue" in values:
        measured += [
            Measured(f"{kind} same BLEU", values["blue"]),
            Measured(f"{kind} reverse BLEU", values["blues_reverse"]),
        ]
    return measured


def _seconds(lines: list[str], kind: str) -> list[Measured]:
    line = next(line for line in reversed(lines) if "inference time: " in line)
    return [Measured(f"{kind} seconds", float(line.split()[-2]))]
