"""What every script does the same way: read flags from a dataclass, and turn a user's mistake into one line.

Flags are the fields of a dataclass; `--help` shows their docstrings; `--config FILE` sets what flags can. Decisions: argparse
only splits the command line into texts; a text becomes a value in one place, wherever it comes from, so that a config
file's scalar counts as it is spelled, like a typed one; dashes and underscores in a flag's name are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, NoReturn, TypeVar

from lit_gpt.processes import end_children, end_with_parent, lost_a_process, process_rank, speaks_for_run

FlagsT = TypeVar("FlagsT")
USER_ERROR_CODE = 2
_LOST_PROCESS_CODE = 1
_LOST_PROCESS = "another process of this run has ended, or does not answer; the same command goes on from what is saved"
# YAML 1.1's words, in any case.
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# Characters of a wrong value in its error.
_LONGEST_SHOWN = 100
# Levels of a config file; flags need two (`data_weights: {a: 1}`).
_DEEPEST = 9
# Bytes of a config file: all flags of a script are a few thousand.
_LARGEST_CONFIG = 1 << 20
# Characters of an error's line before its long words are cut.
_LONGEST_LINE = 1500


class Interrupted(Exception):
    """A signal stopped the work at a clean point; its argument is the line to print, `code` the exit code."""

    def __init__(self, line: str, signal_number: int) -> None:
        super().__init__(line)
        self.code = 128 + signal_number


def parse(
    flags: type[FlagsT], argv: Sequence[str] | None, description: str, defaults: dict[str, Any] | None = None
) -> FlagsT:
    """Read command-line flags into a dataclass.

    Args:
        flags: a dataclass of defaults; every field is a flag, its docstring (or `metadata["help"]`) the help text. Types:
            str, int, float, bool, lists, dictionaries by str, and unions of them with None. A class attribute `ALIASES`
            may map other spellings to fields.
        argv: the arguments; None means sys.argv.
        description: the first lines of `--help`.
        defaults: values that replace the dataclass's own.

    Returns:
        An instance of `flags`.

    Raises:
        SystemExit: after `--help` (code 0) or a wrong flag or value (code 2, one line).
    """
    given = sys.argv[1:] if argv is None else argv
    for word in given:
        if not _is_utf8(word):
            fail(f"{ascii(word)[1:-1]}: expected UTF-8")
    # `--batch-size` is `--batch_size`; what follows a = stays.
    words = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in given]
    # The texts are read from the source, which takes longer than all the rest.
    helps = _help_texts(flags) if {"-h", "--help"} & set(words) else {}
    try:
        known, unknown = _parser(flags, description, defaults or {}, helps).parse_known_args(words)
        if unknown:
            raise ValueError(f"unrecognized arguments: {' '.join(unknown)} (--help lists the flags)")
        typed = vars(known)
        texts = _read_config(flags, typed.pop("config", [])) | typed
        kinds = typing.get_type_hints(flags)
        values = {name: _flag_value(name, text, kinds[name]) for name, text in texts.items()}
    except argparse.ArgumentError as error:
        fail(f"{error.argument_name}: {error.message} (--help lists the flags)")
    except (ValueError, OSError) as error:
        fail(_describe(error))
    return flags(**{**(defaults or {}), **values})


def run(main: Callable[[], Any]) -> NoReturn:
    """Run a script's main; the user's mistakes and interrupts end in one line on stderr, without a traceback.

    ValueError and OSError (which the package raises for users, with what, where, expected and remedy) end with code 2,
    `Interrupted` and Ctrl-C with 128 + the signal; a distributed run that lost one of its processes with code 1. Anything
    else is a mistake of ours and shows its traceback.
    """
    _use_utf8()
    _open_closed_streams()
    show_warnings()
    end_with_parent()
    try:
        main()
        try:
            sys.stdout.flush()
        except OSError as error:
            error.filename = "standard output"
            raise
    except Interrupted as stop:
        if process_rank() == 0:
            _tell(str(stop))
        leave(stop.code)
    except KeyboardInterrupt:
        _tell("interrupted")
        leave(130)
    except BrokenPipeError:
        leave(141)
    except (ValueError, OSError) as error:
        if os.environ.get("SMDM_TRACEBACK"):
            raise
        if speaks_for_run():
            _tell(f"error: {_one_line(_describe(error))}")
        leave(USER_ERROR_CODE)
    except RuntimeError as error:
        if os.environ.get("SMDM_TRACEBACK") or not lost_a_process(error):
            raise
        if speaks_for_run():
            _tell(f"error: {_LOST_PROCESS}")
        leave(_LOST_PROCESS_CODE)
    leave(0)


def below_least(flags: Any, least: Mapping[str, float]) -> list[str]:
    """One line for each flag, by name, whose value is below the least that is possible."""
    return [
        f"--{name} {getattr(flags, name)}: at least {low}" for name, low in least.items() if getattr(flags, name) < low
    ]


def _use_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale is none of UTF-8: torch and others read no other paths."""
    # Not a second time, should the mode be switched off on Python's own command line.
    if sys.getfilesystemencoding().lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_closed_streams() -> None:
    """Put the null device where a standard stream is closed: a file opened later would get its number, and its output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as the process runs)


def _tell(line: str) -> None:
    """Print a line on stderr; a full disk or a closed pipe behind it is no error of its own."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def fail(line: str) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    _tell(f"error: {_one_line(line)}")
    leave(USER_ERROR_CODE)


