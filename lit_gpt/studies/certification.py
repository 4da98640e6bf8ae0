"""The certification: every objective, estimator and sampler on distributions that are enumerated, as one table."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoints.loaded import load_model
from lit_gpt.evaluation.versions import commit, versions
from lit_gpt.files import write_file, write_json
from lit_gpt.studies.certification_estimators import check_estimators
from lit_gpt.studies.certification_findings import FALSE_ALARMS, Finding, level_of
from lit_gpt.studies.certification_functions import (
    LAWS,
    check_likelihood,
    check_loss,
    check_perplexity,
    check_sampler_function,
)
from lit_gpt.studies.certification_mistakes import known_mistakes
from lit_gpt.studies.certification_models import (
    CheckedModel,
    check_model,
    check_own_models,
    check_shift,
    check_trained,
    network_model,
)
from lit_gpt.studies.certification_objectives import check_objectives
from lit_gpt.studies.certification_samplers import check_rare_words, check_samplers, sampled_tokens
from lit_gpt.studies.certification_toys import toy_distributions


def package_checks(thorough: bool) -> list[Callable[[], Iterator[Finding]]]:
    """The checks of everything that this package has registered.

    Args:
        thorough: also what takes minutes.
    """
    toys = toy_distributions()

    def rare_words() -> Iterator[Finding]:
        """Random numbers of few bits: half precision, and float32 with more words."""
        for width, exponent in ((8192, 17), (32768, 26))[: 1 + thorough]:
            yield check_rare_words(sampled_tokens, ("sampler", "all"), width, exponent)

    return [lambda: check_objectives(toys), lambda: check_estimators(toys), lambda: check_samplers(toys), rare_words,
            check_own_models]  # fmt: skip


def certify(checks: Iterable[Callable[[], Iterator[Finding]]]) -> tuple[list[Finding], float]:
    """Run some checks, telling how far they are.

    Returns:
        The findings, and the seconds that they took.
    """
    findings: list[Finding] = []
    started = time.perf_counter()
    for check in checks:
        for finding in check():
            if findings and (finding.part, finding.name) != (findings[-1].part, findings[-1].name):
                _tell(findings, started)
            findings.append(finding)
    _tell(findings, started)
    return findings, time.perf_counter() - started


def _tell(findings: Sequence[Finding], started: float) -> None:
    last = findings[-1]
    done = sum((one.part, one.name) == (last.part, last.name) for one in findings)
    print(f"{time.perf_counter() - started:5.0f} s  {last.part} {last.name}: {done} checks", flush=True)


def failures(findings: Sequence[Finding]) -> list[Finding]:
    """Those that fail."""
    level = level_of(findings)
    return [finding for finding in findings if finding.verdict(level) == "FAIL"]


def run_verdict(findings: Sequence[Finding], seconds: float) -> str:
    """The last line."""
    failed, level = len(failures(findings)), level_of(findings)
    chances = sum(finding.p_value is not None for finding in findings)
    found = f"{failed} of {len(findings)} checks FAIL" if failed else f"all {len(findings)} checks pass"
    alarms = f"{chances} of chance, each fails at p < {level:.1e}: a false alarm in {FALSE_ALARMS:g} of runs"
    return f"{found} ({alarms if chances else 'none is of chance'}; {seconds:.0f} s)"


def findings_table(findings: Sequence[Finding]) -> list[str]:
    """Markdown: one row for each check of each thing, over all distributions: the worst one's numbers."""
    level = level_of(findings)
    rows: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        rows.setdefault((finding.part, finding.name, finding.check), []).append(finding)
    lines = [
        "| part | name | what must hold | result | on | the worst of them |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (part, name, check), found in rows.items():
        worst = min(found, key=lambda one: _badness(one, level))
        chance = "" if worst.p_value is None else f", p {min(1.0, worst.p_value):.2g}"
        where = f"{len(found)} toys" if len(found) > 1 else worst.where
        evidence = f"{worst.evidence}{chance}".replace("|", "/")
        lines.append(f"| {part} | {name} | {check} | {worst.verdict(level)} | {where} | {evidence} |")
    return lines


def _badness(finding: Finding, level: float) -> tuple[int, float]:
    """Sorts the worst first."""
    return ["FAIL", "no", "pass"].index(finding.verdict(level)), 1.0 if finding.p_value is None else finding.p_value


def write_findings(path: Path, findings: Sequence[Finding], seconds: float) -> None:
    """All findings as JSON, with what they were made with."""
    level = level_of(findings)
    write_json(path, {
        "findings": [dataclasses.asdict(one) | {"verdict": one.verdict(level)} for one in findings],
        "level": level,
        "false_alarms": FALSE_ALARMS,
        "seconds": seconds,
        "commit": commit(),
        "machine": platform.platform(),
        "versions": versions(("torch", "numpy")),
    })  # fmt: skip


# --- the command ------------------------------------------------------------------------------------------------------


def certify_by_flags(flags: Any) -> None:
    """What `scripts/certify.py` does.

    Raises:
        ValueError: a wrong flag; or a check fails, which is said in one line.
    """
    _check_flags(flags)
    # The tensors are small: more threads wait for each other.
    torch.set_num_threads(1)
    if flags.mistakes:
        return _find_mistakes(flags)
    named = [name for name in FUNCTIONS if getattr(flags, name)]
    checks = [partial(FUNCTIONS[name], flags) for name in named] or package_checks(flags.thorough)
    findings, seconds = certify(checks)
    _report(flags, findings_table(findings), findings, seconds)
    if failed := failures(findings):
        names = ", ".join(sorted({f"{one.part} {one.name}" for one in failed}))
        raise ValueError(f"{run_verdict(findings, seconds)}: {names}")
    print(run_verdict(findings, seconds))


def _check_flags(flags: Any) -> None:
    problems = []
    if flags.sampler_law not in LAWS:
        problems.append(f"--sampler_law {flags.sampler_law}: choose from {', '.join(LAWS)}")
    if flags.distribution not in ("", *_DISTRIBUTIONS):
        problems.append(f"--distribution {flags.distribution}: choose from {', '.join(_DISTRIBUTIONS)}")
    for name in ("text", "distribution", "mask_id", "vocab_size"):
        if getattr(flags, name) not in ("", None) and not flags.model:
            problems.append(f"--{name} goes with --model")
    if flags.mistakes and any(getattr(flags, name) for name in FUNCTIONS):
        problems.append("--mistakes goes without a model or function")
    if problems:
        raise ValueError("; ".join(problems))


def _find_mistakes(flags: Any) -> None:
    """Run the known mistakes; a table of which check finds each."""
    lines = ["| mistake | found by | what was seen |", "| --- | --- | --- |"]
    missed, everything, started = [], [], time.perf_counter()
    for mistake in known_mistakes():
        if mistake.slow and not flags.thorough:
            continue
        findings = list(mistake.checks())
        everything += findings
        # As strict as in a run of everything.
        level = FALSE_ALARMS / _CHECKS_OF_CHANCE
        caught = [one for one in findings if one.verdict(level) == "FAIL"]
        missed += [] if caught else [mistake.name]
        found = "; ".join(dict.fromkeys(one.check for one in caught)) or "NOT FOUND"
        seen = caught[0].evidence.replace("|", "/") if caught else ""
        lines.append(f"| {mistake.name} | {found} | {seen} |")
        print(f"{time.perf_counter() - started:5.0f} s  {mistake.name}: {found}", flush=True)
    _report(flags, lines, everything, time.perf_counter() - started)
    if missed:
        raise ValueError(f"{len(missed)} of {len(lines) - 2} mistakes were not found: {', '.join(missed)}")
    print(f"all {len(lines) - 2} mistakes are found ({time.perf_counter() - started:.0f} s)")


def _report(flags: Any, lines: list[str], findings: Sequence[Finding], seconds: float) -> None:
    """The table on the console, in a page, and the findings as JSON."""
    print("\n".join(lines))
    if flags.output:
        write_findings(Path(flags.output), findings, seconds)
    if flags.page:
        path, kind = Path(flags.page), "mistakes" if flags.mistakes else "certify"
        text, mark = path.read_text(encoding="utf-8"), f"<!-- {kind} -->"
        if text.count(mark) != 2:
            raise ValueError(f"--page {path}: expected two lines {mark}, between which the table goes")
        before, _, after = text.split(mark)
        made = f"{len(findings)} findings in {seconds:.0f} s, commit {(commit() or 'unknown')[:10]}, torch {torch.__version__}."
        whole = f"{before}{mark}\n\n{made}\n\n" + "\n".join(lines) + f"\n\n{mark}{after}"
        write_file(path, lambda file: file.write(whole.encode()))


# --- what users name --------------------------------------------------------------------------------------------------

_DISTRIBUTIONS = {"dependent": 0, "rule": 1, "copy": 2}
# Of a run of everything: what mistakes must be worse than.
_CHECKS_OF_CHANCE = 100
# Of a text that a checkpoint is asked about.
_TEXT_TOKENS = 64


def load_function(name: str, flag: str) -> Callable[..., Any]:
    """A function by `file.py:name` or `package.module:name`.

    Raises:
        ValueError: no such file, module or function; its own error while it is imported.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise ValueError(f"--{flag} {name}: expected file.py:function or package.module:function")
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"--{flag} {name}: no such file")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found = getattr(module, function)
    # Whatever a user's file raises.
    except (Exception, SystemExit) as error:
        raise ValueError(f"--{flag} {name}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not callable(found):
        raise ValueError(f"--{flag} {name}: not a function")
    return found  # type: ignore[no-any-return]


def _model_checks(flags: Any) -> Iterator[Finding]:
    """A checkpoint or a function."""
    if ":" in flags.model and not Path(flags.model).exists():
        if flags.mask_id is None:
            raise ValueError("--mask_id is missing: the id of [MASK] for --model as a function")
        function = load_function(flags.model, "model")
        model = CheckedModel(flags.model, function, flags.mask_id, flags.vocab_size or flags.mask_id)
        try:
            text = [int(word) for word in flags.text.split()]
        except ValueError:
            raise ValueError(f"--text {flags.text[:40]}: expected token ids, such as '5 6 7'") from None
    else:
        loaded = load_model(flags.model)
        model, text = network_model(loaded.model, Path(flags.model).name), []
        if flags.text:
            text = loaded.tokenizer.encode_ids(flags.text)[: min(_TEXT_TOKENS, loaded.model.config.block_size)]
    yield from check_model(model)
    if text and not model.is_causal:
        yield from check_shift(model, text)
    if flags.distribution:
        yield from check_trained(model, toy_distributions()[_DISTRIBUTIONS[flags.distribution]])


def _loss_checks(flags: Any) -> Iterator[Finding]:
    return check_loss(load_function(flags.loss, "loss"), flags.loss, toy_distributions())


def _likelihood_checks(flags: Any) -> Iterator[Finding]:
    return check_likelihood(load_function(flags.likelihood, "likelihood"), flags.likelihood, toy_distributions())


def _perplexity_checks(flags: Any) -> Iterator[Finding]:
    return check_perplexity(load_function(flags.perplexity, "perplexity"), flags.perplexity, toy_distributions())


def _sampler_checks(flags: Any) -> Iterator[Finding]:
    function = load_function(flags.sampler, "sampler")
    return check_sampler_function(function, flags.sampler, toy_distributions(), flags.sampler_law, flags.thorough)


FUNCTIONS: dict[str, Callable[[Any], Iterator[Finding]]] = {
    "model": _model_checks,
    "loss": _loss_checks,
    "likelihood": _likelihood_checks,
    "perplexity": _perplexity_checks,
    "sampler": _sampler_checks,
}
"""What a user may have certified, by the flags that name it."""
