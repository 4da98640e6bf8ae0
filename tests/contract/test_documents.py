"""What the documents say about the code, held against the code: files that exist, functions that are there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "data" / "README.md"]
LONGEST_README = 150
# What commands write, or users bring.
ELSEWHERE = (
    "quickstart/",
    "build/",
    "models/",
    "workdir/",
    "out/",
    "data/fineweb/",
    "data/reverse_experiments/",
    "data/mt_bench/",
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(document):
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)*[\w-]+\.(?:py|sh|md|toml|html|yaml))`", text))
    named |= set(re.findall(r"\]\((?!http|#)([^)#]+)\)", text))
    # What a page has the reader write.
    named -= set(re.findall(r"<!-- file: (\S+) -->", text))
    assert named or document.name not in ("README.md", "architecture.md", "CONTRIBUTING.md")
    bases = (ROOT, document.parent, ROOT / "lit_gpt", *(ROOT / name for name in ("pretrain", "sft", "eval", "scripts")))
    missing = [
        name
        for name in sorted(named)
        if not name.startswith(ELSEWHERE)
        and not any((base / name).exists() for base in bases)
        # A module's own name is enough where its folder was just said.
        and not ("/" not in name and any((ROOT / "lit_gpt").rglob(name)))
    ]
    assert not missing, f"{document.name} names what is not there: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_functions_exist(document):
    """`path.py`: `function` or `path.py`: `Class.method`."""
    for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, |))+)", document.read_text(encoding="utf-8")):
        file = next(base / path for base in (ROOT, ROOT / "lit_gpt") if (base / path).exists())
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for name in re.findall(r"`([\w.]+)`", names):
            scope: list[ast.stmt] = tree.body
            for part in name.split("."):
                found = [node for node in scope if getattr(node, "name", None) == part]
                assert found, f"{document.name}: {path} has no {name}"
                scope = found[0].body if hasattr(found[0], "body") else []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < LONGEST_README


def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path):
    """Every page is in the table of contents and every link leads somewhere: Sphinx warns otherwise."""
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-c", "docs", "."]
    built = subprocess.run([*command, tmp_path / "site"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = [
        tmp_path / "site" / page.relative_to(ROOT).with_suffix(".html")
        for page in DOCUMENTS
        if page.name != "README.md"
    ]
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"(?:https?:)?//[^\"]*", html)
        assert not loaded, f"{page.name} loads {loaded}"
    assert "<math" in (tmp_path / "site/docs/likelihood.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"[\w./-]+/[\w.-]*\.(?:py|sh|yaml)\b|\b[\w/]+/(?=`)", GUIDE))))
def test_files_and_folders_that_the_guide_names_exist(path):
    assert (ROOT / path).exists() or (ROOT / "lit_gpt" / path).is_dir(), path
