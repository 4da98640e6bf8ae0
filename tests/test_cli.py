"""Flags and errors as users meet them: spellings, config files, one line and code 2, a quick `--help`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lit_gpt.cli import parse
from lit_gpt.training.settings import FinetuneConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Flags:
    """Flags of every kind."""

    batch_size: int = 256
    """Sequences of one step."""
    flops: float | None = None
    """Budget in 1e18."""
    model: str = ""
    """Size or name."""
    overwrite: bool = False
    """Whether files may be replaced."""
    logger: list[str] = field(default_factory=lambda: ["csv"])
    """Where metrics go."""
    data_weights: dict[str, float] = field(default_factory=lambda: {"train": 1.0})
    """Prefixes and weights."""


def read(*argv: str) -> Flags:
    """Parse a command line."""
    return parse(Flags, list(argv), "A test.")


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a command line that is refused with code 2."""
    with pytest.raises(SystemExit) as stop:
        read(*argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


# --- flags ------------------------------------------------------------------------------------------------------------


def test_defaults_and_replaced_defaults():
    assert read() == Flags()
    assert parse(Flags, ["--model", "6"], "A test.", defaults={"batch_size": 8}) == Flags(batch_size=8, model="6")


@pytest.mark.parametrize("argv", [["--batch_size=8"], ["--batch-size=8"], ["--batch_size", "8"], ["--batch-size", "8"]])
def test_dashes_and_underscores_are_the_same(argv):
    assert read(*argv).batch_size == 8


def test_values_keep_their_dashes():
    assert read("--model", "Diff-x_y").model == "Diff-x_y"
    assert read("--model=--a-b").model == "--a-b"


@pytest.mark.parametrize(("text", "value"), [("100.", 100.0), ("1e2", 100.0), ("0.", 0.0), ("null", None)])
def test_numbers_as_users_type_them(text, value):
    assert read("--flops", text).flops == value


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--overwrite"], True),
        (["--overwrite", "--model=6"], True),
        (["--overwrite", "true"], True),
        (["--overwrite=false"], False),
        (["--overwrite", "false"], False),
    ],
)
def test_switches(argv, value):
    assert read(*argv).overwrite is value


@pytest.mark.parametrize(
    "argv",
    [
        ["--logger", "csv,wandb"],
        ["--logger=csv,wandb"],
        ["--logger", "csv", "wandb", "--model=6"],
        ["--logger", "[csv,wandb]"],
        ["--logger", '["csv", "wandb"]'],
    ],
)
def test_lists(argv):
    assert read(*argv).logger == ["csv", "wandb"]


def test_a_list_of_one_and_a_path_with_a_comma():
    assert read("--logger", "csv").logger == ["csv"]
    assert read("--logger", "/a,b/c.txt").logger == ["/a,b/c.txt"]


