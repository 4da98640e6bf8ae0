"""The guide's Python lines, as they stand there, on a model at the path that they name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from lit_gpt.tokenizer import Tokenizer
from tests.support.small_models import export_arm_and_mdm
from tests.support.training_runs import one_thread_environment

ROOT = Path(__file__).resolve().parents[2]


def test_the_lines_run(tmp_path):
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/guides/python.md").read_text(encoding="utf-8"), re.DOTALL
    )
    made = export_arm_and_mdm(tmp_path / "made")
    (named,) = re.findall(r'load_model\("(.+?)"\)', block)
    path = tmp_path / "elsewhere" / named
    path.parent.mkdir(parents=True)
    shutil.copy(made["mdm"], path)
    vocabulary = Tokenizer(made["tokenizer"]).vocab_size
    shutil.rmtree(tmp_path / "made")
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        env=one_thread_environment(),
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = re.match(r"(-\d+\.\d\d) nats, standard error (\d+\.\d\d)\n", done.stdout)
    assert found and found[2] == "0.00", "so short a target is scored under all masks"
    assert vocabulary == 500 and -60 < float(found[1]) < -6, "a few tokens at about ln 500 nats each"
    assert re.search(r"^The.* is my.*\.$", done.stdout, re.DOTALL | re.MULTILINE) and "___" not in done.stdout
