"""Every command of the documents: its flags exist, and it runs, the short ones here and the long ones by -m slow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documented_commands import KINDS, ROOT, Block, check_command, command_blocks, marked_blocks
from tests.support.small_models import export_arm_and_mdm

BLOCKS = command_blocks()
CODE = [block for block in marked_blocks() if block.kind in ("file", "patch")]
WITH_CODE = sorted({block.document for block in CODE})
RUN = [block for block in BLOCKS if block.kind == "run" and block.document not in WITH_CODE]
SLOW_DOCUMENTS = sorted({block.document for block in BLOCKS if block.kind in ("run", "slow")} - set(WITH_CODE))
# Lines of code on a page about how to add something.
MOST_CODE = 60
# What the quickstart's commands leave behind, by the names in the documents.
QUICKSTART_MODELS = {
    "arm": "quickstart/arm/model/ar-1.05M-1.55e13-bs-16.safetensors",
    "mdm": "quickstart/mdm/model/mdm-1.05M-1.55e13-bs-16.safetensors",
}


def named(block: Block) -> str:
    return f"{block.document}:{block.line}"


def make_workspace(folder: Path, copied: tuple[str, ...] = ("data", "docs")) -> Path:
    """A folder that looks like the repository, in which commands may write; what is not copied must stay as it is."""
    for path in ROOT.iterdir():
        if path.name in copied:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not path.name.startswith(".") and path.name not in ("build", "models", "out", "quickstart", "workdir"):
            (folder / path.name).symlink_to(path)
    return folder


def run_block(block: Block, folder: Path, substituted: bool, timeout: int) -> None:
    """Run a block as a user's shell does, where an activated environment is first on the path."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
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


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.document not in WITH_CODE], ids=named)
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
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's models by their names, but tiny and with random weights."""
    folder = tmp_path_factory.mktemp("models")
    made = export_arm_and_mdm(folder / "made", block_size=512)
    for kind, name in QUICKSTART_MODELS.items():
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(made[kind], folder / name)
    return folder / "quickstart"


def test_short_commands_run(tmp_path: Path, small_models: Path):
    """In the order of the documents, in one folder; equal scripts once."""
    folder = make_workspace(tmp_path)
    shutil.copytree(small_models, folder / "quickstart")
    done = set()
    for block in RUN:
        script = block.script(substituted=True)
        if script not in done:
            run_block(block, folder, substituted=True, timeout=300)
        done.add(script)


@pytest.mark.parametrize("document", WITH_CODE)
def test_code_that_a_page_adds_runs(document: str, tmp_path: Path, small_models: Path):
    """The page's files are written and its lines are added to a copy of the code; then its commands are run."""
    pieces = [block for block in CODE if block.document == document]
    lines = sum(len(piece.text.splitlines()) for piece in pieces)
    assert lines < MOST_CODE, f"{document} shows {lines} lines of code"
    folder = make_workspace(tmp_path, ("data", "docs", "lit_gpt", "pretrain", "scripts"))
    shutil.copytree(small_models, folder / "quickstart")
    for piece in pieces:
        piece.change_code(folder)
    for block in BLOCKS:
        if block.document == document and block.kind == "run":
            run_block(block, folder, substituted=True, timeout=300)


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
