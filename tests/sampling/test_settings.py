"""The settings of sampling: what each field says of itself, which flags, the page and the checks all read."""

from __future__ import annotations

import dataclasses

import pytest

from lit_gpt.cli import parse
from lit_gpt.sampling.settings import Sampling

FIELDS = dataclasses.fields(Sampling)


def test_every_setting_says_what_it_is():
    assert all(len(field.metadata["help"]) > 20 and field.type in ("bool", "int", "float", "str") for field in FIELDS)
    kinds = {field.name: field.metadata["kind"] for field in FIELDS}
    assert (kinds["steps"], kinds["use_cache"], kinds["seed"]) == ("mdm", "arm", None)
    helps = {field.name: field.metadata["help"] for field in FIELDS}
    assert helps["steps"].startswith("MDM: ") and helps["threshold"].startswith("MDM, threshold: ")
    # What belongs to an algorithm names one that there is; what needs another setting names one, too.
    for field in FIELDS:
        assert field.metadata["algorithm"] in (None, *helps) or Sampling(field.metadata["algorithm"])
        assert field.metadata["needs"] in (None, *helps)


def test_unused_settings_are_those_of_the_other_kind():
    changed = Sampling(steps=3, use_cache=False, temperature=0.5, remask=0.1)
    assert changed.unused("arm") == ["steps", "remask"] and changed.unused("mdm") == ["use_cache"]
    assert Sampling().unused("arm") == Sampling().unused("mdm") == []


@dataclasses.dataclass(frozen=True)
class Flags(Sampling):
    """A script's."""

    path: str = ""
    """A file of its own."""


def test_a_script_has_the_settings_as_flags(capsys):
    flags = parse(Flags, ["--steps", "7", "--early-stop", "--path", "here"], "What it does.")
    assert flags.path == "here" and Sampling.of(flags) == Sampling(steps=7, early_stop=True)
    with pytest.raises(SystemExit):
        parse(Flags, ["--help"], "What it does.")
    shown = " ".join(capsys.readouterr().out.split())
    for field in FIELDS:
        assert f"--{field.name}" in shown and field.metadata["help"][:20] in shown
    assert "A file of its own." in shown


def test_a_wrong_flag_is_refused_by_its_settings():
    with pytest.raises(ValueError, match="steps is 0: at least 1 is needed; remask goes with the algorithm origin"):
        parse(Flags, ["--steps", "0", "--remask", "0.5", "--algorithm", "greedy"], "What it does.")