def test_weights():
    assert read("--data_weights", '{"a": 1, "b": 0.5}').data_weights == {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_siz", "3"], "unrecognized arguments: --batch_siz 3"),
        (["--batch", "3"], "unrecognized arguments: --batch 3"),
        (["--batch-size=x"], "--batch_size: expected int, got x"),
        (["--flops", "much"], ", got much"),
        (["--model"], "--model: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_wrong_flags(capsys, argv, message):
    assert message in error(capsys, *argv)


# --- every spelling of every type -------------------------------------------------------------------------------------

REFUSED = object()
# What a text is as int, as float and as bool. YAML's rarer numbers (0x1F, 1:30, .inf) and numbers that fit nowhere are
# refused, and whole numbers stay whole: 1e2 is a float.
SPELLINGS: list[tuple[str, object, object, object]] = [
    ("8", 8, 8.0, REFUSED),
    ("0", 0, 0.0, REFUSED),
    ("1", 1, 1.0, REFUSED),
    ("-3", -3, -3.0, REFUSED),
    ("+5", 5, 5.0, REFUSED),
    ("007", 7, 7.0, REFUSED),
    ("1_000", 1000, 1000.0, REFUSED),
    (" 8 ", 8, 8.0, REFUSED),
    ("8\n", 8, 8.0, REFUSED),
    ("9223372036854775807", 2**63 - 1, 2.0**63, REFUSED),
    ("18446744073709551615", 2**64 - 1, 2.0**64, REFUSED),
    ("18446744073709551616", REFUSED, 2.0**64, REFUSED),
    ("1180591620717411303424", REFUSED, 2.0**70, REFUSED),
    ("-1180591620717411303424", REFUSED, -(2.0**70), REFUSED),
    ("9" * 5000, REFUSED, REFUSED, REFUSED),
    ("9" * 1_000_000, REFUSED, REFUSED, REFUSED),
    ("8.0", REFUSED, 8.0, REFUSED),
    ("100.", REFUSED, 100.0, REFUSED),
    ("0.", REFUSED, 0.0, REFUSED),
    (".5", REFUSED, 0.5, REFUSED),
    ("-.5", REFUSED, -0.5, REFUSED),
    ("1e2", REFUSED, 100.0, REFUSED),
    ("1E2", REFUSED, 100.0, REFUSED),
    ("12e03", REFUSED, 12000.0, REFUSED),
    ("1e-2", REFUSED, 0.01, REFUSED),
    ("-1e-2", REFUSED, -0.01, REFUSED),
    ("100_000.5", REFUSED, 100000.5, REFUSED),
    ("5e-324", REFUSED, 5e-324, REFUSED),
    ("1.7976931348623157e308", REFUSED, 1.7976931348623157e308, REFUSED),
    ("1e400", REFUSED, REFUSED, REFUSED),
    ("true", REFUSED, REFUSED, True),
    ("True", REFUSED, REFUSED, True),
    ("TRUE", REFUSED, REFUSED, True),
    ("yes", REFUSED, REFUSED, True),
    ("on", REFUSED, REFUSED, True),
    ("false", REFUSED, REFUSED, False),
    ("no", REFUSED, REFUSED, False),
    ("off", REFUSED, REFUSED, False),
    *(
        (text, REFUSED, REFUSED, REFUSED)
        for text in (
            *("", " ", "x", "much", "a b", "y", "inf", "-inf", ".inf", "nan", ".nan", "NaN", "Infinity"),
            *("null", "~", "None", "none", "0x1F", "0o17", "0b11", "1:30", "2026-01-01", "2026-01-01 10:00:00"),
            *("1,000", "1,2", "a,b", "1e3.5", "0.1.2", "8 # c", "# c", "!!int 8", '"8"', "'8'", "*a", "&a b", "@f"),
            *(
                "a: b",
                "{",
                "[",
                "[1,2]",
                "{a: 1}",
                "{}",
                "[]",
                "-",
                "=",
                "a=b",
                "--a",
                "-a",
                "C:\\x",
                "~/x",
                "é",
                "a\nb",
            ),
        )
    ),
]


@dataclass
class Typed:
    """One flag of every type that the scripts have."""

    whole: int = 7
    whole_or_none: int | None = 7
    number: float = 0.5
    number_or_none: float | None = 0.5
    switch: bool = False
    text: str = "d"
    text_or_none: str | None = "d"
    whole_or_text: int | str = 32
    text_or_whole: str | int | None = "d"


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: repr(spelling[0][:30]))
def test_spellings(capsys, spelling):
    text, whole, number, switch = spelling
    absent = text in ("null", "~")
    expected = {
        "whole": whole,
        "whole_or_none": None if absent else whole,
        "number": number,
        "number_or_none": None if absent else number,
        "switch": switch,
        "text": text,
        "text_or_none": None if absent else text,
        "whole_or_text": text if whole is REFUSED else whole,
        "text_or_whole": None if absent else text,
    }
    for name, value in expected.items():
        if value is REFUSED:
            with pytest.raises(SystemExit) as stop:
                parse(Typed, [f"--{name}={text}"], "")
            line = capsys.readouterr().err
            assert stop.value.code == 2 and line.startswith(f"error: --{name}: expected ") and line.count("\n") == 1
            assert len(line) < 250
        else:
            read = getattr(parse(Typed, [f"--{name}={text}"], ""), name)
            assert read == value and type(read) is type(value)


@dataclass
class Collections:
    """Flags with several values."""

    names: list[str] = field(default_factory=lambda: ["csv"])
    names_or_none: list[str] | None = None
    weights: dict[str, float] = field(default_factory=lambda: {"t": 1.0})


@pytest.mark.parametrize(
    ("words", "items"),
    [
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        (["a,b"], ["a", "b"]),
        (["a,b", "c"], ["a,b", "c"]),
        (["/a,b"], ["/a,b"]),
        (["a,"], ["a,"]),
        (["a b"], ["a b"]),
        (["[a,b]"], ["a", "b"]),
        (["[a,", "b]"], ["a", "b"]),
        (['["a", "b"]'], ["a", "b"]),
        (["[1, on, null]"], ["1", "on", "null"]),
        (["[]"], []),
        (["[ab]*.txt"], ["[ab]*.txt"]),
        (["-3"], ["-3"]),
        (["1e2"], ["1e2"]),
        ([""], [""]),
    ],
)
def test_spellings_of_lists(words, items):
    read = parse(Collections, ["--names", *words, "--names-or-none", *words], "")
    assert read.names == items and read.names_or_none == items


def test_a_list_collects_over_repeated_flags():
    assert parse(Collections, ["--names", "a", "--names=b"], "").names == ["a", "b"], "without the default"
    assert parse(Collections, ["--names_or_none", "[b]"], "").names == ["csv"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1, "b": 0.5}', {"a": 1.0, "b": 0.5}),
        ("{a: 1e2}", {"a": 100.0}),
        ("a: 1", {"a": 1.0}),
        ("{1: 2}", {"1": 2.0}),
        ("{}", {}),
    ],
)
def test_spellings_of_weights(text, value):
    assert parse(Collections, [f"--weights={text}"], "").weights == value


