"""Every sampler: a batch of prompts of different lengths in, tokens out, one state per step for whoever watches.

Decisions:

- Samplers see a model only as `logits_fn(input_ids, positions, key_mask) -> logits`, so a toy distribution tests them
  exactly, and guidance or a key/value cache is a function around it.
- A row's tokens depend on its own number and prompt alone: random numbers are hashes of (seed, step, row, position in
  the row, token id), and padding is masked (`canvas`).
- A masked-diffusion algorithm is one function, from the times of a step and the confidences to the positions that are
  revealed (`ALGORITHMS`); everything else of the loop is shared.

May import canvas, config, layers, model, diffusion and noise only.

B rows, T tokens, L new tokens, V padded vocabulary, K real vocabulary (ids that may be sampled), N masked positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lit_gpt.canvas import Canvas, State, context_lengths, masked_canvas, prompt_canvas
from lit_gpt.layers import Transformer
from lit_gpt.model import GPT, KVCache
from lit_gpt.noise import Stream, uniform

LogitsFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input_ids (B, T) int64, positions (B, T) int64, key_mask (B, S) bool or None) -> logits (B, T, V)."""

_LAST_TIME = 1e-5
"""Where the published time grid ends (SPEC 2)."""
_CHUNK_ELEMENTS = 2**21
"""Logits that are in float64 at one time: 16 MB a temporary, near a processor's cache."""
_REVEAL_COLUMN = -1
"""Where a token id stands in the other random keys: the number that decides whether a position is revealed."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. Fields that only one kind of model has a use for say so."""

    context_length: int | tuple[int, ...]
    """Tokens of the finished row, prompt included; a tuple gives each row its own."""
    algorithm: str = "origin"
    """MDM: `origin` or `greedy` (also spelt `greddy`)."""
    steps: int = 128
    """MDM: denoising steps; more steps than masked positions is normal use."""
    temperature: float = 1.0
    """0 takes the likeliest token; 1 samples from the model's distribution."""
    cfg_scale: float = 0.0
    """MDM: classifier-free guidance; 0 is none."""
    seed: int = 1234
    """Together with a row's number it decides all that is random."""
    stop_id: int | None = None
    """ARM: a row ends with this token (the tokenizer's eos)."""
    use_cache: bool = True
    """ARM: keep keys and values instead of reading the whole row again for each token; the tokens are the same."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "algorithm", algorithm_name(self.algorithm))
        problems = []
        if self.steps < 1:
            problems.append(f"steps is {self.steps}: at least 1 is needed")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature is {self.temperature}: it must be a number from 0 up")
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            problems.append(f"cfg_scale is {self.cfg_scale}: it must be a number from 0 up")
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))


class Algorithm(Protocol):
    """Which masked positions of a step are revealed.

    Attributes:
        needs_confidence: whether it ranks; where it does not, tokens are drawn only for what is revealed.
    """

    needs_confidence: bool

    def __call__(self, mask: Tensor, confidence: Tensor, reveal_uniforms: Tensor, fraction: Tensor) -> Tensor:
        """Choose positions.

        Args:
            mask: (B, T) bool, True at [MASK].
            confidence: (B, T) float64, each token's probability at masked positions, -1 elsewhere.
            reveal_uniforms: (B, T) float64, one random number per position.
            fraction: scalar float32, 1 - s / t for the step from time t to s; 1 at the last step.

        Returns:
            (B, T) bool, a subset of mask.
        """
        ...


class Origin:
    """Each masked position by itself, with probability 1 - s / t: the reverse process of the diffusion."""

    needs_confidence = False

    def __call__(self, mask: Tensor, confidence: Tensor, reveal_uniforms: Tensor, fraction: Tensor) -> Tensor:
        """See `Algorithm`."""
        return mask & (reveal_uniforms < fraction)


class Greedy:
    """Of a row's n masked positions the int(n (1 - s / t)) whose tokens have the highest confidence.

    The published code counts and ranks over the whole batch; here each row has its own count and ranks.
    """

    needs_confidence = True

    def __call__(self, mask: Tensor, confidence: Tensor, reveal_uniforms: Tensor, fraction: Tensor) -> Tensor:
        """See `Algorithm`."""
        # float32, like the published count: what int() cuts off must be the same.
        count = (mask.sum(1).float() * fraction).long()
        order = confidence.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(mask.size(1), device=mask.device).expand_as(order)
        )
        return mask & (rank < count[:, None])


ALGORITHMS: dict[str, Algorithm] = {"origin": Origin(), "greedy": Greedy()}
_HISTORIC_NAMES = {"greddy": "greedy"}


def algorithm_name(name: str) -> str:
    """The algorithm's one name: the published spelling `greddy` becomes `greedy`.

    Raises:
        ValueError: no such algorithm; the known ones are listed.
    """
    name = _HISTORIC_NAMES.get(name, name)
    if name not in ALGORITHMS:
        raise ValueError(f"unknown sampling algorithm {name!r}: choose from {', '.join(ALGORITHMS)}")
    return name


def sample(
    model: Transformer,
    prompts: Sequence[Sequence[int] | Tensor],
    sampling: Sampling,
    rows: Sequence[int] | None = None,
    on_state: Callable[[State], None] | None = None,
) -> list[Tensor]:
    """Complete a batch of prompts with an ARM or an MDM.

    Args:
        model: a `GPT` or a `TransEncoder`; the batch is read on its device.
        prompts: token ids per row, of any lengths (an MDM's may be empty).
        sampling: how.
        rows: each row's number, which decides its random stream; None numbers them from 0. A row with the same number
            and prompt gets the same tokens in any batch.
        on_state: called with every `State`, the first one before the first step.

    Returns:
        One (L_i,) int64 tensor per row: the prompt and what follows; an MDM's row always has the context length, an
        ARM's ends with the stop token if that came earlier.

    Raises:
        ValueError: as `sample_states`.
    """
    for state in sample_states(model, prompts, sampling, rows):
        if on_state is not None:
            on_state(state)
    return state.tokens()


def sample_states(
    model: Transformer,
    prompts: Sequence[Sequence[int] | Tensor],
    sampling: Sampling,
    rows: Sequence[int] | None = None,
) -> Iterator[State]:
    """`sample`, as the sequence of its states: one before the first step and one after each.

    Args are those of `sample`.

    Returns:
        The states; the last one's `tokens()` is the result. Arguments are checked before this returns.

    Raises:
        ValueError: a prompt longer than the context, a context longer than the model's block size, ids that are no
            tokens of the model, guidance for an ARM, or an empty prompt for one.
    """
    config, device = model.config, next(model.parameters()).device
    lengths = context_lengths(prompts, sampling.context_length, config)
    if isinstance(model, GPT):
        if sampling.cfg_scale:
            raise ValueError(
                f"sampling: cfg_scale {sampling.cfg_scale} needs an MDM: an ARM cannot read a masked prompt"
            )
        canvas = prompt_canvas(prompts, rows, device)
        new = [total - len(prompt) for total, prompt in zip(lengths, prompts, strict=True)]
        logits_fn = (
            cached(model, len(new), canvas.input_ids.size(1) + max(new)) if sampling.use_cache else recomputed(model)
        )
        return extend(logits_fn, canvas, new, sampling, config.vocab_size)
    canvas = masked_canvas(prompts, lengths, config.mask_id, rows, device)
    return denoise(
        guided(model, sampling.cfg_scale, canvas.prompt_mask, config.mask_id), canvas, sampling, config.vocab_size
    )


def guided(logits_fn: LogitsFn, cfg_scale: float, prompt_mask: Tensor, mask_id: int) -> LogitsFn:
    """Classifier-free guidance: un + (cfg_scale + 1) (cond - un), where `un` sees the prompt as [MASK].

    Args:
        logits_fn: the model; both passes run as one batch of 2 B rows.
        cfg_scale: w; 0 returns `logits_fn` itself.
        prompt_mask: (B, T) bool, True at the prompt.
        mask_id: id of [MASK].

    Source: Ho & Salimans 2022 (arXiv 2207.12598); unsupervised form: SMDM (arXiv 2410.18514), section 4.
    """
    if not cfg_scale:
        return logits_fn

    def with_guidance(input_ids: Tensor, positions: Tensor, key_mask: Tensor | None) -> Tensor:
        both = torch.cat((input_ids, input_ids.masked_fill(prompt_mask, mask_id)))
        twice = None if key_mask is None else key_mask.repeat(2, 1)
        cond_logits, uncond_logits = logits_fn(both, positions.repeat(2, 1), twice).chunk(2)
        return uncond_logits + (cfg_scale + 1) * (cond_logits - uncond_logits)

    return with_guidance


@torch.no_grad()
def denoise(logits_fn: LogitsFn, canvas: Canvas, sampling: Sampling, vocab_size: int) -> Iterator[State]:
    """Masked-diffusion sampling: reveal a canvas over t = linspace(1, 1e-5, steps + 1).

    In a step from t to s the algorithm chooses among the masked positions with fraction 1 - s / t (all of them at the
    last step); tokens are argmax of logit - temperature * log(-log u), in float64 (Gumbel-max).

    Args:
        logits_fn: logits of every position from the whole canvas.
        canvas: what to fill; [MASK] is wherever a token is neither given nor padding.
        sampling: algorithm, steps, temperature, seed.
        vocab_size: K; ids from here on are never sampled.

    Yields:
        The state before the first step, then one after each.
    """
    algorithm = ALGORITHMS[sampling.algorithm]
    # float32, as published: the greedy count int(n (1 - s / t)) depends on it.
    times = torch.linspace(1, _LAST_TIME, sampling.steps + 1)
    input_ids, mask = canvas.input_ids.clone(), canvas.key_mask & ~canvas.prompt_mask
    key_mask, confidence = canvas.attention_mask(), canvas.prompt_mask.float()
    yield State(0, input_ids.clone(), confidence.clone(), canvas.key_mask)
    logits: Tensor | None = None
    for step in range(sampling.steps):
        last = step == sampling.steps - 1
        fraction = torch.ones(()) if last else 1 - times[step + 1] / times[step]
        uniforms = uniform(
            sampling.seed, int(Stream.SAMPLER), step, canvas.rows[:, None], canvas.positions, _REVEAL_COLUMN
        )
        fraction = fraction.to(mask.device)
        token_ids, probability = (
            input_ids.clone(),
            torch.full(mask.shape, -1.0, dtype=torch.float64, device=mask.device),
        )
        revealed = mask if algorithm.needs_confidence else algorithm(mask, probability, uniforms, fraction)
        if bool(revealed.any()):
            if logits is None:
                logits = logits_fn(input_ids, canvas.positions, key_mask)
            token_ids[revealed], probability[revealed] = _draw(
                logits[revealed], canvas, revealed, step, sampling, vocab_size
            )
            if algorithm.needs_confidence:
                revealed = algorithm(mask, probability, uniforms, fraction)
        if bool(revealed.any()):
            input_ids = torch.where(revealed, token_ids, input_ids)
            confidence = torch.where(revealed, probability.float(), confidence)
            mask = mask & ~revealed
            logits = None  # what was computed holds until a token changes
        yield State(step + 1, input_ids.clone(), confidence.clone(), canvas.key_mask)


@torch.no_grad()
def extend(
    logits_fn: LogitsFn, canvas: Canvas, new_tokens: Sequence[int], sampling: Sampling, vocab_size: int
) -> Iterator[State]:
    """Autoregressive sampling: one token a step behind every row, by Gumbel-max, until it stops or is full.

    Args:
        logits_fn: called with the tokens it has not seen yet (the prompts, then one column at a time) and a key mask
            over all; only its last column is read. See `cached` and `recomputed`.
        canvas: prompts from `prompt_canvas`.
        new_tokens: how many tokens each row gets at most.
        sampling: temperature, seed, stop_id.
        vocab_size: K; ids from here on are never sampled.

    Yields:
        The state before the first step, then one after each.
    """
    device = canvas.input_ids.device
    input_ids, key_mask, confidence = canvas.input_ids, canvas.key_mask, canvas.prompt_mask.float()
    positions = canvas.positions
    limit = torch.tensor(list(new_tokens), device=device)
    open_rows = limit > 0
    yield State(0, input_ids, confidence, key_mask)
    unseen = input_ids.size(1)
    everyone = torch.ones(len(limit), 1, dtype=torch.bool, device=device)
    for step in range(max(new_tokens, default=0)):
        if not bool(open_rows.any()):
            return
        logits = logits_fn(input_ids[:, -unseen:], positions[:, -unseen:], None if bool(key_mask.all()) else key_mask)
        position = positions[:, -1:] + 1
        # A token's key is its position in the row, not the step: a longer prompt beside it changes nothing.
        here = Canvas(input_ids[:, -1:], position, everyone, ~everyone, canvas.rows)
        token_ids, probability = _draw(logits[:, -1], here, everyone, 0, sampling, vocab_size)
        written = open_rows[:, None]
        input_ids = torch.cat((input_ids, torch.where(written, token_ids[:, None], 0)), 1)
        confidence = torch.cat((confidence, torch.where(written, probability[:, None].float(), 0)), 1)
        # A row that has stopped stays where it is: its position may not run out of the block.
        positions = torch.cat((positions, torch.where(written, position, 0)), 1)
        key_mask = torch.cat((key_mask, written), 1)
        open_rows = open_rows & (limit > step + 1)
        if sampling.stop_id is not None:
            open_rows = open_rows & (token_ids != sampling.stop_id)
        unseen = 1
        yield State(step + 1, input_ids, confidence, key_mask)


def cached(model: GPT, batch: int, capacity: int) -> LogitsFn:
    """The model as `extend` calls it, with keys and values kept; returns the last column's logits, (B, 1, V).

    Args:
        model: the ARM.
        batch: B.
        capacity: columns of the finished canvas.
    """
    weight = model.lm_head.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    cache = KVCache(model.config, batch, capacity, weight.device, dtype)

    def last_logits(input_ids: Tensor, positions: Tensor, key_mask: Tensor | None) -> Tensor:
        hidden = model.hidden_states(input_ids, positions, key_mask, cache.layers, cache.length)
        cache.length += input_ids.size(1)
        return model.lm_head(hidden[:, -1:])  # type: ignore[no-any-return]

    return last_logits


def recomputed(logits_fn: LogitsFn) -> LogitsFn:
    """A function of whole rows as `extend` calls it: it remembers what it was given and reads all of it each time."""
    seen: list[tuple[Tensor, Tensor]] = []

    def all_logits(input_ids: Tensor, positions: Tensor, key_mask: Tensor | None) -> Tensor:
        seen.append((input_ids, positions))
        return logits_fn(torch.cat([ids for ids, _ in seen], 1), torch.cat([at for _, at in seen], 1), key_mask)

    return all_logits


def gumbel_argmax(logits: Tensor, temperature: float, keys: Sequence[int | Tensor]) -> tuple[Tensor, Tensor]:
    """Draw tokens: argmax exp(logit) / (-log u)^temperature, in float64.

    Args:
        logits: (N, K).
        temperature: 0 takes the argmax of the logits; 1 samples softmax(logits).
        keys: what the random numbers are a function of, besides the token id: integers and (N,) int64 tensors.

    Returns:
        (N,) int64 tokens and (N,) float64 softmax(logits) of each.
    """
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    probability = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    columns = torch.arange(logits.size(1), device=logits.device)
    rows = max(1, _CHUNK_ELEMENTS // logits.size(1))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        wide = logits[part].double()
        noisy = wide
        if temperature:
            own = [key[part, None] if isinstance(key, Tensor) else key for key in keys]
            noisy = wide - temperature * uniform(*own, columns).log_().neg_().log_()
        chosen = noisy.argmax(1)
        token_ids[part] = chosen
        probability[part] = (wide.gather(1, chosen[:, None]).squeeze(1) - wide.logsumexp(1)).exp()
    return token_ids, probability


def _draw(
    logits: Tensor, canvas: Canvas, where: Tensor, step: int, sampling: Sampling, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """`gumbel_argmax` of logits (N, V) at the N positions of `where`, (N,) tokens and probabilities."""
    rows = canvas.rows[:, None].expand_as(where)[where]
    keys = (sampling.seed, int(Stream.SAMPLER), step, rows, canvas.positions[where])
    return gumbel_argmax(logits[:, :vocab_size], sampling.temperature, keys)
