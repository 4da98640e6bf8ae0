"""Multiple choice with `decide`: the harness's requests put together to questions, answered, and kept as questions.

The harness passes the answers of a question as single requests, which have the task and the document in common. What it
compares is the log-likelihood (acc), and divided by the answer's characters (acc_norm) or bytes (acc_bytes): all three must
be safe. It counts an answer without the white space before it. Requests that are alone in their document, and documents
with answers behind an empty context beside the real one (acc_mutual_info), have no such decision: they get the whole budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.evaluation.result_cache import EvalCache, is_estimate, request_key
from lit_gpt.evaluation.work import Work, likelihood_work, total_work
from lit_gpt.likelihood.decision import Question, QuestionResult, question_likelihoods
from lit_gpt.likelihood.loglikelihood import Likelihood, LikelihoodRequest, LikelihoodSettings
from lit_gpt.likelihood.scoring import ScoringModel

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# Questions that are put on the disk together.
_QUESTIONS_AT_ONCE = 16


@dataclass(frozen=True)
class HarnessQuestion:
    """A question, and which requests of the harness its answers are."""

    question: Question
    numbers: tuple[tuple[int, ...], ...]
    """For each answer the numbers of its requests: equal ones are one answer."""

    def key(self) -> str:
        """Of its results on the disk."""
        answers = [[one.prefix, one.target, one.stream] for one in self.question.answers]
        return request_key("question", answers, self.question.rules)


def find_questions(requests: Sequence[LikelihoodRequest], asked: Sequence[Instance]) -> list[HarnessQuestion]:
    """The questions among some requests.

    Args:
        requests: as tokens.
        asked: the harness's own, in the same order.
    """
    documents: dict[tuple[Any, Any], list[int]] = {}
    for number, own in enumerate(asked):
        documents.setdefault((own.task_name, own.doc_id), []).append(number)
    found = []
    for numbers in documents.values():
        contexts = {asked[number].args[0] for number in numbers}
        answers: dict[tuple[LikelihoodRequest, int, int], list[int]] = {}
        for number in numbers:
            text = asked[number].args[1].lstrip()
            answers.setdefault((requests[number], len(text), len(text.encode())), []).append(number)
        has_decision = len(answers) > 1 and all(one.target for one, _, _ in answers)
        if has_decision and not (len(contexts) > 1 and "" in contexts):
            chosen, characters, in_bytes = zip(*answers, strict=True)
            question = Question(chosen, _distinct_rules((1,) * len(chosen), characters, in_bytes))
            found.append(HarnessQuestion(question, tuple(tuple(equal) for equal in answers.values())))
    return found


def _distinct_rules(*rules: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    """The rules without those that compare as another one does, or that would divide by 0."""
    by_ratio = {tuple(length / rule[0] for length in rule): rule for rule in reversed(rules) if all(rule)}
    return tuple(tuple(float(length) for length in rule) for rule in reversed(by_ratio.values()))


@dataclass
class QuestionScorer:
    """Answers questions, and remembers what was spent."""

    loaded: LoadedModel
    settings: LikelihoodSettings
    """With which questions can be decided (`check_decision`)."""
    chance: float
    """That more passes would change a question's decisions, at most."""
    max_tokens: int
    """Tokens of a batch; a matter of speed and memory only."""
    cache: EvalCache
    spent: dict[str, tuple[bool, int, int, int]] = field(default_factory=dict)
    """By question: whether it was decided, its answers, their passes, and those that the whole budget would have been."""

    def unanswered(self, questions: Sequence[HarnessQuestion]) -> dict[str, Question]:
        """The questions whose results are not on the disk, by key."""
        by_key = {one.key(): one.question for one in questions}
        return {key: question for key, question in by_key.items() if _stored(self.cache.get(key), question) is None}

    def work(self, question: Question) -> Work:
        """What a question costs with the whole budget."""
        return total_work([likelihood_work(self.loaded, one, self.settings) for one in question.answers])

    def results(
        self,
        questions: Sequence[HarnessQuestion],
        progress: Callable[[Iterable[tuple[str, QuestionResult]]], Mapping[str, QuestionResult]],
    ) -> list[QuestionResult]:
        """The results of some questions, from the disk where they are there.

        Args:
            questions: of the harness.
            progress: takes results by key as they come, shows how far the work is, and returns all of them.
        """
        by_key = {one.key(): one.question for one in questions}
        known = {key: _stored(self.cache.get(key), question) for key, question in by_key.items()}
        found = {key: result for key, result in known.items() if result is not None}
        todo = {key: question for key, question in by_key.items() if key not in found}
        with self.loaded.autocast():
            fresh = self.cache.keep(self._answer(todo), dataclasses.asdict, _QUESTIONS_AT_ONCE)
            found.update(progress(fresh))
        for key, question in by_key.items():
            whole = sum(self.settings.estimator.passes(len(one.target)) for one in question.answers)
            result = found[key]
            self.spent[key] = result.is_decided, len(question.answers), sum(result.passes), whole
        return [found[one.key()] for one in questions]

    def summary(self) -> dict[str, float | int]:
        """What was spent on how many questions, beside the passes that the whole budget would have been."""
        decided, answers, passes, whole = (sum(column) for column in zip(*self.spent.values(), strict=True))
        counts = {"questions": len(self.spent), "decided": decided, "answers": answers, "passes": passes}
        return {"chance": self.chance, **counts, "passes_of_the_budget": whole}

    def line(self) -> str:
        """The same in words."""
        found = self.summary()
        answers = found["answers"]
        return (
            f"decide {self.chance:g}: {found['decided']} of {found['questions']} questions were decided before the budget "
            f"was spent; {found['passes'] / answers:.1f} passes per answer, {found['passes_of_the_budget'] / answers:.1f} "
            "with the whole budget"
        )

    def _answer(self, todo: dict[str, Question]) -> Iterator[tuple[str, QuestionResult]]:
        model = ScoringModel.of(self.loaded.model, self.max_tokens)
        names = list(todo)
        for number, result in question_likelihoods(model, list(todo.values()), self.settings, self.chance):
            yield names[number], result


def _stored(value: Any, question: Question) -> QuestionResult | None:
    """A result as it was kept; None if it is none."""
    try:
        likelihoods = tuple(Likelihood(**one) for one in value["likelihoods"])
        result = QuestionResult(likelihoods, tuple(value["passes"]), value["is_decided"])
    except (TypeError, KeyError):
        return None
    count = len(question.answers)
    sound = len(likelihoods) == len(result.passes) == count and isinstance(result.is_decided, bool)
    sound = sound and all(is_estimate([one.nll, one.standard_error]) for one in likelihoods)
    return result if sound and all(type(passes) is int for passes in result.passes) else None