def warn(line: str) -> None:
    """Print a warning that does not stop the work."""
    _tell(f"warning: {line}")


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
        _tell(self.format(record))


def leave(code: int) -> NoReturn:
    """Exit with a code, after taking down the process group of a distributed run if there is one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # A failing rank must not wait in a collective for ranks that failed elsewhere.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        if code:
            end_children()
            os._exit(code)
        distributed.destroy_process_group()
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            # Python would try once more at its end, and make the exit code 120.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.exit(code)


def _parser(flags: type, description: str, defaults: dict[str, Any], helps: dict[str, str]) -> argparse.ArgumentParser:
    """An argparse parser that gives the text of every flag that is typed, and shows types and defaults in its help."""
    program = os.path.basename(sys.argv[0])
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [--flag VALUE ...]",
        description=description,
        # Keeps the description's lines: it shows commands to copy.
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    config_help = "Read flags from this YAML or JSON file; flags win over it."
    parser.add_argument("--config", metavar="FILE", action="append", help=config_help)
    kinds = typing.get_type_hints(flags)
    aliases = getattr(flags, "ALIASES", {})
    for field in dataclasses.fields(flags):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = defaults.get(field.name, default)
        shown = default if isinstance(default, str) else json.dumps(default, default=str)
        about = f"(type: {_type_name(kinds[field.name])}{f', default: {shown}' if shown else ''})"
        options: dict[str, Any] = {}
        if bool in _alternatives(kinds[field.name]):
            options = {"nargs": "?", "const": "true", "metavar": "{true,false}"}
        elif any(typing.get_origin(one) is list for one in _alternatives(kinds[field.name])):
            options = {"nargs": "+", "action": "extend"}
        names = [field.name, *(name for name, meant in aliases.items() if meant == field.name)]
        text = f"{helps.get(field.name, '')} {about}".strip().replace("%", "%%")
        parser.add_argument(*(f"--{name}" for name in names), dest=field.name, help=text, **options)
    return parser


def _is_utf8(word: str) -> bool:
    """Whether a word of the command line, as Python decodes it, is text; libraries cannot open other files."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _help_texts(flags: type) -> dict[str, str]:
    """What is said about the fields of a dataclass: `metadata["help"]`, else the docstring after the field."""
    import docstring_parser

    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(flags.__mro__)):
        # Without its source, a class has no such docstrings.
        with contextlib.suppress(OSError, TypeError):
            found |= {one.arg_name: one.description or "" for one in docstring_parser.parse_from_object(base).params}
    return found | {field.name: text for field in dataclasses.fields(flags) if (text := field.metadata.get("help"))}


