"""Evaluation through lm-evaluation-harness: the documented commands, the cache, several processes, and mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lit_gpt import cli
from lit_gpt.evaluation import lm_harness
from lit_gpt.evaluation.harness_command import read_command
from lit_gpt.evaluation.lm_adapter import Adapter
from lit_gpt.evaluation.result_cache import EvalCache
from lit_gpt.evaluation.settings import read_model_args
from tests.support.small_models import export_arm_and_mdm

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["--tasks", "next_line,lambada_local", "--include_path", "tasks"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """An ARM and an MDM with random weights, their tokenizer beside them."""
    return export_arm_and_mdm(tmp_path_factory.mktemp("models"), embedding_scale=8)


def adapter(kind: str, path: Path, cache: Path | None = None, **settings) -> Adapter:
    return Adapter(kind, read_model_args(kind, {"ckpt_path": str(path), **settings}), cache, ["evaluate"])


def asked(*pairs):
    """Requests as the harness passes them, each of a document of its own."""
    return [SimpleNamespace(args=pair, task_name="task", doc_id=number) for number, pair in enumerate(pairs)]


TEXTS = asked(
    ("My lord, ", "what news?"), ("My lord,", " what news?"), ("", "ROMEO"), ("   ", "ROMEO"), ("Déjà ", "vu ☕ 𝄞"),
    ("To be", " or not to be, that is the question"), ("A", "\n\nB"), ("thou art " * 120, "gone"),
    ("x", " word" * 200), ("To be", ""),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_results_do_not_depend_on_the_batch(models, kind, capsys):
    settings = {} if kind == "arm" else {"nll_type": "exact", "budget": 10, "greedy": True}
    results = [adapter(kind, models[kind], batch_size=size, **settings).loglikelihood(TEXTS) for size in (1, 64)]
    for (one, one_greedy), (many, many_greedy) in zip(*results, strict=True):
        assert one == pytest.approx(many, abs=2e-2 if one < -1000 else 2e-3)
        assert one_greedy == many_greedy
    # White space at the context's end belongs to the continuation; an empty continuation is certain.
    assert results[0][0] == pytest.approx(results[0][1])
    assert results[0][-1] == (0.0, True)
    err = capsys.readouterr().err
    assert "warning: 2 of 10 requests are longer than 128 tokens: their beginnings are left out" in err
    assert "warning: 1 of 10 continuations are empty" in err


def test_an_arm_adds_up(models):
    """log p(b c | a) = log p(b | a) + log p(c | a b), where the tokens are the same."""
    model = adapter("arm", models["arm"])
    (whole, _), (first, _), (second, _) = model.loglikelihood(
        asked(("KING:", "\nAway\nAway"), ("KING:", "\nAway"), ("KING:\nAway", "\nAway"))
    )
    assert whole == pytest.approx(first + second, abs=1e-3)


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_rolling_scores_every_token_once(models, kind):
    """A text beyond the block is the sum of its windows; a short one is its likelihood behind bos."""
    settings = {} if kind == "arm" else {"nll_type": "chain_rule"}
    model = adapter(kind, models[kind], **settings)
    short, long = "Speak, speak.", "Speak, speak. " * 60
    (rolling, rolling_long), ((single, _),) = (
        model.loglikelihood_rolling(asked((short,), (long,))),
        model.loglikelihood(asked(("", short))),
    )
    assert rolling == pytest.approx(single, abs=1e-3)
    tokens = len(model.tokenizer.encode_ids(long))
    assert tokens > 128
    # Random weights: every token costs about as much as one of 500 equally likely ones, so all of them were counted.
    per_token = -rolling_long / tokens
    assert 4 < per_token < 12


@pytest.mark.parametrize("what", ["rolling", "windows", "empty context"])
def test_documents_do_not_share_their_noise(models, what, tmp_path):
    """The error of a corpus is that of independent parts: shared masks made it six times as large."""
    texts = [f"{number}. Speak, {name}, speak." for number in range(20) for name in ("Tom", "my lord", "the other")]
    if what == "windows":
        # Every window behind the first has the same token before it.
        texts = [" the" * 127 * 24]
    values = []
    for seed in range(24):
        model = adapter("mdm", models["mdm"], tmp_path / str(seed), mc_num=4, seed=seed)
        if what == "empty context":
            model.loglikelihood(asked(*(("", text) for text in texts)))
        else:
            model.loglikelihood_rolling(asked(*((text,) for text in texts)))
        model.close()
        kept = map(json.loads, next((tmp_path / str(seed)).iterdir()).read_text().splitlines())
        values.append([line[1][0] for line in sorted(line for line in kept if isinstance(line, list))])
    nll = np.array(values)
    assert nll.shape[1] > 20
    corpus, independent = nll.sum(1).std(ddof=1), np.sqrt(nll.var(0, ddof=1).sum())
    print(f"{what}: error of the sum {corpus:.4f} nats, of independent parts {independent:.4f}")
    assert corpus < 2 * independent


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_special_tokens_of_a_context_are_read_as_published(models, kind, tmp_path):
    """<unk> and </s> in a context are their ids by default; spelled out they are other tokens, another result."""
    settings = {} if kind == "arm" else {"nll_type": "chain_rule", "cfg": 0.6}
    text = asked(("Speak, <unk></s> my lord", ", speak."))
    default, ids, spelled = (
        adapter(kind, models[kind], tmp_path, **settings, **how)
        for how in ({}, {"special_tokens": "ids"}, {"special_tokens": "text"})
    )
    context = default.loaded.encode_pair(*text[0].args)[0]
    assert context[:1] == [default.tokenizer.bos_id] and context.count(0) == 1 and default.tokenizer.eos_id in context
    assert not {0, default.tokenizer.eos_id} & set(spelled.loaded.encode_pair(*text[0].args)[0])
    results = [one.loglikelihood(text, disable_tqdm=True)[0][0] for one in (default, ids, spelled)]
    assert results[0] == results[1] and abs(results[0] - results[2]) > 0.01
    assert [one.get_model_info()["special_tokens"] for one in (default, spelled)] == ["ids", "text"]


def test_padding_fills_up_to_the_block_whatever_max_length(models):
    text = asked(("Speak,", " speak."))
    results = [
        adapter("mdm", models["mdm"], nll_type="chain_rule", padding=True, **how).loglikelihood(text, disable_tqdm=True)
        for how in ({}, {"max_length": 40})
    ]
    without = adapter("mdm", models["mdm"], nll_type="chain_rule").loglikelihood(text, disable_tqdm=True)
    assert results[0] == results[1] and results[0] != without


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_generation_stops_where_it_is_told(models, kind):
    model = adapter(kind, models[kind])
    how = {"max_gen_toks": 24, "until": [], "do_sample": False}
    (whole,) = model.generate_until(asked(("ROMEO:", how)))
    assert whole
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    (cut,) = model.generate_until(asked(("ROMEO:", {**how, "until": [stop]})))
    assert cut == whole.split(stop)[0]
    repeated = {**how, "do_sample": True, "temperature": 1.0}
    first, second = model.generate_until(asked(("ROMEO:", repeated)) * 2)
    assert first != second


def test_a_text_does_not_depend_on_which_other_documents_its_process_has(models):
    """Two documents with one prompt: of two processes, each has one of them."""
    how = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    first, second, again = (SimpleNamespace(args=("ROMEO:", how), task_name="t", doc_id=number) for number in (0, 1, 1))
    alone = [adapter("arm", models["arm"]).generate_until(share) for share in ([first], [second, again])]
    assert adapter("arm", models["arm"]).generate_until([first, second, again]) == alone[0] + alone[1]
    assert alone[1][0] != alone[1][1]


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_generations_share_batches_and_do_not_depend_on_them(models, kind, tmp_path):
    wishes = [
        (
            f"{'KING ' * (number % 4)}speak, {number}:",
            {"max_gen_toks": 12 + 4 * (number % 2), "do_sample": True, "temperature": 1.0},
        )
        for number in range(7)
    ]
    found = [adapter(kind, models[kind], batch_size=size).generate_until(asked(*wishes)) for size in (1, 3, 64)]
    assert found[0] == found[1] == found[2] and len(set(found[0])) == 7
    # Half of them kept: the rest is written behind them, in the order of the requests.
    kept = adapter(kind, models[kind], tmp_path)
    assert kept.generate_until(asked(*wishes[::2])) == found[0][::2]
    assert kept.generate_until(asked(*wishes)) == found[0]


def lines(folder: Path) -> dict[str, int]:
    return {path.name: path.read_text().count("\n") for path in folder.glob("*.jsonl")}


def test_the_cache_serves_the_same_settings_only(models, tmp_path):
    settings = {"nll_type": "exact", "budget": 8}
    first = adapter("mdm", models["mdm"], tmp_path, **settings).loglikelihood(TEXTS)
    stored = lines(tmp_path)
    assert len(stored) == 1
    again = adapter("mdm", models["mdm"], tmp_path, batch_size=3, **settings)
    assert again.loglikelihood(TEXTS) == first
    again.close()
    # Nothing but its own header was added: every result came from the file.
    assert sum(lines(tmp_path).values()) == sum(stored.values()) + 2
    for changed in ({"seed": 5}, {"budget": 9}, {"cfg": 0.5}, {"nll_type": "chain_rule"}, {"max_length": 64}):
        before = len(lines(tmp_path))
        adapter("mdm", models["mdm"], tmp_path, **{**settings, **changed}).loglikelihood(TEXTS[:1])
        assert len(lines(tmp_path)) == before + 1, changed


def test_a_torn_line_is_passed_over(tmp_path):
    cache = EvalCache(tmp_path, {"a": 1})
    cache.add([("x", 1.5), ("y", [2, True])])
    cache.close()
    with cache.path.open("a") as file:
        file.write('["z", 3')
    again = EvalCache(tmp_path, {"a": 1}, rank=1)
    assert (again.get("x"), again.get("y"), again.get("z")) == (1.5, [2, True], None)
    same_file = EvalCache(tmp_path, {"a": 1})
    same_file.add([("z", 4)])
    assert EvalCache(tmp_path, {"a": 1}).get("z") == 4
    assert EvalCache(tmp_path, {"a": 2}).get("x") is None


# The commands


def command(script: str, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / script), *TASKS, *words]


def environment(folder: Path) -> dict[str, str]:
    """A home of its own: the harness's libraries write into it."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(folder), "HF_HOME": str(folder / "hf")}


