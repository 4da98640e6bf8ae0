"""How to sample, as plain values: the one description that flags, the page and the library share.

Imports no torch, so that `--help` is quick. A field's metadata say what a person must know of it: `help` for
flags, `text` without the owner, which `kind` (`arm`, `mdm`, None for both) and `algorithm` name, and the rest of
`setting`'s arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

ALGORITHMS = {
    "origin": "lit_gpt.sampling.origin:Origin",
    "greedy": "lit_gpt.sampling.greedy:Greedy",
    "threshold": "lit_gpt.sampling.threshold:Threshold",
    "entropy": "lit_gpt.sampling.entropy:Entropy",
}
"""The MDM's algorithms by name: where their classes are, which are imported when they are used."""
# A row's times are a table of four bytes a step, and no row is longer than a few thousand tokens.
_MOST_STEPS = 1 << 20
# What a setting without a limit of its own may be: tensors count in int64 and compute in float32.
_LARGEST_NUMBER = 2**31 - 1


def setting(
    default: Any,
    text: str,
    owner: str | None = None,
    needs: str | None = None,
    choices: tuple[str, ...] = (),
    bounds: tuple[float, float | None] | None = None,
) -> Any:
    """A field of `Sampling`.

    Args:
        default: its value unless another one is given.
        text: what it does.
        owner: who alone has a use for it: `arm`, `mdm`, or one of the MDM's algorithms. If it is off by default, other
            algorithms refuse it.
        needs: another field, without which only the default will do.
        choices: its values, if there are few.
        bounds: its smallest and its largest value; None is 2**31 - 1.
    """
    algorithm = None if owner in (None, "arm", "mdm") else owner
    kind = "mdm" if algorithm else owner
    before = ", ".join(filter(None, (kind and kind.upper(), algorithm)))
    metadata: dict[str, Any] = {"help": f"{before}: {text}" if before else text[0].upper() + text[1:]}
    metadata |= {"text": text, "kind": kind, "algorithm": algorithm, "needs": needs}
    return field(default=default, metadata=metadata | {"choices": choices, "bounds": bounds})


