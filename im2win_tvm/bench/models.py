"""A model end to end, and its distinct convolutions one by one.

End to end: the model with our kernels, by TVM's default build, and where it is an exported program
by PyTorch, eager in both memory formats and by `torch.compile`. Inputs are random; every output is
checked against PyTorch's in float32, or TVM's where there is no PyTorch program.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..problem import ConvProblem
from ..relax.report import Report
from ..target import Target
from . import report, timing, units
from .baselines import implementations
from .baselines.tvm_default import choose_cuda_compiler
from .cells import aligned
from .run import BenchError, Progress, limits_for, run

__all__ = ["measure", "text"]

# Largest difference, in parts of the largest output, by the class that a model is computed in.
_LIMITS = {"float32": 1e-4, "float16": 2e-2, "tf32": 1e-2}


@dataclass
class _Way:
    """A way to compute the model: its call, and the call's outputs as float64 arrays."""

    call: Callable[[], Any]
    arrays: Callable[[Any], list[np.ndarray]]
    peak: Callable[[], int] | None = None


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
) -> dict[str, Any]:
    """The record, ready for JSON: that of `run` for the convolutions, and ``model``.

    batch: for a model with a symbolic one. dtype, accuracy: as in `relax.read` and
    `im2win_tvm.compile`. against: families of competitors, of which tvm and torch take part end to
    end. Raises ModelError, and BenchError where nothing can be measured.
    """
    from .. import relax

    limits = limits or limits_for(target)
    module = relax.read(path, dtype)
    module = module if batch is None else relax.specialise(module, batch)
    inputs = _inputs(module)
    rewrite = relax.UseIm2win(target, accuracy=accuracy)
    progress("im2win")
    if target.kind == "cuda":
        choose_cuda_compiler()
    families = ["tvm", "torch"] if against is None else against
    ways: dict[str, Callable[[], _Way]] = {
        "im2win": lambda: _in_tvm(rewrite(module), target, inputs)
    }
    if "tvm" in families:
        ways["tvm"] = lambda: _in_tvm(module, target, inputs)
    if "torch" in families and path.suffix == ".pt2":
        for name, options in _TORCH.items():
            ways[name] = lambda options=options: _in_torch(
                path, target, inputs, dtype, accuracy == "tf32", **options
            )
    kind = accuracy if accuracy == "tf32" else "float16" if dtype == "float16" else "float32"
    entries = _measured(ways, _reference(path, module, inputs, target), kind, target, limits)
    counts = convolutions(rewrite.report)
    problems = {f"{n}x {problem}": problem for problem, n in counts.items()}
    schedules = sorted({each.schedule for each in rewrite.report.replaced})
    if not problems:
        raise BenchError(f"{path}: none of its convolutions is replaced:\n{rewrite.report}")
    contenders = implementations(target, families, schedules)
    record = run(problems, target, contenders, limits, progress, accuracy)
    for layer, count in zip(record["layers"], counts.values(), strict=True):
        layer["count"] = count
    return record | {
        "kind": "model",
        "model": {
            "file": path.name,
            "inputs": {name: [list(x.shape), str(x.dtype)] for name, x in inputs.items()},
            "class": kind,
            "convolutions": len(rewrite.report.layers),
            "replaced": len(rewrite.report.replaced),
            "implementations": entries,
        },
    }


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
    layers = "Its convolutions, without what is computed with them (how often, which):"
    return "\n".join([heading, "", *aligned(rows), *notes, "", layers, report.text(record)])


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


def _in_tvm(module: Any, target: Target, inputs: dict[str, np.ndarray]) -> _Way:
    import tvm

    from ..relax import build

    device = tvm.cuda() if target.kind == "cuda" else tvm.cpu()
    main = tvm.relax.VirtualMachine(build(module, target), device)["main"]
    given = [tvm.runtime.tensor(x, device) for x in inputs.values()]
    return _Way(lambda: main(*given), lambda out: [x.numpy() for x in _flat(out)])


def _flat(out: Any) -> list[Any]:
    return [out] if hasattr(out, "numpy") else [x for part in out for x in _flat(part)]


#: PyTorch's ways by name.
_TORCH: dict[str, dict[str, bool]] = {
    "torch nchw": {},
    "torch nhwc": {"channels_last": True},
    "torch.compile": {"compiled": True},
}


def _in_torch(
    path: Path,
    target: Target,
    inputs: dict[str, np.ndarray],
    dtype: str | None,
    tf32: bool,
    channels_last: bool = False,
    compiled: bool = False,
) -> _Way:
    import torch

    from .baselines.torch_conv import peak_above

    on_cuda = target.kind == "cuda"
    device = "cuda" if on_cuda else "cpu"
    model = torch.export.load(path).module().to(device)
    given = [torch.tensor(x, device=device) for x in inputs.values()]
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
        given = [x.to(getattr(torch, dtype)) for x in given]
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        given = [
            x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in given
        ]
    if on_cuda:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 0
    else:
        torch.set_num_threads(target.threads)
    function = torch.compile(model, dynamic=False) if compiled else model

    def call() -> Any:
        # Ways with and without TF32 take turns.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        with torch.no_grad():
            return function(*given)

    def arrays(out: Any) -> list[np.ndarray]:
        return [x.float().cpu().numpy() for x in torch.utils._pytree.tree_leaves(out)]

    return _Way(call, arrays, (lambda: peak_above(call)) if on_cuda else None)


def _reference(
    path: Path, module: Any, inputs: dict[str, np.ndarray], target: Target
) -> list[np.ndarray]:
    """The outputs in float32, by PyTorch's program on the CPU, or by TVM's default build."""
    if path.suffix != ".pt2":
        way = _in_tvm(module, target, inputs)
        return way.arrays(way.call())
    import torch

    model = torch.export.load(path).module().float()
    with torch.no_grad():
        out = model(*(torch.tensor(x).float() for x in inputs.values()))
    return [x.numpy() for x in torch.utils._pytree.tree_leaves(out)]


def _measured(
    ways: dict[str, Callable[[], _Way]],
    expected: list[np.ndarray],
    kind: str,
    target: Target,
    limits: timing.Limits,
) -> list[dict[str, Any]]:
    """One entry a way; what cannot be built or run is a gap, and of our own a failure."""
    entries, calls = {}, {}
    for name, make in ways.items():
        entry = entries[name] = {"name": name, "status": "ok", "reason": None}
        try:
            way = make()
            error = _error(way.arrays(way.call()), expected)
            entry["relative_error"] = error if math.isfinite(error) else None
            if not error <= _LIMITS[kind]:
                entry["status"] = "failed"
                entry["reason"] = f"error {error:.1e}: allowed for {kind} is {_LIMITS[kind]:.0e}"
                continue
            entry["peak_bytes"] = way.peak() if way.peak else None
        except Exception as error:
            entry["status"] = "failed" if name == "im2win" else "absent"
            entry["reason"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            continue
        calls[name] = way.call
    times = timing.measure(calls, timing.clock_for(target.kind), limits) if calls else {}
    for name, states in times.items():
        entries[name]["times"] = {state: asdict(value) for state, value in states.items()}
    return list(entries.values())


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
