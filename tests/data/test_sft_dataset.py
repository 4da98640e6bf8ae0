"""Fine-tuning data: the original's examples token for token, what is left out, and reading at any position."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import resource
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.data.sft_dataset import ExamplePreparation, SftDataset, left_out_lines, prepare_examples
from lit_gpt.data.sft_formats import CHAT_TEMPLATE, GSM8K, REVERSE, SFT_FORMATS, SHAREGPT, json_items, text_lines
from lit_gpt.files import SaveError
from lit_gpt.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
LINE = "How many are {n} and 1?||We add them: {n} + 1. #### {n}1\n"
TURNS = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A model."}, {"from": "human", "value": "Bye"}]


@pytest.fixture(scope="module")
def llama():
    return Tokenizer(ROOT / "data/tokenizer")


@pytest.fixture
def plan(tmp_path, tokenizer):
    """A function that writes a file and says how to prepare it."""

    def make(source, text, **changes):
        path = tmp_path / f"data.{source.name}"
        path.write_text(text, encoding="utf-8")
        return dataclasses.replace(
            ExamplePreparation(source, path, tokenizer, 64, 0.05, workers=1, cache=tmp_path / "cache"), **changes
        )

    return make


def opened(plan, row_length=64, seed=3):
    return SftDataset(prepare_examples(plan), row_length, plan.tokenizer.eos_id, seed)


def examples(source, records, tokenizer):
    return [example for _, record in records for example in source.examples(record, tokenizer)]


def check(found, expected):
    assert found.prompt + found.response == expected["tokens"]
    assert len(found.prompt) == expected.get("input_length", 0)


@pytest.mark.parametrize("number", [0, 1])
def test_gsm8k_examples_are_the_originals(golden, llama, tmp_path, number):
    case = golden("sft")["gsm8k"][number]
    first, end = case["lines"]
    chosen = [line for _, line in text_lines(ROOT / GSM8K.bundled)][first:end]
    path = tmp_path / "train.txt"
    path.write_text("".join(chosen), encoding="utf-8")
    data = opened(
        ExamplePreparation(GSM8K, path, llama, case["max_length"], 0, 1, tmp_path / "cache"), case["max_length"]
    )
    assert len(data) == case["count"]
    for index, expected in enumerate(case["examples"]):
        assert data.tokens(index).tolist() == expected["tokens"]
        assert data._prompt_lengths[index] == expected["input_length"]
        assert data.pad_id == expected["pad_id"]


def test_sharegpt_examples_are_the_originals(golden, llama):
    case = golden("sft")["sharegpt"]
    found = examples(SHAREGPT, list(json_items(ROOT / SHAREGPT.bundled))[slice(*case["items"])], llama)
    assert len(found) == case["count"]
    for one, expected in zip(found, case["examples"], strict=False):
        check(one, expected)


def test_reverse_examples_are_the_originals(llama):
    shared = ROOT.parent / "shared"
    if not (shared / REVERSE.path).is_file():
        pytest.skip("the reversal curse's files state no licence and are not part of this repository")
    case = json.loads((shared / "golden/sft.json").read_text())["reverse"]
    found = examples(REVERSE, text_lines(shared / REVERSE.path), llama)
    assert len(found) == case["count"]
    for index, expected in zip((0, 1, 3599), case["examples"], strict=True):
        check(found[index], expected)


def test_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("a\u2028b\r\nc\n\n d\x0be", encoding="utf-8", newline="")
    assert list(text_lines(path)) == [(1, "a\u2028b\r\n"), (2, "c\n"), (4, " d\x0be")]


def test_samples_are_padded_rows_in_an_order_of_their_own_each_epoch(plan):
    data = opened(plan(GSM8K, "".join(LINE.format(n=n) for n in range(20))))
    assert len(data) == 40
    epochs = [[tuple(data[k].tokens) for k in range(start, start + 40)] for start in (0, 40)]
    assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == 40
    assert epochs[0] != epochs[1]
    for k in range(40):
        sample, extent = data[k], data.extent(k)
        assert sample.tokens.shape == (65,) and (sample.tokens[sample.length :] == data.pad_id).all()
        assert (sample.length, sample.prompt_length) == extent
        assert 0 < sample.prompt_length < sample.length
    other = opened(plan(GSM8K, "".join(LINE.format(n=n) for n in range(20))), seed=4)
    assert [tuple(other[k].tokens) for k in range(40)] != epochs[0]


def test_several_workers_and_a_second_call_give_the_same(plan, monkeypatch):
    monkeypatch.setattr("lit_gpt.data.sft_dataset._RECORDS_FOR_A_WORKER", 40)
    text = "".join(LINE.format(n=n) for n in range(120))
    one = opened(plan(GSM8K, text))
    folder = prepare_examples(plan(GSM8K, text))
    made = (folder / "info.json").stat().st_mtime_ns
    assert prepare_examples(plan(GSM8K, text)) == folder and (folder / "info.json").stat().st_mtime_ns == made
    two = opened(plan(GSM8K, text, workers=2, cache=folder.parent / "other"))
    assert one.fingerprint == two.fingerprint
    assert all((one.tokens(index) == two.tokens(index)).all() for index in range(240))
    # Another text or limit is another folder.
    assert prepare_examples(plan(GSM8K, text, max_length=63)) != folder
    assert prepare_examples(plan(GSM8K, text + LINE.format(n=7))) != folder


def _prepare_and_tell(plan, queue):
    queue.put(str(prepare_examples(plan)))


def test_processes_that_start_together_prepare_once(plan):
    chosen = plan(GSM8K, "".join(LINE.format(n=n) for n in range(50)))
    # Tokenizers are opened in the child: compiled ones do not travel.
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_prepare_and_tell, args=(chosen, queue)) for _ in range(3)]
    for child in children:
        child.start()
    folders = {queue.get(timeout=60) for _ in children}
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(folders) == 1 and len(SftDataset(Path(folders.pop()), 64, 2, 0)) == 100


def test_long_and_malformed_records_are_counted_with_their_place(plan):
    text = (
        "".join(LINE.format(n=n) for n in range(40))
        + "no bars\n"
        + f"{'x ' * 200}|| long #### 1\n"
        + "a||b||c #### 1\n"
    )
    chosen = plan(GSM8K, text, max_malformed=0.1)
    data = opened(chosen)
    assert len(data) == 80
    assert left_out_lines(data.info, 64) == [
        f"left out 2 of 43 records: malformed: expected one || and one #### (first: {chosen.path}:41)",
        f"left out 1 of 43 records: over 64 tokens (first: {chosen.path}:42)",
    ]
    # The share is the reader's to set: prepared or not, it is looked at.
    with pytest.raises(
        ValueError, match=r"2 of 43 records are malformed, first .*:41 .*larger share with --max_malformed"
    ):
        prepare_examples(dataclasses.replace(chosen, max_malformed=0.01))


@pytest.mark.parametrize(
    "record,reason",
    [
        (3, "malformed"),
        ({"conversations": [{"from": "human"}]}, "malformed"),
        ({"id": "a"}, "malformed"),
        ({"conversations": []}, "not human, then gpt"),
        ({"conversations": TURNS[1:]}, "not human, then gpt"),
        ({"conversations": TURNS[:1]}, "not human, then gpt"),
    ],
)
def test_dialogues_of_wrong_roles_are_left_out(plan, record, reason):
    good = {"conversations": TURNS}
    data = opened(plan(SHAREGPT, json.dumps([good, record, good]), max_malformed=0.5, max_length=200), 200)
    (line,) = left_out_lines(data.info, 200)
    assert len(data) == 2 and reason in line and line.endswith(":2)")


def with_first_round(number, question, answer):
    """A bundled dialogue, its first round changed where a text is given."""
    dialogue = json.loads(list(json_items(ROOT / SHAREGPT.bundled))[number][1])
    for turn, text in zip(dialogue["conversations"], (question, answer), strict=False):
        turn["value"] = turn["value"] if text is None else text
    return dialogue


def test_dialogues_with_an_empty_question_or_answer_are_kept(plan, llama):
    """As the published template writes them: without the blanks around an empty question."""
    changed = [("", None), (None, ""), ("", ""), (" ", "\n"), (None, None)]
    dialogues = [with_first_round(number, *texts) for number, texts in enumerate(changed)]
    data = opened(plan(SHAREGPT, json.dumps(dialogues), max_length=300, tokenizer=llama), 300)
    assert len(data) == 5 and left_out_lines(data.info, 300) == []
    start = CHAT_TEMPLATE.partition("USER:")[0]
    questions, answers = ([dialogue["conversations"][turn]["value"] for dialogue in dialogues] for turn in (0, 1))
    prompts = [f"{start}USER:ASSISTANT:" if not text else f"{start}USER: {text} ASSISTANT:" for text in questions]
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [llama.bos_id, *llama.encode_ids(prompt)]
        assert data.tokens(index).tolist() == [*ids, llama.bos_id, *llama.encode_ids(answer), llama.eos_id]
        assert data._prompt_lengths[index] == len(ids)
    assert data.tokens(2).tolist()[-2:] == [llama.bos_id, llama.eos_id], "an empty answer ends at once"


def test_special_tokens_inside_a_text_are_read_as_the_tokenizer_is_told(plan, llama):
    dialogue = with_first_round(0, "What is </s>?", "An end.<unk>")
    own, published = (
        plan(SHAREGPT, json.dumps([dialogue]), max_length=300, tokenizer=llama.reading(how)) for how in ("text", "ids")
    )
    assert prepare_examples(own) != prepare_examples(published), "the cache tells them apart"
    spelled, ids = (opened(chosen, 300).tokens(0).tolist() for chosen in (own, published))
    assert (spelled.count(llama.eos_id), spelled.count(0)) == (1, 0)
    assert (ids.count(llama.eos_id), ids.count(0)) == (2, 1) and ids[-2:] == [0, llama.eos_id]
    assert llama.decode(spelled).replace("</s>", "").replace("<unk>", "").split() == llama.decode(ids).split()


def test_files_that_give_nothing_are_refused(plan):
    with pytest.raises(ValueError, match=r"gives no example: left out 1 of 1 records: over 4 tokens"):
        prepare_examples(plan(GSM8K, LINE.format(n=1), max_length=4))
    with pytest.raises(ValueError, match="gives no example: it is empty"):
        prepare_examples(plan(GSM8K, ""))
    with pytest.raises(ValueError, match="not readable as JSON: .* line 1 column"):
        prepare_examples(plan(SHAREGPT, "[{]"))
    with pytest.raises(ValueError, match="holds a JSON dict, expected a list"):
        prepare_examples(plan(SHAREGPT, "{}"))
    with pytest.raises(FileNotFoundError, match=r"get it from github.com/lukasberglund.* and put it there$"):
        chosen = plan(REVERSE, "")
        chosen.path.unlink()
        prepare_examples(chosen)


def test_a_full_disk_under_the_cache_is_one_line(plan):
    text = "".join(f"question {number}||1 #### 2\n" for number in range(2000))
    chosen = plan(GSM8K, text)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(SaveError, match=f"^cannot write {chosen.cache}/.*: .*[Ff]ile too large"):
            prepare_examples(chosen)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_reverse_fact_is_one_text(tokenizer):
    record = json.dumps({"prompt": "Ada is", "completion": " the one."})
    (found,) = REVERSE.examples(record, tokenizer)
    assert found.prompt == []
    assert found.response == [tokenizer.bos_id, *tokenizer.encode_ids("Ada is the one."), tokenizer.eos_id]


def test_every_source_says_where_it_comes_from():
    for source in SFT_FORMATS.values():
        assert source.origin and (source.bundled is None or (ROOT / source.bundled).is_file())


def test_memory_maps_hold_several_chunks(plan, monkeypatch):
    """`datasets` writes long columns in batches: a row is found in whichever it lies."""
    monkeypatch.setattr("lit_gpt.data.sft_dataset._RECORDS_AT_ONCE", 7)
    data = opened(plan(REVERSE, "".join(json.dumps({"prompt": f"{n}", "completion": "x"}) + "\n" for n in range(3000))))
    assert len(data._chunks) > 1
    found = [data.tokens(n) for n in (0, 999, 1000, 2999)]
    expected = [
        REVERSE.examples(json.dumps({"prompt": f"{n}", "completion": "x"}), plan(REVERSE, "").tokenizer)[0].response
        for n in (0, 999, 1000, 2999)
    ]
    assert [row.tolist() for row in found] == expected
    assert isinstance(data[0].tokens, np.ndarray)
