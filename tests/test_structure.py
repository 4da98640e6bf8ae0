"""The shape of the code, read from its source: what imports what, who may touch what, how long things are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = {path.stem: path for path in sorted((ROOT / "lit_gpt").glob("*.py")) if path.stem != "__init__"}
# Every script with its folder; modules of `lit_gpt` are below all of them.
SCRIPT_FOLDERS = ("pretrain", "sft", "eval", "scripts", "benchmarks")
SCRIPTS = [path for folder in SCRIPT_FOLDERS for path in sorted((ROOT / folder).glob("*.py"))] + sorted(
    ROOT.glob("*.py")
)
SOURCES = [*PACKAGE.values(), ROOT / "lit_gpt" / "__init__.py", *SCRIPTS]

# From the bottom up. A module imports only from rows above its own in this table, never from its own row or below.
LAYERS = [
    # Leaves: they know nothing else of the package.
    {
        "config",
        "noise",
        "schedule",
        "kernels",
        "cli",
        "files",
        "train_config",
        "tokenizer",
        "eval_args",
        "provenance",
        "token_list",
        "sampling_flags",
        "gsm8k",
        "reversal",
        "mt_bench",
        "mt_bench_table",
        "judge_client",
    },
    {"packed_format", "text_sources", "canvas", "algorithms", "drawing", "clock"},
    {"layers", "diffusion", "naming", "checkpoint_files", "packed_dataset", "sft_sources", "speed_monitor"},
    # What scripts besides training use, and nothing of the package above needs.
    {"launcher", "stages", "display", "preparation_plan", "eval_cache", "result_file", "judging"},
    {"model", "diffmodel", "runtime", "export", "batching", "preparation", "plots", "reading", "estimators"},
    {"block_cache", "denoising", "sft_dataset"},
    {"sampling", "scoring", "objectives", "checkpoint"},
    {"likelihood", "infill"},
    {"weights", "validation"},
    {"run_folder", "describe", "completion"},
    {"trainer", "terminal", "lm_adapter"},
    {"pretraining", "finetuning", "lm_harness", "answering"},
]
LEAVES = LAYERS[0] | LAYERS[1]
LEVEL = {module: level for level, row in enumerate(LAYERS) for module in row}

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
    "jsonargparse",
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
    "flash_attn": {"kernels"},
    "xformers": {"kernels"},
    "sentencepiece": {"tokenizer"},
    "lm_eval": {"lm_harness", "lm_adapter"},
}
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
MOST_ARGUMENTS = 6
ids = {"ids": lambda value: value.stem if isinstance(value, Path) else str(value)}


def tree(path: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def for_types_only(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`, whose imports never happen."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node: ast.AST, into_functions: bool = True) -> Iterator[str]:
    """Dotted names that a tree imports, `from a import b` as `a.b`."""
    for child in ast.iter_child_nodes(node):
        if for_types_only(child) or (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not into_functions):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child, into_functions)


def of_package(path: Path) -> set[str]:
    """Modules of `lit_gpt` that a file imports; `__init__`'s names count as their modules."""
    homes = {"GPT": "model", "Config": "config", "Tokenizer": "tokenizer", "TransEncoder": "diffmodel"}
    parts = [name.split(".") for name in imports(tree(path)) if name.split(".")[0] == "lit_gpt"]
    return {homes.get(name[1], name[1]) for name in parts if len(name) > 1}


@pytest.mark.parametrize("module", PACKAGE, **ids)
def test_imports_go_down_only(module):
    assert module in LEVEL, f"new module: put {module} into its row of LAYERS"
    for imported in of_package(PACKAGE[module]):
        assert LEVEL[imported] < LEVEL[module], f"{module} may not import {imported}"
    if module in LEAVES:
        assert not of_package(PACKAGE[module])


def test_the_table_lists_nothing_else():
    assert set(LEVEL) == set(PACKAGE)
    assert sum(len(row) for row in LAYERS) == len(LEVEL)


@pytest.mark.parametrize("path", SCRIPTS, **ids)
def test_scripts_do_not_import_scripts(path):
    own_folder = path.parent.name if path.parent.name == "benchmarks" else None
    names = {script.stem for script in SCRIPTS if script.parent.name != own_folder} | set(SCRIPT_FOLDERS) - {own_folder}
    assert not names & {name.split(".")[0] for name in imports(tree(path))}


@pytest.mark.parametrize("path", SOURCES, **ids)
def test_slow_libraries_are_imported_late(path):
    if path.parent.name != "benchmarks":
        assert not LATE & {name.split(".")[0] for name in imports(tree(path), into_functions=False)}


@pytest.mark.parametrize("path", SCRIPTS, **ids)
def test_scripts_show_help_without_torch(path):
    if path.parent.name == "benchmarks":
        pytest.skip("benchmarks compare libraries, and load them")
    quick = {"config", "cli", "train_config", "eval_args", "schedule", "naming"}
    early = {name for name in imports(tree(path), into_functions=False)}
    assert "torch" not in {name.split(".")[0] for name in early}
    assert {name.split(".")[1] for name in early if name.startswith("lit_gpt.")} <= quick


@pytest.mark.parametrize("library", HOMES)
def test_libraries_have_one_home(library):
    users = {path.stem for path in SOURCES if library in {name.split(".")[0] for name in imports(tree(path))}}
    assert users <= HOMES[library] | {"train_tokenizer"}


def test_import_costs_nothing():
    code = (
        "import sys, lit_gpt; from lit_gpt import GPT, Config, Tokenizer, TransEncoder; print(*sys.modules, sep='\\n')"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not LATE & set(found.split())


def test_cli_and_settings_need_no_torch():
    code = "import sys, lit_gpt, lit_gpt.cli, lit_gpt.config, lit_gpt.train_config; print(*sys.modules, sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not (LATE | {"torch", "numpy"}) & set(found.split())


def test_the_loop_knows_no_kind_and_no_task():
    for module in ("trainer", "run_folder", "validation"):
        words = re.findall(r"(?<![a-z])(mdm|arm|gsm8k|reverse)(?![a-z])", PACKAGE[module].read_text().lower())
        assert not words, f"{module} says {words}"


@pytest.mark.parametrize("path", SOURCES, **ids)
def test_nothing_is_unpickled(path):
    for node in ast.walk(tree(path)):
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
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, **ids)
def test_functions_take_few_arguments(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            assert count <= MOST_ARGUMENTS, f"{path.name}: {node.name} takes {count} arguments"


@pytest.mark.parametrize("module", PACKAGE, **ids)
def test_modules_say_what_they_are(module):
    assert len(ast.get_docstring(tree(PACKAGE[module])) or "") > 80


def test_tests_and_modules_have_no_paths_of_one_machine():
    patterns = re.compile(r"/home/\w|/Users/\w|/root/|/work/")
    for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]:
        if path != Path(__file__).resolve():
            assert not patterns.search(path.read_text(encoding="utf-8")), path
