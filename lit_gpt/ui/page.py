"""What the web page shows: the checkpoints and settings to choose from, and a generation, state by state, as JSON values.

Only the listed checkpoints can be opened. The form has every field of `Sampling`, from its metadata. A state is told as
what has changed since the state before, so that the page can step back and forth. HTTP is `page_server`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from lit_gpt.checkpoints.export import WeightsRecord, read_record
from lit_gpt.checkpoints.loaded import load_model
from lit_gpt.checkpoints.markers import is_sharded
from lit_gpt.checkpoints.run_files import list_checkpoints
from lit_gpt.checkpoints.run_record import RUN_RECORD_NAME, read_run_record
from lit_gpt.checkpoints.torch_files import clean_names
from lit_gpt.checkpoints.weights import infer_config, infer_kind, of_family
from lit_gpt.cli import warn
from lit_gpt.config import Config
from lit_gpt.sampling.infill import has_gaps
from lit_gpt.sampling.sequence import State
from lit_gpt.sampling.settings import Sampling
from lit_gpt.ui.completion import Completer, CompletionRequest
from lit_gpt.ui.trajectory import token_texts, with_space

_MAX_STEPS = 4096
"""States that a page can hold and a person would look through."""
_DEFAULT_LENGTH = 128
"""Tokens of the finished row, where the form does not say."""


# --- checkpoints ------------------------------------------------------------------------------------------------------


class ListedCheckpoint(NamedTuple):
    """A checkpoint to choose, as far as it is known before it is loaded."""

    kind: str
    """`arm` or `mdm`."""
    config: Config


def find_checkpoints(sources: Sequence[str]) -> dict[str, ListedCheckpoint]:
    """All models in the `.safetensors` files and run folders at or below some paths, by path.

    A finished run is left out where the file that it exported is in the list.

    Raises:
        FileNotFoundError: a path is missing, or there is no model at all.
    """
    found: dict[str, ListedCheckpoint] = {}
    run_folders: dict[str, WeightsRecord] = {}
    exported: set[str | None] = set()
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"--models {source}: no such file or folder")
        paths = sorted(source.rglob("*.safetensors")) if source.is_dir() else [source]
        for path in paths:
            if is_sharded(path.parent):
                continue  # a part of a run's checkpoint
            try:
                record = read_record(path)
                found[str(path)] = _listed(record) if record else _read_shapes(path)
                exported.add(record.run_id if record else None)
            except (ValueError, OSError) as error:
                warn(f"passed over: {error}")
        for path in sorted(source.rglob(RUN_RECORD_NAME)) if source.is_dir() else []:
            if not list_checkpoints(path.parent):
                continue
            try:
                run_folders[str(path.parent)] = WeightsRecord.from_dict(read_run_record(path.parent))
            except (ValueError, OSError) as error:
                warn(f"passed over: {error}")
    for name, record in run_folders.items():
        if not (record.run.get("finished") and record.run_id in exported):
            found[name] = _listed(record)
    if not found:
        raise FileNotFoundError(
            f"--models {' '.join(sources)}: no model in any .safetensors file there, and no run with a checkpoint"
        )
    return found


def _listed(record: WeightsRecord) -> ListedCheckpoint:
    return ListedCheckpoint(record.kind, record.config)


def _read_shapes(path: Path) -> ListedCheckpoint:
    """Kind and config of a file without a record, from its tensors' shapes; the weights are not read."""
    with safe_open(path, framework="pt") as file:
        shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    state = of_family(path, clean_names(shapes))
    return ListedCheckpoint(infer_kind(path, state), infer_config(path, state))


@lru_cache(maxsize=2)
def _load(path: str, changed_ns: int, tokenizer: str | None, device: str | None) -> Completer:
    """A checkpoint's model and tokenizer; the last two stay in memory, unless a file has changed meanwhile."""
    return Completer(load_model(path, tokenizer=tokenizer, device=device, dtype="float32"))


# --- the form ---------------------------------------------------------------------------------------------------------


def form_controls() -> list[dict[str, Any]]:
    """The form's controls: the row's length, and every field of `Sampling`.

    Returns:
        Name, type, default (None: none, or the page decides), choices, help, group, and the kind of model (`only`) and
        the algorithm (`with`) that alone have a use for it.
    """
    places = {name: place for place, name in enumerate(name for names in _GROUPS.values() for name in names)}
    return sorted(_controls(), key=lambda control: places.get(control["name"], len(places)))


def _controls() -> list[dict[str, Any]]:
    """The controls in the order of `Sampling`'s fields."""
    length = "Tokens of the finished row, prompt included; a text with gaps keeps its own."
    result = [_control("context_length", "int", None, {"help": length})]
    return result + [_control(one.name, str(one.type), one.default, one.metadata) for one in fields(Sampling)]


_GROUPS = {
    "": ("algorithm", "steps", "context_length", "temperature", "seed"),
    "how tokens are drawn": ("top_k", "top_p"),
    "classifier-free guidance": ("cfg_scale",),
    "blocks from left to right, and what is kept": ("block_length", "cache", "refresh", "use_cache"),
    "written again": ("remask",),
    "the algorithm's own": ("threshold", "entropy_bound"),
    "how long": ("steps_per_token",),
    "the end of the text": ("min_new_tokens", "early_stop"),
}
"""The groups of the form, in the order and the words of the guide on sampling; the first stands at the top, without a name."""


