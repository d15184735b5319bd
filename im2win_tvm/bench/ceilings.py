"""What the device gives at best, measured in the same run: a float32 product and a copy."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from . import timing, units

__all__ = ["COPY_BYTES", "SGEMM_SIZE", "describe", "measure"]

#: Rows and columns of each matrix of the product.
SGEMM_SIZE = 8192
#: Bytes read, and as many written.
COPY_BYTES = 1 << 30


def measure(clock: timing.Clock, limits: timing.Limits) -> dict[str, Any]:
    """Rates of `torch.mm` in float32 without TF32, and of a copy on the device."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    times = timing.measure(_calls(), clock, limits)
    torch.cuda.empty_cache()  # for the problems that come next
    # The first cache state: next to these sizes the other one does not differ.
    return describe(*(next(iter(times[name].values())) for name in ("sgemm", "copy")))


def _calls() -> dict[str, timing.Call]:
    import torch

    size = SGEMM_SIZE
    a, b, c = (torch.randn(size, size, device="cuda") for _ in range(3))
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    copied = torch.empty_like(source)
    return {
        "sgemm": lambda: torch.mm(a, b, out=c),
        "copy": lambda: copied.copy_(source),
    }


def describe(sgemm: timing.Times, copy: timing.Times) -> dict[str, Any]:
    """The ceilings as a record holds them, from the times of the product and of the copy."""
    flops = 2 * SGEMM_SIZE**3
    return {
        "sgemm": {
            "what": f"torch.mm, float32, {SGEMM_SIZE}^3, TF32 off",
            "tflops": units.throughput(flops, sgemm.median_us, "TFLOPS"),
            "times": asdict(sgemm),
        },
        "copy": {
            "what": f"device copy, {COPY_BYTES >> 30} GiB read and as much written",
            "gb_s": units.bandwidth(2 * COPY_BYTES, copy.median_us),
            "times": asdict(copy),
        },
    }
