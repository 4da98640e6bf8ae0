"""Torch files of other people: read without running anything in them, and the names of their tensors."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoints.tensor_checks import check_archive, check_plain_tensors
from lit_gpt.files import open_regular

_WRAPPERS = ("module", "_forward_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Of a name that is no text, as much as tells two apart.
_SHOWN_CHARACTERS = 40


def open_torch_file(path: Path) -> Any:
    """Read a torch file without running anything in it; tensors are mapped into memory where the format allows.

    Raises:
        ValueError: it is truncated, no torch file, or holds Python objects or tensors that are no plain arrays.
        OSError: it cannot be opened.
    """
    with open_regular(
        path
    ) as file:  # what the system refuses is its own error; what fails below is the contents' fault
        zipped = file.read(2) == b"PK"
    if zipped:
        check_archive(path)
    try:
        # Files of before 2020 are no archives, and are not mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if named := re.search(r"(?:GLOBAL|Unsupported global|class) ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds a Python object ({named[1]}) besides tensors and plain values; it could run code when "
                "read, so it is not read"
            ) from error
        raise ValueError(f"{path} is not a torch file, or is damaged") from error
    except (RuntimeError, EOFError, LookupError, ValueError, OSError, AttributeError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"{path} is truncated or not a torch file ({reason})") from error
    check_plain_tensors(path, content)
    return content


def clean_names(state: dict[str, Any], source: Path | str = "the model") -> dict[str, torch.Tensor]:
    """A state dict's tensors without what wrappers (DDP, FSDP, torch.compile) put into their names.

    Args:
        state: by name; what is no tensor is left out.
        source: where it comes from, for messages.

    Raises:
        ValueError: a name is no text, or two names differ by the wrappers alone.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if other := [name for name in tensors if not isinstance(name, str)]:
        raise ValueError(f"{source}: a parameter's name is {str(other[0])[:_SHOWN_CHARACTERS]}, expected text")
    cleaned = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): value for name, value in tensors.items()
    }
    if len(cleaned) < len(tensors):
        raise ValueError(f"{source}: two parameters have the same name")
    return cleaned
