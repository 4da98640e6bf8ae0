"""The kinds of files that users bring: how a whole one is made, how it is damaged, and how the scripts read it.

A reader raises AssertionError where what it accepted cannot be a result: a number that is not finite, a share beyond 1,
a token that the vocabulary does not have.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt.checkpoints import run_files, run_record, saving, weights
from lit_gpt.checkpoints.export import SUFFIX, WeightsRecord, export_weights
from lit_gpt.checkpoints.loaded import load_model
from lit_gpt.config import Config
from lit_gpt.data.packed_dataset import open_mixture, recorded_tokenizer
from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.data.pickled_tokens import read_token_list
from lit_gpt.data.sft_formats import SFT_FORMATS, Unusable
from lit_gpt.data.text_files import find_sources
from lit_gpt.data.text_sources import DocumentRules, ReadPosition, read_raw_records
from lit_gpt.evaluation.generated_answers import AnswerFile, accuracy_line, read_json_questions
from lit_gpt.evaluation.mt_bench.benchmark_files import read_answers, read_mt_bench_questions
from lit_gpt.evaluation.mt_bench.judging import read_judge_prompts, read_judgments
from lit_gpt.evaluation.mt_bench.tables import model_ratings
from lit_gpt.evaluation.result_cache import EvalCache, is_estimate
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.layers import Transformer
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.training import strategies
from lit_gpt.training.loggers import MetricsCsv
from lit_gpt.ui.info import path_info
from lit_gpt.ui.page import find_checkpoints
from tests.fuzz.mutations import WILD_VALUES, mutate_bytes, mutate_json, mutate_lines, mutate_value
from tests.support.small_tokenizers import convert_to_tokenizer_json, train_small_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = Config("tiny", 1, 2, 16, 32, 2, block_size=32, vocab_size=400)
torch.set_num_threads(1)


@dataclass(frozen=True)
class FileKind:
    """One kind of files."""

    make: Callable[[Path], object]
    """Write whole ones into an empty folder."""
    damage: Callable[[Path, random.Random], object]
    """Damage one of them."""
    read: Callable[[Path], object]
    """Read them all as the scripts do, without keeping anything."""
    load: Callable[[], object] = lambda: None
    """Import what reading needs, once for all inputs."""


def damage_one(damages: dict[str, Callable[[bytes, random.Random], bytes]]) -> Callable[[Path, random.Random], None]:
    """Damage one file among those of some names."""

    def damage(folder: Path, chance: random.Random) -> None:
        name = chance.choice(sorted(damages))
        path = folder / name
        path.write_bytes(damages[name](path.read_bytes(), chance))

    return damage


def require(good: bool, text: str) -> None:
    """What was accepted has to be a result."""
    if not good:
        raise AssertionError(f"accepted: {text}")


@cache
def whole_tokenizer() -> bytes:
    """A small tokenizer.model."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return (train_small_tokenizer(Path(folder), 400) / "tokenizer.model").read_bytes()


def small_model(kind: type[Transformer]) -> Transformer:
    """A model with random weights."""
    model = kind(TINY)
    model.init_weights(1)
    return model


# --- packed data ------------------------------------------------------------------------------------------------------


def make_packed(folder: Path) -> None:
    """Two files, a manifest and a pickled token list."""
    builder = PackedDatasetBuilder(folder, "train", 99, 1, vocab_size=400)
    builder.add_array(np.arange(2, 150))
    builder.write_reminder()
    files = {Path(name).name: {"tokens": 99 - 50 * index} for index, name in enumerate(builder.filenames)}
    tokenizer = {"source": "tok", "fingerprint": "00", "vocab_size": 400}
    (folder / "train.manifest.json").write_text(json.dumps({"files": files, "tokenizer": tokenizer, "made_from": {}}))
    import pickle

    (folder / "old.pkl").write_bytes(pickle.dumps(list(range(1000)) + [70_000] * 3))


def read_packed(folder: Path) -> None:
    """Training data, its tokenizer, its description."""
    mixture = open_mixture(folder, {"train": 1.0}, 33, 400, 1)
    for number in range(6):
        tokens = mixture[number].tokens
        require(bool((tokens >= 0).all() and (tokens < 400).all()), "a token beyond the vocabulary")
    recorded_tokenizer(folder, ["train"])
    path_info(folder)
    require(bool((read_token_list(folder / "old.pkl") >= 0).all()), "a negative token")


