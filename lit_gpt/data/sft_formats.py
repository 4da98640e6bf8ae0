"""The files that fine-tuning reads, each format as two functions: the records of a file, and a record's examples.

Decisions: a piece of text that the published code tokenizes by itself begins with bos here, too; a record that cannot be
used says why (`Unusable`), and whoever reads the file counts the reasons. Sources: the published fine-tuning scripts;
GSM8K in the form of da03/implicit_chain_of_thought, ShareGPT's JSON, the reversal curse's JSON lines (docs/formats.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.files import open_regular, parse_json, read_json
from lit_gpt.tokenizer import Tokenizer

# ShareGPT's file has 0.7 GB.
_LARGEST_LIST = 1 << 32

CHAT_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {question} ASSISTANT:"
)
"""Vicuna 1.1's prompt template (lm-sys/FastChat)."""
CHAT_TEMPLATES = {
    "vicuna": (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
        f"{CHAT_TEMPLATE.split(' USER:')[0]}"
        "{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        "{{ '' if loop.index0 and messages[loop.index0 - 1]['role'] == 'assistant' else ' ' }}USER: {{ message['content'] }}"
        "{% elif message['role'] == 'assistant' %} ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
}
"""By name, templates of whole dialogues as Jinja, like those of the transformers library; of one question `vicuna` is
`CHAT_TEMPLATE`, and an answer ends with the end token, behind which the next question follows (FastChat)."""
# That template leaves out the blanks around a turn that is empty.
_CHAT_WITHOUT_QUESTION = CHAT_TEMPLATE.replace(" {question} ", "")


class Unusable(Exception):
    """A record gives no example; its argument says why, in a few words."""


class Malformed(Unusable):
    """A record is not of the format at all."""


@dataclass(frozen=True)
class Example:
    """One training example as token ids."""

    prompt: list[int]
    """Given, never masked or scored; may be empty."""
    response: list[int]
    """To be learnt, with the end token where the format has one."""


@dataclass(frozen=True)
class SftFormat:
    """A format of fine-tuning data."""

    name: str
    path: str
    """Where the published commands look for it."""
    origin: str
    """Where users get it."""
    bundled: str | None
    """A small file of this format that comes with the code."""
    records: Callable[[Path], Iterator[tuple[int, str]]]
    """A file to (line or item number from 1, record)."""
    examples: Callable[[str, Tokenizer], list[Example]]
    """A record to its examples; they stand or fall together. Raises Unusable."""
    chat_template: str | None = None
    """The name of the template that questions are asked in, one of `CHAT_TEMPLATES`."""
    version: int = 1
    """Changes whenever the same file would give other examples."""


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""The lines of a text file with their numbers, split at `\n` only (texts hold U+2028 and the like)."""
    with open_regular(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{raw[error.start]:02x}: {error.reason}"
                raise ValueError(f"{path}: line {number}: not UTF-8 ({byte}); convert the file") from error
            if line.strip():
                yield number, line


def json_items(path: Path) -> Iterator[tuple[int, str]]:
    """The items of a JSON list with their numbers, each as JSON again.

    Raises:
        ValueError: the file is no JSON list; the line says where it breaks.
    """
    content = read_json(path, _LARGEST_LIST)
    if not isinstance(content, list):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected a list of dialogues")
    for number, item in enumerate(content, start=1):
        yield number, json.dumps(item)


def gsm8k_examples(line: str, tokenizer: Tokenizer) -> list[Example]:
    """`question||thought #### answer`: learn the thought from the question, then the answer from both."""
    if line.count("||") != 1 or line.count("####") != 1:
        raise Malformed("expected one || and one ####")
    question, solution = line.split("||")
    thought, answer = solution.split("####")
    ask, think, say = (
        [tokenizer.bos_id, *tokenizer.encode_ids(text)]
        for text in (f"Question: {question}", f"Answer: {thought}", f"####{answer}")
    )
    return [Example(ask, think), Example(ask + think, [*say, tokenizer.eos_id])]


def sharegpt_examples(item: str, tokenizer: Tokenizer) -> list[Example]:
    """The first round of a dialogue: learn the answer from the question in the chat template; both may be empty."""
    dialogue = parse_json(item)
    turns = dialogue.get("conversations") if isinstance(dialogue, dict) else None
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise Malformed('expected {"conversations": [{"from": "human", "value": "..."}, ...]}')
    if [turn["from"] for turn in turns[:2]] != ["human", "gpt"]:
        raise Unusable("the first round is not human, then gpt")
    question, answer = (turn["value"] for turn in turns[:2])
    text = CHAT_TEMPLATE.format(question=question) if question else _CHAT_WITHOUT_QUESTION
    prompt = [tokenizer.bos_id, *tokenizer.encode_ids(text)]
    return [Example(prompt, [tokenizer.bos_id, *tokenizer.encode_ids(answer), tokenizer.eos_id])]


def reverse_examples(line: str, tokenizer: Tokenizer) -> list[Example]:
    """A prompt and its completion as one text: nothing is given, everything is learnt."""
    try:
        fact = parse_json(line)
    except ValueError:
        fact = None
    if not isinstance(fact, dict) or not all(isinstance(fact.get(name), str) for name in ("prompt", "completion")):
        raise Malformed('expected {"prompt": "...", "completion": "..."}')
    text = tokenizer.encode_ids(fact["prompt"] + fact["completion"])
    return [Example([], [tokenizer.bos_id, *text, tokenizer.eos_id])]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)


GSM8K = SftFormat(
    "gsm8k",
    "data/gsm8k/train.txt",
    "github.com/da03/implicit_chain_of_thought, the augmented GSM8K (385,620 lines)",
    "data/gsm8k/train_no_aug.txt",
    text_lines,
    gsm8k_examples,
)
SHAREGPT = SftFormat(
    "sharegpt",
    "data/ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json",
    "huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
    "data/sharegpt/dummy_conversation.json",
    json_items,
    sharegpt_examples,
    chat_template="vicuna",
    version=2,
)
REVERSE = SftFormat(
    "reverse",
    "data/reverse_experiments/june_version_7921032488/all_prompts_train.jsonl",
    "github.com/lukasberglund/reversal_curse, its folder data/reverse_experiments",
    None,
    text_lines,
    reverse_examples,
)
SFT_FORMATS = {source.name: source for source in (GSM8K, SHAREGPT, REVERSE)}
