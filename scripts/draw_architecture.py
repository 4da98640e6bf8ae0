"""Draw the departments of `lit_gpt/` and what they import, read from the source: docs/pictures/architecture.png.

    python scripts/draw_architecture.py                          # draw the picture again, after modules were moved
    python scripts/draw_architecture.py --output /tmp/now.png    # somewhere else

A box is a department (a folder of `lit_gpt/`) with its modules and the number of imports, for types too, that lead to other
departments. Every department may import the ground, so those are not counted. tests/test_structure.py holds the rule.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up: a department imports its own modules, the ground, and departments of rows below its own.
# `checkpoints` is above `likelihood` and `sampling` because the model that `load_model` opens offers both.
ROWS = (("model", "data"), ("likelihood", "sampling"), ("checkpoints",), ("training", "evaluation", "ui"), ("studies",))
# Import paths that users' scripts contain, beside the modules that they lead to.
PUBLISHED_PATHS = {"diffmodel": "model.bidirectional", "packed_dataset": "data.packed_format"}
GROUND = "ground"
_COLORS = {GROUND: "#e8e4dc", "model": "#cfe2f3", "data": "#d9ead3", "likelihood": "#fff2cc", "sampling": "#fce5cd"}
_COLORS |= {
    "checkpoints": "#ead1dc",
    "training": "#d0e0e3",
    "evaluation": "#d9d2e9",
    "ui": "#f4cccc",
    "studies": "#e6e0c8",
}
_LINE_HEIGHT = 0.2  # of a module's name in a box, in the picture's units
_WIDTH = 12.0
_CHARACTER_WIDTH = 0.068  # of a letter of the captions, at most


@dataclass
class Flags:
    """Flags of the drawing."""

    output: str = "docs/pictures/architecture.png"
    """Where the picture goes."""


def main() -> None:
    """Read the imports, draw."""
    flags = parse(Flags, None, __doc__)
    draw(package_modules(), ROOT / flags.output)
    print(flags.output)


def package_modules() -> dict[str, Path]:
    """Every module of `lit_gpt` by its dotted name below the package, packages as `model.__init__`."""
    folder = ROOT / "lit_gpt"
    return {".".join(path.relative_to(folder).with_suffix("").parts): path for path in sorted(folder.rglob("*.py"))}


def syntax_tree(path: Path) -> ast.Module:
    """A parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(node: ast.AST, into_functions: bool = True, types: bool = False) -> Iterator[str]:
    """Dotted names that a tree imports, `from a import b` as `a.b`.

    Args:
        node: the tree.
        into_functions: whether imports inside functions count.
        types: whether imports under `if TYPE_CHECKING:` count, which never happen.
    """
    for child in ast.iter_child_nodes(node):
        if _for_types_only(child) and not types:
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not into_functions:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child, into_functions, types)


def _for_types_only(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_modules(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of `lit_gpt` that a file imports anywhere, for types too; imports of `lit_gpt` itself do not count."""
    found = set()
    for name in imports(syntax_tree(path), types=True):
        parts = name.split(".")
        if parts[0] != "lit_gpt" or len(parts) == 2 and parts[1] not in modules:
            continue
        prefixes = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
        module = next((prefix for prefix in prefixes if prefix in modules), None)
        assert module is not None, f"{path.name} imports {name}: name the module that it is defined in"
        found.add(module)
    return found


def department(module: str) -> str:
    """The department of a module; `ground` for the files of `lit_gpt/` itself."""
    return module.split(".")[0] if "." in module else GROUND


def draw(modules: dict[str, Path], output: Path) -> None:
    """The departments from the ground up, each with what it imports of the others and how often."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    named = [name for name in modules if not name.endswith("__init__") and name not in PUBLISHED_PATHS]
    places = _places(named)
    height = max(bottom + tall for _, bottom, _, tall in places.values()) + 0.2
    figure = Figure(figsize=(_WIDTH, height), dpi=90)
    FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(0, height)
    axes.axis("off")
    counts = Counter(
        (department(name), department(imported))
        for name in named
        for imported in imported_modules(modules[name], modules)
    )
    for name, place in places.items():
        below = [other for row in ROWS for other in row if other != name and counts[name, other]]
        used = "imports " + ", ".join(f"{other} {counts[name, other]}" for other in below) if below else ""
        _box(axes, name, used, place, [module for module in named if department(module) == name])
    arrow = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 2.5}
    axes.annotate("", xy=(0.3, 0.3), xytext=(0.3, height - 0.3), arrowprops=arrow)
    axes.text(0.14, height / 2, "imports go down only", rotation=90, fontsize=11, va="center", ha="center")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Software": None})


Place = tuple[float, float, float, float]
"""Left, bottom, width and height of a box."""


def _places(named: list[str]) -> dict[str, Place]:
    """Where the boxes stand: the ground at the bottom, one row of boxes above the other."""
    counts = Counter(department(name) for name in named)
    places: dict[str, Place] = {}
    left, bottom = 0.55, 0.2
    for row in ((GROUND,), *ROWS):
        width = (_WIDTH - left - 0.2 - 0.2 * (len(row) - 1)) / len(row)
        tall = max(1.0 + _LINE_HEIGHT * -(-counts[name] // _columns(width)) for name in row)
        for index, name in enumerate(row):
            places[name] = (left + index * (width + 0.2), bottom, width, tall)
        bottom += tall + 0.2
    return places


def _columns(width: float) -> int:
    """Columns of module names in a box."""
    return int(width // 1.75)


def _box(axes: Any, name: str, used: str, place: Place, modules: list[str]) -> None:
    """A department with its name, what it imports, and its modules in columns."""
    from matplotlib.patches import Rectangle

    left, bottom, width, tall = place
    axes.add_patch(Rectangle((left, bottom), width, tall, facecolor=_COLORS[name], edgecolor="#555555"))
    title = "the ground: everybody may import it" if name == GROUND else f"{name}/"
    top = bottom + tall
    axes.text(left + 0.12, top - 0.26, title, fontsize=12, fontweight="bold")
    caption = textwrap.fill(used, int((width - 0.3) / _CHARACTER_WIDTH))
    axes.text(left + 0.15, bottom + 0.12, caption, fontsize=8, color="#444444", style="italic")
    columns = _columns(width)
    rows = -(-len(modules) // columns)
    for number, module in enumerate(modules):
        column, row = divmod(number, rows)
        x, y = left + 0.15 + column * width / columns, top - 0.55 - row * _LINE_HEIGHT
        axes.text(x, y, module.split(".", 1)[-1], fontsize=8.5)


if __name__ == "__main__":
    run(main)
