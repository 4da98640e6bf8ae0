"""benchmarks/input_pipeline.py: simulated ranks on a few sparse files, and that nothing stays behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from benchmarks import input_pipeline, input_ranks

TOY = [
    "--ranks",
    "1",
    "--files",
    "20",
    "--tokens",
    "1e6",
    "--batches",
    "12",
    "--samples",
    "128",
    "--block_length",
    "65",
]


def test_scans_ranks_and_rates_in_this_process(tmp_path: Path):
    corpus = input_ranks.Corpus(tmp_path, files=20, tokens=10**6, block_length=65, ranks=2, samples=128, batches=12)
    input_ranks.make_sparse_files(corpus)
    files = input_ranks._build_scanner(corpus)()[0]
    # No token of the last file is taken for padding.
    assert files.real_tokens.tolist() == [50_000] * 20
    for rank in (0, 1):
        first_s, early_mb, late_mb = input_ranks._build_rank(corpus, rank)(files)
        assert first_s > 0 and late_mb >= 0.9 * early_mb > 0
    assert [name for name, _ in input_ranks._build_rates(corpus, files)()] == [
        f"{kind} files, {threads}" for threads in ("1 reader thread", "8 reader threads") for kind in ("cold", "warm")
    ]


@pytest.mark.slow
def test_simulated_ranks_are_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "work"))
    input_pipeline.main([*TOY, "--output", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert capsys.readouterr().out == text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    measured = {name: value for name, value in rows[2:]}
    assert len(measured) == 12 and "second start, the scan was kept" in measured
    rates = [float(value.split()[0].replace(",", "")) for name, value in measured.items() if "reader thread" in name]
    assert len(rates) == 4 and min(rates) > 0
    assert not list((tmp_path / "work").iterdir())


def test_an_interrupt_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []

    def interrupted(corpus: input_ranks.Corpus) -> None:
        input_ranks.make_sparse_files(corpus)
        made.extend(corpus.folder.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(input_ranks, "measure_ranks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        input_pipeline.main(TOY)
    assert len(made) == 20 and not list(tmp_path.iterdir())
