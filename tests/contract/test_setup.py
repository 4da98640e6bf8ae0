"""setup.sh explains itself, and installs nothing then."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def setup(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SMDM_VENV": str(folder / "venv"), "PYTHON": "/nowhere/python"}
    return subprocess.run(
        [ROOT / "setup.sh", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["test", "--help"]])
def test_help_explains_and_installs_nothing(tmp_path: Path, words: list[str]):
    done = setup(tmp_path, *words)
    assert (done.returncode, done.stderr) == (0, "")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(word in done.stdout for word in (*extras, "SMDM_VENV", "PIP_INDEX_URL", "./setup.sh test"))
    assert not any(line.startswith("#") for line in done.stdout.splitlines()) and not list(tmp_path.iterdir())


def test_an_unknown_option_is_one_line(tmp_path: Path):
    done = setup(tmp_path, "--tset")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: --tset") and not list(tmp_path.iterdir())
