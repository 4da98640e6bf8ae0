"""A device that is only played: it computes on the CPU, and notes whenever the host has to wait for it.

Its tensors say that they are on a device that torch knows by name only. As on a GPU, an operation takes tensors of one
device only (or scalars); a result whose shape depends on values, a value that the host asks for, and a copy that is not
told to go on by itself make the host wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_ASKED = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave", "_unique2"}
_INDEXED = {"index", "index_put", "index_put_"}


class FarTensor(Tensor):
    """A tensor of the device; `near` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        # torch takes it for a tensor of its `meta` device, the one without memory that is always there.
        far = Tensor._make_wrapper_subclass(cls, near.size(), strides=near.stride(), dtype=near.dtype, device="meta")
        far.near = near
        return far

    @property
    def device(self) -> torch.device:
        """What Python code sees."""
        return FarDevice.device

    def tolist(self) -> Any:
        """As a list, which the host waits for."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise AssertionError("a far tensor outside of its device")


class FarDevice(TorchDispatchMode):
    """While it is entered, the device is there; `waits` names the operations that made the host wait."""

    # A name that torch's autocast knows; no wheel of torch can compute there.
    device = torch.device("xla:0")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        far = [isinstance(tensor, FarTensor) for tensor in tensors]
        to_device = kwargs.get("device") in (self.device, torch.device("meta"))
        copied = name in ("_to_copy", "copy_") and ("device" in kwargs or len(set(far)) > 1)
        if copied and (to_device or any(far)):
            arrives = to_device or isinstance(args[0], FarTensor) and name == "copy_"
            if not (arrives and (kwargs.get("non_blocking") or args[2:3] == (True,))):
                self.waits.append(name)
        else:
            assert not any(far) or all(one or not own.dim() for one, own in zip(far, tensors, strict=True)), (
                f"{name} of tensors on different devices"
            )
        if any(far) and makes_the_host_wait(func, args):
            self.waits.append(name)
        if to_device:
            kwargs["device"] = torch.device("cpu")
        stays = to_device or (any(far) and "device" not in kwargs)
        result = func(*tree_map(_near, args), **tree_map(_near, kwargs))
        return tree_map(lambda leaf: FarTensor(leaf) if stays and isinstance(leaf, Tensor) else leaf, result)


def makes_the_host_wait(func: Any, args: Any) -> bool:
    """Whether an operation on a device's tensors asks for values: as numbers, or because they decide a shape."""
    name = func.overloadpacket.__name__
    return name in _ASKED or name in _INDEXED and _has_mask(args[1])


def _near(leaf: Any) -> Any:
    return leaf.near if isinstance(leaf, FarTensor) else leaf


def _has_mask(indices: Any) -> bool:
    """Whether one of them chooses by True and False."""
    return any(index is not None and index.dtype == torch.bool for index in indices)
