"""The training command that a preparation prints: it fits the corpus, and runs as it stands."""

from __future__ import annotations

import io
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lit_gpt.cli import parse
from lit_gpt.config import Config
from lit_gpt.pipeline import Pipeline
from lit_gpt.studies.text_corpus import packed_text
from lit_gpt.training.settings import PretrainConfig
from lit_gpt.training.suggested_run import SuggestedRun, suggest_run
from tests.support.small_tokenizers import training_lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("tokens", "largest_block"), [(3000, 61), (400_000, 2049 * 1024)])
def test_a_small_corpus_is_read_at_most_ten_times(tokens, largest_block):
    run = suggest_run(tokens, 400, largest_block)
    assert run.config.n_embd == 128 and run.config.block_size < largest_block
    used = run.steps * run.batch_size * run.config.block_size
    assert run.epochs == used / tokens and run.epochs <= 10.5
    assert 0 < run.minutes <= 61


@pytest.mark.parametrize(
    ("size", "steps", "warmup", "peak"), [(1, 31, 3, 2e-3), (1, 2000, 100, 2e-3), (170, 9000, 100, 2e-4)]
)
def test_the_command_s_values(size, steps, warmup, peak):
    config = Config.from_name(170) if size == 170 else Config.from_shape(n_layer=4, n_embd=128, block_size=128)
    words = shlex.split(SuggestedRun(config, 16, steps, 1.0, 1.0).command)
    flags = parse(PretrainConfig, words[2:], "")
    assert (flags.warmup_steps, flags.max_steps, flags.learning_rate) == (warmup, steps, peak)
    assert flags.problems() == []
    assert (
        Config.from_shape(n_layer=flags.n_layer, n_embd=flags.n_embd).non_embedding_params
        == config.non_embedding_params
    )


def test_the_printed_command_runs(tmp_path, tokenizer_folder):
    source = tmp_path / "text.py"
    source.write_text("".join(training_lines(60)), encoding="utf-8")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "prepare_text.py"),
        "--source_path",
        str(source),
        "--document",
        "line",
    ]
    command += ["--destination_path", str(tmp_path / "data"), "--tokenizer_path", str(tokenizer_folder)]
    done = subprocess.run([*command, "--chunk_size", "64"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    printed = next(line for line in done.stdout.splitlines() if line.startswith("train with: "))
    words = shlex.split(printed.removeprefix("train with: "))
    folders = [f"--{name}={tmp_path / name}" for name in ("out_dir", "log_dir", "models_dir")]
    run = [sys.executable, str(ROOT / words[1]), *words[2:], "--devices=1", "--accelerator=cpu", *folders]
    trained = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    assert list((tmp_path / "models_dir").glob("mdm-*.safetensors"))


@pytest.mark.parametrize("tokens", [13, 14, 100, 205, 2000, 31_000])
def test_the_smallest_corpora_are_not_read_more_often_either(tokens):
    run = suggest_run(tokens, 400, 2049)
    assert 0 < run.steps * run.batch_size * run.config.block_size <= 10 * tokens


def test_a_few_words_are_no_corpus():
    with pytest.raises(ValueError, match="4 tokens are too few to train on: one sequence has 128"):
        suggest_run(4, 400, 2049)


def test_a_pipeline_is_told_no_command(tmp_path):
    """It trains by one of its own; none is chosen for it."""
    (tmp_path / "text.txt").write_text("".join(f"{line}\n\n" for line in training_lines(300)), encoding="utf-8")
    console = Console(file=io.StringIO(), record=True, width=200)
    packed_text(Pipeline(tmp_path / "out", console, lambda line: True), tmp_path / "text.txt", 400, 32, 3)
    printed = console.export_text()
    assert "train_slim: 1 file(s)" in printed and "train with" not in printed and "that is" not in printed


def test_a_finished_preparation_stays_one_where_no_command_can_be_chosen(monkeypatch, capsys):
    def fail(tokens, vocab_size, largest_block):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("lit_gpt.training.suggested_run.suggest_run", fail)
    script = runpy.run_path(str(ROOT / "scripts" / "prepare_text.py"))
    script["suggest"](script["PrepareFlags"](), 1000, 400)
    assert capsys.readouterr().out == (
        "the data is finished; no training command could be chosen: CUDA out of memory\n"
    )
