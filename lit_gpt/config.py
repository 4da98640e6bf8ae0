"""The shape of a model: one dataclass, and the 30 published sizes as one table.

Decisions: a size is six numbers (everything else is common to the family); a config is frozen and travels as JSON
inside every checkpoint, so a user types a path and never a shape; the mask id is always the padded vocabulary size,
whatever the vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

NAME_PREFIX = "Diff_LLaMA_"

# Source: the 30 sizes of the SMDM paper (arXiv 2410.18514).
# size: layers, heads, width, MLP width, query groups
_SIZES: dict[int, tuple[int, int, int, int, int]] = {
    6: (6, 4, 256, 1024, 4),
    19: (8, 6, 384, 1536, 6),
    34: (8, 8, 512, 2048, 8),
    48: (9, 9, 576, 2304, 9),
    66: (10, 10, 640, 2560, 10),
    75: (16, 8, 640, 1600, 8),
    85: (13, 10, 640, 2560, 10),
    113: (12, 12, 768, 3072, 12),
    142: (15, 12, 768, 3072, 12),
    170: (18, 12, 768, 3072, 12),
    180: (14, 14, 896, 3584, 14),
    206: (16, 14, 896, 3584, 14),
    231: (18, 14, 896, 3584, 14),
    268: (16, 16, 1024, 4096, 16),
    302: (18, 16, 1024, 4096, 16),
    336: (20, 16, 1024, 4096, 16),
    472: (18, 10, 1280, 5120, 10),
    551: (21, 10, 1280, 5120, 10),
    571: (18, 11, 1408, 5632, 11),
    629: (24, 10, 1280, 5120, 10),
    666: (21, 11, 1408, 5632, 11),
    717: (19, 12, 1536, 6144, 12),
    761: (24, 11, 1408, 5632, 11),
    831: (22, 12, 1536, 6144, 12),
    944: (25, 12, 1536, 6144, 12),
    1028: (20, 14, 1792, 7168, 14),
    1233: (24, 14, 1792, 7168, 14),
    1476: (22, 16, 2048, 8192, 16),
    1678: (25, 16, 2048, 8192, 16),
    2121: (28, 17, 2176, 8704, 17),
}
SIZES: tuple[int, ...] = tuple(_SIZES)


@dataclass(frozen=True)
class Config:
    """The shape of one model of the family: pre-norm RMSNorm, SwiGLU, rotary on the whole head, no biases, untied head."""

    name: str
    """`Diff_LLaMA_<size>M` for a published size, any other name for a shape of your own."""
    n_layer: int
    """Transformer blocks."""
    n_head: int
    """Query heads."""
    n_embd: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the MLP."""
    n_query_groups: int
    """Key and value heads; each serves n_head / n_query_groups query heads."""
    block_size: int = 2048
    """Longest input, in tokens."""
    vocab_size: int = 32000
    """Pieces of the tokenizer; ids from here to padded_vocab_size exist in the head but are never trained on or sampled."""
    padding_multiple: int = 64
    """The head's rows are padded up to a multiple of this."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_table_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Rounding of the cos and sin tables; released weights were trained with bfloat16, transformers keeps float32."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""

    def __post_init__(self) -> None:
        problems = [
            *self._wrong_numbers(),
            *([] if _is_name(self.name) else [f"name must be {_NAME_WORDS}, not {_shown(self.name)}"]),
        ]
        if not problems:
            if self.n_embd % self.n_head:
                problems.append(f"n_embd {self.n_embd} does not divide by n_head {self.n_head}")
            elif self.head_size % 2:
                problems.append(f"head size {self.head_size} (n_embd / n_head) must be even for rotary")
            elif self.block_size * self.head_size > _LARGEST_TABLE:
                problems.append(f"block_size {self.block_size} times head size {self.head_size} is too large")
            if self.n_head % self.n_query_groups:
                problems.append(f"n_head {self.n_head} does not divide by n_query_groups {self.n_query_groups}")
        if self.rope_table_dtype not in ("bfloat16", "float32"):
            problems.append(f"rope_table_dtype must be bfloat16 or float32, not {_shown(self.rope_table_dtype)}")
        if problems:
            raise ValueError(f"model {self.name if _is_name(self.name) else _shown(self.name)}: {'; '.join(problems)}")

    def _wrong_numbers(self) -> list[str]:
        """What is wrong with the type or size of each number, in words."""
        problems = []
        for field, most in _LARGEST.items():
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                problems.append(f"{field} must be a whole number above 0, not {_shown(value)}")
            elif value > most:
                problems.append(f"{field} must be at most {most}, not {_shown(value)}")
        for field in ("rope_theta", "norm_eps"):
            value = getattr(self, field)
            if type(value) not in (int, float) or not 0 < value <= _LARGEST_REAL:
                problems.append(
                    f"{field} must be a finite number above 0 and at most {_LARGEST_REAL:g}, not {_shown(value)}"
                )
        return problems

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the head: vocab_size rounded up to padding_multiple."""
        return -(-self.vocab_size // self.padding_multiple) * self.padding_multiple

    @property
    def mask_id(self) -> int:
        """Id of [MASK]: one above the last row of the head, so that it can be read but never predicted."""
        return self.padded_vocab_size

    @property
    def non_embedding_params(self) -> int:
        """Parameters without the embedding and the head (the paper's N): blocks and the final norm."""
        qkv = (self.n_head + 2 * self.n_query_groups) * self.head_size * self.n_embd
        proj = self.n_embd * self.n_embd
        mlp = 3 * self.n_embd * self.intermediate_size
        return self.n_layer * (qkv + proj + mlp + 2 * self.n_embd) + self.n_embd

    @property
    def size_in_millions(self) -> float:
        """The exact non-embedding count in millions, as the compute budget uses it."""
        return self.non_embedding_params / 1e6

    @property
    def size_label(self) -> str:
        """How names of files and folders write the size: `170` for 170M, `0.87` or `1.23e+03` for shapes of your own."""
        if self.name.startswith(NAME_PREFIX) and self.name.endswith("M"):
            label = self.name[len(NAME_PREFIX) : -1]
            if label.isdecimal() and len(label) <= 4 and int(label) in _SIZES:
                return label
        return f"{self.size_in_millions:.3g}"

    @classmethod
    def from_name(cls, name: str | int, **overrides: Any) -> Config:
        """Build a published size; `170`, `170M` and `Diff_LLaMA_170M` are the same.

        Args:
            name: the size in millions, or the full name.
            **overrides: fields to set instead, such as `vocab_size=4096, block_size=256`. A shape that differs from
                the published one in layers, heads or widths loses the published name.

        Returns:
            The config.

        Raises:
            ValueError: the size is not one of the 30 (they are listed), or a field is unknown or impossible.
        """
        label = str(name).strip().removeprefix(NAME_PREFIX).removesuffix("M")
        if not label.isdecimal() or len(label) > 4 or int(label) not in _SIZES:
            known = ", ".join(str(size) for size in SIZES)
            raise ValueError(
                f"unknown model size {name!r}: the sizes are {known} (millions of non-embedding parameters)"
            )
        unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown model setting {', '.join(unknown)}")
        shape = dict(zip(_SHAPE_FIELDS, _SIZES[int(label)], strict=True))
        published = dict(shape)
        shape.update({key: value for key, value in overrides.items() if key in shape})
        rest = {key: value for key, value in overrides.items() if key not in shape}
        full_name = f"{NAME_PREFIX}{label}M"
        if shape != published:
            custom = cls(name="custom", **shape, **rest)  # type: ignore[arg-type]
            full_name = f"{NAME_PREFIX}{custom.size_in_millions:.3g}M"
        return cls(**{"name": full_name, **shape, **rest})  # type: ignore[arg-type]

    @classmethod
    def from_shape(cls, **fields: Any) -> Config:
        """Build a shape of one's own from layers and width; what is not given follows the family's rule.

        The rule: heads of 64 up to a width of 1024 and of 128 above (of the size nearest to it that divides the width),
        an MLP of four times the width, as many query groups as heads. All published sizes but 75M are so.

        Args:
            **fields: `n_layer` and `n_embd`, and any other field but the name, which the size decides.

        Raises:
            ValueError: layers or width are missing, a field is unknown or impossible.
        """
        missing = [name for name in ("n_layer", "n_embd") if name not in fields]
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if missing or unknown:
            words = [f"{'missing' if name in missing else 'unknown'} {name}" for name in (*missing, *unknown)]
            raise ValueError(f"a model's shape: {', '.join(words)}")
        width = fields["n_embd"]
        heads = fields["n_head"] if "n_head" in fields else _family_heads(width)
        derived = {"n_head": heads, "intermediate_size": _MLP_FACTOR * width, "n_query_groups": heads}
        custom = cls(**{"name": "custom", **derived, **fields})
        return dataclasses.replace(custom, name=f"{NAME_PREFIX}{custom.size_in_millions:.3g}M")

    def describe(self) -> str:
        """The shape in one line."""
        grouped = "" if self.n_query_groups == self.n_head else f" in {self.n_query_groups} query groups"
        return (
            f"{self.n_layer} layers, width {self.n_embd}, {self.n_head} heads of {self.head_size}{grouped}, "
            f"MLP {self.intermediate_size}, context {self.block_size}, vocabulary {self.vocab_size}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; `Config.from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Read back `to_dict`.

        Raises:
            ValueError: a field is missing or unknown (the file is of another program or a later version), or of another
                type or size than a model can have.
        """
        if not isinstance(values, dict):
            raise ValueError(f"model config: expected an object, not {_shown(values)}")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = [name for name in values if name not in names]
        missing = [field for field in ("name", *_SHAPE_FIELDS) if field not in values]
        if unknown or missing:
            raise ValueError(f"model config: unknown fields {_shown(unknown)}, missing fields {missing}")
        return cls(**values)


# The published sizes' rule.
_MLP_FACTOR = 4
_HEAD_SIZE, _WIDE_HEAD_SIZE, _LARGEST_NARROW_WIDTH = 64, 128, 1024


def _family_heads(width: Any) -> int:
    """Heads of a width: those whose size is nearest to the family's; 1 where the width is impossible anyway."""
    if type(width) is not int or not 0 < width <= _LARGEST["n_embd"]:
        return 1
    wanted = _HEAD_SIZE if width <= _LARGEST_NARROW_WIDTH else _WIDE_HEAD_SIZE
    sizes = [size for size in range(2, width + 1, 2) if width % size == 0]
    return width // min(sizes, key=lambda size: abs(size - wanted)) if sizes else 1


_SHAPE_FIELDS = ("n_layer", "n_head", "n_embd", "intermediate_size", "n_query_groups")
# A file's numbers decide what is allocated, so each has a limit: far above any model of this family, far below what
# would exhaust a machine.
_LARGEST = {
    "n_layer": 1 << 12,
    "n_head": 1 << 12,
    "n_embd": 1 << 17,
    "intermediate_size": 1 << 19,
    "n_query_groups": 1 << 12,
    "block_size": 1 << 20,
    "vocab_size": 1 << 22,
    "padding_multiple": 1 << 16,
}
# Positions times head size: the rotary tables take 4 bytes for each, 512 MB here.
_LARGEST_TABLE = 1 << 27
# A whole number up to here fits into what kernels take for one.
_LARGEST_REAL = 1e15
_NAME_WORDS = "a short printable text without /"
_SHOWN_CHARACTERS = 60


def _is_name(value: Any) -> bool:
    """Whether a value can be a model's name, which folders get."""
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable() and "/" not in value


def _shown(value: Any) -> str:
    """A value for a message; Python refuses to write out numbers of more than 4300 digits."""
    if isinstance(value, int) and value.bit_length() > 100:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
