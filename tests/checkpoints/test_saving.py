"""Checkpoints on real files: kills, full disks, damage, other people's files, two writers, several strategies."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt import files
from lit_gpt.checkpoints import run_files, run_record, saving, torch_files
from lit_gpt.checkpoints.names import export_name, run_name
from lit_gpt.config import Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.training import strategies
from tests.support.training_runs import run_python

ROOT = Path(__file__).resolve().parents[2]
TINY = Config("tiny", 1, 2, 16, 32, 2, block_size=16, vocab_size=50)
RECORD = {
    "kind": "mdm",
    "config": TINY.to_dict(),
    "run_id": "r1",
    "settings": {"batch_size": 8, "model": TINY.to_dict()},
}


@pytest.fixture(scope="module")
def fabric() -> Any:
    return strategies.start_fabric("cpu", "1", 1, "auto", "32-true")


def make_state(fabric: Any, seed: int = 1, steps: int = 2, fused: bool = True) -> dict[str, Any]:
    """A model and an optimizer that have made some steps."""
    module = TransEncoder(TINY)
    module.init_weights(seed)
    model = fabric.setup_module(module)
    model.mark_forward_method("weighted_nll")
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused))
    state = {"model": model, "optimizer": optimizer, "hparams": {"batch_size": 8}, "iter_num": 0, "step_count": 0}
    for _ in range(steps):
        train_step(fabric, state)
    return state


def train_step(fabric: Any, state: dict[str, Any]) -> None:
    """One step on tokens that depend on the step alone."""
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(state["step_count"]))
    terms = LossTerms(ids, ids, torch.full((2, 16), 1 / 32), torch.ones(2, 16, dtype=torch.bool))
    total, _, _ = state["model"].weighted_nll(terms)
    fabric.backward(total)
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    state["step_count"] += 1
    state["iter_num"] += 4


def save(fabric: Any, folder: Path, state: dict[str, Any], keep: int | None = None) -> Path:
    return saving.save_checkpoint(fabric, folder, state, RECORD, keep)


def weights_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state["model"].state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def newest(folder: Path) -> tuple[run_files.CheckpointInfo | None, list[str]]:
    lines: list[str] = []
    return run_files.newest_complete(folder, lines.append), lines


# --- a whole life -------------------------------------------------------------------------------------------------


def test_published_name_and_keys(fabric: Any, tmp_path: Path) -> None:
    path = save(fabric, tmp_path, make_state(fabric))
    assert path.name == "iter-000008-ckpt.pth"
    content = torch.load(path, weights_only=True)
    assert {"model", "optimizer", "hparams", "iter_num", "step_count"} <= content.keys()
    assert (content["iter_num"], content["step_count"]) == (8, 2)
    marker = json.loads(path.with_suffix(".json").read_text())
    assert marker["size"] == path.stat().st_size
    assert marker["sha256"] == files.file_sha256(path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, path.with_suffix(".json").name}


def test_resumed_training_is_bit_identical(fabric: Any, tmp_path: Path) -> None:
    unbroken = make_state(fabric, steps=2)
    save(fabric, tmp_path, unbroken)
    for _ in range(3):
        train_step(fabric, unbroken)
    resumed = make_state(fabric, seed=99, steps=0)
    info, lines = newest(tmp_path)
    assert info is not None and not lines
    rest = saving.load_checkpoint(fabric, info, resumed)
    assert rest["step_count"] == info.step == 2 and rest["hparams"] == {"batch_size": 8}
    assert info.settings == RECORD["settings"]
    resumed.update(step_count=rest["step_count"], iter_num=rest["iter_num"])
    info.path.unlink()  # what was restored does not hang on the file
    for _ in range(3):
        train_step(fabric, resumed)
    assert_same(weights_of(unbroken), weights_of(resumed))


def test_keeps_the_last_ones(fabric: Any, tmp_path: Path) -> None:
    state = make_state(fabric, steps=0)
    for _ in range(4):
        train_step(fabric, state)
        save(fabric, tmp_path, state, keep=2)
    assert [path.name for path in run_files.list_checkpoints(tmp_path)] == [
        "iter-000012-ckpt.pth",
        "iter-000016-ckpt.pth",
    ]
    assert len(list(tmp_path.glob("*.json"))) == 2
    for _ in range(2):
        train_step(fabric, state)
        save(fabric, tmp_path, state, keep=None)
    assert len(run_files.list_checkpoints(tmp_path)) == 4


def test_a_broken_one_does_not_count_as_kept(fabric: Any, tmp_path: Path) -> None:
    state = make_state(fabric, steps=0)
    for number in range(3):
        train_step(fabric, state)
        path = save(fabric, tmp_path, state, keep=2)
        if number == 1:
            path.write_bytes(path.read_bytes()[:-100])
    assert [path.name for path in run_files.list_checkpoints(tmp_path)] == [
        "iter-000004-ckpt.pth",
        "iter-000012-ckpt.pth",
    ]


def test_going_back_to_an_earlier_one(fabric: Any, tmp_path: Path) -> None:
    state = make_state(fabric, steps=0)
    for _ in range(3):
        train_step(fabric, state)
        save(fabric, tmp_path, state)
    run_files.remove_checkpoints(tmp_path, after_iter_num=4)
    assert newest(tmp_path)[0].step == 1  # type: ignore[union-attr]
    run_files.remove_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


# --- damage -------------------------------------------------------------------------------------------------------


def three(fabric: Any, folder: Path) -> list[Path]:
    state = make_state(fabric, steps=0)
    paths = []
    for _ in range(3):
        train_step(fabric, state)
        paths.append(save(fabric, folder, state))
    return paths


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def edit_marker(path: Path, **values: Any) -> None:
    marker = path.with_suffix(".json")
    marker.write_text(json.dumps({**json.loads(marker.read_text()), **values}))


def drop_from_marker(path: Path) -> None:
    marker = path.with_suffix(".json")
    marker.write_text(
        json.dumps({key: value for key, value in json.loads(marker.read_text()).items() if key != "step"})
    )


DAMAGE = {
    "truncated": (truncate, "bytes, its marker says"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes, its marker says"),
    "one bit": (flip_a_bit, "SHA-256 differs"),
    "marker cut": (lambda path: truncate(path.with_suffix(".json")), "its marker iter-000012-ckpt.json is damaged"),
    "marker without a key": (drop_from_marker, "'step' is missing"),
    "marker with a wrong type": (lambda path: edit_marker(path, size="big"), "size is 'big'"),
    "marker of a later version": (lambda path: edit_marker(path, format=2), "format 2, expected 1"),
    "truncated, no marker": (
        lambda path: (truncate(path), path.with_suffix(".json").unlink()),
        "no completion marker, and",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "its marker says"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_broken_one_is_skipped_and_named(fabric: Any, tmp_path: Path, case: str) -> None:
    paths = three(fabric, tmp_path)
    damage, reason = DAMAGE[case]
    damage(paths[2])  # type: ignore[operator]
    info, lines = newest(tmp_path)
    assert info is not None and info.path == paths[1] and info.step == 2
    assert len(lines) == 1 and str(paths[2]) in lines[0] and reason in lines[0] and "\n" not in lines[0]
    with pytest.raises((ValueError, FileNotFoundError), match="cannot be used|holds no complete checkpoint"):
        run_files.open_checkpoint(paths[2])


def test_nothing_complete(fabric: Any, tmp_path: Path) -> None:
    assert newest(tmp_path / "missing") == (None, [])
    for path in three(fabric, tmp_path):
        truncate(path)
    info, lines = newest(tmp_path)
    assert info is None and len(lines) == 3
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        run_files.open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        run_files.open_checkpoint(tmp_path / "iter-000099-ckpt.pth")


def test_published_file_without_marker(fabric: Any, tmp_path: Path) -> None:
    state = make_state(fabric)
    content = {**state, "model": {f"_forward_module.{name}": value for name, value in weights_of(state).items()}}
    torch.save({**content, "optimizer": state["optimizer"].state_dict()}, tmp_path / "iter-000008-ckpt.pth")
    info, lines = newest(tmp_path)
    assert info is not None and info.sha256 is None and (info.step, info.iter_num) == (2, 8)
    assert len(lines) == 1 and "taken as a published checkpoint" in lines[0]
    assert run_record.differences(info.settings, {"batch_size": 8}) == []
    restored = make_state(fabric, seed=7, steps=0)
    saving.load_checkpoint(fabric, info, restored)
    assert_same(weights_of(state), weights_of(restored))
    torch.save({"model": {}}, tmp_path / "iter-000020-ckpt.pth")
    assert newest(tmp_path)[0] == info
    assert any("lacks optimizer, hparams, iter_num, step_count" in line for line in newest(tmp_path)[1])


def test_an_optimizer_stays_as_fast_as_it_is(fabric: Any, tmp_path: Path) -> None:
    """Published optimizers were not fused, and torch's take that from the file."""
    save(fabric, tmp_path, make_state(fabric, fused=False))
    for fused in (True, False):
        restored = make_state(fabric, seed=7, steps=0, fused=fused)
        saving.load_checkpoint(fabric, tmp_path, restored)
        assert [group["fused"] for group in restored["optimizer"].param_groups] == [fused]
        train_step(fabric, restored)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused(fabric: Any, tmp_path: Path, zipped: bool) -> None:
    path, trace = tmp_path / "iter-000008-ckpt.pth", tmp_path / "it-ran"
    state = make_state(fabric, steps=0)
    content = {**state, "model": weights_of(state), "optimizer": {}, "hparams": Malicious(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    info, lines = newest(tmp_path)
    assert info is None and "Python object" in lines[0] and "mkdir" in lines[0]
    with pytest.raises(ValueError, match="could run code"):
        torch_files.open_torch_file(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04nothing", b"\x80\x02}q\x00."], ids=repr)
def test_what_is_no_torch_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="some.pth is|some.pth holds") as raised:
        torch_files.open_torch_file(path)
    assert "\n" not in str(raised.value)


def test_another_model(fabric: Any, tmp_path: Path) -> None:
    path = save(fabric, tmp_path, make_state(fabric))
    module = TransEncoder(Config("wide", 1, 2, 32, 32, 2, block_size=16, vocab_size=50))
    model = fabric.setup_module(module)
    state = {"model": model, "optimizer": fabric.setup_optimizers(torch.optim.AdamW(model.parameters()))}
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[64, 16\], expected \[64, 32\]"):
        saving.load_checkpoint(fabric, path, state)


def test_saved_over_one_of_the_same_name(fabric: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames, one or the other is complete."""
    state = make_state(fabric)
    path = save(fabric, tmp_path, state)
    old, old_marker = path.read_bytes(), path.with_suffix(".json").read_bytes()
    train_step(fabric, state)
    state["iter_num"] = 8
    save(fabric, tmp_path, state)
    new = path.read_bytes()
    assert new != old and newest(tmp_path)[0].step == 3  # type: ignore[union-attr]
    path.write_bytes(old)
    path.with_suffix(".json").write_bytes(old_marker)
    code = SAVE_LOOP.replace("LOOP", f"state['iter_num'] = 8; stop_before_last_marker(Path({str(tmp_path)!r}), state)")
    run_child(code, tmp_path, expect=77)
    assert path.read_bytes() != old
    info, lines = newest(tmp_path)
    assert info is not None and not lines and info.sha256 == files.file_sha256(path)
    path.write_bytes(old)
    assert newest(tmp_path)[0].step == 2  # type: ignore[union-attr]


# --- kill -9, full disks, second writers --------------------------------------------------------------------------

SAVE_LOOP = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lit_gpt import files
from lit_gpt.training import strategies
from lit_gpt.checkpoints import run_files, saving
from tests.checkpoints.test_saving import make_state, train_step, save

fabric = strategies.start_fabric("cpu", "1", 1, "auto", "32-true")
state = make_state(fabric, steps=1)

def stop_before_last_marker(folder, state):
    # The kill is this process's own, at the one place that chance rarely hits.
    write = saving.write_json
    def write_or_die(path, value):
        if "successor" not in value:
            os._exit(77)
        write(path, value)
    saving.write_json = write_or_die
    save(fabric, folder, state)

LOOP
"""


def child(code: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run_child(code: str, folder: Path, expect: int = 0) -> str:
    process = child(code)
    out, err = process.communicate(timeout=120)
    assert process.returncode == expect, err
    return out


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """A process that saves in a loop is killed eight times; it is forked, so that torch is imported once."""
    loop = """
folder = Path(FOLDER)
for line in sys.stdin:
    saver = os.fork()
    if saver == 0:
        with files.folder_lock(folder):
            run_files.remove_temporary(folder)
            state["iter_num"] = int(line)
            while True:
                state["iter_num"] += 1
                save(fabric, folder, state, keep=2)
                if state["iter_num"] % 2:
                    save(fabric, folder, state, keep=2)  # over one of the same name
    print(saver, flush=True)
    os.waitpid(saver, 0)
    print("ended", flush=True)
"""
    chance, start = random.Random(3), 0
    with child(SAVE_LOOP.replace("LOOP", loop.replace("FOLDER", repr(str(tmp_path))))) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(8):
            print(start, file=process.stdin, flush=True)
            saver = int(process.stdout.readline())
            deadline = time.monotonic() + 60
            while not (tmp_path / f"iter-{start + 2:06d}-ckpt.pth").exists() and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.1))
            os.kill(saver, signal.SIGKILL)
            assert process.stdout.readline() == "ended\n"
            info, _ = newest(tmp_path)
            assert info is not None and info.iter_num > start
            assert info.sha256 is None or files.file_sha256(info.path) == info.sha256
            assert torch.load(info.path, weights_only=True)["iter_num"] == info.iter_num
            assert len(run_files.list_checkpoints(tmp_path)) <= 4
            start = info.iter_num
        process.stdin.close()
    run_files.remove_temporary(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    assert all(path.with_suffix(".json").exists() for path in run_files.list_checkpoints(tmp_path))


def test_full_disk(tmp_path: Path) -> None:
    """The system refuses to write on, in the middle of the file: one line, the last good one stays, nothing is left."""
    loop = f"""
import resource, signal
folder = Path({str(tmp_path)!r})
save(fabric, folder, state)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
train_step(fabric, state)
try:
    save(fabric, folder, state, keep=1)
except files.SaveError as error:
    print(error)
"""
    line = run_child(SAVE_LOOP.replace("LOOP", loop), tmp_path)
    assert line.count("\n") == 1 and "cannot write" in line and "iter-000008-ckpt.pth: File too large" in line
    assert "the last good checkpoint is" in line and "iter-000004-ckpt.pth" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter-000004-ckpt.json", "iter-000004-ckpt.pth"]
    assert newest(tmp_path)[0].step == 1  # type: ignore[union-attr]


def test_really_full_file_system(fabric: Any, tmp_path: Path) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(mounted)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small file system is not permitted here")
    try:
        state = make_state(fabric, steps=1)
        first = save(fabric, mounted, state)
        with pytest.raises(files.SaveError, match=r"No space left on device \(.* MB free\)"):
            for _ in range(3):
                train_step(fabric, state)
                save(fabric, mounted, state)
        assert newest(mounted)[0] is not None and first.exists()
        assert not list(mounted.glob("*.tmp"))
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_unwritable_folder(fabric: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(files.SaveError, match="cannot write into the folder .*file/run: "):
        files.make_folder(tmp_path / "file" / "run")
    with pytest.raises(files.SaveError, match="cannot write .*there is no earlier checkpoint"):
        save(fabric, tmp_path / "file" / "run", make_state(fabric))


def test_second_writer(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from lit_gpt.files import folder_lock
with folder_lock(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    process = child(code)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with (
            pytest.raises(files.FolderInUseError, match=f"{tmp_path} is in use by process {process.pid} on "),
            files.folder_lock(tmp_path, wait_s=0.1),
        ):
            pass
        assert files.lock_holder(tmp_path)["pid"] == process.pid  # type: ignore[index]
        process.kill()
        process.wait()
        with files.folder_lock(tmp_path, wait_s=5):
            assert files.lock_holder(tmp_path)["pid"] == os.getpid()  # type: ignore[index]
            with pytest.raises(files.FolderInUseError), files.folder_lock(tmp_path, wait_s=0):
                pass
        assert files.lock_holder(tmp_path) is None
        with files.folder_lock(tmp_path, wait_s=0):
            pass
    finally:
        process.kill()
        process.wait()


def test_forked_children_do_not_keep_the_lock(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from lit_gpt.files import folder_lock
with folder_lock(Path({str(tmp_path)!r})):
    if os.fork() == 0:
        sys.stdout.close()
        sys.stderr.close()
        time.sleep(3)
        os._exit(0)
    os.kill(os.getpid(), 9)
"""
    run_child(code, tmp_path, expect=-9)
    with files.folder_lock(tmp_path, wait_s=0.5):
        pass


def test_leftovers_are_removed(tmp_path: Path) -> None:
    for name in ("iter-000004-ckpt.pth.0a1b2c3d.tmp", "run.json.ffff0000.tmp", "iter-000008-ckpt.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "run.json").write_text("{}")
    run_files.remove_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_whole_file_that_only_lacks_its_marker_gets_one(fabric: Any, tmp_path: Path) -> None:
    paths = three(fabric, tmp_path)
    marker = paths[0].with_suffix(".json")
    before = marker.read_text()
    marker.unlink()
    published = tmp_path / "iter-000001-ckpt.pth"
    torch.save({"model": {}, "optimizer": {}, "hparams": {}, "iter_num": 1, "step_count": 1}, published)
    run_files.remove_temporary(tmp_path)
    assert marker.read_text() == before
    assert published.exists() and not published.with_suffix(".json").exists()


def test_run_record(tmp_path: Path) -> None:
    assert run_record.read_run_record(tmp_path) == {}
    run_record.write_run_record(tmp_path, {"run_id": "a", "result": {"val_loss": 3.5}})
    run_record.write_run_record(tmp_path, {"run_id": "a", "finished": True})
    assert run_record.read_run_record(tmp_path) == {"run_id": "a", "finished": True}
    (tmp_path / "run.json").write_text('{"run_id": ')
    with pytest.raises(ValueError, match="run.json is not readable as JSON"):
        run_record.read_run_record(tmp_path)


# --- several processes --------------------------------------------------------------------------------------------

ACROSS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lit_gpt import files
from lit_gpt.training import strategies
from lit_gpt.checkpoints import run_files, saving
from tests.checkpoints.test_saving import make_state, train_step, save

strategy, folder = sys.argv[1], Path(sys.argv[2])
fabric = strategies.start_fabric("cpu", "2", 1, strategy, "32-true")
state = make_state(fabric, seed=5, steps=0)
rest = saving.load_checkpoint(fabric, folder / "one", state)
state.update(step_count=rest["step_count"], iter_num=rest["iter_num"])
save(fabric, folder / "again", state)
train_step(fabric, state)
save(fabric, folder / "after", state)
try:
    save(fabric, folder / "file" / "run", state)
except files.SaveError as error:
    print("refused", fabric.global_rank, flush=True)
saving.load_checkpoint(fabric, folder / "slow", state)
assert all(group["fused"] for group in state["optimizer"].param_groups)
"""


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_one_strategys_checkpoint_is_anothers(fabric: Any, tmp_path: Path, strategy: str) -> None:
    """Saved by one process, restored and saved by two, restored by one: each goes on as the unbroken run does.

    FSDP2 keeps the optimizer's state by name, other strategies by number. A save that fails on the first process fails
    on both, and none hangs.
    """
    (tmp_path / "file").write_text("")
    for folder in ("one", "again", "after", "slow"):
        (tmp_path / folder).mkdir()
    save(fabric, tmp_path / "slow", make_state(fabric, fused=False))
    unbroken = make_state(fabric, steps=2)
    save(fabric, tmp_path / "one", unbroken)
    before = weights_of(unbroken)
    train_step(fabric, unbroken)
    (tmp_path / "across.py").write_text(ACROSS)
    done = run_python(ROOT, tmp_path / "across.py", strategy, tmp_path)
    assert done.stdout.count("refused") == 2
    after = torch.load(tmp_path / "after" / "iter-000012-ckpt.pth", weights_only=True)["model"]
    restored = make_state(fabric, seed=7, steps=0)
    rest = saving.load_checkpoint(fabric, tmp_path / "again", restored)
    assert_same(weights_of(restored), before)
    restored.update(step_count=rest["step_count"], iter_num=rest["iter_num"])
    train_step(fabric, restored)
    assert_same(weights_of(restored), weights_of(unbroken))
    for name, value in weights_of(unbroken).items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-7)


# --- settings and names -------------------------------------------------------------------------------------------


def test_differences() -> None:
    saved = {"batch_size": 256, "model": {"n_layer": 6, "name": "a"}, "betas": (0.9, 0.95), "seed": 1, "flag": True}
    current = {
        "batch_size": 128,
        "model": {"n_layer": 6, "name": "b"},
        "betas": [0.9, 0.95],
        "lr": None,
        "flag": 1,
        "seed": 1.0,
    }
    assert run_record.differences(saved, current) == [
        "batch_size: checkpoint 256, now 128",
        "flag: checkpoint True, now 1",
        "lr: checkpoint does not have it, now none",
        "model.name: checkpoint a, now b",
    ]
    assert run_record.differences({}, current) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=4), json_values, max_size=5))
def test_a_settings_record_does_not_differ_from_its_json(values: dict[str, Any]) -> None:
    assert run_record.differences(json.loads(json.dumps(values)), values) == []


def test_export_names() -> None:
    big, small = Config.from_name(1028), Config.from_name(6)
    odd = Config.from_name(6, n_layer=2, n_embd=128, n_head=2, n_query_groups=2, intermediate_size=384)
    table = {
        "ar-1028M-100e18": export_name("arm", big, 100.0),
        "mdm-1028M-1600e18": export_name("mdm", big, 1600.0),
        "mdm-1028M-3300e18-rsl-0.01-bs-1024": export_name("mdm", big, 3300.0, 0.01, 1024),
        "mdm-1028M-3300e18-rsl-0.01-bs-1024-reverse": export_name("mdm", big, 3300.0, 0.01, 1024, "reverse"),
        "ar-1028M-100e18-sharegpt": export_name("arm", big, 100.0, suffix="sharegpt"),
        "mdm-6M-1e13": export_name("mdm", small, 1e-5),
        "mdm-6M-9.99e15": export_name("mdm", small, 0.00999),
        "mdm-6M-0.01e18": export_name("mdm", small, 0.01),
        "mdm-6M-0.1e18-bs-64": export_name("mdm", small, 0.1, global_batch_size=64),
        "mdm-0.427M-2.5e15": export_name("mdm", odd, 0.0025),
        "mdm-6M-2e24": export_name("mdm", small, 2e6),
    }
    assert {wanted: got for wanted, got in table.items() if wanted != got} == {}


def test_run_names() -> None:
    assert run_name("arm", Config.from_name(1028), 100) == "arm-1028M-100.0"
    assert run_name("mdm", Config.from_name(170), 10.0) == "mdm-170M-10.0"
    assert run_name("mdm", Config.from_name(170), 60.0, 0.01) == "mdm-170M-60.0-ssl-0.01"


def test_torch_load_is_always_weights_only() -> None:
    """No file of the package reads a torch file in a way that could run what is in it."""
    found = 0
    for path in [*ROOT.glob("lit_gpt/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("pretrain/*.py")]:
        text = path.read_text()
        assert "pickle.load" not in text, path
        for call in text.split("torch.load(")[1:]:
            found += 1
            assert "weights_only=True" in call.split(")")[0], path
    assert found
