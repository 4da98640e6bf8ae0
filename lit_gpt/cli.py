"""What every script does the same way: read flags from a dataclass, and turn a user's mistake into one line.

Flags are the fields of a dataclass; `--help` shows their docstrings; `--config FILE` sets what flags can. Dashes and
underscores in flag names are the same. Imports of the package stay out of here, so that `--help` is quick.
"""

from __future__ import annotations

import logging
import os
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
        flags: a dataclass; every field is a flag, its docstring the help text.
        argv: the arguments; None means sys.argv.
        description: the first lines of `--help`.
        defaults: values that replace the dataclass's own.

    Returns:
        An instance of `flags`.

    Raises:
        SystemExit: after `--help` (code 0) or a wrong flag or value (code 2, one line).
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            fail(f"{_one_line(message)} (--help lists the flags)")

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(description=description, allow_abbrev=False, default_env=False, prog=os.path.basename(sys.argv[0]))
    parser.add_argument("--config", action="config", help="Read flags from this YAML or JSON file; flags win over it.")
    parser.add_class_arguments(flags, as_group=False)
    if defaults:
        parser.set_defaults(defaults)
    values = parser.parse_args(_underscores(sys.argv[1:] if argv is None else argv)).as_dict()
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
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("warning: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


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


def _underscores(argv: Sequence[str]) -> list[str]:
    """`--batch-size` and `--batch_size` are the same flag."""
    result = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        result.append(
            name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument
        )
    return result


def _describe(error: Exception) -> str:
    """An OSError of the system as 'FILE: reason'; ours already read so."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _one_line(text: str) -> str:
    """Fold white space, newlines too."""
    return " ".join(text.split())
