"""Models whose convolutions are replaced where that makes them faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .module import Conv2d, numbers, refusal
from .operator import kernel_of

__all__ = ["Converted", "Report", "convert"]

# Runs that are timed, by turns, and those before; calls in a CUDA graph, which is launched whole.
_RUNS, _WARM_UP, _CALLS = 11, 3, 10


@dataclass
class Converted:
    """One module: its name, whether it was replaced, and why.

    ours_us, theirs_us: of one forward pass over all inputs that it was seen with; None where
    nothing was measured.
    """

    name: str
    replaced: bool
    reason: str
    ours_us: float | None = None
    theirs_us: float | None = None


@dataclass
class Report:
    """What `convert` did; its text is a table."""

    modules: list[Converted] = field(default_factory=list)

    @property
    def replaced(self) -> list[Converted]:
        return [entry for entry in self.modules if entry.replaced]

    def __str__(self) -> str:
        width = max((len(entry.name) for entry in self.modules), default=0)
        lines = [f"{len(self.replaced)} of {len(self.modules)} convolutions replaced"]
        for entry in self.modules:
            times = (
                ""
                if entry.ours_us is None
                else f"{entry.ours_us:10.1f} us {entry.theirs_us:10.1f} us  "
            )
            mark = "im2win " if entry.replaced else "PyTorch"
            lines.append(f"{entry.name:{width}}  {mark}  {times}{entry.reason}")
        return "\n".join(lines)


def convert(
    model: nn.Module,
    *inputs: Any,
    accuracy: str | None = None,
    freeze: bool = False,
    graph: bool = False,
) -> Report:
    """Replace the model's ``nn.Conv2d`` in place by `Conv2d`, which share their parameters.

    inputs: those of a call of the model. With them the model runs once, in evaluation mode, to see
    what its convolutions are given; each is then timed both ways on random tensors like these,
    equal ones once, and replaced if it is faster. Without them all are replaced that can be.
    accuracy: as in `im2win_tvm.compile`; freeze: as `Conv2d.freeze`, and timed so. graph: time them
    in CUDA graphs, for a model that will run in one: what calls cost the host does not count there.
    Raises ValueError with inputs that are not on CUDA.
    """
    seen = _seen(model, inputs) if inputs else None
    report, made, clock = Report(), {}, _Clock(graph)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Conv2d:
            continue
        trial = reason = refusal(module)
        if module is model:
            reason = "it is the model itself: Conv2d.of(model) makes one of it"
        if reason is None:
            trial = Conv2d.of(module, accuracy)
            trial.frozen = freeze
            entry = _judged(
                name, module, trial, None if seen is None else seen.get(module, []), clock
            )
        else:
            entry = Converted(name, False, reason)
        report.modules.append(entry)
        if entry.replaced:
            made[module] = trial.freeze() if freeze else trial
    # A module may have several places.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    return report


class _Clock:
    """Times of convolutions, both ways; equal ones are timed once."""

    def __init__(self, graph: bool):
        self._measure = _times_in_graphs if graph else _times
        self._known: dict[tuple, list[float]] = {}

    def times(self, trial: Conv2d, module: nn.Conv2d, x: torch.Tensor) -> list[float]:
        key = (
            _kind(x), _kind(trial.weight), trial.bias is None, trial.stride, trial.padding,
            trial.dilation, trial.groups,
        )  # fmt: skip
        if key not in self._known:
            self._known[key] = self._measure([trial.forward, module.forward], x)
        return self._known[key]


def _kind(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _judged(
    name: str, module: nn.Conv2d, trial: Conv2d, given: list[torch.Tensor] | None, clock: _Clock
) -> Converted:
    if given is None:
        return Converted(name, True, "not measured: no inputs were given")
    if not given:
        return Converted(name, False, "the model did not call it")
    ours = theirs = 0.0
    for x in given:
        kernel = kernel_of(
            x if x.dim() == 4 else x.unsqueeze(0), trial.weight, trial.bias, trial.stride,
            numbers(trial), trial.dilation, trial.groups, trial.accuracy,
        )  # fmt: skip
        if isinstance(kernel, str):
            return Converted(name, False, kernel)
        times = clock.times(trial, module, x)
        ours, theirs = ours + times[0], theirs + times[1]
    reason = f"{theirs / ours:.2f}x PyTorch's speed"
    return Converted(name, ours < theirs, reason, 1e6 * ours, 1e6 * theirs)


def _seen(model: nn.Module, inputs: tuple) -> dict[nn.Module, list[torch.Tensor]]:
    """Tensors like those that each convolution is given in one call of the model.

    Where they are alike it is the same tensor, for memory.
    """
    seen: dict[nn.Module, list[torch.Tensor]] = {}
    made: dict[tuple, torch.Tensor] = {}

    def see(module, arguments, keywords):
        x = arguments[0] if arguments else keywords["input"]
        if _kind(x) not in made:
            made[_kind(x)] = torch.randn_like(x)
        seen.setdefault(module, []).append(made[_kind(x)])

    hooks = [
        module.register_forward_pre_hook(see, with_kwargs=True)
        for module in model.modules()
        if type(module) is nn.Conv2d
    ]
    # Running statistics are not to change.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    return seen


def _times(functions: list[Callable], x: torch.Tensor) -> list[float]:
    """Median seconds of each, which take turns."""
    took: list[list[float]] = [[] for _ in functions]
    with torch.no_grad():
        for run in range(_WARM_UP + _RUNS):
            for function, times in zip(functions, took, strict=True):
                seconds = _time(function, x)
                if run >= _WARM_UP:
                    times.append(seconds)
    return [statistics.median(times) for times in took]


def _times_in_graphs(functions: list[Callable], x: torch.Tensor) -> list[float]:
    """Median seconds of a call of each on the device alone."""
    if not x.is_cuda:
        raise ValueError(f"graph=True, inputs on {x.device}: allowed are inputs on CUDA")
    replays = []
    for function in functions:
        with torch.cuda.device(x.device), torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # searches and preparations cannot be captured
                for _ in range(_WARM_UP):
                    function(x)
            torch.cuda.current_stream().wait_stream(stream)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                for _ in range(_CALLS):
                    function(x)
        replays.append(lambda _, replay=captured.replay: replay())
    return [seconds / _CALLS for seconds in _times(replays, x)]


def _time(function: Callable, x: torch.Tensor) -> float:
    if not x.is_cuda:
        start = time.perf_counter()
        function(x)
        return time.perf_counter() - start
    with torch.cuda.device(x.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(x)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