def _control(name: str, kind: str, default: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """One control, from the metadata of a field of `Sampling`."""
    control = {"name": name, "type": kind, "default": default, "choices": list(metadata.get("choices", ()))}
    control["group"] = next((group for group, names in _GROUPS.items() if name in names), "others")
    only = metadata.get("kind")
    # The kind's name before the help is for command lines: the form shows a kind's own settings only.
    shown = metadata["text"] if only else metadata["help"]
    return control | {"only": only, "with": metadata.get("algorithm"), "help": shown}


def read_settings(given: Any) -> dict[str, Any]:
    """What the form sent, as fields of `Sampling` and perhaps a `context_length`; what is empty keeps its default.

    Raises:
        ValueError: an unknown name, or a value of another type.
    """
    known = {control["name"]: control for control in _controls()}
    if not isinstance(given, dict):
        raise ValueError(f"sampling: expected an object, got {type(given).__name__}")
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"unknown parameter {', '.join(unknown)}: known are {', '.join(known)}")
    result = {name: _read_value(known[name], value) for name, value in given.items() if value not in (None, "")}
    if result.get("steps", 0) > _MAX_STEPS:
        raise ValueError(f"steps is {result['steps']}: this page shows at most {_MAX_STEPS}")
    return result


def _read_value(control: dict[str, Any], value: Any) -> Any:
    """One value, as a JSON value of its type or written out."""
    kind = control["type"]
    try:
        if kind == "bool":
            return {"true": True, "false": False}[str(value).lower()]
        if kind == "str" and isinstance(value, str):
            return value
        whole = not isinstance(value, float) or value.is_integer()
        if kind in ("int", "float") and not isinstance(value, bool) and (whole or kind == "float"):
            return int(value) if kind == "int" else float(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{control['name']}: expected {kind}, got {str(value)[:40]!r}")


# --- generating -------------------------------------------------------------------------------------------------------


class Generation:
    """A generation that has passed all checks, to be computed state by state."""

    def __init__(self, name: str, completer: Completer, request: CompletionRequest, sampling: Sampling) -> None:
        """Nothing is computed yet; ValueError if the prompt or the settings do not suit the model."""
        self.name, self._completer, self._request = name, completer, request
        self._states = completer.states(request, sampling)
        self._last: State | None = None
        self._row: list[tuple[int, float]] = []

    def next_state(self) -> dict[str, Any] | None:
        """The next state's `step`, number of `masked` tokens and `changes`; None after the last one.

        A change is [position, text or None for a mask, confidence, token id].
        """
        state = next(self._states, None)
        if state is None:
            return None
        tokenizer, mask_id = self._completer.loaded.tokenizer, self._completer.loaded.model.config.mask_id
        ids, confidence = state.tokens()[0].tolist(), state.confidences()[0].tolist()
        before = [*self._row, *[(-1, 0.0)] * (len(ids) - len(self._row))]
        self._last, self._row = (
            state,
            [(token, float(f"{value:.4g}")) for token, value in zip(ids, confidence, strict=True)],
        )
        changed = [position for position in range(len(ids)) if self._row[position] != before[position]]
        texts = token_texts(tokenizer, [ids[position] for position in changed], mask_id, starts_text=changed[:1] == [0])
        changes: list[list[Any]] = []
        for position, text in zip(changed, texts, strict=True):
            token, value = self._row[position]
            shown = with_space(text) if position in self._request.spaced else text
            changes.append([position, None if token == mask_id else shown, value, token])
        return {"step": state.step, "changes": changes, "masked": ids.count(mask_id)}

    def text(self) -> str:
        """The text of the last state."""
        return self._completer.text(self._last, self._request) if self._last else ""


@dataclass(frozen=True)
class PageModels:
    """The checkpoints that the page may use; none is loaded before it is asked for."""

    checkpoints: dict[str, ListedCheckpoint]
    """By path, as `find_checkpoints` returns them."""
    tokenizer: str | None = None
    """Of all checkpoints; None takes each one's own."""
    device: str | None = None
    """As `devices.choose_device`."""

    def listing(self) -> list[dict[str, Any]]:
        """What the page shows of each: `name`, `kind`, `size`, `block_size`, and whether it is a run's folder (`is_run`)."""
        return [
            {
                "name": name,
                "kind": kind,
                "size": f"{config.size_in_millions:.3g}M",
                "block_size": config.block_size,
                "is_run": Path(name).is_dir(),
            }
            for name, (kind, config) in self.checkpoints.items()
        ]

    def begin(self, wanted: dict[str, Any]) -> Generation:
        """Check a request of the page and load its checkpoint.

        Args:
            wanted: `checkpoint`, `prompt` and `sampling`, as the page sent them.

        Raises:
            ValueError: whatever the user can get wrong.
            OSError: a file has gone.
        """
        name, prompt = str(wanted.get("checkpoint")), wanted.get("prompt", "")
        if name not in self.checkpoints:
            raise ValueError(f"no checkpoint {name[:80]!r}: choose one of the list")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt: expected text, got {type(prompt).__name__}")
        settings = read_settings(wanted.get("sampling", {}))
        length = settings.pop("context_length", min(_DEFAULT_LENGTH, self.checkpoints[name].config.block_size))
        # Its mistakes are told before a large model is read.
        sampling = Sampling(**settings)
        if sampling.steps_per_token * length > _MAX_STEPS:
            raise ValueError(
                f"steps_per_token is {sampling.steps_per_token:g}: this page shows at most {_MAX_STEPS} steps"
            )
        completer = _load(name, Path(name).stat().st_mtime_ns, self.tokenizer, self.device)
        request = completer.request(prompt, length)
        if has_gaps(prompt) and "steps" not in settings:
            # A gap's tokens are few: of more steps than tokens, most would show nothing new.
            masks = request.row.count(completer.loaded.model.config.mask_id)
            sampling = replace(sampling, steps=max(1, min(masks, sampling.steps)))
        return Generation(name, completer, request, sampling)