# --- models -----------------------------------------------------------------------------------------------------------


def make_export(folder: Path) -> None:
    """An MDM with its tokenizer inside."""
    model = small_model(TransEncoder)
    record = WeightsRecord(model.kind, TINY, {}, {"run_id": "a", "name": "n", "result": {"val_loss": 1.5}})
    tokenizer = Tokenizer.from_contents({"tokenizer.model": whole_tokenizer()}, "tok")
    export_weights(folder, "model", model.state_dict(), record, tokenizer=tokenizer)


def damage_export(folder: Path, chance: random.Random) -> None:
    """Damage the header's JSON, the record within, a weight, or any byte."""
    path = folder / f"model{SUFFIX}"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    kind = chance.randrange(5)
    if kind == 0:
        path.write_bytes(mutate_bytes(content, chance))
        return
    if kind <= 2:
        record = json.loads(header["__metadata__"]["smdm"])
        record = mutate_value(record["config"], chance) if chance.random() < 0.1 else mutate_value(record, chance)
        header["__metadata__"]["smdm"] = json.dumps(record)
    elif kind == 3:
        header = mutate_value(header, chance)
    else:
        at = 4 * chance.randrange(len(data) // 4)
        wild = (math.nan, math.inf, -math.inf, 3e38, 1e-44, -0.0)
        data[at : at + 4] = struct.pack("<f", chance.choice(wild))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_export(folder: Path) -> None:
    """As the page lists it, `info` describes it, and an evaluation uses it."""
    path = folder / f"model{SUFFIX}"
    find_checkpoints([str(path)])
    path_info(path)
    model = load_model(path, device="cpu", tokenizer=None)
    result = model.loglikelihood("To be", " or not", "exact", budget=4)
    require(math.isfinite(result.nats), f"log-likelihood {result.nats}")
    model.generate("To be", max_new_tokens=4, steps=2)


def make_checkpoint(folder: Path) -> None:
    """A checkpoint of a run, its marker and its record."""
    fabric = strategies.start_fabric("cpu", "1", 1, "auto", "32-true")
    state = training_state(fabric, seed=1)
    training_step(fabric, state)
    record = {"kind": "mdm", "config": TINY.to_dict(), "run_id": "a", "settings": {"lr": 1.0}, "log_path": "x",
              "run": {"micro_batch_size": 2, "world_size": 1}}  # fmt: skip
    saving.save_checkpoint(fabric, folder, state, record)
    run_record.write_run_record(folder, {**record, "result": {"val_loss": 1.5}, "finished": False})


def training_state(fabric: Any, seed: int) -> dict[str, Any]:
    """A model and its optimizer."""
    module = TransEncoder(TINY)
    module.init_weights(seed)
    model = fabric.setup_module(module)
    model.mark_forward_method("weighted_nll")
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))
    return {"model": model, "optimizer": optimizer, "hparams": {"a": 1}, "iter_num": 4, "step_count": 1}


def training_step(fabric: Any, state: dict[str, Any]) -> float:
    """One step on fixed tokens; its loss."""
    ids = torch.arange(64).view(2, 32) + 2
    terms = LossTerms(ids, ids, torch.full((2, 32), 1 / 64), torch.ones(2, 32, dtype=torch.bool))
    loss = state["model"].weighted_nll(terms)[0]
    fabric.backward(loss)
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    return float(loss)


def odd_tensors() -> tuple[Any, ...]:
    """What may stand where a plain tensor is expected."""
    square = torch.ones(16, 16)
    return (
        square.to_sparse(), square.to("meta"), square.long(), square.to(torch.complex64), square * math.nan, square[:0],
        torch.zeros(1).expand(1 << 16, 1 << 16), torch.zeros(()), torch.tensor(-1.0), torch.ones(3, dtype=torch.bool),
        torch.quantize_per_tensor(square, 0.1, 0, torch.qint8), square.to(torch.float8_e4m3fn), square.bfloat16(),
    )  # fmt: skip


