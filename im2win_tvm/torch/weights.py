"""What is made of constant weights once, and held for as long as PyTorch has them."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..kernel import Kernel, PreparedWeights

__all__ = ["Cast", "Prepared"]


class _Held(NamedTuple):
    """Prepared weights; version: PyTorch's count of changes; stream, event: of their making."""

    storage: StorageWeakRef
    version: int
    weights: PreparedWeights
    stream: int | None
    event: Any


class Prepared:
    """Constant weights in the order of kernels."""

    def __init__(self):
        self._held: dict[tuple, _Held] = {}
        self._guard = threading.Lock()

    def get(self, kernel: Kernel, weight: torch.Tensor) -> PreparedWeights | torch.Tensor:
        if weight.is_inference():  # has no count of changes
            return weight.contiguous()
        storage, version = weight.untyped_storage(), weight._version
        # Another tensor may come to lie in the same memory: its storage is another one.
        key = (
            kernel.metadata["prepare_hash"], storage._cdata, weight.storage_offset(),
            weight.stride(), weight.device,
        )  # fmt: skip
        held = self._held.get(key)
        stale = held is None or held.storage.expired() or held.version != version
        stream = torch.cuda.current_stream() if weight.is_cuda else None
        if not stale and (stream is None or stream.cuda_stream == held.stream):
            return held.weights
        capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
        if stale:
            if capturing:  # nothing is computed now: others would read what is not there yet
                return weight.contiguous()
            made = kernel.prepare(weight.contiguous())
            on = (None, None) if stream is None else (stream.cuda_stream, stream.record_event())
            held = _Held(StorageWeakRef(storage), version, made, *on)
            with self._guard:
                # Those of weights that are gone go, too.
                self._held = {k: v for k, v in self._held.items() if not v.storage.expired()}
                self._held[key] = held
        elif not capturing:
            # They were made on another stream, and may be dropped while this one reads them.
            stream.wait_event(held.event)
            held.weights.packed.record_stream(stream)
        return held.weights


class Cast:
    """Constant weights in the dtype of autocast.

    They are prepared once as long as they are the same tensor.
    """

    def __init__(self):
        self._held: dict[tuple, tuple[StorageWeakRef, int, torch.Tensor]] = {}
        self._guard = threading.Lock()

    def get(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
        # Gradients go through a cast of their own; an inference tensor has no count of changes.
        if weight.dtype == torch.float64:
            return weight
        if weight.dtype == dtype or weight.requires_grad or weight.is_inference():
            return weight.to(dtype)
        storage, version = weight.untyped_storage(), weight._version
        key = (
            storage._cdata, weight.storage_offset(), weight.shape, weight.stride(), weight.device,
            dtype,
        )  # fmt: skip
        held = self._held.get(key)
        if held is None or held[0].expired() or held[1] != version:
            made = weight.to(dtype)
            if capturing:  # nothing is computed now: others would read what is not there yet
                return made
            if made.is_cuda:  # other streams may read it next
                torch.cuda.current_stream().synchronize()
            held = StorageWeakRef(storage), version, made
            with self._guard:
                self._held = {k: v for k, v in self._held.items() if not v[0].expired()}
                self._held[key] = held
        elif held[2].is_cuda and not capturing:
            held[2].record_stream(torch.cuda.current_stream())
        return held[2]
