"""lm-evaluation-harness's command line: what of it is ours, and what is handed on.

Decisions: a flag that was typed counts before `--config FILE` (the harness's YAML), and that before our own defaults.
`use_cache` is never handed on, from wherever it comes: the harness's cache unpickles what it finds.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.evaluation.settings import ModelArgs
from lit_gpt.files import open_regular

# The harness reads values as Python's literals, whose parser gives up at a depth of some hundreds without a ValueError.
_MOST_BRACKETS = 100
_OURS = (("--use_cache", "-c"), ("--output_path", "-o"), ("--config", "-C"))
# Every beginning of these means them to the harness, which has no other flags that begin so.
_ABBREVIATED = ("--output_path", "--device", "--batch_size")
_DEFAULTS = {"--device": "auto", "--batch_size": str(ModelArgs.batch_size)}


@dataclass(frozen=True)
class HarnessCommand:
    """A command line of the harness."""

    typed: argparse.Namespace
    """The flags that mean something to us; None for what was not typed."""
    rest: list[str]
    """All others."""
    config: Mapping[str, Any]
    """What `--config` says; empty without one."""

    @property
    def use_cache(self) -> str | None:
        """The folder of our own cache, or `off`."""
        # YAML reads the word off as False.
        is_off = self.typed.use_cache is None and self.config.get("use_cache") is False
        return "off" if is_off else self._text("use_cache")

    @property
    def output_path(self) -> str | None:
        """Where the harness writes."""
        return self._text("output_path")

    def _text(self, name: str) -> str | None:
        value = getattr(self.typed, name)
        value = self.config.get(name) if value is None else value
        if not isinstance(value, str | None):
            raise ValueError(f"{self.typed.config}: {name} is {value!r}, expected a text")
        return value

    @contextlib.contextmanager
    def words(self, model: str) -> Iterator[list[str]]:
        """The words for the harness.

        Args:
            model: the `--model` that is meant where nothing says one.
        """
        words = []
        for flag, default in {"--model": model, **_DEFAULTS, "--output_path": None}.items():
            name = flag.removeprefix("--")
            value = getattr(self.typed, name) or (default if self.config.get(name) is None else None)
            words += [flag, value] if value else []
        # The last counts: behind our defaults stands what we did not recognise, as -sb 4, which is -s -b 4.
        words += self.rest
        with tempfile.TemporaryDirectory() as folder:
            if "use_cache" in self.config:
                copy = Path(folder) / Path(self.typed.config).name
                copy.write_text(_as_yaml({name: self.config[name] for name in self.config if name != "use_cache"}))
                words += ["--config", str(copy)]
            elif self.typed.config is not None:
                words += ["--config", self.typed.config]
            yield words


SPELL_IT_OUT = "spell it out, as a word of its own, so that it names our cache of results"
"""What must be done with `--use_cache`."""


def read_command(argv: Sequence[str]) -> HarnessCommand:
    """Read a command line.

    Raises:
        ValueError: a flag without its value; brackets without end; `--config` names a file that is no YAML mapping.
        OSError: that file cannot be read.
    """
    for word in argv:
        if max(map(word.count, "([{")) > _MOST_BRACKETS:
            raise ValueError(f"{word[:40]}...: more than {_MOST_BRACKETS} brackets")
    # What is not typed is None, so that it is told from what is.
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names in (*_OURS, ("--device",), ("--batch_size", "-b"), ("--model", "-M")):
        flags.add_argument(*names)
    flags.add_argument("--dry_run", action="store_true")
    # `run` is the harness's command, which ours are always.
    words = [_spelt_out(word) for word in (argv[1:] if argv and argv[0] == "run" else argv)]
    try:
        typed, rest = flags.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if any(word.startswith("--u") and "--use_cache".startswith(word.split("=")[0]) for word in rest):
        # Before the harness makes a cache of that name.
        raise ValueError(f"--use_cache: {SPELL_IT_OUT}")
    return HarnessCommand(typed, rest, {} if typed.config is None else _read_yaml(typed.config))


def _spelt_out(word: str) -> str:
    """A word with the name of its flag in full."""
    name, equals, value = word.partition("=")
    full = [flag for flag in _ABBREVIATED if flag.startswith(name) and len(name) > len("--")]
    return full[0] + equals + value if full else word


def _read_yaml(path: str) -> Mapping[str, Any]:
    import yaml

    with open_regular(path) as file:
        try:
            content = yaml.safe_load(file.read().decode())
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected YAML with flags and their values, found a {type(content).__name__}")
    return content


def _as_yaml(content: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(content), sort_keys=False))