def damage_checkpoint(folder: Path, chance: random.Random) -> None:
    """Damage what the file holds, its bytes, its marker or the run's record."""
    path = next(folder.glob("*.pth"))
    kind = chance.randrange(5)
    if kind == 0:
        name = chance.choice((path.with_suffix(".json").name, "run.json"))
        (folder / name).write_bytes(mutate_json((folder / name).read_bytes(), chance))
        return
    if kind == 1:
        path.write_bytes(mutate_bytes(path.read_bytes(), chance))
    else:
        content = torch.load(path, weights_only=True)
        wild = (*WILD_VALUES, *odd_tensors(), *odd_tensors())
        if kind == 2:
            content["optimizer"] = mutate_value(content["optimizer"], chance, wild)
        else:
            content = mutate_value(content, chance, wild)
        torch.save(content, path)
    if chance.random() < 0.7:
        path.with_suffix(".json").unlink()
    else:
        marker = json.loads(path.with_suffix(".json").read_text())
        marker |= {"size": path.stat().st_size, "sha256": run_files.file_sha256(path)}
        path.with_suffix(".json").write_text(json.dumps(marker))


def read_checkpoint(folder: Path) -> None:
    """Describe it, open it for evaluation, resume from it and make a step."""
    path_info(folder)
    run_record.read_run_record(folder, ("run_id", "log_path"))
    path = next(folder.glob("*.pth"))
    info = run_files.open_checkpoint(path)
    model, _ = weights.read_model(path)
    require(bool(torch.isfinite(model(torch.arange(8)[None])).all()), "logits that are not finite")
    fabric = strategies.start_fabric("cpu", "1", 1, "auto", "32-true")
    state = training_state(fabric, seed=2)
    saving.load_checkpoint(fabric, info, state)
    training_step(fabric, state)
    require(all(bool(value.isfinite().all()) for value in state["model"].state_dict().values()), "weights after a step")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def make_tokenizers(folder: Path) -> None:
    """Both forms, each in a folder of its own, side by side."""
    for name in ("model", "json"):
        (folder / name).mkdir()
    (folder / "model" / "tokenizer.model").write_bytes(whole_tokenizer())
    convert_to_tokenizer_json(folder / "model", folder / "json")


def read_tokenizers(folder: Path) -> None:
    """Encode, decode, count bytes."""
    for name in ("model", "json"):
        tokenizer = Tokenizer(folder / name)
        for text in ("To be, or not to be", "\u2028 \U0001f600 \x00", ""):
            ids = tokenizer.encode_ids(text)
            require(all(0 <= one < tokenizer.vocab_size for one in ids), "an id beyond the vocabulary")
            tokenizer.decode(ids)
        require(len(tokenizer.token_bytes()) == tokenizer.vocab_size < 1 << 22, "the size of the vocabulary")


# --- lines ------------------------------------------------------------------------------------------------------------


def make_lines(folder: Path) -> None:
    """Files of JSON lines, and fine-tuning data of every format."""
    mt_bench = ROOT / "data" / "mt_bench"
    copies = {
        "questions.jsonl": mt_bench / "question.jsonl",
        "prompts.jsonl": ROOT / "data" / "judge_prompts.jsonl",
        "gsm8k.jsonl": ROOT / "data" / "gsm8k" / "test.jsonl",
        "answers.jsonl": next((mt_bench / "reference_answer").glob("*.jsonl")),
    }
    for name, source in copies.items():
        (folder / name).write_bytes(b"".join(source.read_bytes().splitlines(keepends=True)[:5]))
    judgment = {"question_id": 81, "model": "m", "judge": ["j", "single-v1"], "user_prompt": "u", "judgment": "[[5]]",
                "score": 5, "turn": 1, "tstamp": 1.5}  # fmt: skip
    (folder / "judgments.jsonl").write_text("".join(json.dumps({**judgment, "turn": turn}) + "\n" for turn in (1, 2)))
    texts = [{"text": "a text", "meta": {"redpajama_set_name": "x"}}, {"text": "another"}]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    (folder / "reverse.jsonl").write_text('{"prompt": "a b", "completion": "c"}\n' * 2)
    (folder / "gsm8k.txt").write_text("1 + 1?||1 + 1 = 2 #### 2\n" * 2)
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    (folder / "sharegpt.json").write_text(json.dumps([{"conversations": turns}] * 2))


