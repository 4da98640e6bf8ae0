"""Weights from whatever a user has: an export, a run folder or checkpoint of ours, a published file.

Decisions: what describes itself loads without a shape being typed, and files without a record are recognised by their
shapes; a file of another kind or model is refused in one line that says which it is; nothing is unpickled. How weights
are exported is in `export`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_gpt.checkpoints.export import SUFFIX, WeightsRecord, read_record
from lit_gpt.checkpoints.markers import is_sharded, marker_path
from lit_gpt.checkpoints.run_files import CheckpointInfo, open_checkpoint
from lit_gpt.checkpoints.sharded import read_model_state
from lit_gpt.checkpoints.tensor_checks import check_finite, check_state
from lit_gpt.checkpoints.torch_files import clean_names, open_torch_file
from lit_gpt.config import SIZES, Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.model.layers import Transformer, rope_tables

MODEL_CLASSES: dict[str, type[Transformer]] = {"arm": GPT, "mdm": TransEncoder}
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
# Where a .pth keeps the weights: ours and published ones under `model`, other programs under the rest, or at its top.
_CONTAINERS = ("model", "state_dict", "model_state_dict")
# Settings of a model that its parameters' shapes do not show.
_ARITHMETIC = ("n_head", "n_query_groups", "vocab_size", "rope_theta", "rope_table_dtype", "norm_eps")
_SHAPE = ("n_layer", "n_head", "n_embd", "intermediate_size", "n_query_groups")
_KIND_WORDS = {"arm": "an autoregressive model (arm)", "mdm": "a masked diffusion model (mdm)"}

_log = logging.getLogger("lit_gpt")


def load_weights(
    path: Path | str, warn: Callable[[str], object] = _log.warning
) -> tuple[dict[str, Tensor], WeightsRecord | None]:
    """Read weights from an export, a run folder or checkpoint of ours, or a published `.safetensors` or `.pth`.

    Args:
        path: a file, a folder of shards, or a run folder (its newest complete checkpoint counts).
        warn: called with a line for what is skipped.

    Returns:
        Parameters by the published names, on the CPU, as stored; and the record, or None for files without one.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        ValueError: it is damaged, holds something else, or weights that are NaN or infinite.
    """
    path = Path(path)
    from_folder = path.is_dir()
    if from_folder:
        found = _in_folder(path)
        path = found.path
        if is_sharded(path):
            state = of_family(path, read_model_state(found))
            check_finite(path, state)
            return state, _record_of(path, {"record": found.record}, warn)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}: no such file{_neighbours(path)}")
    if path.suffix == SUFFIX:
        record = read_record(path)
        state = of_family(path, clean_names(_load_safetensors(path), path))
        check_finite(path, state)
        return state, record
    # What a folder gave has been checked against its marker already: hashing a large file twice takes a while.
    if not from_folder and marker_path(path).exists() and path.name.startswith("iter-"):
        open_checkpoint(path)
    state, record = weights_of(path, open_torch_file(path), warn)
    check_finite(path, state)
    # Copies: a mapped tensor would die with a file that is replaced in place.
    return {name: value.clone() for name, value in of_family(path, state).items()}, record


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    """A file's tensors, after `read_record` has found its header good."""
    try:
        return load_file(path)
    except (SafetensorError, LookupError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} holds tensors that torch cannot take: {str(error).splitlines()[0][:120]}") from error