@dataclass(frozen=True)
class Sampling:
    """How to sample. What follows from the prompts and the tokenizer (context length, end token) is no setting."""

    algorithm: str = setting(
        "origin",
        f"{', '.join(ALGORITHMS)}; greedy may be spelt greddy.",
        owner="mdm",
        choices=tuple(ALGORITHMS),
    )
    steps: int = setting(
        128,
        "denoising steps, for threshold and entropy at most; more steps than masked positions is normal use.",
        owner="mdm",
        bounds=(1, _MOST_STEPS),
    )
    temperature: float = setting(
        1.0, "0 takes the likeliest token; 1 samples from the model's distribution.", bounds=(0, None)
    )
    cfg_scale: float = setting(0.0, "classifier-free guidance; 0 is none.", owner="mdm", bounds=(0, None))
    seed: int = setting(1234, "together with a row's number it decides all that is random.")
    use_cache: bool = setting(
        True,
        "keep keys and values instead of reading the whole row again for each token; the tokens are the same.",
        owner="arm",
    )
    top_k: int = setting(0, "draw only from the k likeliest tokens; 0 from all.", bounds=(0, None))
    top_p: float = setting(
        1.0, "draw only from the likeliest tokens that together reach this probability.", bounds=(0, 1)
    )
    min_new_tokens: int = setting(0, "no end token among the first so many new ones.", bounds=(0, None))
    threshold: float = setting(
        0.9, "reveal every token with at least this confidence.", owner="threshold", bounds=(0, 1)
    )
    entropy_bound: float = setting(
        0.1,
        "nats that the tokens of one step may share; higher is faster and less careful.",
        owner="entropy",
        bounds=(0, math.inf),
    )
    block_length: int = setting(
        0,
        "write blocks of so many tokens from left to right, each in its share of the steps; 0 is one block.",
        owner="mdm",
        bounds=(0, None),
    )
    cache: str = setting(
        "none",
        "with block_length, keep keys and values of what a block's steps do not change: none, prefix or dual.",
        owner="mdm",
        needs="block_length",
        choices=("none", "prefix", "dual"),
    )
    refresh: int = setting(
        0,
        "with cache, read everything again after so many steps; 0 only at each block's start, 1 is exact.",
        owner="mdm",
        bounds=(0, None),
    )
    remask: float = setting(
        0.0,
        "largest share of written tokens that a step masks again, to be written better (ReMDM-cap).",
        owner="origin",
        bounds=(0, 1),
    )
    early_stop: bool = setting(
        False,
        "once the end token stands with nothing masked before it, the row is done: end tokens fill the rest.",
        owner="mdm",
    )
    steps_per_token: float = setting(
        0.0,
        "denoising steps for each masked position of a row, in place of steps; 0 leaves it to steps.",
        owner="mdm",
        bounds=(0, 100),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "algorithm", algorithm_name(self.algorithm))
        problems = [problem for field in fields(Sampling) if (problem := self._problem(field))]
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))

    def _problem(self, field: Field[Any]) -> str | None:
        """What is wrong with one value, if anything is."""
        name, value = field.name, getattr(self, field.name)
        choices, bounds, needs, algorithm = map(field.metadata.get, ("choices", "bounds", "needs", "algorithm"))
        if choices and value not in choices:
            return f"{name} is {value!r}: choose from {', '.join(choices)}"
        if bounds is not None:
            low, high = bounds
            most = high if high is not None else _LARGEST_NUMBER
            if not low <= value <= most:
                number = "a whole number" if field.type == "int" else "a number"
                expected = f"it must be {number} from {low} " + ("up" if high is None and value < low else f"to {most}")
                return f"{name} is {value}: {f'at least {low} is needed' if low and value < low else expected}"
        if needs and value != field.default and not getattr(self, needs):
            return f"{name} {value} needs a {needs}"
        if algorithm and value and not field.default and self.algorithm != algorithm:
            return f"{name} goes with the algorithm {algorithm}, not {self.algorithm}"
        return None

    @classmethod
    def of(cls, flags: Any) -> Sampling:
        """The settings among a script's flags, which have them as fields."""
        return Sampling(**{field.name: getattr(flags, field.name) for field in fields(Sampling)})

    def row_steps(self, masked: int) -> int:
        """Denoising steps of a row with so many masked positions."""
        return max(1, math.ceil(self.steps_per_token * masked)) if self.steps_per_token else self.steps

    def unused(self, kind: str) -> list[str]:
        """Names of settings that are not the default's and that this kind of model (`arm`, `mdm`) has no use for."""
        return [
            field.name
            for field in fields(Sampling)
            if field.metadata["kind"] not in (None, kind) and getattr(self, field.name) != field.default
        ]


SampledT = TypeVar("SampledT")


def sampling_flag(name: str, default: Any) -> Any:
    """The field of `Sampling` with another default, for a dataclass of flags."""
    (own,) = (one for one in fields(Sampling) if one.name == name)
    return field(default=default, metadata=own.metadata)


def sampling_flags(without: Collection[str] = ()) -> Callable[[type[SampledT]], type[SampledT]]:
    """Give a dataclass of flags every setting of `Sampling` that it does not have itself; stands below `@dataclass`.

    Args:
        without: names that it does not get.
    """

    def extended(flags: type[SampledT]) -> type[SampledT]:
        kinds = dict(flags.__annotations__)
        for one in fields(Sampling):
            if one.name not in kinds and one.name not in without:
                kinds[one.name] = one.type
                setattr(flags, one.name, sampling_flag(one.name, one.default))
        flags.__annotations__ = kinds
        return flags

    return extended


def sampling_values(flags: Any) -> dict[str, Any]:
    """The settings of `Sampling` that flags have under the same names, whole numbers as such where it has fractions."""
    found = {one.name: getattr(flags, one.name) for one in fields(Sampling) if hasattr(flags, one.name)}
    return {name: float(value) if type(value) is int and _FLOATS.get(name) else value for name, value in found.items()}


def setting_kind(name: str) -> str | None:
    """The kind of model (`arm`, `mdm`) that alone has a use for a setting; None for both."""
    kinds = {one.name: one.metadata["kind"] for one in fields(Sampling)}
    return kinds[name]  # type: ignore[no-any-return]


def changed_settings(flags: Any, said: Collection[str] = ()) -> dict[str, Any]:
    """The settings of `Sampling` among flags that are not the flags' defaults, but for those that are `said` anyway."""
    names = [one.name for one in fields(Sampling) if one.name not in said and hasattr(flags, one.name)]
    return {name: getattr(flags, name) for name in names if getattr(flags, name) != getattr(type(flags), name)}


_FLOATS = {one.name: one.type == "float" for one in fields(Sampling)}
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
