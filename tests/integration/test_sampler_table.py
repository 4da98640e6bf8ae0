"""The table of samplers: every line comes from real texts, and a model's training is kept."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import sampler_table


def test_a_look_at_everything(tmp_path: Path, monkeypatch, capsys):
    argv = ["sampler_table.py", "--out", str(tmp_path), "--train_steps", "2", "--texts", "3", "--letters", "3"]
    monkeypatch.setattr(sys, "argv", argv)
    tables = []
    for _ in range(2):
        sampler_table.main()
        rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
        tables.append([[cell.strip() for cell in row[:4]] for row in rows])
    assert tables[0] == tables[1] and len(list(tmp_path.glob("*.safetensors"))) == 2
    table = {name: row for name, *row in tables[0]}
    assert list(table) == [name for name, _, _ in sampler_table.samplers()]
    # Three letters, two of them given, a bar, three letters, the end: six new tokens behind three.
    assert all(
        1 <= int(table[name][1]) <= 6 for name in ("greedy, 1 steps for each token", "ARM, everything read again")
    )
    assert int(table["greedy, 0.5 steps for each token"][1]) <= 3
    assert all(row[0].endswith("%") and int(row[1]) > 0 for row in table.values())


def test_what_is_right():
    bos, eos, bar = sampler_table.BOS, sampler_table.EOS, sampler_table.BAR
    assert sampler_table.words(5, 4, 1).shape == (5, 11)
    assert all(sampler_table.is_right(row, 4) for row in sampler_table.words(5, 4, 1).tolist())
    assert not sampler_table.is_right([bos, 5, 6, bar, 6, 5, eos], 2)
    assert not sampler_table.is_right([bos, 5, 6, bar, 5, 6], 2) and not sampler_table.is_right(
        [bos, 0, 0, bar, 0, 0, eos], 2
    )
