"""A model end to end, and its distinct convolutions one by one.

End to end: the model with our kernels, by TVM's default build, and where it is an exported program
by PyTorch, eager in both memory formats and by `torch.compile`; on CUDA also in CUDA graphs. Inputs
are random; every output is checked against PyTorch's in float32, or TVM's where there is no PyTorch
program.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..problem import ConvProblem
from ..relax.report import Report
from ..target import Target
from . import report, timing, units
from .baselines import implementations
from .cells import aligned
from .model_ways import TORCH, Start, Way, default_build, in_torch, in_tvm, reference
from .run import BenchError, Progress, limits_for, run

__all__ = ["measure", "text"]

# Largest difference, in parts of the largest output, by the class that a model is computed in.
_LIMITS = {"float32": 1e-4, "float16": 2e-2, "tf32": 1e-2}
# Of others, who may sum in float16: their times count all the same.
_OTHERS = 5
_GRAPH = " graph"


def measure(
    path: Path,
    target: Target,
    *,
    batch: int | None = None,
    dtype: str | None = None,
    accuracy: str | None = None,
    against: list[str] | None = None,
    limits: timing.Limits | None = None,
    progress: Progress = lambda what: None,
    layers: bool = True,
    without: Collection[str] = (),
    turn: Callable[[bool], AbstractContextManager] = nullcontext,
    then: Callable[[dict[str, Way]], None] | None = None,
) -> dict[str, Any]:
    """The record, ready for JSON: that of `run` for the convolutions, and ``model``.

    batch: for a model with a symbolic one. dtype, accuracy: as in `relax.read` and
    `im2win_tvm.compile`. against: families of competitors, of which tvm and torch take part end to
    end. layers: whether convolutions are measured one by one, too. without: names of ways to leave
    out. turn: for processes that share a device; what turn(alone) gives is entered while PyTorch
    computes the reference and compiles, which tries kernels, and alone while anything is measured;
    what is built between takes processors only. then: gets the ways by name after all are timed.
    Raises ModelError, and BenchError where nothing can be measured.
    """
    from .. import relax

    limits = limits or limits_for(target)
    module = relax.read(path, dtype)
    module = module if batch is None else relax.specialise(module, batch)
    inputs = _inputs(module)
    rewrite = relax.UseIm2win(target, accuracy=accuracy)
    families = ["tvm", "torch"] if against is None else against
    kind = accuracy if accuracy == "tf32" else "float16" if _is_half(module, dtype) else "float32"
    found = _Ways(progress, without)
    # What needs the device untimed comes first: then others measure while this one builds.
    with turn(False):
        expected = reference(path, module, inputs, target)
        if "torch" in families and path.suffix == ".pt2":
            held: dict[tuple, Any] = {}
            for name, options in TORCH.items():
                if target.kind == "cuda" or not options.get("graph"):
                    tf32 = accuracy == "tf32"
                    way = partial(in_torch, path, target, inputs, dtype, tf32, held, **options)
                    found.add([name], lambda way=way: [way()])
    found.add(_named("im2win", target), partial(_ours, rewrite, module, target, inputs))
    if "tvm" in families:
        found.add(_named("tvm", target), partial(_theirs, module, target, inputs))
    counts = convolutions(rewrite.report)
    problems = {f"{n}x {problem}": problem for problem, n in counts.items()}
    schedules = sorted({each.schedule for each in rewrite.report.replaced})
    if not problems:
        raise BenchError(f"{path}: none of its convolutions is replaced:\n{rewrite.report}")
    with turn(True):
        clock = timing.CallsClock() if target.kind == "cuda" else timing.clock_for(target.kind)
        entries = found.measured(expected, kind, clock, limits)
        if then is not None:
            then(found.ways)
        contenders = implementations(target, families, schedules) if layers else []
        record = run(problems if layers else {}, target, contenders, limits, progress, accuracy)
    for layer, count in zip(record["layers"], counts.values(), strict=layers):
        layer["count"] = count
    return record | {
        "kind": "model",
        "model": {
            "file": path.name,
            "inputs": {name: [list(x.shape), str(x.dtype)] for name, x in inputs.items()},
            "class": kind,
            "protocol": timing.describe(clock, limits),
            "convolutions": len(rewrite.report.layers),
            "replaced": len(rewrite.report.replaced),
            "schedules": Counter(each.schedule for each in rewrite.report.replaced),
            "build_seconds": found.seconds,
            "implementations": entries,
        },
    }


def _is_half(module: Any, dtype: str | None) -> bool:
    """Whether a model is computed in float16: as asked, or by its own inputs."""
    inputs = {str(parameter.ty.dtype) for parameter in module["main"].params}
    return dtype == "float16" or (dtype is None and "float16" in inputs)


def _named(name: str, target: Target) -> list[str]:
    return [name, name + _GRAPH] if target.kind == "cuda" else [name]


def _place(name: str) -> int:
    """In a table: ours, TVM's, PyTorch's."""
    families = ("im2win", "tvm", "torch")
    return next(n for n, family in enumerate(families) if name.startswith(family))


def _ours(rewrite: Any, module: Any, target: Target, inputs: dict) -> list[Start]:
    from .. import relax

    module = rewrite(module)
    if target.kind != "cuda":
        return [partial(in_tvm, relax.build(module, target), target, inputs, False)]
    built = (relax.build(module, target, cuda_graph=graph) for graph in (False, True))
    return [
        partial(in_tvm, each, target, inputs, graph)
        for each, graph in zip(built, (False, True), strict=True)
    ]


def _theirs(module: Any, target: Target, inputs: dict) -> list[Start]:
    graphs = (False, True) if target.kind == "cuda" else (False,)
    built = default_build(module, target, graphs)
    return [
        partial(in_tvm, each, target, inputs, graph)
        for each, graph in zip(built, graphs, strict=True)
    ]


class _Ways:
    """Ways that are built as they are added; what cannot be built is a gap, ours a failure."""

    def __init__(self, progress: Progress, without: Collection[str]) -> None:
        self.progress, self.without = progress, without
        self.entries: dict[str, dict[str, Any]] = {}
        self.starts: dict[str, Start] = {}
        self.ways: dict[str, Way] = {}
        self.seconds: dict[str, float] = {}

    def add(self, names: list[str], build: Callable[[], list[Start]]) -> None:
        """The ways that one build gives."""
        wanted = [name for name in names if name not in self.without]
        if not wanted:
            return
        self.progress(names[0])
        started = time.monotonic()
        for name in wanted:
            self.entries[name] = {"name": name, "status": "ok", "reason": None}
        try:
            built = dict(zip(names, build(), strict=True))
            self.starts |= {name: built[name] for name in wanted}
        except Exception as error:
            for name in wanted:
                self._failed(name, error)
        self.seconds[names[0]] = round(time.monotonic() - started, 1)

    def _failed(self, name: str, error: Exception) -> None:
        entry = self.entries[name]
        entry["status"] = "failed" if name.startswith("im2win") else "absent"
        entry["reason"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]

    def measured(
        self, expected: list[np.ndarray], kind: str, clock: timing.Clock, limits: timing.Limits
    ) -> list[dict[str, Any]]:
        """One entry a way: checked, its peak, and times of all by turns."""
        for name, start in self.starts.items():
            entry = self.entries[name]
            self.progress(f"check of {name}")
            try:
                way = start()
                if self._is_right(entry, way, expected, kind):
                    entry["peak_bytes"] = way.peak() if way.peak else None
                    self.ways[name] = way
            except Exception as error:
                self._failed(name, error)
        self.progress("times")
        calls = {name: way.call for name, way in self.ways.items()}
        times = timing.measure(calls, clock, limits) if calls else {}
        for name, states in times.items():
            self.entries[name]["times"] = {state: asdict(value) for state, value in states.items()}
        return sorted(self.entries.values(), key=lambda entry: _place(entry["name"]))

    def _is_right(self, entry: dict, way: Way, expected: list[np.ndarray], kind: str) -> bool:
        found = way.arrays(way.call())
        error = _error(found, expected)
        entry["relative_error"] = error if math.isfinite(error) else None
        if math.isfinite(error):
            entry |= _classes(found, expected)
        limit = _LIMITS[kind] * (1 if entry["name"].startswith("im2win") else _OTHERS)
        if error <= limit:
            return True
        entry["status"] = "failed"
        entry["reason"] = f"error {error:.1e}: allowed for {kind} is {limit:.0e}"
        return False


def _classes(actual: list[np.ndarray], expected: list[np.ndarray], top: int = 5) -> dict[str, Any]:
    """Of a classifier, for how many inputs the largest classes are the same, in any order."""
    if len(expected) != 1 or expected[0].ndim != 2 or expected[0].shape[1] <= top:
        return {}
    both = [np.sort(np.argsort(x[0].astype("float64"))[:, -top:]) for x in (actual, expected)]
    return {"same_top5": int((both[0] == both[1]).all(axis=1).sum()), "inputs": len(expected[0])}


def convolutions(found: Report) -> Counter[ConvProblem]:
    """The distinct problems that kernels of ours compute, and how often each."""
    return Counter(layer.convolution for layer in found.replaced)


def text(record: dict[str, Any]) -> str:
    """The tables: end to end, then layer by layer."""
    model = record["model"]
    states = next((e["times"] for e in model["implementations"] if "times" in e), {})
    rows = [["model", *(f"{state} us" for state in states), "vs im2win", "error", "peak memory"]]
    first = model["implementations"][0].get("times")
    for entry in model["implementations"]:
        times = entry.get("times", {})
        row = [entry["name"]]
        row += [units.microseconds(times[s]["median_us"]) if s in times else "-" for s in states]
        state = next(iter(states), "")
        both = first and state in times
        theirs = times[state]["median_us"] / first[state]["median_us"] if both else None
        row.append("-" if theirs is None else units.ratio(theirs))
        error, peak = entry.get("relative_error"), entry.get("peak_bytes")
        row.append("-" if error is None else f"{error:.1e}")
        row.append("?" if peak is None else units.size(peak))
        rows.append(row)
    notes = [
        f"{entry['name']}: {'FAILED: ' if entry['status'] == 'failed' else ''}{entry['reason']}"
        for entry in model["implementations"]
        if entry["status"] != "ok"
    ]
    inputs = ", ".join(
        f"{name} {shape} {dtype}" for name, (shape, dtype) in model["inputs"].items()
    )
    heading = (
        f"{model['file']}: {inputs}; {model['replaced']} of {model['convolutions']} convolutions "
        f"replaced; time over im2win's, larger is slower"
    )
    parts = [heading, "", *aligned(rows), *notes]
    if record["layers"]:
        layers = "Its convolutions, without what is computed with them (how often, which):"
        parts += ["", layers, report.text(record)]
    return "\n".join(parts)


def _inputs(module: Any) -> dict[str, np.ndarray]:
    """Random arrays by the names of parameters. Raises BenchError for a symbolic shape."""
    rng, made = np.random.default_rng(0), {}
    for parameter in module["main"].params:
        try:
            shape = [int(n) for n in parameter.ty.shape]
        except (TypeError, ValueError):
            raise BenchError(
                f"input {parameter.name}: shape {parameter.ty.shape}: pass --batch N"
            ) from None
        made[str(parameter.name)] = rng.standard_normal(shape).astype(str(parameter.ty.dtype))
    return made


def _error(actual: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference in parts of the largest output; infinite where shapes differ."""
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return math.inf
    largest = max(
        (
            np.abs(a.astype("float64") - e).max() / (np.abs(e).max() or 1)
            for a, e in zip(actual, expected, strict=True)
            if e.size
        ),
        default=0.0,
    )
    return float(largest) if math.isfinite(largest) else math.inf
