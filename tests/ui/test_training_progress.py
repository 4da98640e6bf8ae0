"""A training's progress, on a terminal and in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from lit_gpt.ui.training_progress import TrainingProgress


@pytest.mark.parametrize("terminal", [True, False])
def test_training_progress(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    with TrainingProgress(console, 60) as show:
        show("run arm: 60 steps")
        for step in range(10, 61, 10):
            line = f"iter {step} step {step}: loss 5.{step}00, iter time: 1.00ms remaining time: 0 hours. 1234 tokens/s"
            show(line)
        show("error: not repeated here")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "run arm: 60 steps" in shown and "not repeated" not in shown
    if terminal:
        assert "60/60" in shown and "1,234 tokens/s" in shown
    else:
        assert "step 10:" in shown and "step 20:" not in shown and "step 60:" in shown
