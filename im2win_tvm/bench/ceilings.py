"""What the device gives at best, measured in the same run: a product of each class, and a copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ..accuracy import TF32
from . import timing, units

__all__ = ["COPY_BYTES", "GEMM_SIZE", "describe", "float32_sums", "measure", "product"]

#: Rows and columns of each matrix of a product.
GEMM_SIZE = 8192
#: Bytes read, and as many written.
COPY_BYTES = 1 << 30
# By accuracy class: the name of its product in a record, the dtype, and what else it is.
_PRODUCTS = {
    "fp32": ("sgemm", "float32", "TF32 off"),
    TF32: ("gemm_tf32", "float32", "TF32 allowed"),
    "fp16": ("gemm_fp16", "float16", "float32 sums"),
    "bf16": ("gemm_bf16", "bfloat16", "float32 sums"),
}


def product(ceilings: dict[str, Any] | None, accuracy: str) -> dict[str, Any] | None:
    """The product of an accuracy class in a record's ceilings; None where there is none."""
    return (ceilings or {}).get(_PRODUCTS[accuracy][0])


def float32_sums() -> None:
    """Keep PyTorch's products in the class of their dtype: no TF32, no sums in two bytes."""
    import torch

    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    # On by default: with it cuBLAS may add the parts of a split sum in the dtype of the inputs.
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False


def measure(
    clock: timing.Clock, limits: timing.Limits, classes: Iterable[str] = ("fp32",)
) -> dict[str, Any]:
    """Rates of `torch.mm` in each of these accuracy classes, and of a copy on the device."""
    import torch

    float32_sums()
    times = timing.measure(_calls(list(dict.fromkeys(classes))), clock, limits)
    float32_sums()
    torch.cuda.empty_cache()  # for the problems that come next
    # The first cache state: next to these sizes the other one does not differ.
    return describe({name: next(iter(states.values())) for name, states in times.items()})


def _calls(classes: list[str], size: int = GEMM_SIZE, device: str = "cuda") -> dict[str, Any]:
    """The calls by name: the class of a product, or "copy"."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    copied = torch.empty_like(source)
    calls = {accuracy: _product_call(accuracy, size, device) for accuracy in classes}
    return calls | {"copy": lambda: copied.copy_(source)}


def _product_call(accuracy: str, size: int, device: str) -> timing.Call:
    import torch

    dtype = getattr(torch, _PRODUCTS[accuracy][1])
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))

    def call() -> Any:
        # One flag for all of PyTorch, and products with and without TF32 take turns.
        torch.backends.cuda.matmul.allow_tf32 = accuracy == TF32
        return torch.mm(a, b, out=c)

    return call


def describe(times: dict[str, timing.Times]) -> dict[str, Any]:
    """The ceilings as a record holds them, from the times of products by class, and of "copy"."""
    found: dict[str, Any] = {}
    for accuracy, (name, dtype, how) in _PRODUCTS.items():
        if accuracy in times:
            rate = units.throughput(2 * GEMM_SIZE**3, times[accuracy].median_us, "TFLOPS")
            found[name] = {
                "what": f"torch.mm, {dtype}, {GEMM_SIZE}^3, {how}",
                "tflops": rate,
                "times": asdict(times[accuracy]),
            }
    copy = times["copy"]
    found["copy"] = {
        "what": f"device copy, {COPY_BYTES >> 30} GiB read and as much written",
        "gb_s": units.bandwidth(2 * COPY_BYTES, copy.median_us),
        "times": asdict(copy),
    }
    return found
