"""eval_mdm.sh: any launcher, and a setting that fails does not keep the others from running."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Stands for a launcher: writes down what it should start, and fails where the tasks are those of $FAILS.
LAUNCHER = """#!/usr/bin/env bash
echo "$@" >>"$(dirname "$0")/commands"
case $5 in $FAILS) exit 7 ;; esac
"""


@pytest.mark.parametrize(("fails", "code"), [("none", 0), ("piqa", 1), ("p*|race", 1)])
def test_all_settings_run_and_failures_are_reported_at_the_end(tmp_path, fails, code):
    launcher = tmp_path / "launch"
    launcher.write_text(LAUNCHER.replace("$FAILS", fails))
    launcher.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "eval_mdm.sh"), "--dry_run", "--limit", "4"],
        env={**os.environ, "LAUNCH": f"{launcher} --nproc_per_node 8", "CKPT": "mine.safetensors"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    started = (tmp_path / "commands").read_text().splitlines()
    assert done.returncode == code and len(started) == 7
    assert all(line.startswith("--nproc_per_node 8 evaluate_diff.py --tasks ") for line in started)
    assert all(line.endswith(" --dry_run --limit 4") and "ckpt_path='mine.safetensors'" in line for line in started)
    expected = {"none": [], "piqa": ["piqa"], "p*|race": ["piqa", "race"]}[fails]
    reported = [line.split()[0] for line in done.stderr.splitlines() if line.startswith("  ")]
    assert reported == expected and ("evaluations failed" in done.stderr) == bool(expected)
