"""`scripts/chat.py` as a person meets it: pipes, a terminal, Ctrl-C, saved files, and mistakes in one line."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from lit_gpt import cli
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.ui.trajectory import DenoisingTrajectory, without_control_characters
from scripts.chat import main
from tests.support.small_models import export_arm_and_mdm
from tests.support.training_runs import restore_interrupts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "chat.py")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """An ARM and an MDM with random weights, their tokenizer beside them."""
    return {kind: str(path) for kind, path in export_arm_and_mdm(tmp_path_factory.mktemp("models")).items()}


@pytest.fixture
def chatting(models, monkeypatch, capsys):
    """Run the script's main in this process: (exit code, stdout, stderr)."""

    def run(kind: str, *flags: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["chat.py", "--ckpt_path", models.get(kind, kind), *flags])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def steps_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- pipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_a_completion_through_a_pipe(models, kind, tmp_path):
    """A real process: stdout is the text and nothing else."""
    table = tmp_path / "new" / "steps.jsonl"
    words = ["--ckpt-path", models[kind], "--prompt", "To be", "--context_length", "24", "--save", str(table)]
    done = subprocess.run([*SCRIPT, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, f"saved {table}\n")
    steps = steps_of(table)
    assert [step["step"] for step in steps] == list(range(len(steps)))
    assert done.stdout == steps[-1]["text"] + "\n" and done.stdout.startswith("To be")
    assert len(steps[-1]["tokens"]) == len(steps[-1]["confidence"]) <= 24
    tokens = steps[-1]["tokens"]
    assert steps[-1]["text"] == Tokenizer(models["tokenizer"]).decode(tokens)
    if kind == "mdm":
        assert 2 < len(steps) <= 129 and steps[0]["text"].count("__") == steps[0]["confidence"].count(0.0) == 24 - 3
        assert steps[0]["tokens"].count(512) == 21, "512 is the mask"


def test_gaps_are_filled_between_what_is_given(models, chatting, tmp_path):
    words = ("--steps", "7", "--algorithm", "greddy", "--save", str(tmp_path / "a.jsonl"), "--gap", "3")
    code, out, _ = chatting("mdm", "--prompt", "the king ___ on the ___2, my lord", *words)
    assert code == 0
    steps = steps_of(tmp_path / "a.jsonl")
    assert steps[0]["text"] == "the king __ __ __ on the __ __, my lord"
    assert out.startswith("the king") and " on the" in out and out.endswith(", my lord\n")
    assert 2 < len(steps) <= 8 and len({len(step["tokens"]) for step in steps}) == 1


def test_snapshots(chatting):
    code, out, err = chatting("mdm", "--prompt", "To be", "--context_length", "20", "--snapshots", "3")
    assert (code, err) == (0, "")
    assert re.findall(r"--- after step (\d+) of \d+", out)[0] == "0"
    assert out.count("--- after step") == 3 and out.splitlines()[1].strip().startswith("To be __")


def test_lines_are_answered_one_by_one(chatting, tmp_path):
    picture = tmp_path / "a.png"
    words = ("--context_length", "16", "--steps", "4", "--save", str(picture))
    code, out, err = chatting("mdm", *words, stdin="To be\nROMEO:\n\nnot read\n")
    assert code == 0
    assert out.index("To be") < out.index("ROMEO:") and "not read" not in out
    assert err == f"saved {picture}\nsaved {tmp_path / 'a-2.png'}\n"
    assert Image.open(picture).size == Image.open(tmp_path / "a-2.png").size
    assert chatting("arm", *words[:2], stdin="To be")[0] == 0, "the end of the input ends it too"


def test_a_chat_shows_the_answer_alone(chatting, tmp_path):
    for kind in ("arm", "mdm"):
        table = tmp_path / f"{kind}.jsonl"
        words = ("--chat", "--prompt", "Who ___ you?", "--context_length", "128", "--steps", "4", "--save", str(table))
        code, out, err = chatting(kind, *words)
        assert code == 0, err
        assert "USER" not in out and "curious" not in out
        assert out == steps_of(table)[-1]["text"] + "\n"


def test_an_animation(chatting, tmp_path):
    words = ("--context_length", "20", "--steps", "6", "--save", str(tmp_path / "a.gif"))
    assert chatting("mdm", "--prompt", "", *words)[0] == 0
    with Image.open(tmp_path / "a.gif") as image:
        assert 2 <= image.n_frames <= 7


# --- a terminal -------------------------------------------------------------------------------------------------------


class Terminal:
    """The script on a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.master, other = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
        self.process = subprocess.Popen(
            [*SCRIPT, *words],
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment,
            start_new_session=True,
            preexec_fn=restore_interrupts,
        )
        os.close(other)
        self.shown = ""

    def until(self, pattern: str, timeout_s: float = 60) -> None:
        """Read until something is shown."""
        end = time.monotonic() + timeout_s
        while not re.search(pattern, self.shown):
            assert time.monotonic() < end, self.shown
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert re.search(pattern, self.shown), self.shown
                    return

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        code = self.process.wait(60)
        self.until(r"\Z")
        while select.select([self.master], [], [], 0.2)[0]:
            try:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
            except OSError:
                break
        os.close(self.master)
        return code


def test_a_text_emerges_on_a_terminal(models):
    terminal = Terminal("--ckpt_path", models["mdm"], "--context_length", "16", "--steps", "5")
    terminal.until("> $")
    terminal.type("To be ___4 not\n")
    terminal.until(r", 0 masked[\s\S]*> $")
    assert "▒▒" in terminal.shown and "step 0 of 5, 4 masked" in terminal.shown
    # A mistake is one line, and the session goes on.
    terminal.type("To be ___99\n")
    terminal.until(r"error: prompt 0 has 102 tokens, more than the context length 16[\s\S]*> $")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.shown


def test_tokens_appear_on_a_terminal(models):
    terminal = Terminal("--ckpt_path", models["arm"], "--prompt", "To be", "--context_length", "9", "--delay", "0.1")
    terminal.until("To be")
    assert terminal.end() == 0
    words = ["--ckpt_path", models["arm"], "--prompt", "To be", "--context_length", "9"]
    piped = subprocess.run([*SCRIPT, *words], capture_output=True, text=True, timeout=120).stdout
    assert terminal.shown.replace("\r\n", "\n") == without_control_characters(piped)


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_an_interrupt_keeps_what_is_there(models, kind, tmp_path):
    path = tmp_path / "steps.jsonl"
    words = ("--prompt", "To be", "--context_length", "128", "--delay", "0.2", "--save", str(path))
    terminal = Terminal("--ckpt_path", models[kind], *words)
    terminal.until("step [3-9] of 128" if kind == "mdm" else "To be.")
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 130
    assert re.search(r"interrupted after step \d+", terminal.shown) and "Traceback" not in terminal.shown
    steps = steps_of(path)
    assert 1 < len(steps) < 100
    assert "To be" in steps[-1]["text"]
    if kind == "mdm":
        assert "__" in steps[-1]["text"] and 512 in steps[-1]["tokens"]


def test_an_interrupt_without_a_terminal(models, monkeypatch, chatting, tmp_path):
    """What was there is printed, and drawn."""
    from lit_gpt.ui.completion import Completer

    def stopping(self, request, sampling, whole=Completer.states):
        for state in whole(self, request, sampling):
            yield state
            if state.step == 40:
                raise KeyboardInterrupt

    monkeypatch.setattr(Completer, "states", stopping)
    code, out, err = chatting("mdm", "--prompt", "To be", "--save", str(tmp_path / "a.png"))
    assert code == 130 and err.endswith("interrupted after step 40\n")
    assert out.startswith("To be") and 40 < out.count("__") < 120
    assert Image.open(tmp_path / "a.png").size[0] > 500


def test_a_model_cannot_command_the_terminal():
    text = "a\x1b[2J\x07b\n\tc\u00a0é\u200d"
    assert without_control_characters(text) == "a�[2J�b\n\tc\u00a0é\u200d"
    assert DenoisingTrajectory([text], [1], 2).styled_text(1).plain == without_control_characters(text)


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no checkpoint": (None, [], "which checkpoint"),
    "missing": ("nowhere/mdm.safetensors", [], "no checkpoint nowhere/mdm.safetensors"),
    "steps": ("mdm", ["--steps", "0"], "steps is 0: at least 1"),
    "algorithm": ("mdm", ["--algorithm", "best"], "unknown sampling algorithm 'best': choose from origin, greedy.*"),
    "long": ("mdm", ["--context_length", "1"], "prompt 0 has 3 tokens, more than the context length 1"),
    "context": ("arm", ["--context_length", "4096"], "context length 4096: this model reads from 1 to 128"),
    "no context": ("arm", ["--context_length", "0"], "--context_length 0: expected 1 or more"),
    "gap": ("arm", ["--prompt", "To ___ be"], "an ARM writes from left to right and cannot fill gaps"),
    "no gap": ("mdm", ["--gap", "0"], "--gap 0: expected 1 or more"),
    "empty gap": ("mdm", ["--prompt", "To ___0 be"], "the gap ___0 has 0 tokens"),
    "suffix": ("mdm", ["--save", "text.txt"], r"--save text.txt: expected a file that ends in .png, .gif, .jsonl"),
    "picture": ("arm", ["--save", "text.png"], "a picture shows masks, which an ARM has none of"),
    "guidance": ("arm", ["--cfg_scale", "1"], "cfg_scale 1.0 needs an MDM"),
    "delay": ("mdm", ["--delay", "-1"], "--delay -1.0: expected 0 or more"),
    "tokenizer": ("mdm", ["--tokenizer", "nowhere/at/all"], "nowhere/at/all: no such tokenizer"),
    "size": ("mdm", ["--model", "170"], "holds tiny, Diff_LLaMA_170M was asked for"),
    "flag": ("mdm", ["--stepz", "3"], "stepz"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(models, chatting, name, tmp_path, monkeypatch):
    kind, flags, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    code, out, err = chatting(kind or "", "--prompt", "To be", *flags)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", err), err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_pipe_ends_it(chatting):
    code, _, err = chatting("arm", "--context_length", "12", stdin="To be\nTo ___ be\n")
    assert code == 2 and err.count("error: ") == 1


def test_flags_of_the_other_kind_are_named(chatting):
    code, _, err = chatting("arm", "--prompt", "To be", "--context_length", "8", "--steps", "3", "--snapshots", "2")
    assert code == 0
    assert err == "".join(
        f"warning: --{name} has no effect: this checkpoint is an ARM\n" for name in ("steps", "snapshots")
    )
    assert "--use_cache has no effect" in chatting("mdm", "--prompt", "a", "--use_cache", "false")[2]


def test_an_end_token_may_end_an_mdm(chatting):
    words = ("--prompt", "To be", "--context_length", "24", "--early_stop", "--algorithm", "threshold")
    code, out, err = chatting("mdm", *words)
    assert (code, err) == (0, "") and out.startswith("To be")


def test_the_seed_decides_the_text(chatting):
    words = ("--prompt", "To be", "--context_length", "24")
    first, again, other = (chatting("mdm", *words, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize("prompt", ["12", "yes", "a: b", "[x]", "{", '"q"'])
def test_a_prompt_is_text_whatever_it_looks_like(chatting, prompt):
    code, out, err = chatting("arm", "--prompt", prompt, "--context_length", "12")
    assert (code, err) == (0, "")
    assert out.startswith(prompt)


def test_help_is_quick():
    code = (
        f"import sys, runpy; sys.argv = [{SCRIPT[1]!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, sep='\\n')"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "rich"} & set(shown.split("\n"))
    for flag in ("ckpt_path", "algorithm", "steps", "temperature", "cfg_scale", "seed", "save"):
        assert f"  --{flag} " in shown
    assert "MDM: denoising steps" in " ".join(shown.split())
