"""The shape of the code, read from its source: what imports what, who may touch what, how long things are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.draw_architecture import (
    GROUND,
    PUBLISHED_PATHS,
    ROWS,
    department,
    imported_modules,
    imports,
    package_modules,
    syntax_tree,
)

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = package_modules()
# Every script with its folder; modules of `lit_gpt` are below all of them.
SCRIPT_FOLDERS = ("pretrain", "sft", "eval", "scripts", "benchmarks")
SCRIPTS = [path for folder in SCRIPT_FOLDERS for path in sorted((ROOT / folder).glob("*.py"))] + sorted(
    ROOT.glob("*.py")
)
SOURCES = [*PACKAGE.values(), *SCRIPTS]

# The rule of the house: a department imports its own modules, the ground, and the departments of rows below its own.
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
MOST_ON_THE_GROUND = 10
MODULES = sorted(set(PACKAGE) - set(PUBLISHED_PATHS) - {name for name in PACKAGE if name.endswith("__init__")})
IMPORTS = {module: imported_modules(PACKAGE[module], PACKAGE) for module in MODULES}

# A library that is slow to load, or compiled, is imported inside functions: `--help` and `import lit_gpt` stay quick.
LATE = {"lightning_fabric", "transformers", "sentencepiece", "tokenizers", "flash_attn", "xformers", "huggingface_hub"}
LATE |= {
    "datasets",
    "datatrove",
    "matplotlib",
    "pyarrow",
    "zstandard",
    "tensorboard",
    "wandb",
    "docstring_parser",
    "lm_eval",
    "litgpt",
    "math_verify",
    "nltk",
    "sympy",
    "openai",
    "anthropic",
}
# A library that one module alone may know.
HOMES = {
    "flash_attn": {"model.kernels"},
    "xformers": {"model.kernels"},
    "sentencepiece": {"tokenizer"},
    "lm_eval": {"evaluation.lm_harness", "evaluation.lm_adapter"},
}
# What scripts import before they have read their flags.
QUICK_MODULES = (
    "cli",
    "config",
    "data.preparation_settings",
    "training.settings",
    "evaluation.settings",
    "evaluation.mt_bench.settings",
    "sampling.settings",
    "studies.scaling_settings",
)
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
MOST_ARGUMENTS = 6
ids = {"ids": lambda value: value.stem if isinstance(value, Path) else str(value)}


@pytest.mark.parametrize("module", MODULES)
def test_departments_import_downwards(module):
    own = department(module)
    for imported in IMPORTS[module]:
        theirs = department(imported)
        assert imported not in PUBLISHED_PATHS, f"{imported} is a published path: import {PUBLISHED_PATHS[imported]}"
        if theirs in (GROUND, own):
            continue
        assert own != GROUND, f"{module} is on the ground and may not import {imported}"
        assert ROW[theirs] < ROW[own], f"{module} may not import {imported}: {own} is not above {theirs}"


def test_no_circles():
    remaining = {module: set(imported) for module, imported in IMPORTS.items()}
    while done := {module for module, imported in remaining.items() if not imported & remaining.keys()}:
        remaining = {module: imported for module, imported in remaining.items() if module not in done}
    assert not remaining, f"a circle among {sorted(remaining)}"


def test_every_folder_is_a_department_and_the_ground_is_small():
    folders = {path.name for path in (ROOT / "lit_gpt").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(ROW)
    assert len([module for module in MODULES if department(module) == GROUND]) <= MOST_ON_THE_GROUND


@pytest.mark.parametrize("name", [name for name in PACKAGE if name.endswith(".__init__")])
def test_packages_hold_a_purpose_and_nothing_else(name):
    source = syntax_tree(PACKAGE[name])
    assert ast.get_docstring(source)
    # `lit_gpt.model.GPT` is published: looked up by name.
    assert len(source.body) == 1 or name == "model.__init__"


def public_names(path: Path) -> set[str]:
    """Classes, functions and constants that a file defines for others."""
    found: set[str] = set()
    for node in syntax_tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_a_public_name_is_one_thing_in_the_whole_package():
    homes: dict[str, list[str]] = {}
    for module in MODULES:
        for name in public_names(PACKAGE[module]):
            homes.setdefault(name, []).append(module)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


@pytest.mark.parametrize("path", SCRIPTS, **ids)
def test_scripts_do_not_import_scripts(path):
    own_folder = path.parent.name if path.parent.name == "benchmarks" else None
    names = {script.stem for script in SCRIPTS if script.parent.name != own_folder} | set(SCRIPT_FOLDERS) - {own_folder}
    assert not names & {name.split(".")[0] for name in imports(syntax_tree(path))}


@pytest.mark.parametrize("path", SOURCES, **ids)
def test_slow_libraries_are_imported_late(path):
    if path.parent.name != "benchmarks":
        assert not LATE & {name.split(".")[0] for name in imports(syntax_tree(path), into_functions=False)}


@pytest.mark.parametrize("path", SCRIPTS, **ids)
def test_scripts_show_help_without_torch(path):
    if path.parent.name == "benchmarks":
        pytest.skip("benchmarks compare libraries, and load them")
    early = {name for name in imports(syntax_tree(path), into_functions=False)}
    assert "torch" not in {name.split(".")[0] for name in early}
    assert {name for name in early if name.startswith("lit_gpt.")} <= {
        f"lit_gpt.{module}.{name.rpartition('.')[2]}" for name in early for module in QUICK_MODULES
    }


@pytest.mark.parametrize("library", HOMES)
def test_libraries_have_one_home(library):
    users = {
        name for name, path in PACKAGE.items() if library in {name.split(".")[0] for name in imports(syntax_tree(path))}
    }
    users |= {path.stem for path in SCRIPTS if library in {name.split(".")[0] for name in imports(syntax_tree(path))}}
    assert users <= HOMES[library] | {"train_tokenizer"}


def test_import_costs_nothing():
    code = (
        "import sys, lit_gpt; from lit_gpt import GPT, Config, Tokenizer, TransEncoder; print(*sys.modules, sep='\\n')"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not LATE & set(found.split())


def test_cli_and_settings_need_no_torch():
    modules = QUICK_MODULES
    code = f"import sys, {', '.join(f'lit_gpt.{name}' for name in modules)}; print(*sys.modules, sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not (LATE | {"torch", "numpy"}) & set(found.split())


def test_the_loop_knows_no_kind_and_no_task():
    for module in ("training.loop", "training.run_folder", "training.validation"):
        words = re.findall(r"(?<![a-z])(mdm|arm|gsm8k|reverse)(?![a-z])", PACKAGE[module].read_text().lower())
        assert not words, f"{module} says {words}"


@pytest.mark.parametrize("path", SOURCES, **ids)
def test_nothing_is_unpickled(path):
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.module not in ("pickle", "cloudpickle", "dill", "joblib", "shelve")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            # The name of its exception is all that anybody needs of pickle.
            assert node.value.id != "pickle" or node.attr == "UnpicklingError", f"line {node.lineno}: {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", f"line {node.lineno}: torch.load without weights_only"
            if called in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}: numpy may unpickle"
            assert called not in ("eval", "exec"), f"line {node.lineno}: {called}"


@pytest.mark.parametrize("path", SOURCES, **ids)
def test_files_and_functions_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{path.name} has {lines} lines"
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, **ids)
def test_functions_take_few_arguments(path):
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            assert count <= MOST_ARGUMENTS, f"{path.name}: {node.name} takes {count} arguments"


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_are(module):
    assert len(ast.get_docstring(syntax_tree(PACKAGE[module])) or "") > 80


def test_tests_and_modules_have_no_paths_of_one_machine():
    patterns = re.compile(r"/home/\w|/Users/\w|/root/|/work/")
    for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]:
        if path != Path(__file__).resolve():
            assert not patterns.search(path.read_text(encoding="utf-8")), path
