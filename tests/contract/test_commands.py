"""Every command of the documents: its flags exist, and it runs, the short ones here and the long ones by -m slow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documented_commands import KINDS, ROOT, Block, check_command, command_blocks
from tests.support.small_models import export_arm_and_mdm

BLOCKS = list(command_blocks())
RUN = [block for block in BLOCKS if block.kind == "run"]
SLOW_DOCUMENTS = sorted({block.document for block in BLOCKS if block.kind in ("run", "slow")})
# What the quickstart's commands leave behind, by the names in the documents.
QUICKSTART_MODELS = {
    "arm": "quickstart/arm/model/ar-1.05M-1.55e13-bs-16.safetensors",
    "mdm": "quickstart/mdm/model/mdm-1.05M-1.55e13-bs-16.safetensors",
}


def named(block: Block) -> str:
    return f"{block.document}:{block.line}"


def make_workspace(folder: Path) -> Path:
    """A folder that looks like the repository, in which commands may write."""
    for path in ROOT.iterdir():
        if path.name == "data":
            shutil.copytree(path, folder / "data")
        elif not path.name.startswith(".") and path.name not in ("build", "models", "out", "quickstart", "workdir"):
            (folder / path.name).symlink_to(path)
    return folder


def run_block(block: Block, folder: Path, substituted: bool, timeout: int) -> None:
    """Run a block as a user's shell does, where an activated environment is first on the path."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # Results that an earlier run has kept must not stand in for this one.
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1" if substituted else "2",
    }
    command = ["bash", "-euo", "pipefail", "-c", block.script(substituted)]
    process = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )
    assert process.returncode == 0, f"{named(block)}\n{block.text}\n{process.stdout}\n{process.stderr}"


def test_every_command_says_what_is_done_with_it():
    unsaid = [named(block) for block in BLOCKS if block.kind not in KINDS]
    assert not unsaid, f"write <!-- commands: run|slow|read, WHY --> before the fences of {unsaid}"
    without_reason = [named(block) for block in BLOCKS if block.kind == "read" and not block.note]
    assert not without_reason, f"say why these are only read: {without_reason}"


@pytest.mark.parametrize("block", BLOCKS, ids=named)
def test_scripts_and_flags_exist(block: Block, monkeypatch: pytest.MonkeyPatch):
    commands = block.commands()
    assert commands
    for words in commands:
        check_command(words, monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        ["python", "pretrain/train_mdm.py", "--no_such_flag", "1"],
        ["lightning", "run", "model", "--devices=2", "pretrain/train_ar.py", "--max_steps", "six"],
        ["python", "evaluate_diff.py", "--taskz", "next_line"],
        ["./quickstart.sh", "--no_such_flag", "1"],
    ],
    ids=lambda words: words[-2],
)
def test_a_wrong_flag_is_noticed(words: list[str], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit) as end:
        check_command(words, monkeypatch)
    assert end.value.code == 2


@pytest.fixture(scope="module")
def small_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's models are tiny ones with random weights here; packed Shakespeare lies in workdir/data."""
    folder = make_workspace(tmp_path_factory.mktemp("commands"))
    made = export_arm_and_mdm(folder / "made", block_size=512)
    for kind, name in QUICKSTART_MODELS.items():
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(made[kind], folder / name)
    return folder


def test_short_commands_run(small_workspace: Path):
    """In the order of the documents, in one folder; equal scripts once."""
    done = set()
    for block in RUN:
        script = block.script(substituted=True)
        if script not in done:
            run_block(block, small_workspace, substituted=True, timeout=120)
        done.add(script)


@pytest.fixture(scope="module")
def quickstart_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart has run as users start it, but for the set-up."""
    folder = make_workspace(tmp_path_factory.mktemp("commands"))
    subprocess.run([sys.executable, "scripts/quickstart.py"], cwd=folder, check=True, timeout=1800)
    assert all((folder / name).is_file() for name in QUICKSTART_MODELS.values())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("document", SLOW_DOCUMENTS)
def test_commands_run_as_they_stand(document: str, quickstart_workspace: Path):
    for block in BLOCKS:
        if block.document == document and block.kind in ("run", "slow"):
            run_block(block, quickstart_workspace, substituted=block.kind == "slow", timeout=3600)
