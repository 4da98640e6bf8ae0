"""A checkpoint ready for use: `load_model` opens it in one call, and texts go in and likelihoods and texts come out.

    model = load_model("models/mdm-170M-10e18.safetensors")
    model.loglikelihood("The capital of France is", " Paris").nats
    model.generate("Once upon a time", max_new_tokens=32, temperature=0.7)
    model.fill("The ___ sat on the ___3.")

Decisions: with `bfloat16` the matrices of the products are rounded once and there is no other copy of them; autocast around
the forward passes rounds what they are multiplied with, as in training, so that embeddings, norms and the sums between the
blocks stay float32 and the numbers are those of training's arithmetic. The tokenizer is opened when it is first asked for,
since scoring token files needs none; the evaluations use the same object.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoints.tokenizer_lookup import find_tokenizer
from lit_gpt.checkpoints.weights import read_model, state_hash
from lit_gpt.devices import check_halvable, choose_device, has_native_bf16
from lit_gpt.likelihood.estimators import make_estimator
from lit_gpt.likelihood.loglikelihood import (
    SCORING_VERSION,
    Likelihood,
    LikelihoodRequest,
    LikelihoodSettings,
    arm_likelihoods,
    mdm_likelihoods,
)
from lit_gpt.likelihood.scoring import ScoringModel
from lit_gpt.model.layers import Transformer
from lit_gpt.sampling.infill import (
    DEFAULT_GAP,
    infill_row,
    infill_states,
    spaced_positions,
    with_typed_spaces,
)
from lit_gpt.sampling.sample import sample
from lit_gpt.sampling.sequence import State
from lit_gpt.sampling.settings import Sampling
from lit_gpt.tokenizer import Tokenizer

# Raised whenever `encode_pair` or `prompt_ids` give other tokens of the same texts.
TOKENIZATION_VERSION = 1
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
# Tokens of a batch by device: beyond, a CPU's caches are exceeded; on GPUs a batch that does not fit is halved.
_BATCH_TOKENS = {"cpu": 8192, "cuda": 131072}


def compute_dtype(name: str, device: torch.device) -> str:
    """`float32` or `bfloat16`: as asked for, or with `auto` bfloat16 on GPUs that have it.

    Raises:
        ValueError: another name.
    """
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"dtype {name}: choose from {', '.join(COMPUTE_DTYPES)}")
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" and has_native_bf16("cuda") else "float32"


def load_model(
    path: Path | str,
    *,
    model_name: str | int | None = None,
    kind: str | None = None,
    tokenizer: str | None = None,
    device: str | None = "auto",
    dtype: str = "auto",
) -> LoadedModel:
    """Open a checkpoint: its model, the tokenizer that belongs to it, and the device and arithmetic to use.

    Args:
        path: an exported `.safetensors`, a run folder or checkpoint, or a published file.
        model_name: the size, such as 170, for a file that does not say.
        kind: `arm` or `mdm`, if only one of them will do.
        tokenizer: a folder, file or hub name; None takes the checkpoint's own, which an export holds inside.
        device: `cpu`, `cuda` or `cuda:N`; `auto` is a GPU if there is one.
        dtype: `float32`, or `bfloat16` for the matrix products; `auto` is float32 on CPUs and bfloat16 on GPUs that have it.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is damaged, holds another kind or model; no such device or dtype.
    """
    chosen = choose_device(device)
    dtype = compute_dtype(dtype, chosen)
    model, record = read_model(path, model_name, kind, chosen)
    fingerprint, run = (record.tokenizer.get("fingerprint"), record.run) if record else (None, {})
    digest = None
    if dtype == "bfloat16":
        # Of what the file holds: a result's identity names the dtype beside it.
        digest = state_hash(model.state_dict())
        round_matrices(model)
    open_tokenizer = functools.partial(find_tokenizer, path, model.config, record, tokenizer)
    return LoadedModel(model, open_tokenizer, dtype, fingerprint, run, digest)


def round_matrices(model: Transformer) -> None:
    """Round every matrix that is multiplied with to bfloat16, in place; embedding and norms stay as they are."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)