def weights_of(
    path: Path, content: Any, warn: Callable[[str], object] = _log.warning
) -> tuple[dict[str, Tensor], WeightsRecord | None]:
    """The weights and the record within what `open_torch_file` read.

    Raises:
        ValueError: it is no dictionary.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict or a checkpoint")
    container = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), dict)), content)
    return clean_names(container, path), _record_of(path, content, warn)


def read_model(
    path: Path | str,
    model_name: str | int | None = None,
    kind: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Transformer, WeightsRecord | None]:
    """Build the model that a file holds.

    Args:
        path: as `load_weights`.
        model_name: the size the user typed (`170`); needed only where neither a record nor the shapes tell.
        kind: `arm` or `mdm`, if only one of them will do.
        device: where to put it.
        dtype: of its parameters; None keeps float32.

    Returns:
        The model in evaluation mode, and the file's record or None.

    Raises:
        FileNotFoundError: as `load_weights`.
        ValueError: as `load_weights`; it holds another kind or model than asked for (the line says which); its
            parameters do not fit.
    """
    state, record = load_weights(path)
    held = record.kind if record else infer_kind(path, state)
    if kind is not None and held != kind:
        raise ValueError(f"{path} holds {_KIND_WORDS[held]}, {_KIND_WORDS[kind]} was asked for")
    config = record.config if record else infer_config(path, state, model_name)
    if not record and model_name is None:
        _log.warning("%s says nothing of its model: its shapes are those of %s", path, config.name)
    if record and model_name is not None:
        _check_name(path, config, model_name)
    blocks = len(_block_numbers(state))
    if record and blocks != config.n_layer:
        raise ValueError(f"{path} holds {blocks} blocks, its record says n_layer {config.n_layer}")
    with torch.device("meta"):
        model = MODEL_CLASSES[held](config)
    check_state(path, state, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    placed = {name: value.to(device, dtype or torch.float32) for name, value in state.items()}
    model.load_state_dict(placed, assign=True)
    # The only tensors that are not in the file.
    model.rope_cos, model.rope_sin = (table.to(device) for table in rope_tables(config))
    return model.eval(), record


def load_into(model: Transformer, path: Path | str, warn: Callable[[str], object] = _log.warning) -> str:
    """Start a new model from a file's weights (`--init_from`), an MDM also from an ARM's.

    Returns:
        `state_hash` of the weights that were loaded, for the run's settings.

    Raises:
        FileNotFoundError, ValueError: as `read_model`; a model setting that the weights were trained with is another.
    """
    state, record = load_weights(path, warn)
    held = record.kind if record else infer_kind(path, state)
    if held != model.kind and not (held == "arm" and model.kind == "mdm"):
        raise ValueError(f"{path} holds {_KIND_WORDS[held]}; {_KIND_WORDS[model.kind]} cannot start from it")
    if record:
        different = [
            f"{name} {getattr(record.config, name)} there, {getattr(model.config, name)} here"
            for name in _ARITHMETIC
            if getattr(record.config, name) != getattr(model.config, name)
        ]
        if different:
            raise ValueError(f"{path} is of another model: {'; '.join(different)}")
    if held == "arm" and model.kind == "mdm":
        state = adapt_arm_to_mdm(state, model.config)
    load_state(model, state, path)
    return state_hash(state)


def load_state(model: Transformer, state: dict[str, Tensor], source: Path | str) -> None:
    """Copy parameters into a model.

    Raises:
        ValueError: they do not fit; the line names the source and the first parameter that does not.
    """
    check_state(source, state, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict(state)


def adapt_arm_to_mdm(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Give an ARM's weights the row for [MASK] that an MDM reads.

    The new row is the mean of the others: it lies within the range that the first block has learnt to read and says
    nothing about which token is hidden, where a random row would be an unknown word and a zero row would be blown up by
    the norm. An MDM's weights come back as they are.

    Args:
        state: parameters; the embedding is (V, C), or (V + 1, C) for an MDM's.
        config: of the model to start.
    """
    rows = state[_EMBEDDING]
    if rows.size(0) != config.padded_vocab_size:
        return state
    return {**state, _EMBEDDING: torch.cat((rows, rows.float().mean(0, keepdim=True).to(rows.dtype)))}


def state_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors; independent of order, file format and device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- what a file holds --------------------------------------------------------------------------------------------


