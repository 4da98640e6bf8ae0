"""The commands of the documents: where they stand, what is done with them, and whether their flags exist.

A block of commands is a fence of `bash` or `sh`, or one without a language whose first line starts a program. The comment in
the line before its fence, which readers do not see, says what the tests do with it:

    <!-- commands: run, --max_steps 200 -> --max_steps 2 -->   run by the default suite, after these substitutions
    <!-- commands: slow -->                                    run by `./test.sh -m slow`, as it stands, after the quickstart
    <!-- commands: read, needs eight GPUs -->                  not run, for this reason; script and flags are checked

What is marked `run` is run by `-m slow` too, as it stands. The commands of docs/results are a record, and are read. Code that
a reader is to save, or lines to add to a file, are put there before the commands behind them are run:

    <!-- file: warped_times.py -->                             the fence is the whole file
    <!-- patch: lit_gpt/sampling/settings.py -->               lines with + are new, the others are there, once
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "data" / "README.md"]
KINDS = ("run", "slow", "read")
_BLOCK = re.compile(
    r"^(?:<!-- (?:commands: )?(?P<kind>\w+)(?:[,:] (?P<note>.*?))? -->\n)?"
    r"(?P<indent> *)```(?P<language>[\w{}-]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_STARTS_A_PROGRAM = re.compile(r"(?:\w+=\S+ )*(?:python|\./\w+\.sh|torchrun|lightning run|fabric run|sbatch)\b")
_LAUNCHERS = {"lightning", "fabric", "torchrun", "sbatch", "srun"}
_MACHINE = {"apt-get", "conda", "pip", "source", "git", "nvidia-smi"}
_ENDS = {"&&", "||", "|", ";", ">", ">>", "<", "&"}


@dataclass(frozen=True)
class Block:
    """A fence with commands."""

    document: str
    line: int
    kind: str
    """One of KINDS, `file` or `patch`; empty where the document does not say what to do with commands."""
    note: str
    """Substitutions, why it is only read, or the file."""
    text: str

    def commands(self) -> list[list[str]]:
        """The words of each command, without comments, redirections and settings of the environment."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word not in _ENDS:
                    words.append(word)
                    continue
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words.pop(0)
                if words:
                    found.append(words)
                # A file that output goes to is no command; blocks have none behind it.
                words = []
                if word in (">", ">>", "<"):
                    break
        return found

    def script(self, substituted: bool) -> str:
        """What bash is given."""
        text = self.text
        for rule in self.note.split("; ") if substituted and self.note else ():
            old, new = rule.split(" -> ")
            assert old in text, f"{self.document}:{self.line}: the block has no {old!r} to be replaced"
            text = text.replace(old, new)
        return text

    def change_code(self, folder: Path) -> None:
        """Write the file, or add the patch's lines, below a folder."""
        path = folder / self.note
        if self.kind == "file":
            path.write_text(self.text, encoding="utf-8")
            return
        lines = self.text.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] == " ")
        before = path.read_text(encoding="utf-8")
        assert before.count(old) == 1, (
            f"{self.document}:{self.line}: {self.note} does not have these lines once:\n{old}"
        )
        path.write_text(before.replace(old, "".join(line[1:] for line in lines)), encoding="utf-8")


def marked_blocks() -> Iterator[Block]:
    """All blocks of commands, and the code that they need, in the order of the documents."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        name = str(path.relative_to(ROOT))
        for found in _BLOCK.finditer(text):
            commands = found["language"] in ("bash", "sh") or (
                not found["language"] and _STARTS_A_PROGRAM.match(found["text"].lstrip())
            )
            if not commands and found["kind"] not in ("file", "patch"):
                assert not found["kind"], f"{name}: {found[0][:80]!r} is said to be commands"
                continue
            record = name.startswith("docs/results/") and not found["kind"]
            kind = "read" if record else found["kind"] or ""
            note = "how the page was made" if record else found["note"] or ""
            yield Block(name, text.count("\n", 0, found.start()) + 1, kind, note, found["text"])


def command_blocks() -> list[Block]:
    """All blocks of commands, in the order of the documents."""
    return [block for block in marked_blocks() if block.kind not in ("file", "patch")]


class _Parsed(Exception):
    """The flags were read."""


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold a command against what is there: the script exists and its flags can be read; nothing is run."""
    program = words[0]
    if program in _MACHINE:
        return
    if program in _LAUNCHERS:
        if program == "lightning":
            from lit_gpt.launcher import split_command_line

            split_command_line(words[1:])
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) - 1 :]
    elif program.endswith(".sh"):
        assert (ROOT / program).is_file(), f"{program} is not there"
        _check_shell_script(Path(program).name, words[1:], monkeypatch)
        return
    else:
        assert program in ("python", "sphinx-build"), f"a test cannot tell what {program} is"
    if words[1:2] and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"{words[1]} is not there"
        _parse_flags(words[1], words[2:], monkeypatch)


def _check_shell_script(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "setup.sh":
        import tomllib

        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(words) <= {*extras, "--help"}, f"setup.sh {words}: extras are {sorted(extras)}"
    elif name in ("quickstart.sh", "eval_mdm.sh"):
        script = {"quickstart.sh": "scripts/quickstart.py", "eval_mdm.sh": "evaluate_diff.py"}[name]
        _parse_flags(script, words, monkeypatch)


def _parse_flags(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a script's main up to where it has read its flags."""
    # A placeholder of the shell stands for a number or a name.
    words = [re.sub(r"\$\{?\w+\}?", "0", word) for word in words]
    if script in ("evaluate_ar.py", "evaluate_diff.py"):
        _parse_harness_flags(words)
        return
    spec = importlib.util.spec_from_file_location(f"documented_{Path(script).stem}", ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.syspath_prepend(str(ROOT / script.split("/")[0]))
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [script, *words])
    if not hasattr(module, "parse"):
        return
    real = module.parse

    def stop_when_parsed(*arguments: Any, **values: Any) -> None:
        real(*arguments, **values)
        raise _Parsed

    monkeypatch.setattr(module, "parse", stop_when_parsed)
    with pytest.raises(_Parsed):
        module.main()


def _parse_harness_flags(words: list[str]) -> None:
    """The harness's own parser, behind our words."""
    from lm_eval._cli.harness import HarnessCLI

    from lit_gpt.evaluation.harness_command import read_command

    command = read_command(words)
    with command.words("mdlm") as rest, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lm_eval", "run", *rest])
        HarnessCLI().parse_args()


def count_by_kind() -> str:
    """One line for the head of a test report."""
    kinds = [block.kind for block in command_blocks() for _ in block.commands()]
    return ", ".join(
        f"{kinds.count(kind)} {words}"
        for kind, words in (("run", "run by the default suite"), ("slow", "by -m slow"), ("read", "only read"))
    ) + (f", {kinds.count('')} not said" if "" in kinds else "")