@pytest.mark.parametrize(
    "text", ["", "8", "a", "a=1", "[1]", '{"a": "x"}', '{"a": null}', '{"a": true}', "{a: [1]}", "{a: 1", "{a: 1e400}"]
)
def test_weights_that_are_none(capsys, text):
    with pytest.raises(SystemExit):
        parse(Collections, [f"--weights={text}"], "")
    line = f"error: --weights: expected dict[str, float], got {text} (--help lists the flags)"
    assert capsys.readouterr().err == " ".join(line.split()) + "\n"


# --- config files -----------------------------------------------------------------------------------------------------


def test_a_config_file_sets_what_flags_can(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "# comment\nmodel: 170\nbatch-size: 8\nflops: 1e-2\noverwrite: true\n"
        "logger: [csv, wandb]\ndata_weights: {a: 1}\n"
    )
    expected = Flags(8, 0.01, "170", True, ["csv", "wandb"], {"a": 1.0})
    assert read("--config", str(path)) == expected
    assert read(f"--config={path}", "--batch_size=16").batch_size == 16
    assert read("--batch_size=16", f"--config={path}").batch_size == 16, "a typed flag wins, wherever it stands"


def test_scalars_are_read_as_they_are_spelled(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: on\n")
    assert read("--config", str(path)).model == "on"


def test_a_json_file_is_a_config_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"batch_size": 8, "flops": None, "logger": ["csv"]}))
    assert read("--config", str(path)) == Flags(batch_size=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sizes: 8\n", "unknown flag batch_sizes"),
        ("model: [6\n", "neither YAML nor JSON"),
        ("just words\n", "expected lines such as 'model: 170'"),
        ("batch_size: many\n", "--batch_size: expected int, got many"),
        ("batch_size: 2026-01-01\n", "--batch_size: expected int, got 2026-01-01"),
        ("batch_size: [8]\n", "--batch_size: expected int, got 8"),
        ("model: {size: 6}\n", "--model: expected str, got {'size': '6'}"),
        ("data_weights: {a: x}\n", "--data_weights: expected dict[str, float], got {'a': 'x'}"),
        ("batch_size: 99999999999999999999\n", "--batch_size: expected int, got 99999999999999999999"),
        ("? [a]\n: 1\n", "neither YAML nor JSON"),
        ("model: \x00\n", "neither YAML nor JSON"),
        ("[" * 100_000, "more than 9 levels of brackets"),
        ("logger: &all [csv]\nmodel: *all\n", "an alias (*name): write the value itself"),
    ],
)
def test_wrong_config_files(capsys, tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message in error(capsys, "--config", str(path))


def test_aliases_that_stand_for_more_than_memory_are_refused_at_once(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 30)]
    path.write_text("\n".join(lines))
    begin = time.process_time()
    assert "an alias" in error(capsys, "--config", str(path))
    assert time.process_time() - begin < 5


def test_two_config_files(capsys, tmp_path):
    assert "--config is given twice" in error(capsys, "--config", "a.yaml", "--config=b.yaml")


def test_historic_spellings_are_flags_and_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("bs: 8\n")
    assert parse(FinetuneConfig, ["--config", str(path), "--epoch", "2"], "").batch_size == 8
    assert parse(FinetuneConfig, ["--bs=4", "--epoch", "2"], "").epochs == 2.0