@dataclass(frozen=True)
class LogLikelihood:
    """How likely a text is."""

    nats: float
    """Log-likelihood; of an MDM the estimate of a lower bound, or with `chain_rule` of writing from left to right."""
    standard_error: float
    """Of the estimator, nats; 0 where nothing was drawn, as for an ARM."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and its arithmetic."""

    model: Transformer
    """In evaluation mode, on its device."""
    open_tokenizer: Callable[[], Tokenizer]
    """Called once, when the tokenizer is first needed."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    trained_with: str | None = None
    """SHA-256 of the tokenizer that its record names, if any."""
    run_record: dict[str, Any] = field(default_factory=dict)
    """What its record says of the run that made it; empty if nothing."""
    original_hash: str | None = None
    """`weights_hash`, where the parameters have been rounded since."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is another model's.
        """
        return self.open_tokenizer()

    def reading(self, special_tokens: str) -> LoadedModel:
        """The same model, whose tokenizer reads special tokens inside a text as `Tokenizer.reading`."""
        return replace(self, open_tokenizer=lambda: self.tokenizer.reading(special_tokens))

    @property
    def kind(self) -> str:
        """`arm` or `mdm`."""
        return self.model.kind

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch that suit the device."""
        return _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS["cuda"])

    @functools.cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the parameters before rounding, whatever file they came from."""
        return self.original_hash or state_hash(self.model.state_dict())

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def identity(self) -> dict[str, Any]:
        """What of the model decides a result, as JSON values: hashes of weights and tokenizer, kind, config, dtype."""
        known = {
            "checkpoint": self.weights_hash,
            "kind": self.kind,
            "config": self.model.config.to_dict(),
            "tokenizer": self.tokenizer.fingerprint,
            "dtype": self.dtype,
        }
        # Results without a word on it are older, and read special tokens as text.
        special_tokens = self.tokenizer.special_tokens
        return known if special_tokens == "text" else known | {"special_tokens": special_tokens}

    def likelihood_versions(self, settings: LikelihoodSettings) -> dict[str, int]:
        """Versions of what computes its likelihoods: kept results of others are not served."""
        return {"scoring": SCORING_VERSION} if self.kind == "arm" else settings.versions()

    # --- text to text -------------------------------------------------------------------------------------------------

    def loglikelihood(
        self,
        prefix: str,
        target: str,
        estimator: str = "exact",
        cfg_scale: float = 0.0,
        seed: int = 1234,
        **parameters: Any,
    ) -> LogLikelihood:
        """Log-likelihood of a text given the text before it.

        Args:
            prefix: the text before; may be empty.
            target: the text that is scored.
            estimator: of an MDM's bound: `exact`, `mc` or `chain_rule`.
            cfg_scale: MDM: scale of classifier-free guidance; 0 is none.
            seed: of an MDM's random masks.
            **parameters: the estimator's own, such as `budget=256` or `mc_num=512`.

        Raises:
            ValueError: both together are longer than the model reads; a setting is wrong.
        """
        chosen = make_estimator(estimator, parameters)
        if unknown := parameters.keys() - vars(chosen):
            known = f"only {', '.join(vars(chosen))}" if vars(chosen) else "no parameters"
            raise ValueError(f"{', '.join(sorted(unknown))}: the estimator {estimator} has {known}")
        before, scored = self.encode_pair(prefix, target)
        request = LikelihoodRequest(tuple(before), tuple(scored))
        limit = self.most_tokens(self.model.config.block_size)
        if (tokens := len(request.prefix) + len(request.target)) > limit:
            raise ValueError(f"prefix and target have {tokens} tokens, this model reads at most {limit}")
        if not request.target:
            return LogLikelihood(0.0, 0.0)
        with self.autocast():
            settings = LikelihoodSettings(chosen, cfg_scale, seed=seed)
            ((_, result),) = self.likelihoods([request], settings, self.batch_tokens)
        return LogLikelihood(-result.nll, result.standard_error)

    def generate(self, prompt: str, max_new_tokens: int | None = None, **sampling: Any) -> str:
        """The text that the model writes behind a prompt, up to its end token.

        Args:
            prompt: read as the tokenizer gives it, like the documents in training; may be empty.
            max_new_tokens: an MDM's text has exactly so many tokens, end tokens included; None: what the model has room for.
            **sampling: fields of `Sampling`.

        Raises:
            ValueError: the text does not fit the model; a setting is wrong.
        """
        row = self.started(self.tokenizer.encode_ids(prompt))
        length = self.model.config.block_size if max_new_tokens is None else len(row) + max_new_tokens
        ids = self._finished(row, length, sampling)
        return self.tokenizer.decode(row + self.until_end(ids[len(row) :])).removeprefix(prompt)

    def fill(self, text: str, gap: int = DEFAULT_GAP, **sampling: Any) -> str:
        """A text whose gaps an MDM has filled: `___` is a gap of `gap` tokens, `___5` one of five.

        Args:
            text: such as `The ___ sat on the ___3.`
            gap: tokens of a gap without a number.
            **sampling: fields of `Sampling`.

        Raises:
            ValueError: the model is an ARM; the text does not fit it; a setting is wrong.
        """
        config = self.model.config
        row = infill_row(text, self.tokenizer, config.mask_id, config.block_size, gap)
        spaced = spaced_positions(text, self.tokenizer, gap)
        return with_typed_spaces(self._finished(row, len(row), sampling), spaced, self.tokenizer)

    def _finished(self, row: list[int], length: int, sampling: dict[str, Any]) -> list[int]:
        """The ids of a row ([MASK] at gaps) once it is written to a length."""
        (last,) = deque(self.states(row, length, Sampling(**sampling)), maxlen=1)
        return last.tokens()[0].tolist()  # type: ignore[no-any-return]

    # --- tokens -------------------------------------------------------------------------------------------------------

    def started(self, row: list[int]) -> list[int]:
        """A row that the model can write behind: an ARM needs a token, so its empty one becomes bos."""
        return row or ([self.tokenizer.bos_id] if self.kind == "arm" else [])

    def states(self, row: list[int], length: int, sampling: Sampling) -> Iterator[State]:
        """Write a row ([MASK] at gaps) to a length: one state before the first step and one after each.

        Raises:
            ValueError: as `infill_states`, before anything is computed.
        """
        return self._each_in_autocast(infill_states(self.model, [row], sampling, length, self.tokenizer.eos_id))

    def _each_in_autocast(self, states: Iterator[State]) -> Iterator[State]:
        """The same states; what happens between them is not in autocast."""
        while True:
            with self.autocast():
                state = next(states, None)
            if state is None:
                return
            yield state

    def most_tokens(self, read: int) -> int:
        """Tokens of prefix and target together where the model reads so many: an ARM does not read the last one."""
        return read + (self.kind == "arm")

    def encode_pair(self, prefix: str, target: str) -> tuple[list[int], list[int]]:
        """Token ids of two texts, bos before the first: the first alone, the second as it continues the first.

        White space at the end of the first belongs to the second.
        """
        stripped = prefix.rstrip()
        target = prefix[len(stripped) :] + target
        bos = [self.tokenizer.bos_id]
        if not stripped:
            return bos, self.tokenizer.encode_ids(target)
        ids = bos + self.tokenizer.encode_ids(stripped)
        return ids, (bos + self.tokenizer.encode_ids(stripped + target))[len(ids) :]

    def likelihoods(
        self, requests: Sequence[LikelihoodRequest], settings: LikelihoodSettings, max_tokens: int
    ) -> Iterator[tuple[int, Likelihood]]:
        """(number of the request, its result) as they are done, exact for an ARM; within `autocast()`.

        Args:
            requests: token ids, no longer than the model reads.
            settings: how an MDM's are estimated.
            max_tokens: tokens of a batch; a matter of speed and memory only.

        Raises:
            NotFiniteError: the model's logits are no numbers.
        """
        scoring_model = ScoringModel.of(self.model, max_tokens)
        if self.kind == "arm":
            return arm_likelihoods(scoring_model, requests)
        return mdm_likelihoods(scoring_model, requests, settings)

    def prompt_ids(self, text: str) -> list[int]:
        """A prompt as fine-tuning reads it: bos, then the text's tokens."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode_ids(text)]

    def until_end(self, ids: list[int]) -> list[int]:
        """What stands before the first end token."""
        return ids[: ids.index(self.tokenizer.eos_id)] if self.tokenizer.eos_id in ids else ids

    def text_behind(self, prompt: list[int], ids: list[int] | None, keep_behind_end: bool = False) -> str:
        """What a finished row, from `complete`, says behind its prompt; nothing for None.

        Args:
            prompt: token ids.
            ids: of the finished row.
            keep_behind_end: take all of it, not only what stands before the end token.
        """
        written = (ids or prompt)[len(prompt) :]
        return self.tokenizer.decode(written if keep_behind_end else self.until_end(written))

    def complete(
        self, prompts: Sequence[list[int]], rows: Sequence[int], sampling: Sampling, length: int
    ) -> list[list[int] | None]:
        """Complete a batch of prompts, up to the tokenizer's end token.

        Args:
            prompts: token ids of each.
            rows: each row's number, as `sample`.
            sampling: how.
            length: tokens of each finished row, prompt included.

        Returns:
            Each finished row's ids, prompt included; None where the prompt leaves no room for a token.

        Raises:
            ValueError: a single row does not fit into memory; a batch that does not is computed in halves.
        """
        finished: list[list[int] | None] = [None] * len(prompts)
        has_room = [number for number, prompt in enumerate(prompts) if len(prompt) < length]
        if not has_room:
            return finished
        start, at_once = 0, len(has_room)
        while start < len(has_room):
            batch = has_room[start : start + at_once]
            fitting, numbers = [prompts[n] for n in batch], [rows[n] for n in batch]
            try:
                with self.autocast():
                    ids = sample(self.model, fitting, sampling, length, self.tokenizer.eos_id, numbers)
            except RuntimeError as error:
                check_halvable(error, len(batch), length, self.device)
                at_once = len(batch) // 2
                continue
            start += len(batch)
            for number, row in zip(batch, ids, strict=True):
                finished[number] = row.tolist()
        return finished