def _read_config(flags: type, paths: list[str]) -> dict[str, Any]:
    """The flags that a config file sets, as texts, and lists and mappings of texts.

    Raises:
        ValueError: there are several files; the file is no mapping of flags.
        OSError: the file cannot be read.
    """
    from lit_gpt.files import open_regular

    if len(paths) > 1:
        raise ValueError("--config is given twice")
    known = {field.name: field.name for field in dataclasses.fields(flags)} | getattr(flags, "ALIASES", {})
    found = {}
    for path in paths:
        with open_regular(path) as file:
            text = file.read(_LARGEST_CONFIG + 1)
        if len(text) > _LARGEST_CONFIG:
            raise ValueError(f"--config {path}: larger than {_LARGEST_CONFIG:,} bytes")
        try:
            content = _read_yaml(text.decode())
        except ValueError as error:
            raise ValueError(f"--config {path}: neither YAML nor JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"--config {path}: expected lines such as 'model: 170'")
        for key, value in content.items():
            if (name := key.replace("-", "_")) not in known:
                raise ValueError(f"--config {path}: unknown flag {key} (--help lists the flags)")
            found[known[name]] = value
    return found


def _read_yaml(text: str) -> Any:
    """YAML (or JSON) as texts, and lists and dictionaries of texts; no types, so that `170` and `on` stay as spelled.

    Raises:
        ValueError: it is no YAML; or a short text that takes forever: aliases of aliases, or brackets without end.
    """
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("an alias (*name): write the value itself")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"more than {_DEEPEST} levels of brackets")
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _flag_value(name: str, text: Any, kind: Any) -> Any:
    """`_convert`, with an error that names the flag, what it expects and what was given."""
    try:
        return _convert(text, kind)
    except ValueError:
        shown = " ".join(map(str, text)) if isinstance(text, list) else str(text)
        shown = shown if len(shown) <= _LONGEST_SHOWN else shown[:_LONGEST_SHOWN] + "..."
        raise ValueError(
            f"--{name}: expected {_type_name(kind, ' or ')}, got {shown} (--help lists the flags)"
        ) from None


def _convert(text: Any, kind: Any) -> Any:
    """Turn a text, or a list or dictionary of texts, into a value of a type; of a union, the first that fits.

    Raises:
        ValueError: it is none. Integers beyond 64 bits and numbers that are not finite are none either: no flag means
            them, and what they overflow says less.
    """
    alternatives = _alternatives(kind)
    if NoneType in alternatives and text in ("null", "~"):
        return None
    if len(alternatives) > 1:
        for alternative in alternatives:
            with contextlib.suppress(ValueError):
                return _convert(text, alternative)
    elif typing.get_origin(kind) is list:
        return [_convert(item, typing.get_args(kind)[0]) for item in _list_items(text)]
    elif typing.get_origin(kind) is dict:
        content = _read_yaml(text) if isinstance(text, str) else text
        if isinstance(content, dict):
            return {key: _convert(item, typing.get_args(kind)[1]) for key, item in content.items()}
    elif isinstance(text, str):
        if kind is str:
            return text
        if kind is bool and text.lower() in _SWITCH:
            return _SWITCH[text.lower()]
        if kind is int and (number := int(text)).bit_length() <= 64:
            return number
        if kind is float and math.isfinite(value := float(text)):
            return value
    raise ValueError(f"no {_type_name(kind)}: {text}")


def _list_items(text: Any) -> list[Any]:
    """The items of a list that is spelled as words (`a b`), with commas (`a,b`) or as YAML (`[a, b]`, one or more words)."""
    words = [text] if isinstance(text, str) else text
    line = " ".join(words) if all(isinstance(word, str) for word in words) else ""
    if line.startswith("[") and line.endswith("]"):
        return _read_yaml(line)
    return line.split(",") if re.fullmatch(r"\w+(,\w+)+", line) else words


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _type_name(kind: Any, between: str = " | ") -> str:
    """A type as users read it: `int | null`, `list[str]`."""
    names = {NoneType: "null"} | {plain: plain.__name__ for plain in (str, int, float, bool)}
    return between.join(names.get(one, str(one)) for one in _alternatives(kind))


def _describe(error: Exception) -> str:
    """An OSError of the system as 'FILE: reason'; ours already read so."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _one_line(text: str) -> str:
    """Fold white space, newlines too; cut what is longer than anybody reads, such as a value of a million characters."""
    words = text.split()
    if sum(map(len, words)) > _LONGEST_LINE:
        words = [word if len(word) <= _LONGEST_SHOWN else word[:_LONGEST_SHOWN] + "..." for word in words]
    return " ".join(words)[:_LONGEST_LINE]
