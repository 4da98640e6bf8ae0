"""Import paths that users' scripts contain, and the package as somebody else installs it."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_published_import_paths():
    import lit_gpt
    from lit_gpt import GPT, Config, Tokenizer, TransEncoder
    from lit_gpt.config import Config as ConfigByModule
    from lit_gpt.diffmodel import TransEncoder as TransEncoderByModule
    from lit_gpt.model import GPT as GPTByModule  # noqa: N811
    from lit_gpt.packed_dataset import PackedDatasetBuilder
    from lit_gpt.tokenizer import Tokenizer as TokenizerByModule

    assert GPT is GPTByModule and Config is ConfigByModule
    assert TransEncoder is TransEncoderByModule and Tokenizer is TokenizerByModule
    assert PackedDatasetBuilder.__module__ == "lit_gpt.data.packed_format"
    assert {"GPT", "TransEncoder", "Config", "Tokenizer"} <= set(dir(lit_gpt))
    with pytest.raises(AttributeError):
        lit_gpt.nothing_of_this_name  # noqa: B018


def test_a_wheel_holds_every_module(tmp_path):
    """Built, installed without what it needs into an empty environment that sees ours, and every module imported there."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    copy = tmp_path / "source"
    copy.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.split("\n"):
        if name.startswith(("lit_gpt/", "pyproject.toml", "README.md", "LICENSE")) and (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(build, cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "lit_gpt/ui/page.html" in zipfile.ZipFile(wheel).namelist()
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "lit_gpt").rglob("*.py"))
    ]
    # What the package needs is taken from here: only the package itself must come from the wheel.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        "import sys, importlib; sys.path += sys.argv[1].split(':'); "
        "found = [importlib.import_module(name).__file__ for name in sys.argv[2:]]; "
        f"assert all(file.startswith({site!r}) for file in found), found"
    )
    run = subprocess.run(
        [python, "-I", "-c", code, ":".join(ours), *modules], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
