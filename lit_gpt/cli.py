"""What every script does the same way: read flags from a dataclass, and turn a user's mistake into one line.

Flags are the fields of a dataclass; `--help` shows their docstrings; `--config FILE` sets what flags can. Dashes and
underscores in flag names are the same. Imports of the package stay out of here, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

Flags = TypeVar("Flags")
USER_ERROR_CODE = 2
# How long a process other than the first waits before it reports an error of its own.
_OTHERS_WAIT_S = 3.0


class Interrupted(Exception):
    """A signal stopped the work at a clean point; its argument is the line to print, `code` the exit code."""

    def __init__(self, line: str, signal_number: int) -> None:
        super().__init__(line)
        self.code = 128 + signal_number


def parse(
    flags: type[Flags], argv: Sequence[str] | None, description: str, defaults: dict[str, Any] | None = None
) -> Flags:
    """Read command-line flags into a dataclass.

    Args:
        flags: a dataclass; every field is a flag, its docstring the help text. A class attribute `ALIASES` may map
            other spellings to fields.
        argv: the arguments; None means sys.argv.
        description: the first lines of `--help`.
        defaults: values that replace the dataclass's own.

    Returns:
        An instance of `flags`.

    Raises:
        SystemExit: after `--help` (code 0) or a wrong flag or value (code 2, one line).
    """
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the description's lines: it shows commands to copy."""

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            fail(f"{_explain(message)} (--help lists the flags)")

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    program = os.path.basename(sys.argv[0])
    parser = Parser(
        prog=program,
        usage=f"{program} [--flag VALUE ...]",
        description=description,
        formatter_class=Formatter,
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("--config", metavar="FILE", help="Read flags from this YAML or JSON file; flags win over it.")
    parser.add_class_arguments(flags, as_group=False)
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(flags) if "help" in field.metadata}  # type: ignore[arg-type]
    for action in parser._actions:
        action.help = helps.get(action.dest, action.help)
    if defaults:
        parser.set_defaults(defaults)
    words = _as_typed(flags, _underscores(sys.argv[1:] if argv is None else argv, getattr(flags, "ALIASES", {})))
    try:
        words = _with_config(flags, words)
    except (ValueError, OSError) as error:
        fail(_one_line(_describe(error)))
    values = parser.parse_args(words).as_dict()
    values.pop("config", None)
    return flags(**values)


