"""The memory of tensors in use: on CUDA what the allocator says, on a CPU every storage from its birth to its death."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that are born under it and still alive."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._alive, self._bytes, self._peak = device, set[int](), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self._bytes += size
        self._peak = max(self._peak, self._bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._bytes -= size

    def in_use(self) -> int:
        """Return the bytes in use now."""
        return torch.cuda.memory_allocated() if self._device.type == "cuda" else self._bytes

    def peak(self) -> int:
        """Return the most bytes in use since the last reset."""
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else self._peak

    def reset_peak(self) -> None:
        """Forget the peak."""
        self._peak = self._bytes
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


@contextmanager
def measured_memory(device: torch.device) -> Iterator[Memory]:
    """Count memory from nothing."""
    memory = Memory(device)
    if device.type == "cuda":
        yield memory
    else:
        with memory:
            yield memory