def test_a_missing_config_file(capsys, tmp_path):
    assert f"{tmp_path / 'none.yaml'}: No such file" in error(capsys, "--config", str(tmp_path / "none.yaml"))


# --- ends of a script -------------------------------------------------------------------------------------------------


def script(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script whose main has this body."""
    code = f"import logging, sys\nfrom lit_gpt import cli\ndef main():\n    {body}\ncli.run(main)\n"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("pass", 0, ""),
        ("raise ValueError('--model 7:\\n  unknown')", 2, "error: --model 7: unknown\n"),
        ("raise FileNotFoundError('no data in x')", 2, "error: no data in x\n"),
        ("open('/nowhere/at/all')", 2, "error: /nowhere/at/all: No such file or directory\n"),
        ("raise cli.Interrupted('saved at step 7', 15)", 143, "saved at step 7\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("sys.exit(3)", 3, ""),
        ("cli.warn('slow')", 0, "warning: slow\n"),
        ("logging.getLogger('lit_gpt').warning('slow')", 0, "warning: slow\n"),
        ("cli.fail('no')", 2, "error: no\n"),
    ],
)
def test_how_a_script_ends(body, code, line):
    done = script(body)
    assert (done.returncode, done.stderr) == (code, line)


def test_our_own_mistakes_show_their_traceback():
    done = script("assert False, 'ours'")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "Traceback" in script("raise ValueError('theirs')", SMDM_TRACEBACK="1").stderr


def test_a_closed_pipe_is_no_error():
    code = "from lit_gpt import cli\ncli.run(lambda: [print('line') for _ in range(100000)])"
    done = subprocess.run(
        f'"{sys.executable}" -c "{code}" | head -n 1', shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("line\n", "")


@pytest.mark.parametrize(
    ("body", "streams", "code", "line"),
    [
        ("print(sys.stdin.readline(), sys.stdin.isatty())", "<&-", 0, ""),
        ("print(sys.stdout.isatty())", ">&-", 0, ""),
        ("raise ValueError('no data')", "2>&-", 2, ""),
        ("print('result')", "<&- >&- 2>&-", 0, ""),
        ("print('result', flush=True)", ">/dev/full", 2, "error: No space left on device\n"),
        ("print('result')", ">/dev/full", 2, "error: standard output: No space left on device\n"),
        ("raise ValueError('no data')", "2>/dev/full", 2, ""),
    ],
)
def test_standard_streams_that_are_closed_or_full(body, streams, code, line):
    text = f"import sys\nfrom lit_gpt import cli\ndef main():\n    {body}\ncli.run(main)"
    command = f'"$0" -c "$1" {streams}'
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = ["bash", "-c", command, sys.executable, text]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr.decode()) == (code, line)


def test_only_the_first_process_speaks():
    """The second one's error is the same line; it is silent if the first one's end ends it too (its parent goes)."""
    body = "raise ValueError('no data')"
    assert script(body, RANK="0").stderr == "error: no data\n"
    assert script(body, RANK="1").stderr == "error: no data\n", "alone with its error, it must say it"


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train_ar", "train_mdm", "train_mdm_rl"])
def test_help_explains_every_flag_and_shows_the_commands(name):
    path = ROOT / "pretrain" / f"{name}.py"
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert f"\n    python pretrain/{name}.py --model 6" in done.stdout, "commands keep their lines"
    for flag in ("--model", "--flops", "--nodes_num", "--batch_size", "--data_dir", "--resume", "--config"):
        assert f"  {flag} " in done.stdout
    assert "Compute budget in units of 1e18 FLOPs" in " ".join(done.stdout.split())


def test_help_shows_types_and_defaults(capsys):
    @dataclass
    class Told:
        """Flags."""

        rate: float | None = None
        """At most 1 % of it."""
        names: list[str] = field(default_factory=lambda: ["csv"], metadata={"help": "Said in the metadata."})
        fast: bool = False

    with pytest.raises(SystemExit) as stop:
        parse(Told, ["--help"], "A test.\n\n    keeps its lines", defaults={"rate": 2})
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "--rate RATE At most 1 % of it. (type: float | null, default: 2)" in out
    assert 'Said in the metadata. (type: list[str], default: ["csv"])' in out
    assert "(type: bool, default: false)" in out


def test_help_loads_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['pretrain/train_mdm.py', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {line.strip() for line in done.stdout.splitlines()}
    assert not loaded & {"torch", "numpy", "lightning_fabric", "transformers", "sentencepiece", "matplotlib"}