def run(main: Callable[[], Any]) -> NoReturn:
    """Run a script's main; the user's mistakes and interrupts end in one line on stderr, without a traceback.

    ValueError and OSError (which the package raises for users, with what, where, expected and remedy) end with code 2,
    `Interrupted` and Ctrl-C with 128 + the signal. Anything else is a mistake of ours and shows its traceback.
    """
    show_warnings()
    try:
        main()
    except Interrupted as stop:
        if _rank() == 0:
            print(stop, file=sys.stderr, flush=True)
        leave(stop.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        leave(130)
    except BrokenPipeError:
        leave(141)
    except (ValueError, OSError) as error:
        if os.environ.get("SMDM_TRACEBACK"):
            raise
        if _speaks():
            print(f"error: {_one_line(_describe(error))}", file=sys.stderr, flush=True)
        leave(USER_ERROR_CODE)
    leave(0)


def fail(line: str) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    leave(USER_ERROR_CODE)


def warn(line: str) -> None:
    """Print a warning that does not stop the work."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def show_warnings() -> None:
    """Let `logging.getLogger("lit_gpt").warning(...)` of lower modules appear as `warning: ...` lines, once."""
    logger = logging.getLogger("lit_gpt")
    if not logger.handlers:
        handler = _Console()
        handler.setFormatter(logging.Formatter("warning: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


class _Console(logging.Handler):
    """Writes to what is stderr at the moment of writing."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """Exit with a code, after taking down the process group of a distributed run if there is one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # A failing rank must not wait in a collective for ranks that failed elsewhere.
        sys.stdout.flush()
        sys.stderr.flush()
        if code:
            os._exit(code)
        distributed.destroy_process_group()
    sys.exit(code)


def _rank() -> int:
    """This process's number in a distributed run."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def _speaks() -> bool:
    """Whether this process reports an error: the first one does; another only if it fails alone.

    When all fail alike, the first one's end ends the others (its launcher stops them, or they are its children) while
    they wait here.
    """
    if _rank() == 0:
        return True
    parent = os.getppid()
    time.sleep(_OTHERS_WAIT_S)
    return os.getppid() == parent


def _underscores(argv: Sequence[str], aliases: dict[str, str]) -> list[str]:
    """`--batch-size` and `--batch_size` are the same flag, and so are a historic spelling and its name."""
    result = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = name.removeprefix("--").replace("-", "_")
            argument = f"--{aliases.get(name, name)}{equals}{value}"
        result.append(argument)
    return result


def _as_typed(flags: type, argv: Sequence[str]) -> list[str]:
    """Flags as users type them: `--overwrite` alone is true, `--logger csv,wandb` or `--logger csv wandb` a list."""
    types = {field.name: str(field.type) for field in dataclasses.fields(flags)}
    result, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        kind = types.get(name, "") if word.startswith("--") else ""
        if kind in ("bool", "<class 'bool'>") and not equals and (not rest or rest[0].lower() not in ("true", "false")):
            word = f"--{name}=true"
        elif kind.startswith("list["):
            values = [value] if equals else []
            while not equals and rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if len(values) == 1 and re.fullmatch(r"\w+(,\w+)+", values[0]):
                values = values[0].split(",")
            if values and not values[0].startswith("["):
                word = f"--{name}={json.dumps(values)}"
            elif values:
                word = f"--{name}={' '.join(values)}"
        result.append(word)
    return result


def _with_config(flags: type, argv: list[str]) -> list[str]:
    """Replace `--config FILE` by the flags that the file sets, put first, so that typed flags win.

    A scalar counts as it is spelled (`model: 170`, `compile: on`), as on the command line.

    Raises:
        ValueError: the file is no mapping of flags.
        OSError: the file cannot be read.
    """
    path, rest = None, []
    words = iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            if path is not None:
                raise ValueError("--config is given twice")
            path = word.partition("=")[2] or next(words, "")
        else:
            rest.append(word)
    if path is None:
        return rest
    import yaml

    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        spelled, typed = yaml.load(text, Loader=yaml.BaseLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: neither YAML nor JSON: {error}") from error
    if not isinstance(typed, dict):
        raise ValueError(f"--config {path}: expected lines such as 'model: 170'")
    known = {field.name for field in dataclasses.fields(flags)}
    result = []
    for key, value in zip(spelled, typed.values(), strict=True):
        name = key.replace("-", "_")
        name = getattr(flags, "ALIASES", {}).get(name, name)
        if name not in known:
            raise ValueError(f"--config {path}: unknown flag {key} (--help lists the flags)")
        result.append(f"--{name}={json.dumps(value) if isinstance(value, dict | list) else spelled[key]}")
    return [*result, *rest]


def _explain(message: str) -> str:
    """The parser's message with the flag spelled as it is typed and the type as a word."""
    line = re.sub(r"<class '(\w+)'>", r"\1", _one_line(message)).replace("NoneType", "null")
    line = re.sub(r"Parser key \"([\w.]+)\": ", r"--\1: ", line)
    if union := re.search(r"^(--[\w.]+): .*Subtypes: \[(.*?)\] Errors: .* Given value: (.*)$", line):
        return f"{union[1]}: expected {union[2].replace(', ', ' or ')}, got {union[3]}"
    return line.replace("Expected a ", "expected ").replace(". Got value: ", ", got ")


def _describe(error: Exception) -> str:
    """An OSError of the system as 'FILE: reason'; ours already read so."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _one_line(text: str) -> str:
    """Fold white space, newlines too."""
    return " ".join(text.split())
