"""What an evaluation costs is told before it is paid: against passes that are counted, and progress against work done."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate_fineweb
import evaluate_gsm8k
import evaluate_reverse
from lit_gpt.checkpoints.loaded import LoadedModel, load_model
from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.evaluation import lm_harness
from lit_gpt.evaluation.progress import WorkBar
from lit_gpt.evaluation.work import Work, likelihood_work, sampling_work, total_work
from lit_gpt.likelihood.estimators import make_estimator
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, LikelihoodSettings
from lit_gpt.sampling.sample import sample
from lit_gpt.sampling.settings import Sampling
from tests.support.small_models import export_arm_and_mdm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    """An ARM and an MDM with random weights."""
    return export_arm_and_mdm(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def models(paths) -> dict[str, LoadedModel]:
    return {kind: load_model(paths[kind], device="cpu") for kind in ("arm", "mdm")}


class Counted:
    """Rows and tokens that a model reads, and logits that its head computes, while this is open."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.passes, self.tokens, self.scored, self.model = 0, 0, 0, loaded.model

    def __enter__(self) -> Counted:
        self.hooks = [
            self.model.transformer.wte.register_forward_hook(self.read),
            self.model.lm_head.register_forward_hook(self.score),
        ]
        return self

    def read(self, module, inputs, output):
        self.passes += inputs[0].size(0)
        self.tokens += inputs[0].numel()

    def score(self, module, inputs, output):
        self.scored += inputs[0].shape[:-1].numel()

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


ESTIMATES = [
    ("mc", {"mc_num": 64}, 0.0),
    ("mc", {"mc_num": 64}, 0.5),
    ("chain_rule", {}, 0.0),
    ("exact", {"budget": 20}, 0.7),
    ("exact", {"budget": 1000}, 0.0),
]


@pytest.mark.parametrize(("name", "parameters", "cfg"), ESTIMATES)
@pytest.mark.parametrize("length", [1, 4, 30])
def test_an_estimate_costs_what_was_told(models, name, parameters, cfg, length):
    """Masks that a short target's draws repeat are computed once: 64 draws of a token are one pass or two."""
    request = LikelihoodRequest(tuple(range(5, 15)), tuple(range(20, 20 + length)))
    settings = LikelihoodSettings(make_estimator(name, parameters), cfg)
    told = likelihood_work(models["mdm"], request, settings)
    with Counted(models["mdm"]) as counted:
        list(models["mdm"].likelihoods([request], settings, 4096))
    assert told.passes == pytest.approx(counted.passes, rel=0.1, abs=2)
    assert told.tokens == pytest.approx(counted.tokens, rel=0.1, abs=2 * (10 + length))
    assert counted.passes <= (1 + bool(cfg)) * settings.estimator.passes(length) and told.requests == 1
    assert told.flops > 2 * models["mdm"].model.config.non_embedding_params * told.tokens


def test_an_arms_likelihood_is_one_pass(models):
    request = LikelihoodRequest((1, 5, 6), (7, 8))
    assert likelihood_work(models["arm"], request, LikelihoodSettings()).passes == 1
    assert likelihood_work(models["arm"], request, LikelihoodSettings()).tokens == 4