def infer_kind(path: Path | str, state: dict[str, Tensor]) -> str:
    """`mdm` if the embedding has a row more than the head (for [MASK]), `arm` if as many.

    Raises:
        ValueError: neither.
    """
    more = state[_EMBEDDING].size(0) - state[_HEAD].size(0)
    if more not in (0, 1):
        rows, head_rows = state[_EMBEDDING].size(0), state[_HEAD].size(0)
        raise ValueError(
            f"{path}: {_EMBEDDING} has {rows} rows, {_HEAD} {head_rows}; expected as many (arm) or one more (mdm)"
        )
    return "mdm" if more else "arm"


def of_family(path: Path | str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state itself, if it is of a model of this family at all.

    Raises:
        ValueError: its embedding or its head is missing or no matrix.
    """
    if _EMBEDDING not in state or _HEAD not in state:
        found = ", ".join(list(state)[:3]) or "no tensors"
        raise ValueError(f"{path} is no model of this family: expected {_EMBEDDING} and {_HEAD}, found {found}")
    for name in (_EMBEDDING, _HEAD):
        if state[name].dim() != 2 or not state[name].numel():
            raise ValueError(f"{path}: {name} has shape {list(state[name].shape)}, expected a matrix")
    return state


def _record_of(path: Path, content: dict[str, Any], warn: Callable[[str], object]) -> WeightsRecord | None:
    """The record inside of a checkpoint of ours."""
    if not isinstance(content.get("record"), dict):
        return None
    try:
        return WeightsRecord.from_dict(content["record"])
    except ValueError as error:
        warn(f"{path}: its record is ignored: {error}")
        return None


def infer_config(path: Path | str, state: dict[str, Tensor], model_name: str | int | None = None) -> Config:
    """The published config of a file without a record: the one that is asked for, or that its shapes show.

    Raises:
        ValueError: no published size has these shapes, or another than the user named.
    """
    rows = state[_HEAD].size(0)
    fitting = [config for size in SIZES if _fits(config := Config.from_name(size, vocab_size=rows), state)]
    if model_name is None:
        if len(fitting) != 1:
            raise ValueError(f"{path} does not say its model, and its shapes fit no published size: give --model")
        return fitting[0]
    config = Config.from_name(model_name, vocab_size=rows)
    if fitting and config not in fitting:
        raise ValueError(f"{path} has the shapes of {fitting[0].name}, {config.name} was asked for")
    return config


def _block_numbers(state: dict[str, Tensor]) -> set[str]:
    return {name.split(".")[2] for name in state if name.startswith("transformer.h.")}


def _fits(config: Config, state: dict[str, Tensor]) -> bool:
    """Whether a state has a config's layers and widths."""
    expected = {
        _EMBEDDING: config.n_embd,
        "transformer.h.0.mlp.swiglu.w3.weight": config.intermediate_size,
    }
    return len(_block_numbers(state)) == config.n_layer and all(
        name in state and state[name].size(-1) == width for name, width in expected.items()
    )


def _check_name(path: Path | str, config: Config, model_name: str | int) -> None:
    """Refuse a size that contradicts the record."""
    if str(model_name) in (config.name, config.size_label, f"{config.size_label}M"):
        return
    asked = Config.from_name(model_name)
    if any(getattr(asked, name) != getattr(config, name) for name in _SHAPE):
        raise ValueError(f"{path} holds {config.name}, {asked.name} was asked for: give the file's model, or none")


def _in_folder(folder: Path) -> CheckpointInfo:
    """The checkpoint of a run folder, or that a folder of shards is."""
    try:
        return open_checkpoint(folder)
    except FileNotFoundError:
        files = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
        if not files:
            raise
        raise FileNotFoundError(f"{folder} is no run folder: name one of its files ({_some(files)})") from None


def _neighbours(path: Path) -> str:
    """What the user may have meant."""
    if not path.parent.is_dir():
        return f" (and no folder {path.parent})"
    files = sorted(other.name for other in path.parent.glob(f"*{path.suffix or SUFFIX}"))
    return f"; {path.parent} has {_some(files)}" if files else ""


def _some(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