def run_script(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(script, *words), cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def table(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("|")]


def values(out: str) -> list[tuple[str, str, float]]:
    """Task, metric and value of each row; the bootstrapped error of a perplexity depends on the documents' order."""
    found = []
    for line in table(out)[2:]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        found.append((cells[0], cells[4], float(cells[6])))
    return found


def test_the_arm_command_and_its_record(models, tmp_path):
    words = ["--model", "ar", "--model_args", f"ckpt_path='{models['arm']}'", "--limit", "6", "--log_samples"]
    done = run_script(
        tmp_path, "evaluate_ar.py", *words, "--output_path", str(tmp_path / "out"), "--batch_size", "auto"
    )
    assert any("next_line" in line for line in table(done.stdout))
    assert "likelihoods: exact (left to right), seed 1234" in done.stdout
    # Nothing was estimated: nothing is said of an estimator's error.
    assert "standard error" not in done.stdout
    (path,) = (tmp_path / "out").rglob("results_*.json")
    assert path.parent == tmp_path / "out" / "tiny"
    config = json.loads(path.read_text())["config"]
    assert config["standard_error_nats"] == {"mean": None, "largest": None, "requests": 6 * 4 + 6}
    assert config["kind"] == "arm" and len(config["checkpoint"]) == 64 and config["versions"]["lm_eval"]
    assert config["command"][1:3] == TASKS[:2]
    assert list((tmp_path / "out").rglob("samples_next_line_*.jsonl"))
    assert list((tmp_path / "out" / "cache").glob("*.jsonl"))


def test_two_checkpoints_of_one_name_have_two_folders(models, tmp_path):
    """The harness's results of an ARM and of an MDM, both tiny.safetensors."""
    for script, kind in (("evaluate_ar.py", "arm"), ("evaluate_diff.py", "mdm")):
        words = ["--model_args", f"ckpt_path='{models[kind]}'", "--limit", "1", "--output_path", str(tmp_path / "out")]
        run_script(tmp_path, script, *words)
    held = {
        path.parent.name: {json.loads(one.read_text())["config"]["checkpoint"] for one in path.parent.iterdir()}
        for path in (tmp_path / "out").rglob("results_*.json")
    }
    other = held.pop("tiny")
    ((name, hashes),) = held.items()
    assert len(other) == 1 and hashes != other and {name} == {f"tiny-{one[:8]}" for one in hashes}


def test_a_killed_evaluation_goes_on_and_processes_share_it(models, tmp_path):
    """kill -9 in the middle, then the same command by one process; unbroken by two processes: the same values."""
    arguments = f"model_name=None,ckpt_path={models['mdm']},nll_type=mc,mc_num=256,greddy=True,batch_size=8"
    words = ["--model", "mdlm", "--model_args", arguments, "--limit", "12", "--use_cache"]
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        command("evaluate_diff.py", *words, str(cache)),
        cwd=ROOT,
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and sum(lines(cache).values() if cache.exists() else []) < 20:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run_script(tmp_path, "evaluate_diff.py", *words, str(cache), "--output_path", str(tmp_path / "one.json"))
    assert "results were there already" in resumed.stdout
    assert "likelihoods: mc, mc_num 256, cfg 0, seed 1234" in resumed.stdout
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571"]
    two = subprocess.run(
        [
            *launch,
            *command("evaluate_diff.py", *words, str(tmp_path / "two"), "--output_path", str(tmp_path / "two.json"))[
                1:
            ],
        ],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert two.returncode == 0, two.stderr
    for one, other in zip(values(resumed.stdout), values(two.stdout), strict=True):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=1e-4)
    records = [json.loads(next(tmp_path.glob(f"{name}_*.json")).read_text())["config"] for name in ("one", "two")]
    errors = [record["standard_error_nats"] for record in records]
    assert errors[0]["requests"] == errors[1]["requests"] == sum(records[1]["results_by_commit"].values())
    assert errors[0]["mean"] == pytest.approx(errors[1]["mean"], rel=1e-4) and errors[0]["mean"] > 0
    (footer,) = (line for line in two.stdout.splitlines() if line.startswith("likelihoods: "))
    assert footer.endswith(f"over {errors[0]['requests']} requests")


MISTAKES = {
    "unknown task": (["--tasks", "nosuch"], {}, "Tasks not found: nosuch"),
    "misspelt": ([], {"gredy": True}, "gredy is unknown; known are .*greedy.* and greddy for greedy"),
    "no checkpoint": ([], {"ckpt_path": "nowhere.safetensors"}, "no checkpoint nowhere.safetensors"),
    "no name": ([], {"ckpt_path": ""}, "ckpt_path is missing"),
    "other kind": ([], {"ckpt_path": "arm"}, "holds an autoregressive model"),
    "other size": ([], {"model_name": 170}, "holds tiny, Diff_LLaMA_170M was asked for"),
    "estimator": ([], {"nll_type": "exakt"}, "'exakt' is unknown: choose from mc, chain_rule, exact"),
    "type": ([], {"mc_num": "many"}, "mc_num=many: expected int"),
    "length": ([], {"max_length": 4096}, "max_length 4096: this model reads 2 to 128"),
    "mask": ([], {"mask_id": 7}, "mask_id 7: this model's is 512"),
    "device": (["--device", "gpu"], {}, "--device gpu: expected cpu, cuda"),
    "batch": (["--batch_size", "0"], {}, "--batch_size 0: expected a number"),
    "tokenizer": ([], {"tokenizer": "nowhere/at/all"}, "nowhere/at/all: no such tokenizer"),
    "tokenizer's type": ([], {"tokenizer": 500}, "tokenizer=500: expected str"),
    "a list": ([], {"tokenizer": "[1]"}, "tokenizer=.*: expected str|no such tokenizer"),
    "size's type": ([], {"model_name": 1.5}, "model_name=1.5: expected str or int"),
    "path's type": ([], {"ckpt_path": 7}, "ckpt_path=7: expected str"),
    "switch for a path": ([], {"device": True}, "device=True: expected str"),
    "huge": ([], {"seed": 2**70}, "seed is a number of 71 bits: too large"),
    "no draws": ([], {"mc_num": -5}, "mc_num"),
    "guidance": ([], {"cfg": "nan"}, "cfg is nan: it must be a number"),
    "endless guidance": ([], {"cfg": "1e999"}, "cfg is inf: it must be"),
    "brackets": ([], {"tokenizer": "[" * 5000}, "more than 100 brackets"),
    "no value": (["--use_cache"], {}, "--use_cache/-c: expected one argument"),
    "abbreviated cache": (["--use_cach", "nowhere/x"], {}, "--use_cache: spell it out"),
    "no config": (["--config", "nowhere.yaml"], {}, "nowhere.yaml"),
    "config of another kind": (["-C", "README.md"], {}, "README.md(: expected YAML| is no YAML)"),
    "no temperature": ([], {"temperature": "None"}, "temperature=None: expected int or float"),
    "endless temperature": ([], {"temperature": "inf"}, "temperature is inf: it must be a number from 0"),
    "algorithm": ([], {"alg": "best"}, "unknown sampling algorithm 'best'"),
    "self": ([], {"self": 1}, "self is unknown; known are"),
    "folder": (["--output_path", "README.md/out"], {}, "cannot write into the folder README.md/out: Not a directory"),
    "file": (["--output_path", "README.md/out.json"], {}, "cannot write into the folder README.md: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(models, name, capsys, monkeypatch):
    flags, settings, message = MISTAKES[name]
    values = {"ckpt_path": "mdm", **settings}
    values["ckpt_path"] = str(models.get(values["ckpt_path"], values["ckpt_path"]))
    text = ",".join(f"{key}={value}" for key, value in values.items())
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate_diff.py"])
    words = [*TASKS, *flags, "--use_cache", "off", "--limit", "1", "--model_args", text]
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: lm_harness.evaluate("mdlm", words))
    assert end.value.code == 2
    last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(last) == 1
    assert not Path("nowhere").exists(), "a refused command made something"
    assert re.search(message, last[0]), last


def test_a_config_file_counts_before_our_defaults_and_behind_what_is_typed(models, tmp_path, monkeypatch, capsys):
    """Its batch size and device were overruled by ours, and its `use_cache` reached a cache that unpickles."""
    config = {
        "model_args": {"ckpt_path": str(models["arm"])},
        "tasks": ["next_line"],
        "include_path": "tasks",
        "limit": 1,
        "batch_size": 3,
        "device": "cpu",
        "use_cache": str(tmp_path / "cache"),
        "output_path": str(tmp_path / "from_config"),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # YAML, too
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate_ar.py"])
    words = ["--config", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "typed")]
    with read_command(words).words("ar") as handed_on:
        assert handed_on[:4] == ["--model", "ar", "--output_path", str(tmp_path / "typed")]
        assert handed_on[4] == "--config" and len(handed_on) == 6
    with read_command([*words, "--device", "cuda:1", "-b", "7"]).words("ar") as handed_on:
        assert handed_on[2:6] == ["--device", "cuda:1", "--batch_size", "7"]
    lm_harness.evaluate("ar", words)
    (record,) = (tmp_path / "typed").rglob("results_*.json")
    assert not (tmp_path / "from_config").exists()
    shown = json.loads(record.read_text())["config"]
    assert (shown["batch_size"], shown["device"], shown["use_cache"]) == (3, "cpu", None)
    # Our cache, where the file says; and no database.
    assert {path.suffix for path in tmp_path.glob("cache*/*")} == {".jsonl"} and not list(tmp_path.rglob("*.db"))
    assert sum(lines(tmp_path / "cache").values()) > 4


def test_a_cache_is_off_in_yaml_too(tmp_path):
    """YAML reads the word off as a truth value."""
    path = tmp_path / "config.yaml"
    for text, expected in (("off", "off"), ("'off'", "off"), ("false", "off"), ("folder", "folder"), ("null", None)):
        path.write_text(f"use_cache: {text}\n")
        assert read_command(["--config", str(path)]).use_cache == expected
    for text in ("on", "5"):
        path.write_text(f"use_cache: {text}\n")
        with pytest.raises(ValueError, match="use_cache is .*, expected a text"):
            _ = read_command(["--config", str(path)]).use_cache


def test_run_is_a_command_only_as_the_first_word():
    for words in (["--output_path", "run", "--tasks", "run"], ["run", "--output_path", "run", "--tasks", "run"]):
        command = read_command(words)
        with command.words("mdlm") as handed_on:
            assert (command.output_path, command.rest) == ("run", ["--tasks", "run"])
            assert handed_on.count("run") == 2


@pytest.mark.parametrize("name", ["batch_size", "device", "output_path"])
def test_abbreviated_flags_count_as_for_the_harness(name: str):
    """`--batch 4` was overruled by our default behind it."""
    from lm_eval._cli.harness import HarnessCLI

    typed = {"batch_size": "4", "device": "cpu", "output_path": "out"}
    for length in range(1, len(name) + 1):
        for words in ([f"--{name[:length]}", typed[name]], [f"--{name[:length]}={typed[name]}"]):
            command = read_command(["--tasks", "x", *words])
            assert getattr(command.typed, name) == typed[name]
            with command.words("mdlm") as handed_on:
                read = HarnessCLI()._parser.parse_args(["run", *handed_on])
            assert (getattr(read, name), read.model) == (typed[name], "mdlm")


def test_our_defaults_stand_before_what_is_handed_on():
    """The harness takes the last, and it may know other spellings: `-sb 4` is `-s` and `-b 4`."""
    from lm_eval._cli.harness import HarnessCLI

    with read_command(["-sb", "4", "--tasks", "x"]).words("mdlm") as handed_on:
        read = HarnessCLI()._parser.parse_args(["run", *handed_on])
    assert (read.batch_size, read.device, read.log_samples) == ("4", "auto", True)


def test_results_that_could_not_be_written_are_an_error(models, tmp_path, monkeypatch, capsys):
    """The harness itself only warns; here the disk is full when it writes."""
    from lm_eval.loggers import EvaluationTracker

    def save(self, *args: object, **kwargs: object) -> None:
        (Path(self.output_path) / "results_2026.json").touch()

    monkeypatch.setattr(EvaluationTracker, "save_results_aggregated", save)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate_ar.py"])
    words = [*TASKS, "--limit", "1", "--model_args", f"ckpt_path={models['arm']}", "-o", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: lm_harness.evaluate("ar", words))
    assert end.value.code == 2
    assert f"error: the results could not be written below {tmp_path}" in capsys.readouterr().err


def test_an_arm_refuses_what_only_an_mdm_has():
    with pytest.raises(ValueError, match="nll_type is unknown"):
        read_model_args("arm", {"ckpt_path": "x", "nll_type": "mc"})


def test_the_papers_settings_are_read():
    """The seven published settings of eval_mdm.sh, as the harness would hand them on."""
    from lm_eval.utils import simple_parse_args_string

    lines = re.findall(r'^evaluate (\S+) "(.*)" "\$@"$', (ROOT / "eval_mdm.sh").read_text(), re.MULTILINE)
    assert [tasks for tasks, _ in lines] == [
        "lambada_standard", "openbookqa,boolq", "piqa", "arc_easy", "social_iqa", "race", "hellaswag"
    ]  # fmt: skip
    settings = [
        read_model_args("mdm", {"ckpt_path": "x", **simple_parse_args_string(words.replace("'", ""))})
        for _, words in lines
    ]
    assert [(one.nll_type, one.cfg, one.greedy) for one in settings] == [
        ("chain_rule", 1.1, True), ("chain_rule", 1.6, False), ("chain_rule", 0.6, False), ("mc", 0.6, False),
        ("mc", 0.6, False), ("mc", 0.7, False), ("mc", 0.7, False),
    ]  # fmt: skip
