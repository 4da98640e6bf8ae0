"""The information about a file or folder (`info.path_info`) on the terminal: what is asked for most comes first.

Sizes have the unit that fits, counts have commas. Long values are left to the terminal to break, so that they can be
copied whole. Rich is imported when it is used.
"""

from __future__ import annotations

import sys
from typing import Any

_COUNTS = ("tokens", "total_tokens", "parameters", "non-embedding parameters", "tokens without padding")
# What a person looks for, in this order; the rest follows as it comes, and what only tells files apart ends the list.
_FIRST = ("what", "path", "kind", "model", "shape", "validation loss", "progress", "finished", "written by", "tokens")
_LAST = ("result", "tokenizer", "run", "config", "sha256")
_FIRST_SETTINGS = (
    "max_steps",
    "batch_size",
    "learning_rate",
    "min_lr",
    "warmup_steps",
    "weight_decay",
    "seed",
    "precision",
)


def print_info(info: dict[str, Any]) -> None:
    """Print names and values, nested ones indented below their name, then a line per checkpoint."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False, no_color=not sys.stdout.isatty())
    values = _arranged(info)
    flat = {name: _format_value(name, value) for name, value in values.items() if not isinstance(value, dict)}
    width = max(map(len, flat), default=0)
    for name, value in values.items():
        if not isinstance(value, dict):
            console.print(Text.assemble((name.ljust(width), "bold"), "  ", flat[name]))
            continue
        console.print(Text(name, "bold"))
        for line in _nested_lines(value):
            console.print(Text(f"  {line}"))
    for entry in info.get("checkpoints", []):
        step = f"step {entry['step']}, " if "step" in entry else ""
        console.print(Text(f"  {entry['file']}: {step}{_format_size(entry['size'])}, {entry['state']}"))


def _arranged(info: dict[str, Any]) -> dict[str, Any]:
    """The values without empty ones, in the order in which they are shown."""
    run = info.get("run") or {}
    values = {name: value for name, value in info.items() if name not in ("checkpoints", "run", "finished")}
    values["run"] = {name: value for name, value in run.items() if name not in ("settings", "result")}
    result = values["result"] = run.get("result") or {}
    settings = info.get("settings") or run.get("settings") or {}
    # The model is told above, as its shape and config.
    known = {name: value for name, value in settings.items() if name != "model" or not isinstance(value, dict)}
    order = [name for name in _FIRST_SETTINGS if name in known]
    values["settings"] = {name: known[name] for name in [*order, *(name for name in known if name not in order)]}
    values["validation loss"] = _validation(result)
    values["progress"] = _progress(info, settings)
    # A run folder of this project has a config; a damaged or foreign one says at least whether it is finished.
    if not values["progress"]:
        values["finished"] = info.get("finished")
    names = [*_FIRST, "settings"]
    names += [name for name in values if name not in (*names, *_LAST)] + list(_LAST)
    return {name: values[name] for name in names if values.get(name) not in (None, {}, [])}


def _validation(result: dict[str, Any]) -> str | None:
    """A run's last validation in one line; None without one."""
    loss, bits, perplexity = (result.get(f"val_{name}") for name in ("loss", "bits_per_byte", "ppl"))
    if not isinstance(loss, float):
        return None
    bound = "<= " if result.get("val_is_bound") else ""
    parts = [f"{bound}{loss:.4f} nats per token"]
    parts += [f"perplexity {bound}{perplexity:.4g}"] if isinstance(perplexity, float) else []
    parts += [f"{bound}{bits:.4f} bits per byte"] if isinstance(bits, float) else []
    return ", ".join(parts)


def _progress(info: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """How far a run is, from its folder's checkpoints; None for what is no run folder."""
    if "checkpoints" not in info:
        return None
    steps = [entry["step"] for entry in info["checkpoints"] if "step" in entry]
    if info.get("finished"):
        return f"finished at step {max(steps)}" if steps else "finished"
    if not steps or not isinstance(settings.get("max_steps"), int):
        return None
    return f"step {max(steps)} of {settings['max_steps']}, not finished"


def _nested_lines(values: dict[str, Any]) -> list[str]:
    """`name: value` lines of a dictionary, those of dictionaries in it indented below their name."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            lines += [f"{name}:", *(f"  {line}" for line in _nested_lines(value))]
        else:
            lines.append(f"{name}: {_format_value(str(name), value)}")
    return lines


def _format_value(name: str, value: Any) -> str:
    """A value as a person reads it."""
    if name == "size" and isinstance(value, int):
        return f"{_format_size(value)} ({value:,} bytes)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int) and name in _COUNTS:
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)


def _format_size(count: int) -> str:
    """Bytes in the unit that fits."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError
