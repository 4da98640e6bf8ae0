"""The settings of `sampling.Sampling` as flags of a script or fields of a form, so that a new one appears by itself.

Decisions: they are read from the source of `sampling`, not from the class: importing it loads torch, which `--help` must
not wait for. What a script decides itself (`OWN`) is left out. Imports nothing of the package.
"""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any

OWN = ("context_length", "stop_id")
"""Settings that follow from the model, the prompt and the tokenizer."""


@dataclass(frozen=True)
class Setting:
    """One field of `Sampling`."""

    name: str
    type: str
    """As written there, such as `float`."""
    default: Any
    help: str
    """Its docstring; it begins with `MDM: ` or `ARM: ` where only that kind of model has a use for it."""

    @property
    def kind(self) -> str | None:
        """`mdm` or `arm` where only that kind has a use for it."""
        return next((kind for kind in ("mdm", "arm") if self.help.startswith(f"{kind.upper()}:")), None)


@cache
def settings() -> tuple[Setting, ...]:
    """The fields of `Sampling` with a default, but `OWN`, in their order."""
    tree = ast.parse(Path(__file__).with_name("settings.py").read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Sampling")
    found = []
    for node, after in zip(body, body[1:], strict=False):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            continue
        is_help = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        text = " ".join(str(ast.literal_eval(after.value)).split()) if is_help else ""  # type: ignore[attr-defined]
        if node.target.id not in OWN:
            found.append(Setting(node.target.id, ast.unparse(node.annotation), ast.literal_eval(node.value), text))
    return tuple(found)


def with_sampling(flags: type) -> type:
    """A dataclass of flags with the sampling settings behind its own."""
    fields = [(one.name, one.type, field(default=one.default)) for one in settings()]
    result = make_dataclass(flags.__name__, fields, bases=(flags,))
    lines = "".join(f"    {one.name}: {one.help}\n" for one in settings())
    result.__doc__ = f"{flags.__doc__}\n\nArgs:\n{lines}"
    return result


def chosen(flags: Any) -> dict[str, Any]:
    """The sampling settings among parsed flags, as keywords of `Sampling`."""
    values = asdict(flags)
    return {one.name: values[one.name] for one in settings()}


def unused(flags: Any, kind: str) -> list[str]:
    """Names of settings that were changed and that this kind of model (`arm`, `mdm`) has no use for."""
    return [one.name for one in settings() if one.kind not in (None, kind) and getattr(flags, one.name) != one.default]