SAMPLINGS = [
    Sampling(algorithm="greedy", steps=64, temperature=0.0),
    Sampling(algorithm="greedy", steps=7, temperature=0.0, cfg_scale=0.5),
    Sampling(algorithm="origin", steps=16),
    Sampling(algorithm="origin", steps=16, remask=0.2),
    Sampling(algorithm="threshold", steps=24, threshold=0.99),
    Sampling(algorithm="greedy", steps=24, block_length=8),
    Sampling(algorithm="greedy", steps=24, block_length=8, cache="prefix"),
    Sampling(algorithm="greedy", steps=24, block_length=8, cache="dual", refresh=3),
    Sampling(algorithm="greedy", steps_per_token=0.5),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
def test_an_mdms_text_costs_what_was_told(models, sampling):
    loaded, prompt, length = models["mdm"], list(range(3, 13)), 34
    told = sampling_work(loaded, len(prompt), length, sampling)
    with Counted(loaded) as counted:
        sample(loaded.model, [prompt], sampling, length)
    assert counted.passes <= told.passes and counted.tokens <= told.tokens
    # Chance decides how many steps of `origin` reveal nothing; the published counts of `greedy` leave few of them empty.
    least = 0.5 if sampling.algorithm == "origin" else 0.85
    assert counted.passes >= least * told.passes and counted.tokens >= least * told.tokens


@pytest.mark.parametrize("cache", [{}, {"block_length": 8, "cache": "prefix", "refresh": 2}], ids=["none", "prefix"])
@pytest.mark.parametrize("steps", [24, 256])
def test_a_batch_of_origin_costs_what_was_told(models, steps, cache):
    """Its rows reveal something in different steps, and all of them are read in each of those."""
    loaded, sampling = models["mdm"], Sampling("origin", steps=steps, **cache)
    told = total_work([sampling_work(loaded, 3, 19, sampling)] * 8)
    with Counted(loaded) as counted:
        sample(loaded.model, [[5, 6, n] for n in range(3, 11)], sampling, 19)
    assert counted.passes <= told.passes
    # A cache is made anew for all rows where one of them needs it: how many tokens that reads is not foreseen.
    assert counted.tokens <= told.tokens or cache


@pytest.mark.parametrize("use_cache", [True, False])
def test_an_arms_text_costs_what_was_told(models, use_cache):
    loaded, sampling = models["arm"], Sampling(use_cache=use_cache)
    told = sampling_work(loaded, 5, 20, sampling)
    with Counted(loaded) as counted:
        sample(loaded.model, [list(range(3, 8))], sampling, 20)
    assert (told.passes, told.tokens) == (counted.passes, counted.tokens)
    assert sampling_work(loaded, 20, 20, sampling) == Work(1)


def test_progress_is_work_and_not_requests(models, capsys):
    """One long request and 79 short ones: the bar once went from 1 of 80 to 80 of 80."""
    loaded = models["mdm"]
    requests = [LikelihoodRequest(tuple(range(9)), tuple(range(60)))]
    requests += [LikelihoodRequest((number,), tuple(range(4 + number % 9))) for number in range(79)]
    settings = LikelihoodSettings(make_estimator("mc", {"mc_num": 32}))
    works = [likelihood_work(loaded, request, settings) for request in requests]
    shares = []
    with WorkBar(loaded.model, total_work(works), "likelihoods") as bar:
        update = bar._bar.update

        def watched(amount):
            update(amount)
            shares.append(bar._bar.n / bar._bar.total)

        bar._bar.update = watched
        for number, _ in loaded.likelihoods(requests, settings, 1024):
            bar.finish(works[number])
    steps = [after - before for before, after in itertools.pairwise([0.0, *shares])]
    assert min(steps) >= 0 and max(steps) < 0.2 and len({round(share, 2) for share in shares}) > 10
    assert shares[-1] == 1.0
    err = capsys.readouterr().err
    assert "80 of 80 requests" in err and "100%" in err
    # The hooks are gone.
    assert not loaded.model.transformer.wte._forward_pre_hooks and not loaded.model.lm_head._forward_pre_hooks


def test_progress_survives_a_wrong_estimate(models):
    """Twice the work that was told: the bar stays below its end until the last request."""
    loaded = models["mdm"]
    settings = LikelihoodSettings(make_estimator("mc", {"mc_num": 16}))
    request = LikelihoodRequest((1,), tuple(range(30)))
    half = likelihood_work(loaded, request, settings)
    half = dataclasses.replace(half, flops=half.flops // 2)
    with WorkBar(loaded.model, half + half, "likelihoods") as bar:
        for _ in loaded.likelihoods([request], settings, 64):
            assert bar._bar.n < bar._bar.total
            bar.finish(half)
        assert bar._bar.n < bar._bar.total
        bar.finish(half)
    assert bar._bar.n == bar._bar.total


# Dry runs


def everything(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def told_line(out: str, what: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith(f"{what}: ")]
    return line


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_a_dry_run_of_gsm8k_tells_and_writes_nothing(paths, kind, tmp_path, capsys):
    words = ["--ckpt_path", str(paths[kind]), "--limit", "3", "--steps", "4", "--length", "128", "--batch_size", "2"]
    words += ["--output", str(tmp_path / "answers.jsonl")]
    evaluate_gsm8k.main([*words, "--dry_run"])
    out, err = capsys.readouterr()
    assert told_line(err, "answers").startswith("answers: 3 requests, 0 of them found, 3 to compute: at most ")
    assert err.endswith("dry run: nothing was computed, nothing was written\n") and out == ""
    assert everything(tmp_path) == []
    evaluate_gsm8k.main(words)
    assert " 3 to compute" in capsys.readouterr().err
    before = {path: (tmp_path / path).read_bytes() for path in ("answers.jsonl", "answers.settings.json")}
    evaluate_gsm8k.main([*words, "--dry_run"])
    assert "answers: 3 requests, 3 of them found, 0 to compute\n" in capsys.readouterr().err
    assert before == {Path(path).name: Path(path).read_bytes() for path in everything(tmp_path)}


def test_a_dry_run_of_fineweb_tells_what_is_there_already(paths, tmp_path, capsys):
    builder = PackedDatasetBuilder(tmp_path / "crawl", "validation", 65 * 8, 1, "uint16", 500)
    builder.add_array(np.random.default_rng(0).integers(3, 500, 65 * 8).astype(np.uint16))
    builder.write_reminder()
    words = ["--ckpt-path", str(paths["mdm"]), "--type", "mdm", "--fineweb", "crawl", "--data-dir", str(tmp_path)]
    words += ["--length", "64", "--mc-samples", "4", "--cache", str(tmp_path / "cache")]
    before = everything(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate_fineweb.py", *words, "--dry_run"])
        evaluate_fineweb.main()
        first = told_line(capsys.readouterr().err, "rows")
        assert everything(tmp_path) == before and " 0 of them found" in first and "passes over" in first
        patch.setattr(sys, "argv", ["evaluate_fineweb.py", *words, "--rows", "3"])
        evaluate_fineweb.main()
        capsys.readouterr()
        patch.setattr(sys, "argv", ["evaluate_fineweb.py", *words, "--dry_run"])
        evaluate_fineweb.main()
        out, err = capsys.readouterr()
    assert " 3 of them found" in told_line(err, "rows") and out == ""


def test_a_dry_run_of_the_reversal_questions(paths, tmp_path, capsys):
    for name in ("p2d_prompts_test.jsonl", "d2p_reverse_prompts_test.jsonl"):
        (tmp_path / name).write_text('{"prompt": "Who is it?", "completion": "Tom"}\n')
    before = everything(tmp_path)
    words = ["--ckpt-path", str(paths["mdm"]), "--data_dir", str(tmp_path), "--output", str(tmp_path / "a.jsonl")]
    evaluate_reverse.main([*words, "--dry_run"])
    assert "answers: 2 requests, 0 of them found" in capsys.readouterr().err and everything(tmp_path) == before


def harness(folder: Path, paths: dict[str, Path], *words: str) -> list[str]:
    """A command of both kinds of requests: likelihoods and texts."""
    task = folder / "tasks"
    task.mkdir(exist_ok=True)
    (task / "docs.jsonl").write_text("".join(f'{{"text": "Speak {n}", "target": "the"}}\n' for n in range(4)))
    common = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {task / "docs.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
"""
    (task / "write.yaml").write_text(
        f"task: write\n{common}output_type: generate_until\ngeneration_kwargs: {{max_gen_toks: 8, until: []}}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    (task / "score.yaml").write_text(
        f"task: score\n{common}output_type: loglikelihood\nmetric_list: [{{metric: acc}}]\n"
    )
    return [
        *("--tasks", "write,score", "--include_path", str(task), "--output_path", str(folder / "out")),
        *("--model_args", f"ckpt_path={paths['mdm']},nll_type=exact,budget=4", *words),
    ]


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
    }


def test_a_dry_run_of_the_harness_tells_all_requests_once_for_all_processes(paths, tmp_path):
    words = [str(ROOT / "evaluate_diff.py"), *harness(tmp_path, paths, "--dry_run")]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, *words],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("likelihoods", "generating"):
        line = told_line(done.stderr, what)
        assert line.startswith(f"{what}: 4 requests, 0 of them found, 4 to compute: ") and line.endswith(
            "in 2 processes"
        )
    assert done.stderr.count("dry run: nothing was computed") == 1 and "|" not in done.stdout
    assert not (tmp_path / "out").exists() and not (tmp_path / ".cache" / "smdm").exists()


def test_the_harness_tells_before_it_computes(paths, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate_diff.py"])
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    lm_harness.evaluate("mdlm", harness(tmp_path, paths, "--use_cache", str(tmp_path / "cache")))
    out, err = capsys.readouterr()
    assert "likelihoods: 4 requests, 0 of them found, 4 to compute: at most " in err and "|score" in out.replace(
        " ", ""
    )
    lm_harness.evaluate("mdlm", harness(tmp_path, paths, "--use_cache", str(tmp_path / "cache"), "--dry_run"))
    out, err = capsys.readouterr()
    assert "generating: 4 requests, 4 of them found, 0 to compute\n" in err and "|" not in out
