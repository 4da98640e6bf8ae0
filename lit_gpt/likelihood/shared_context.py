"""Answers to a question under an ARM: the context is read once, and each answer is read behind its keys and values.

A causal model's states of the context do not depend on what follows, so the numbers are those of whole rows, up to rounding.
An MDM's do depend on it, so this is for ARMs.

Q questions, A answers of all of them, P tokens of the longest context, W tokens that are read of the longest answer.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.devices import check_halvable
from lit_gpt.likelihood.scoring import TokenScores, token_scores
from lit_gpt.model.layers import Transformer
from lit_gpt.model.logits import logits_in_chunks
from lit_gpt.model.prefix_cache import PrefixCache

TokenIds = tuple[int, ...]
# An answer's row needs a copy of its context's keys and values, one layer at a time; a key takes a small part of what a
# token that is read does. A choice, not a measurement.
_KEYS_PER_TOKEN = 4


@dataclass(frozen=True)
class SharedContext:
    """A context and what may follow it."""

    context: TokenIds
    """At least one token."""
    answers: tuple[TokenIds, ...]
    """At least one token each."""

    def tokens(self) -> int:
        """What it takes of a batch's tokens."""
        read = sum(map(len, self.answers)) - len(self.answers)
        keys = len(self.answers) * len(self.context) + read
        return len(self.context) + read + keys // _KEYS_PER_TOKEN


def answers_of_a_batch(context: TokenIds, answers: Sequence[TokenIds], max_tokens: int) -> Iterator[SharedContext]:
    """A question's answers in order, as few questions with so many of them as a batch of `max_tokens` takes."""
    start = 0
    for end in range(1, len(answers) + 1):
        last = end == len(answers)
        if last or SharedContext(context, tuple(answers[start : end + 1])).tokens() > max_tokens:
            yield SharedContext(context, tuple(answers[start:end]))
            start = end


def score_answers(
    network: Transformer, questions: Sequence[SharedContext], max_tokens: int
) -> Iterator[tuple[int, list[TokenScores]]]:
    """Score all answers of some questions.

    Args:
        network: the ARM.
        questions: in any order; those of like lengths should stand together.
        max_tokens: of a batch; a larger question is a batch of its own. Halved for the rest when memory runs out.

    Yields:
        (number of the question, the scores of its answers, (1, L) each), in order.

    Raises:
        ValueError: a question with one of its answers does not fit into memory.
    """
    start = 0
    while start < len(questions):
        totals = list(itertools.accumulate(question.tokens() for question in questions[start:]))
        count = max(1, bisect.bisect_right(totals, max_tokens))
        part = questions[start : start + count]
        try:
            found = _read(network, part)
        except RuntimeError as error:
            rows, longest = sum(len(question.answers) for question in part), max(map(len, part[0].answers))
            check_halvable(error, rows, len(part[0].context) + longest - 1, network.lm_head.weight.device)
            found = None
        if found is None and count > 1:
            max_tokens = sum(question.tokens() for question in part) // 2
            continue
        if found is None:
            alone = [SharedContext(part[0].context, (answer,)) for answer in part[0].answers]
            found = [[scores for _, (scores,) in score_answers(network, alone, 1)]]
        yield from enumerate(found, start)
        start += count


@torch.no_grad()
def _read(network: Transformer, questions: Sequence[SharedContext]) -> list[list[TokenScores]]:
    """The scores of some questions' answers, read together."""
    device = network.lm_head.weight.device
    answers = [answer for question in questions for answer in question.answers]
    of_question = torch.tensor([number for number, question in enumerate(questions) for _ in question.answers])
    contexts, context_mask = _padded([question.context for question in questions])
    parts, part_mask = _padded([answer[:-1] for answer in answers])
    lengths, width = context_mask.sum(1), contexts.size(1)

    cache = PrefixCache()
    positions = torch.arange(width).expand_as(contexts)
    visible = network.visibility if bool(context_mask.all()) else network.visibility.padded(context_mask.to(device))
    hidden = network.hidden_states(contexts.to(device), positions.to(device), visible, cache).flatten(0, 1)
    # The context's last token predicts an answer's first, and each of the answer's the next one.
    last = (torch.arange(len(questions)) * width + lengths - 1)[of_question, None]
    if parts.size(1):
        cache.texts = of_question.to(device)
        # Padding stands where nobody looks, but must have a position.
        positions = torch.where(part_mask, lengths[of_question, None] + torch.arange(parts.size(1)), 0)
        visible = network.visibility.padded(torch.cat((context_mask[of_question], part_mask), 1).to(device))
        behind = network.hidden_states(parts.to(device), positions.to(device), visible, cache).flatten(0, 1)
        own = len(hidden) + torch.arange(parts.numel()).view_as(parts)
        last, hidden = torch.cat((last, own), 1), torch.cat((hidden, behind))
    wanted = torch.cat((torch.ones(len(answers), 1, dtype=torch.bool), part_mask), 1)
    targets = torch.tensor([token for answer in answers for token in answer], device=device)
    logits = logits_in_chunks(network, hidden[last[wanted].to(device)])
    found = [
        values.cpu().split([len(answer) for answer in answers])
        for values in token_scores(logits, targets, network.config.vocab_size, best=True)
    ]
    scores = iter([TokenScores(*(value[None] for value in one)) for one in zip(*found, strict=True)])
    return [[next(scores) for _ in question.answers] for question in questions]


def _padded(rows: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
    """Rows filled up on the right, and a mask that is False at the filling."""
    width = max(map(len, rows))
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64).view(mask.shape), mask
