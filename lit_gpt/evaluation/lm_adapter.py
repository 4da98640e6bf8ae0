"""A checkpoint as lm-evaluation-harness sees it: what the harness asks, answered in batches.

Decisions: all requests of a call are answered together (`likelihood`), and no result depends on which others there are;
results are kept as they come (`eval_cache`). The context is tokenized alone and with its continuation, bos in both; its
trailing white space goes to the continuation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_gpt.checkpoints.loaded import TOKENIZATION_VERSION, load_model
from lit_gpt.cli import warn
from lit_gpt.devices import join_processes
from lit_gpt.evaluation import versions
from lit_gpt.evaluation.chat_template import find_chat_template, render_chat
from lit_gpt.evaluation.harness_generation import GenerationRequest, TextWriter
from lit_gpt.evaluation.multiple_choice import QuestionScorer, find_questions
from lit_gpt.evaluation.progress import results_with_bar, tell_work
from lit_gpt.evaluation.result_cache import EvalCache, is_estimate, request_key
from lit_gpt.evaluation.settings import ModelArgs
from lit_gpt.evaluation.standard_errors import StandardErrors
from lit_gpt.evaluation.work import Work, greedy_check_passes, likelihood_work, sampling_work, total_work
from lit_gpt.likelihood.decision import DECISION_VERSION, check_decision
from lit_gpt.likelihood.estimators import make_estimator
from lit_gpt.likelihood.loglikelihood import Likelihood, LikelihoodRequest, LikelihoodSettings, NotFiniteError
from lit_gpt.randomness import hash_int
from lit_gpt.sampling.settings import changed_settings

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# Results that are put on the disk together.
_RESULTS_AT_ONCE = 64
_SHOWN_CHARACTERS = 60  # of each text of a request in an error
_REPORTED_VERSIONS = ("smdm", "torch", "lm_eval", "numpy", "sentencepiece", "tokenizers")


class Adapter:
    """A checkpoint as the harness sees it; `lm_harness` mixes it with the harness's base class.

    Args:
        kind: `arm` or `mdm`.
        arguments: from `--model_args`.
        cache_folder: where results are kept; None keeps none.
        found_folder: another folder whose results are found, too.
        command: as typed, for the results file.
        dry_run: only tell what the requests cost; the results are none.
    """

    def __init__(
        self,
        kind: str,
        arguments: ModelArgs,
        cache_folder: Path | None,
        command: Sequence[str],
        found_folder: Path | None = None,
        dry_run: bool = False,
    ) -> None:
        self.kind, self.arguments, self.command = kind, arguments, list(command)
        self.dry_run, self.told = dry_run, False
        self._rank, self._world_size = join_processes()
        self.loaded = load_model(
            arguments.ckpt_path,
            model_name=arguments.model_name,
            kind=kind,
            tokenizer=arguments.tokenizer,
            device=arguments.device,
            dtype=arguments.dtype,
        ).reading(arguments.special_tokens)
        self._device = self.loaded.device  # the harness asks
        self.tokenizer = self.loaded.tokenizer
        self.max_length = arguments.max_length or self.loaded.model.config.block_size
        self._check()
        self.likelihood_settings = LikelihoodSettings(
            make_estimator(arguments.nll_type, vars(arguments)),
            cfg_scale=float(arguments.cfg),
            greedy=arguments.greedy,
            pad_to=self.loaded.model.config.block_size if arguments.padding else 0,
            seed=arguments.seed,
        )
        if arguments.decide:
            check_decision(self.likelihood_settings, arguments.decide)
        self._writer = TextWriter(self.loaded, arguments, self.max_length, self._batch_tokens())
        self._cache = EvalCache(cache_folder, self._identity(), self._rank, found_folder, writes=not dry_run)
        self._questions: QuestionScorer | None = None
        if arguments.decide:
            settings, tokens = self.likelihood_settings, self._batch_tokens()
            self._questions = QuestionScorer(self.loaded, settings, arguments.decide, tokens, self._cache)
        self._errors = StandardErrors()
        self._makers: dict[str, str] = {}
        self._chat_template: str | None = None

    @property
    def tokenizer_name(self) -> str:
        """What of the model decides how a prompt reads; the harness's cache of prompts asks."""
        return request_key("prompts", self.tokenizer.fingerprint, self._chat_template)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of `--apply_chat_template`, as Jinja: a named one, or with True the checkpoint's own."""
        if not chat_template:
            return None
        name = chat_template if isinstance(chat_template, str) else None
        self._chat_template = find_chat_template(self.loaded, name)
        return self._chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of messages with roles."""
        template = self._chat_template or find_chat_template(self.loaded)
        return render_chat(template, chat_history, self.tokenizer.eos_text, add_generation_prompt)

    def _check(self) -> None:
        """Refuse settings that this checkpoint contradicts."""
        arguments, config = self.arguments, self.loaded.model.config
        if not 2 <= self.max_length <= config.block_size:
            raise ValueError(f"max_length {self.max_length}: this model reads 2 to {config.block_size} tokens")
        if arguments.mask_id not in (None, config.mask_id):
            raise ValueError(f"mask_id {arguments.mask_id}: this model's is {config.mask_id}; leave it out")

    # --- what the harness calls ---------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation given its context, and whether greedy decoding gives it."""
        pairs = [self.loaded.encode_pair(*request.args) for request in requests]
        cut = sum(len(prefix) + len(target) > self._room for prefix, target in pairs)
        if cut:
            warn(
                f"{cut} of {len(pairs)} requests are longer than {self.max_length} tokens: their beginnings are left out"
            )
        if empty := sum(not target for _, target in pairs):
            warn(f"{empty} of {len(pairs)} continuations are empty: their log-likelihood is 0")
        # A context has masks of its own, which the answers to it share; texts without one must not share theirs.
        fitted = [
            self._fit(*pair, 0 if request.args[0].strip() else self._stream(request))
            for request, pair in zip(requests, pairs, strict=True)
        ]
        results = (self._decided if self._questions else self._likelihoods)(fitted, requests, disable_tqdm)
        return [(-result.nll, result.is_greedy) for result in results]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text: the sum over disjoint windows, each behind one token of context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        owners: list[int] = []
        asked: list[Instance] = []
        pairs: list[LikelihoodRequest] = []
        for number, request in enumerate(requests):
            ids = self.tokenizer.encode_ids(request.args[0])
            windows = get_rolling_token_windows(ids, self.tokenizer.bos_id, self._room - 1, 1)
            for place, (prefix, target) in enumerate(map(make_disjoint_window, windows)):
                pairs.append(LikelihoodRequest(tuple(prefix), tuple(target), self._stream(request, place)))
                owners.append(number)
                asked.append(request)
        totals = [0.0] * len(requests)
        for number, result in zip(owners, self._likelihoods(pairs, asked, disable_tqdm), strict=True):
            totals[number] -= result.nll
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first stop string or the end token."""
        asked: Counter[str] = Counter()
        keys: list[str] = []
        todo: dict[str, GenerationRequest] = {}
        for one in requests:
            context, settings = one.args
            # A document's repeated requests want other samples: each has a number of its own. Other documents do not
            # count, which another process may have.
            document = (getattr(one, "task_name", None), getattr(one, "doc_id", None))
            name = request_key("generate", *document, context, settings)
            request = self._writer.request(context, settings, asked[name])
            asked[name] += 1
            keys.append(request_key("text", *request.identity()))
            if self._cache.get(keys[-1], _is_text) is None:
                todo[keys[-1]] = request
        works = {
            key: sampling_work(self.loaded, len(new.prompt), new.length, new.sampling) for key, new in todo.items()
        }
        self._tell("generating", works, len(set(keys)) - len(todo))
        if self.dry_run:
            return [""] * len(requests)
        texts = self._cache.keep(self._writer.texts(todo), str, 1)
        fresh = self._with_bar(texts, works, "generating", disable_tqdm)
        return [fresh[key] if key in fresh else self._cache.get(key) for key in keys]

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the results file beside the harness's own record."""
        return {
            **self._identity(),
            "standard_error_nats": self._errors.summary(),
            **({"decisions": self._questions.summary()} if self._questions and self._questions.spent else {}),
            "command": self.command,
            "versions": versions.versions(_REPORTED_VERSIONS),
            "commit": versions.commit(),
            "results_by_commit": dict(Counter({**self._makers, **self._cache.makers()}.values())),
            "processes": self._world_size,
        }

    def close(self) -> None:
        """Say how sure the likelihoods are, and end what was opened."""
        if self._errors.by_request and not self._rank:
            settings = self.likelihood_settings
            how = f"{settings.estimator.description()}, cfg {settings.cfg_scale:g}"
            how = "exact (left to right)" if self.kind == "arm" else how
            print(f"likelihoods: {how}, seed {settings.seed}; {self._errors.line()}")
        if self._questions and self._questions.spent and not self._rank:
            print(self._questions.line())
        self._cache.close()

    # --- between processes ----------------------------------------------------------------------------------------------

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, in their order."""
        parts = [torch.zeros_like(tensor) for _ in range(self._world_size)]
        torch.distributed.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes at process `dst`, None elsewhere."""
        parts = [None] * self._world_size if self._rank == dst else None
        torch.distributed.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        """Wait for all processes; the first one learns what the others' results are, for its record of all of them."""
        spent = self._questions.spent if self._questions else {}
        for errors, makers, others in self.gather_object((self._errors.by_request, self._cache.makers(), spent)) or ():
            self._errors.update(errors)
            self._makers.update(makers)
            spent.update(others)
        torch.distributed.barrier()

    # --- likelihoods --------------------------------------------------------------------------------------------------

    @property
    def _room(self) -> int:
        """Tokens of prefix and target together."""
        return self.loaded.most_tokens(self.max_length)

    def _fit(self, prefix: list[int], target: list[int], stream: int) -> LikelihoodRequest:
        """The end of what is too long; an ARM keeps a token before its first target."""
        target = target[-(self._room - 1) :]
        return LikelihoodRequest(tuple(prefix[-(self._room - len(target)) :]), tuple(target), stream)

    def _stream(self, asked: Instance, window: int = 0) -> int:
        """The random numbers of a document's window: errors that documents share do not average out over a corpus."""
        if self.kind == "arm":
            return 0
        task = int.from_bytes(hashlib.sha256(str(asked.task_name).encode()).digest()[:8], "big")
        return hash_int(task, asked.doc_id or 0, window)

    def _likelihoods(
        self, requests: Sequence[LikelihoodRequest], asked: Sequence[Instance], disable_tqdm: bool
    ) -> list[Likelihood]:
        """Results in the order of the requests, each distinct one computed once, or found in the cache.

        Args:
            requests: as tokens.
            asked: what the harness asked for by each, for errors.
            disable_tqdm: show no bar.
        """
        # Where the context alone decides the masks, keys are as they were before there was a stream.
        keys = [
            request_key("likelihood", one.prefix, one.target, *([one.stream] if one.stream else [])) for one in requests
        ]
        found: dict[str, Likelihood] = {}
        todo: dict[str, LikelihoodRequest] = {}
        for key, request in zip(keys, requests, strict=True):
            known = self._cache.get(key, _is_likelihood)
            if not request.target:
                found[key] = Likelihood(0.0, 0.0, True)
            elif known is not None:
                found[key] = Likelihood(*known)
            else:
                todo[key] = request
        asked_for = {key for key, request in zip(keys, requests, strict=True) if request.target}
        if self._cache.path and len(todo) < len(asked_for) and not self._rank:
            there = len(asked_for) - len(todo)
            print(f"{there} of {len(asked_for)} results were there already: {self._cache.path}", flush=True)
        settings = self.likelihood_settings
        works = {key: likelihood_work(self.loaded, one, settings) for key, one in todo.items()}
        checks = sum(map(greedy_check_passes, todo.values())) if settings.greedy and self.kind == "mdm" else 0
        self._tell("likelihoods", works, len(asked_for) - len(todo), checks)
        if self.dry_run:
            return [Likelihood(0.0, 0.0, False)] * len(requests)
        names = list(todo)
        with self.loaded.autocast():
            estimates = self.loaded.likelihoods(list(todo.values()), settings, self._batch_tokens())
            results = ((names[number], result) for number, result in estimates)
            kept = self._cache.keep(results, dataclasses.astuple, _RESULTS_AT_ONCE)
            with _requests_named(requests, asked):
                found.update(self._with_bar(kept, works, "likelihoods", disable_tqdm))
        self._errors.update({key: found[key].standard_error for key in keys})
        return [found[key] for key in keys]

    def _decided(
        self, requests: Sequence[LikelihoodRequest], asked: Sequence[Instance], disable_tqdm: bool
    ) -> list[Likelihood]:
        """As `_likelihoods`, but answers of a question get no more passes than its decision needs."""
        assert self._questions
        questions = find_questions(requests, asked)
        todo = self._questions.unanswered(questions)
        works = {key: self._questions.work(question) for key, question in todo.items()}
        answers = sum(len(one.question.answers) for one in questions)
        self._tell("likelihoods", works, answers - total_work(list(works.values())).requests)
        by_number = {n: Likelihood(0.0, 0.0, False) for one in questions for equal in one.numbers for n in equal}
        if not self.dry_run:
            with _requests_named(requests, asked):
                results = self._questions.results(
                    questions, lambda fresh: self._with_bar(fresh, works, "questions", disable_tqdm)
                )
            for question, result in zip(questions, results, strict=True):
                for place, (likelihood, equal) in enumerate(zip(result.likelihoods, question.numbers, strict=True)):
                    by_number |= dict.fromkeys(equal, likelihood)
                    self._errors.update({f"{question.key()}-{place}": likelihood.standard_error})
        others = [number for number in range(len(requests)) if number not in by_number]
        found = self._likelihoods([requests[n] for n in others], [asked[n] for n in others], disable_tqdm)
        by_number |= dict(zip(others, found, strict=True))
        return [by_number[number] for number in range(len(requests))]

    # --- the rest -----------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """Everything that decides a result, as JSON values."""
        arguments = self.arguments
        known: dict[str, Any] = {
            "kind": self.kind,
            "checkpoint": self.loaded.weights_hash,
            "config": self.loaded.model.config.to_dict(),
            "tokenizer_hash": self.tokenizer.fingerprint,
            "special_tokens": self.tokenizer.special_tokens,
            "max_length": self.max_length,
            "dtype": self.loaded.dtype,
            "device": self.loaded.device.type,
            "computed_by": self.loaded.likelihood_versions(self.likelihood_settings)
            | {"tokenization": TOKENIZATION_VERSION},
            "generation": _generation(arguments),
        }
        if self.kind == "arm":
            return {**known, "estimator": "exact (left to right)", "seed": self.likelihood_settings.seed}
        if arguments.decide:
            known["computed_by"]["decision"] = DECISION_VERSION
            known["decide"] = arguments.decide
        return {**known, **self.likelihood_settings.identity()}

    def _batch_tokens(self) -> int:
        size = str(self.arguments.batch_size)
        if size.startswith("auto"):
            return self.loaded.batch_tokens
        return int(size) * self.max_length

    def _tell(self, what: str, works: dict[str, Work], found: int, greedy_checks: int = 0) -> None:
        """Say what is about to be computed."""
        self.told = True
        note = f", and at most {greedy_checks:,} passes of the greedy check" if greedy_checks else ""
        tell_work(what, total_work(list(works.values())), found, note)

    def _with_bar(
        self, results: Iterable[tuple[str, Any]], works: dict[str, Work], what: str, disable: bool
    ) -> dict[str, Any]:
        return results_with_bar(self.loaded.model, results, works, what, not disable and not self._rank)


@contextlib.contextmanager
def _requests_named(requests: Sequence[LikelihoodRequest], asked: Sequence[Instance]) -> Iterator[None]:
    """Errors that tell a request say which of the harness's it is."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(error.request, _name(asked[requests.index(error.request)])) from None


def _name(asked: Instance) -> str:
    """A request of the harness for an error: its task, its document's number and its text."""
    text = " -> ".join(repr(str(part)[-_SHOWN_CHARACTERS:]) for part in asked.args)
    return f"task {asked.task_name}, document {asked.doc_id} ({text})"


def _generation(arguments: ModelArgs) -> list[Any]:
    """How texts are written, as JSON values: what is as always goes without saying."""
    more = changed_settings(arguments, ("steps", "temperature", "seed"))
    return [arguments.alg, arguments.steps, arguments.temperature, *([more] if more else [])]


def _is_likelihood(value: Any) -> bool:
    """Whether a stored value has the fields of a `Likelihood`."""
    return isinstance(value, list) and len(value) == 3 and is_estimate(value[:2]) and isinstance(value[2], bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
