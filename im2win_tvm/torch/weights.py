"""What is made of constant weights once, and held for as long as PyTorch has them."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..kernel import Kernel, PreparedWeights

__all__ = ["Cast", "Prepared"]


def _capturing(tensor: torch.Tensor) -> bool:
    """Whether what is launched for a tensor now goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class _Captured:
    """What CUDA graphs read that were captured: kept for as long as the weights that it is made of.

    A graph knows addresses alone. After a change of the weights another tensor takes the place of
    the one that it reads, whose memory would go to whoever asks next; and graphs do not tell when
    they end.
    """

    def __init__(self):
        self._kept: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}

    def keep(self, storage: StorageWeakRef, tensor: torch.Tensor) -> None:
        self._kept[id(tensor)] = storage, tensor

    def drop_expired(self) -> None:
        self._kept = {k: v for k, v in self._kept.items() if not v[0].expired()}


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
        self._captured = _Captured()
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
        if _capturing(weight):
            if stale:  # nothing is computed now: others would read what is not there yet
                return weight.contiguous()
            with self._guard:
                self._captured.keep(held.storage, held.weights.packed)
            return held.weights
        stream = torch.cuda.current_stream() if weight.is_cuda else None
        if stale:
            made = kernel.prepare(weight.contiguous())
            on = (None, None) if stream is None else (stream.cuda_stream, stream.record_event())
            held = _Held(StorageWeakRef(storage), version, made, *on)
            with self._guard:
                # Those of weights that are gone go, too.
                self._held = {k: v for k, v in self._held.items() if not v.storage.expired()}
                self._captured.drop_expired()
                self._held[key] = held
        elif stream is not None and stream.cuda_stream != held.stream:
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
        self._captured = _Captured()
        self._guard = threading.Lock()

    def get(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
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
        stale = held is None or held[0].expired() or held[1] != version
        if _capturing(weight):
            if stale:  # nothing is computed now: others would read what is not there yet
                return weight.to(dtype)
            with self._guard:
                self._captured.keep(held[0], held[2])
            return held[2]
        if stale:
            made = weight.to(dtype)
            if made.is_cuda:  # other streams may read it next
                torch.cuda.current_stream().synchronize()
            held = StorageWeakRef(storage), version, made
            with self._guard:
                self._held = {k: v for k, v in self._held.items() if not v[0].expired()}
                self._captured.drop_expired()
                self._held[key] = held
        elif held[2].is_cuda:
            held[2].record_stream(torch.cuda.current_stream())
        return held[2]
