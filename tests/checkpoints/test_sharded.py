"""Checkpoints that are folders of shards: written in the background, damaged, foreign, and read by other processes."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_gpt import files
from lit_gpt.checkpoints import run_files, saving, shard_files, sharded, weights
from lit_gpt.checkpoints.markers import marker_path
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.training import strategies
from lit_gpt.training.checkpoint_saves import CheckpointSaves
from lit_gpt.ui.info import path_info
from tests.checkpoints.test_saving import (
    RECORD,
    ROOT,
    TINY,
    assert_same,
    flip_a_bit,
    make_state,
    newest,
    save,
    train_step,
    truncate,
    weights_of,
)
from tests.support.training_runs import run_python


@pytest.fixture(scope="module")
def fabric() -> Any:
    return strategies.start_fabric("cpu", "1", 1, "auto", "32-true")


def saves_of(folder: Path) -> CheckpointSaves:
    """Saves everything as shards."""
    return CheckpointSaves(folder, 0, lambda path: None)


def save_shards(fabric: Any, folder: Path, state: dict[str, Any], keep: int | None = None) -> Path:
    saves = saves_of(folder)
    saves.save(fabric, state, RECORD, keep)
    saves.wait(fabric)
    return folder / f"iter-{state['iter_num']:06d}-ckpt"


def moments_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{entry}": value.clone()
        for number, entries in state["optimizer"].state_dict()["state"].items()
        for entry, value in entries.items()
    }


def load(fabric: Any, source: Any, **how: Any) -> dict[str, Any]:
    """A fresh state restored from a checkpoint."""
    state = make_state(fabric, seed=99, steps=0, **how)
    rest = saving.load_checkpoint(fabric, source, state)
    return {**state, "iter_num": rest["iter_num"], "step_count": rest["step_count"], "record": rest["record"]}


# --- a whole life -------------------------------------------------------------------------------------------------


def test_what_lies_on_the_disk(fabric: Any, tmp_path: Path) -> None:
    path = save_shards(fabric, tmp_path, make_state(fabric))
    assert [one.name for one in tmp_path.iterdir()] == ["iter-000008-ckpt"]
    (shard,) = path.glob("*.safetensors")
    assert sorted(one.name for one in path.iterdir()) == ["checkpoint.json", "shard-00001-of-00001.safetensors"]
    marker = json.loads((path / "checkpoint.json").read_text())
    assert marker["shards"] == {shard.name: {"size": shard.stat().st_size, "sha256": files.file_sha256(shard)}}
    assert (marker["step"], marker["iter_num"], marker["record"]) == (2, 8, RECORD)
    assert marker["values"] == {"hparams": {"batch_size": 8}, "iter_num": 8, "step_count": 2}
    info, lines = newest(tmp_path)
    assert info is not None and not lines and info.path == path and info.settings == RECORD["settings"]
    assert info.size == shard.stat().st_size


def test_torch_reads_it(fabric: Any, tmp_path: Path) -> None:
    """The shards are those of torch's own safetensors storage."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as load_distributed

    state = make_state(fabric)
    path = save_shards(fabric, tmp_path, state)
    read = {f"model.{name}": torch.zeros_like(value) for name, value in weights_of(state).items()}
    load_distributed(read, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    assert_same({name.removeprefix("model."): value for name, value in read.items()}, weights_of(state))


@pytest.mark.parametrize("forms", ["shards", "file shards file", "shards file shards"])
def test_resumed_training_is_bit_identical(fabric: Any, tmp_path: Path, forms: str) -> None:
    """Whatever form the checkpoint has, and between two of another form."""
    unbroken = state = make_state(fabric, steps=2)
    before = {name: value.clone() for name, value in weights_of(unbroken).items()}
    for number, form in enumerate(forms.split()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = (save_shards if form == "shards" else save)(fabric, folder, state)
        state = load(fabric, path, fused=number % 2 == 0)
        assert_same(weights_of(state), before)
        shutil.rmtree(folder)  # what was restored does not hang on the files
    assert_same(moments_of(state), moments_of(unbroken))
    assert state["record"] == RECORD
    for _ in range(3):
        train_step(fabric, unbroken)
        train_step(fabric, state)
    if len(forms.split()) == 1:  # the last of several optimizers is fused like the first, the middle one is not
        assert_same(weights_of(unbroken), weights_of(state))


def test_a_run_that_has_made_no_step(fabric: Any, tmp_path: Path) -> None:
    state = make_state(fabric, steps=0)
    restored = load(fabric, save_shards(fabric, tmp_path, state))
    assert restored["step_count"] == 0 and not restored["optimizer"].state_dict()["state"]
    assert_same(weights_of(restored), weights_of(state))


def test_weights_are_read_without_the_optimizer(fabric: Any, tmp_path: Path) -> None:
    state = make_state(fabric)
    path = save_shards(fabric, tmp_path, state)
    copied = tmp_path / "elsewhere"
    shutil.copytree(path, copied)
    for source in (path, tmp_path, copied):
        model, record = weights.read_model(source)
        assert isinstance(model, TransEncoder) and record is not None and record.config == TINY
        assert_same(dict(model.state_dict()), weights_of(state))


def test_what_info_says(fabric: Any, tmp_path: Path) -> None:
    path = save_shards(fabric, tmp_path, make_state(fabric))
    info = path_info(path)
    assert info["what"] == "checkpoint" and info["state"] == "complete" and info["step"] == 2
    assert info["parameters"] == sum(value.numel() for value in weights_of(make_state(fabric)).values())
    assert info == path_info(path / "checkpoint.json")
    (entry,) = path_info(tmp_path)["checkpoints"]
    assert entry["state"] == "complete" and entry["size"] == info["size"] > 10_000
    flip_a_bit(next(path.glob("*.safetensors")))
    assert path_info(tmp_path)["checkpoints"][0]["state"].startswith("broken: the bytes of shard-00001")


def test_only_the_last_ones_are_kept_in_either_form(fabric: Any, tmp_path: Path) -> None:
    state = make_state(fabric, steps=0)
    for number in range(5):
        train_step(fabric, state)
        (save if number % 2 else save_shards)(fabric, tmp_path, state, keep=2)
    assert [path.name for path in run_files.list_checkpoints(tmp_path)] == ["iter-000016-ckpt.pth", "iter-000020-ckpt"]
    assert len(list(tmp_path.iterdir())) == 3
    save(fabric, tmp_path, state)  # the same step in the other form
    assert [path.name for path in run_files.list_checkpoints(tmp_path)][1:] == ["iter-000020-ckpt.pth"]
    save_shards(fabric, tmp_path, state)
    first = marker_path(save_shards(fabric, tmp_path, state)).stat().st_ino
    assert marker_path(save_shards(fabric, tmp_path, state)).stat().st_ino != first  # over one of the same name
    assert [path.name for path in run_files.list_checkpoints(tmp_path)][1:] == ["iter-000020-ckpt"]
    run_files.remove_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


# --- in the background --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Shards are written as soon as the event is set."""
    ready, write = threading.Event(), shard_files.write_shard

    def write_when_ready(*arguments: Any) -> Any:
        assert ready.wait(60)
        return write(*arguments)

    from lit_gpt.checkpoints import sharded_storage

    with monkeypatch.context() as patch:
        patch.setattr(sharded_storage, "write_shard", write_when_ready)
        try:
            yield ready
        finally:
            ready.set()


def test_training_goes_on_while_a_checkpoint_is_written(
    fabric: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, saves = make_state(fabric), saves_of(tmp_path)
    before = weights_of(state), moments_of(state)
    with slow_disk(monkeypatch) as ready:
        saves.save(fabric, state, RECORD, None)
        train_step(fabric, state)
        saves.look(fabric)
        assert saves.saved_step == 0 and newest(tmp_path) == (None, []) and not capsys.readouterr().out
        ready.set()
        saves.save(fabric, state, RECORD, None)  # waits for the first
        assert saves.saved_step == 2 and newest(tmp_path)[0].step == 2  # type: ignore[union-attr]
        saves.wait(fabric)
    assert saves.saved_step == 3 and newest(tmp_path)[0].step == 3  # type: ignore[union-attr]
    restored = load(fabric, tmp_path / "iter-000008-ckpt")
    assert_same(weights_of(restored), before[0])
    assert_same(moments_of(restored), before[1])
    first, second = capsys.readouterr().out.splitlines()
    assert "iter-000008-ckpt (" in first and "s in the background)" in first and "iter-000012-ckpt (" in second
    saves.wait(fabric)
    saves.settle()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk: no file may grow beyond so many bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(("limit", "longest"), [(30_000, 1), (90_000, 100_000)], ids=["shard", "marker"])
def test_a_save_that_fails_is_told_at_the_next_look(fabric: Any, tmp_path: Path, limit: int, longest: int) -> None:
    """On a full disk, in the middle of a shard or of the marker: one line, nothing is left, and the last good one stays."""
    state, saves = make_state(fabric), saves_of(tmp_path)
    first = save_shards(fabric, tmp_path, state, keep=1)
    train_step(fabric, state)
    state["hparams"] = {"long": "x" * longest}  # the marker may be larger than the shard
    with largest_file(limit):
        saves.save(fabric, state, RECORD, 1)
        while not saves._background.written:
            saves._background._thread.join(0.01)  # type: ignore[union-attr]
        with pytest.raises(files.SaveError) as raised:
            saves.look(fabric)
    line = str(raised.value)
    assert "\n" not in line and "File too large" in line and line.endswith(f"the last good checkpoint is {first}")
    assert list(tmp_path.iterdir()) == [first] and newest(tmp_path)[0].step == 2  # type: ignore[union-attr]
    assert saves.saved_step == 0
    saves.save(fabric, state, RECORD, 1)
    saves.wait(fabric)
    assert saves.saved_step == 3 and list(tmp_path.iterdir()) == [tmp_path / "iter-000012-ckpt"]


def test_an_error_waits_for_the_save(
    fabric: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, saves = make_state(fabric), saves_of(tmp_path)
    with slow_disk(monkeypatch) as ready:
        saves.save(fabric, state, RECORD, None)
        threading.Timer(0.2, ready.set).start()
        saves.settle()
    assert saves.saved_step == 2 and newest(tmp_path)[0].step == 2  # type: ignore[union-attr]
    with largest_file(100):
        saves.save(fabric, state, RECORD, None)
        saves.settle()
    assert "step 2 could not be saved: cannot write" in capsys.readouterr().err
    train_step(fabric, state)
    saves.save(fabric, state, RECORD, None, alone=True)
    assert saves.saved_step == 3 and newest(tmp_path)[0].step == 3  # type: ignore[union-attr]


def test_no_folder_no_save(fabric: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(files.SaveError, match="cannot write .*iter-000008-ckpt: Not a directory"):
        saves_of(tmp_path / "file").save(fabric, make_state(fabric), RECORD, None)


# --- kills --------------------------------------------------------------------------------------------------------


def test_what_kills_leave_behind(fabric: Any, tmp_path: Path) -> None:
    """Unfinished folders go; one that is whole but for its name gets it; none is taken before."""
    state = make_state(fabric)
    path = save_shards(fabric, tmp_path, state)
    before = weights_of(state)
    without_marker = tmp_path / "iter-000012-ckpt.01234567.tmp"
    shutil.copytree(path, without_marker)
    marker_path(without_marker).unlink()
    cut_short = tmp_path / "iter-000016-ckpt.01234567.tmp"
    shutil.copytree(path, cut_short)
    truncate(next(cut_short.glob("*.safetensors")))
    path.rename(tmp_path / "iter-000008-ckpt.89abcdef.tmp")
    assert newest(tmp_path) == (None, [])
    run_files.remove_temporary(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    shutil.copytree(path, tmp_path / "iter-000008-ckpt.89abcdef.tmp")
    run_files.remove_temporary(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert_same(weights_of(load(fabric, tmp_path)), before)


# --- damage -------------------------------------------------------------------------------------------------------


def edit(path: Path, **values: Any) -> None:
    marker = marker_path(path)
    marker.write_text(json.dumps({**json.loads(marker.read_text()), **values}))


def shard_of(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: truncate(shard_of(path)), "safetensors has .* bytes, its marker says"),
    "empty": (lambda path: shard_of(path).write_bytes(b""), "has 0 bytes, its marker says"),
    "one bit": (lambda path: flip_a_bit(shard_of(path)), "the bytes of shard-00001-of-00001.safetensors are not"),
    "missing": (lambda path: shard_of(path).unlink(), "shard-00001-of-00001.safetensors is missing"),
    "a folder": (lambda path: (shard_of(path).unlink(), shard_of_folder(path)), "bytes, its marker says"),
    "no marker": (lambda path: marker_path(path).unlink(), "has no checkpoint.json, which is written last"),
    "marker cut": (lambda path: truncate(marker_path(path)), "its marker checkpoint.json is damaged"),
    "marker without shards": (lambda path: marker_path(path).write_text('{"format": 1}'), "'step' is missing"),
    "shards of another type": (lambda path: edit(path, shards=[1]), r"shards is \[1\]"),
    "a shard of another type": (
        lambda path: edit(path, shards={"shard-00001-of-00001.safetensors": 3}),
        "a part of it is no object",
    ),
    "a shard elsewhere": (lambda path: edit(path, shards={"../x": {}}), "names a shard ../x"),
    "later version": (lambda path: edit(path, format=2), "format 2, expected 1"),
    "successor": (lambda path: edit(path, successor={}), "'format' is missing"),
}


def shard_of_folder(path: Path) -> None:
    (path / "shard-00001-of-00001.safetensors").mkdir()


@pytest.mark.parametrize("case", DAMAGE)
def test_a_broken_one_is_skipped_and_named(fabric: Any, tmp_path: Path, case: str) -> None:
    state = make_state(fabric)
    first = save(fabric, tmp_path, state)
    train_step(fabric, state)
    second = save_shards(fabric, tmp_path, state)
    damage, reason = DAMAGE[case]
    damage(second)
    info, lines = newest(tmp_path)
    assert info is not None and info.path == first
    assert len(lines) == 1 and str(second) in lines[0] and "\n" not in lines[0] and len(lines[0]) < 400
    with pytest.raises(ValueError, match=f"checkpoint {second} cannot be used: .*{reason}"):
        run_files.open_checkpoint(second)
    with pytest.raises(ValueError, match="cannot be used"):
        weights.load_weights(second)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a shard's tensors as someone in bad faith may: its marker fits."""
    shard = shard_of(path)
    parts: dict[str, Any] = {name: (value, [0] * value.dim()) for name, value in load_file(shard).items()}
    change(parts)
    shard.unlink()
    stamp = shard_files.write_shard(shard, parts)
    edit(path, shards={shard.name: vars(stamp)})


HEAD, NORM = "lm_head.weight", "transformer.ln_f.weight"


def spoil(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        parts[name][0].view(-1)[-1] = value

    return change


def replace(name: str, tensor: torch.Tensor, begin: list[int] | None = None) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts.update({name: (tensor, [0] * tensor.dim() if begin is None else begin)})


FOREIGN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shape": (replace(f"model.{HEAD}", torch.ones(64, 8)), r"lm_head.weight has shape \[64, 8\], expected \[64, 16\]"),
    "huge": (replace(f"model.{HEAD}", torch.ones(1, 16), [2**40, 0]), "rows of model.lm_head.weight are missing"),
    "columns": (replace(f"model.{HEAD}", torch.ones(64, 16), [0, 1]), "expected whole rows"),
    "negative": (replace(f"model.{HEAD}", torch.ones(64, 16), [-1, 0]), "expected whole rows"),
    "offsets": (replace(f"model.{HEAD}", torch.ones(64, 16), [0]), "does not say where it begins"),
    "missing": (lambda parts: parts.pop(f"model.{NORM}"), "transformer.ln_f.weight is missing"),
    "unknown": (replace("model.x", torch.ones(1)), "1 unknown parameters, the first x"),
    "of nothing": (replace("x", torch.ones(1)), "is no checkpoint of a run: it holds x"),
    "NaN": (spoil(f"model.{HEAD}", float("nan")), "lm_head.weight has NaN"),
    "moment's shape": (replace(f"optimizer.{HEAD}.exp_avg", torch.ones(3)), r"exp_avg of lm_head.weight has shape \[3\]"),
    "moment's NaN": (spoil(f"optimizer.{NORM}.exp_avg", float("inf")), "exp_avg of transformer.ln_f.weight has values"),
    "square": (spoil(f"optimizer.{NORM}.exp_avg_sq", -1), "exp_avg_sq of transformer.ln_f.weight has values from -1.0"),
    "moment": (lambda parts: parts.pop(f"optimizer.{NORM}.exp_avg"), "exp_avg of transformer.ln_f.weight is missing"),
    "entry": (replace(f"optimizer.{NORM}.x", torch.ones(1)), "has an unknown entry x"),
    "step": (replace(f"optimizer.{NORM}.step", torch.tensor(-1.0)), r"step of transformer.ln_f.weight is tensor\(-1"),
    "steps": (replace(f"optimizer.{NORM}.step", torch.ones(1)), "step of transformer.ln_f.weight is"),
    "parameter": (replace("optimizer.x.step", torch.tensor(1.0)), "has an unknown parameter x"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_tensors_that_do_not_fit_are_named(fabric: Any, tmp_path: Path, case: str) -> None:
    path = save_shards(fabric, tmp_path, make_state(fabric))
    change, message = FOREIGN[case]
    rewrite(path, change)
    info = run_files.open_checkpoint(path)
    with pytest.raises(ValueError, match=message) as raised:
        load(fabric, info)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": []}, "its marker lacks hparams, iter_num, step_count"),
        ({"values": {"hparams": {}, "iter_num": 8}}, "its marker lacks hparams"),
        ({"values": {"hparams": {}, "iter_num": 8, "step_count": 3}}, "is of step 3, its marker says 2"),
        ({"param_groups": None}, "it has no state and param_groups"),
        ({"param_groups": [{}, {}]}, "it has 2 parameter groups, expected 1"),
        ({"param_groups": [{"params": ["x"]}]}, "a parameter group names other parameters"),
    ],
    ids=str,
)
def test_plain_values_that_do_not_fit_are_named(fabric: Any, tmp_path: Path, change: Any, message: str) -> None:
    path = save_shards(fabric, tmp_path, make_state(fabric))
    edit(path, **change)
    with pytest.raises(ValueError, match=message) as raised:
        load(fabric, path)
    assert "\n" not in str(raised.value)


def test_rows_and_dtypes_of_several_files(tmp_path: Path) -> None:
    one, two = tmp_path / "shard-00001-of-00002.safetensors", tmp_path / "shard-00002-of-00002.safetensors"
    rows = torch.arange(12.0).reshape(6, 2)
    half = torch.tensor(3.0, dtype=torch.bfloat16)
    shard_files.write_shard(two, {"a": (rows[:4], (0, 0)), "number": (half, ())})
    shard_files.write_shard(one, {"a": (rows[4:], (4, 0))})
    index = shard_files.read_index([one, two])
    assert index["a"].shape == (6, 2) and index["number"].dtype == torch.bfloat16
    assert torch.equal(shard_files.read_tensor(index["a"], "a"), rows)
    assert torch.equal(shard_files.read_tensor(index["number"], "number"), half)
    wrong = {
        "are there twice before row 2": (rows[2:], (2, 0)),
        "are missing before row 5": (rows[5:], (5, 0)),
        "a has shape .*, its other rows": (rows[:, 0].clone(), (0,)),
        "torch.float64 in another file": (rows[4:].double(), (4, 0)),
    }
    for message, part in wrong.items():
        one.unlink()
        shard_files.write_shard(one, {"a": part})
        with pytest.raises(ValueError, match=message):
            shard_files.read_index([one, two])
    for content in (b"", b"hello", b"\xff" * 100, two.read_bytes()[:-3]):
        one.write_bytes(content)
        with pytest.raises(ValueError, match="is no part of a checkpoint, or damaged") as raised:
            shard_files.read_index([one])
        assert "\n" not in str(raised.value)


# --- several processes --------------------------------------------------------------------------------------------

ACROSS = """
import resource, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lit_gpt import files
from lit_gpt.checkpoints import saving
from lit_gpt.training import strategies
from tests.checkpoints.test_saving import make_state, train_step
from tests.checkpoints.test_sharded import load, saves_of, save_shards

strategy, folder = sys.argv[1], Path(sys.argv[2])
fabric = strategies.start_fabric("cpu", "2", 1, strategy, "32-true")
state = load(fabric, folder / "one")
save_shards(fabric, folder / "again", state)
train_step(fabric, state)
saves = saves_of(folder / "full")
saves.save(fabric, state, state["record"], None)
saves.wait(fabric)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if fabric.global_rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
state["iter_num"] += 1
saves.save(fabric, state, state["record"], None)
try:
    saves.wait(fabric)
except files.SaveError as error:
    sys.stdout.write(f"{error}\\n")  # at once: both processes write to one pipe
    sys.stdout.flush()
fabric.barrier()  # the first process's end would end the second before it has spoken
"""


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_shards_of_one_strategy_are_anothers(fabric: Any, tmp_path: Path, strategy: str) -> None:
    """Saved by one process, restored and saved by two, restored by one; a save that fails on one fails on both."""
    for folder in ("one", "again", "full"):
        (tmp_path / folder).mkdir()
    unbroken = make_state(fabric, steps=2)
    save_shards(fabric, tmp_path / "one", unbroken)
    (tmp_path / "across.py").write_text(ACROSS)
    done = run_python(ROOT, tmp_path / "across.py", strategy, tmp_path)
    again = tmp_path / "again" / "iter-000008-ckpt"
    shards = list(again.glob("*.safetensors"))
    assert len(shards) == 2 and max(one.stat().st_size for one in shards) < 0.6 * sum(
        one.stat().st_size for one in shards
    )
    restored = load(fabric, again)
    assert_same(weights_of(restored), weights_of(unbroken))
    assert_same(moments_of(restored), moments_of(unbroken))
    assert_same(weights.load_weights(again)[0], weights_of(unbroken))
    train_step(fabric, unbroken)
    for name, value in load(fabric, tmp_path / "full")["model"].state_dict().items():
        torch.testing.assert_close(value, weights_of(unbroken)[name], rtol=1e-5, atol=1e-7)
    failed = [line for line in done.stdout.splitlines() if "cannot write" in line]
    good = tmp_path / "full" / "iter-000012-ckpt"
    assert len(failed) == 2 and all("File too large" in line and line.endswith(str(good)) for line in failed)
    assert list((tmp_path / "full").iterdir()) == [good]


def test_processes_share_what_all_of_them_have() -> None:
    tensors = {str(size): torch.zeros(size) for size in (5, 30, 10, 20, 1, 0)} | {"number": torch.tensor(1.0)}
    shares = [sharded._own_share(tensors, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    assert [sum(value.numel() for value in share.values()) for share in shares] == [30, 20, 17]
