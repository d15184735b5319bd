"""Random tensors for a measurement, and the check of every output made from them.

On CUDA everything stays on the device: copying and checking the larger layers on the host would
take longer than measuring them. The reference is float64 there too, computed by PyTorch and held
against the NumPy reference on the first image.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, prod, sqrt
from typing import Any

import numpy as np

from .. import reference, tensors
from ..problem import ConvProblem

__all__ = ["HostOperands", "Outcome", "ReferenceError", "TorchOperands", "operands_for"]

# Float64 elements of a reference computed, or compared, at once.
_CHUNK = 1 << 25


class ReferenceError(RuntimeError):
    """The two references disagree, so that nothing can be checked."""


@dataclass(frozen=True)
class Outcome:
    """How far an output is from the float64 reference.

    in_class: within what its accuracy class allows. max_error: the largest difference;
    relative_error: Frobenius norm of the difference over that of the reference; both infinite
    where an output is not finite. message: what is wrong, or the errors.
    """

    in_class: bool
    max_error: float
    relative_error: float
    message: str


class HostOperands:
    """NumPy tensors in the problem's layout."""

    def __init__(self, problem: ConvProblem, seed: int = 0) -> None:
        self.problem = problem
        made = tensors.fill(problem, "normal", seed)
        self.x, self.w = made.x, made.w
        self._expected = reference.conv2d(self.x, self.w, problem)

    def poisoned(self) -> np.ndarray:
        """An output of NaN."""
        return tensors.poisoned(self.problem.output_shape, self.problem.dtype)

    def check(self, output: Any, accuracy: str | None = None) -> Outcome:
        """`output` against the reference: an array of problem.output_shape on the host.

        accuracy: its class, None for the dtype's own.
        """
        actual = np.asarray(output)
        result = tensors.check(actual, self._expected, self.problem, "normal", accuracy)
        relative = inf
        if isfinite(result.max_error):
            difference = np.linalg.norm((actual - self._expected).ravel())
            relative = float(difference / np.linalg.norm(self._expected.ravel()))
        return Outcome(result.ok, result.max_error, relative, result.message)


class TorchOperands:
    """PyTorch tensors on a device, in the problem's layout."""

    def __init__(self, problem: ConvProblem, seed: int = 0, device: str = "cuda") -> None:
        import torch

        self.problem = problem
        self._torch = torch
        self._device = device
        torch.cuda.empty_cache()  # of the problem before, so that large ones find room
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, problem.dtype)

        def normal(shape: tuple[int, ...], scale: float) -> Any:
            made = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return made.mul_(scale).to(dtype)

        # Weights of variance 1/K: outputs are of unit scale, as in tensors.fill.
        self.x = normal(problem.input_shape, 1.0)
        self.w = normal(problem.weight_shape, 1 / sqrt(problem.k))
        # A competitor may have left `benchmark` on, and float64 engines are slow to try.
        cudnn = torch.backends.cudnn
        before, cudnn.benchmark = cudnn.benchmark, False
        try:
            self._expected = self._reference()
        finally:
            cudnn.benchmark = before
        self._compare_references()

    def poisoned(self) -> Any:
        """An output of NaN."""
        torch, problem = self._torch, self.problem
        return torch.full(problem.output_shape, torch.nan, dtype=self.x.dtype, device=self._device)

    def check(self, output: Any, accuracy: str | None = None) -> Outcome:
        """`output` against the reference: a tensor of problem.output_shape on the device.

        accuracy: its class, None for the dtype's own.
        """
        problem = self.problem
        if tuple(output.shape) != problem.output_shape or output.dtype != self.x.dtype:
            message = f"output is {output.dtype} of shape {tuple(output.shape)}"
            return Outcome(False, inf, inf, message)
        scale = sqrt(float(self._expected.square().mean()))
        limits = tensors.rounding_limits(problem, scale, accuracy)
        wrong, worst, zeros = 0, 0.0, 0
        error_squares = expected_squares = 0.0
        for images in self._images():
            expected = self._expected[images]
            error = (output[images].double() - expected).abs_().nan_to_num_(nan=inf, posinf=inf)
            wrong += int((error > limits.floor + limits.share * expected.abs()).sum())
            worst = max(worst, float(error.max()))
            zeros += int((output[images] == 0).sum())
            error_squares += float(error.square().sum())
            expected_squares += float(expected.square().sum())
        relative = sqrt(error_squares / expected_squares) if isfinite(error_squares) else inf
        if wrong:
            message = f"{wrong} of {output.numel()} outputs are off, by up to {worst:.3g}"
        elif 2 * zeros > output.numel():
            message = f"{zeros} of {output.numel()} outputs are zero"
        elif relative > limits.norm:
            message = f"relative error of all outputs {relative:.3g}, above {limits.norm:.3g}"
        else:
            message = f"largest error {worst:.3g}, relative over all {relative:.3g}"
            return Outcome(True, worst, relative, message)
        return Outcome(False, worst, relative, message)

    def _images(self) -> list[slice]:
        """The batch in pieces whose windows fit a bounded number of elements."""
        problem = self.problem
        one = max(prod(problem.output_shape), prod(problem.input_shape)) // problem.batch
        step = max(1, _CHUNK // one)
        return [slice(start, start + step) for start in range(0, problem.batch, step)]

    def _reference(self) -> Any:
        from torch.nn import functional

        torch, problem = self._torch, self.problem
        expected = torch.empty(problem.output_shape, dtype=torch.float64, device=self._device)
        pads = [entry for pair in reversed(problem.padding) for entry in pair]
        for images in self._images():
            x = self.x[images].double()
            x = x.movedim(-1, 1) if problem.channels_last else x
            y = functional.conv2d(
                functional.pad(x, pads),
                self.w.double(),
                stride=problem.stride,
                dilation=problem.dilation,
                groups=problem.groups,
            )
            expected[images] = y.movedim(1, -1) if problem.channels_last else y
        return expected

    def _compare_references(self) -> None:
        first = self.problem.replace(batch=1)
        # NumPy has no bfloat16 of its own; float32 holds all of the shorter types.
        x, w = (tensor.cpu().float().numpy() for tensor in (self.x[:1], self.w))
        ours = reference.conv2d(x, w, first)
        theirs = self._expected[:1].cpu().numpy()
        # Both sum in float64: 1e-10 is far above its rounding and far below float32's.
        if not np.allclose(theirs, ours, rtol=1e-10, atol=1e-10):
            raise ReferenceError(
                f"{self.problem}: PyTorch's float64 convolution and the NumPy reference differ by "
                f"{np.abs(theirs - ours).max():.3g} on the first image"
            )


Operands = HostOperands | TorchOperands


def operands_for(problem: ConvProblem, kind: str, seed: int = 0) -> Operands:
    """Tensors and reference for a problem where a target of this kind runs."""
    return TorchOperands(problem, seed) if kind == "cuda" else HostOperands(problem, seed)