def read_lines(folder: Path) -> None:
    """All of them."""
    read_mt_bench_questions(folder / "questions.jsonl")
    read_judge_prompts(folder / "prompts.jsonl")
    read_json_questions(folder / "gsm8k.jsonl", ("question", "target"))
    read_answers(folder / "answers.jsonl")
    for ratings in model_ratings(read_judgments(folder / "judgments.jsonl", "single")):
        require(math.isfinite(ratings.mean() or 0), "a mean rating")
    rules = DocumentRules(skip_subsets=("x",))
    for batch in read_raw_records(find_sources([str(folder / "texts.jsonl")]), rules, ReadPosition()):
        list(batch.texts(rules))
    tokenizer = Tokenizer.from_contents({"tokenizer.model": whole_tokenizer()}, "tok")
    for name, file in (("gsm8k", "gsm8k.txt"), ("sharegpt", "sharegpt.json"), ("reverse", "reverse.jsonl")):
        for _, record in SFT_FORMATS[name].records(folder / file):
            try:
                SFT_FORMATS[name].examples(record, tokenizer)
            except Unusable:
                continue


# --- results ----------------------------------------------------------------------------------------------------------

QUESTIONS = [{"index": number, "question": f"{number}?", "target": "1"} for number in range(4)]
SETTINGS = {"steps": 4, "model": {"n": 1}}


def collect(folder: Path) -> list[dict[str, Any]]:
    """The answers that are kept, and those that lack."""
    file = AnswerFile(folder / "answers.jsonl", SETTINGS, ("index",), "continue", 2, ("correct", "bleu"))
    return file.collect(QUESTIONS, lambda batch: [{**one, "correct": True, "bleu": 0.5, "text": "1"} for one in batch])


def make_results(folder: Path) -> None:
    """Answers, a cache, a log."""
    collect(folder)
    cached = EvalCache(folder / "cache", SETTINGS)
    cached.add([("a", [1.5, 0.1]), ("b", [2.5, math.nan])])
    cached.close()
    MetricsCsv(folder / "metrics.csv", ["step", "loss"], None).log_metrics({"loss": 0.5}, 1)


def damage_results(folder: Path, chance: random.Random) -> None:
    """Damage one of them."""
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    change = {".jsonl": mutate_lines, ".json": mutate_json}.get(path.suffix, mutate_bytes)
    path.write_bytes(change(path.read_bytes(), chance))


def read_results(folder: Path) -> None:
    """Go on with all of them."""
    answers = collect(folder)
    require(len(answers) == 4 and all(isinstance(one["correct"], bool) for one in answers), "a verdict")
    require(all(0 <= one["bleu"] <= 1 for one in answers), "a BLEU")
    accuracy_line(answers)
    cached = EvalCache(folder / "cache", SETTINGS)
    values = [cached.get(key, is_estimate) for key in "ab"]
    require(all(value is None or math.isfinite(value[0]) for value in values), "a cached number")
    cached.close()
    MetricsCsv(folder / "metrics.csv", ["step", "loss"], 5)


FILE_KINDS = {
    "packed": FileKind(
        make_packed,
        damage_one(
            {"train_0000000000.bin": mutate_bytes, "train.manifest.json": mutate_json, "old.pkl": mutate_bytes}
        ),
        read_packed,
    ),
    "exports": FileKind(make_export, damage_export, read_export),
    "checkpoints": FileKind(make_checkpoint, damage_checkpoint, read_checkpoint),
    "tokenizers": FileKind(
        make_tokenizers,
        damage_one(
            {
                "model/tokenizer.model": mutate_bytes,
                "json/tokenizer.json": mutate_json,
                "json/tokenizer_config.json": mutate_json,
            }
        ),
        read_tokenizers,
    ),
    "lines": FileKind(
        make_lines,
        damage_one(
            {
                **dict.fromkeys(
                    ("questions.jsonl", "prompts.jsonl", "gsm8k.jsonl", "answers.jsonl", "judgments.jsonl",
                     "texts.jsonl", "reverse.jsonl"), mutate_lines
                ),
                "gsm8k.txt": mutate_bytes,
                "sharegpt.json": mutate_json,
            }
        ),
        read_lines,
    ),
    "results": FileKind(make_results, damage_results, read_results),
}  # fmt: skip
