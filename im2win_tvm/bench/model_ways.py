"""Ways to compute a model: with our kernels, by TVM's default build, by PyTorch.

What takes a processor (building) comes first, what takes the device afterwards: several processes
that share a GPU build side by side and measure by turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..target import Target
from .baselines.tvm_default import choose_cuda_compiler, tvm_target_here

__all__ = ["TORCH", "Start", "Way", "default_build", "in_torch", "in_tvm", "reference"]


@dataclass
class Way:
    """A way to compute the model: its call, the call's outputs as arrays, its peak in bytes.

    The peak is what a call takes at most beside inputs and weights, outputs included.
    """

    call: Callable[[], Any]
    arrays: Callable[[Any], list[np.ndarray]]
    peak: Callable[[], int] | None = None


#: A way on the device, once it is built.
Start = Callable[[], Way]


def default_build(module: Any, target: Target, cuda_graphs: tuple[bool, ...]) -> list[Any]:
    """TVM's executables of its own accord, one for each answer to whether it uses CUDA graphs."""
    import tvm
    from tvm import relax

    from ..relax import build

    if target.kind != "cuda":
        return [build(module, target)]
    choose_cuda_compiler()
    from tvm.relax.backend.cuda.pipeline import legalize_passes, library_dispatch_passes

    tvm_target, made = tvm_target_here(target), []
    passes = library_dispatch_passes(tvm_target) + legalize_passes(tvm_target)
    with tvm_target:
        # What its default pipeline begins with, and finds done when it is repeated.
        module = tvm.transform.Sequential(passes)(module)
        for graph in cuda_graphs:
            config = {"relax.backend.use_cuda_graph": graph}
            with tvm.transform.PassContext(config=config):
                made.append(relax.build(module, tvm_target))
    return made


def in_tvm(executable: Any, target: Target, inputs: dict[str, np.ndarray], graph: bool) -> Way:
    """An executable in TVM's virtual machine."""
    import tvm

    device = tvm.cuda() if target.kind == "cuda" else tvm.cpu()
    main = tvm.relax.VirtualMachine(executable, device)["main"]
    given = [tvm.runtime.tensor(x, device) for x in inputs.values()]

    def call() -> Any:
        return main(*given)

    # What a graph holds is never given back.
    pooled = target.kind == "cuda" and not graph
    peak = (lambda: _pool_bytes(call)) if pooled else None
    return Way(call, lambda out: [x.numpy() for x in _flat(out)], peak)


def _pool_bytes(call: Callable[[], Any]) -> int:
    """What the virtual machine's pool holds after a call, by what the device has free without it.

    Found twice alike, or the middle of three: others may use the device.
    """
    import torch
    import tvm

    clear = tvm.get_global_func("vm.builtin.memory_manager.clear")
    found = []
    clear()
    for _ in range(3):
        call()
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        clear()
        torch.cuda.synchronize()
        found.append(torch.cuda.mem_get_info()[0] - free)
        if found[1:] == found[:1]:
            break
    return int(statistics.median(found))


def _flat(out: Any) -> list[Any]:
    return [out] if hasattr(out, "numpy") else [x for part in out for x in _flat(part)]


#: PyTorch's ways by name; those in a CUDA graph are for CUDA alone.
TORCH: dict[str, dict[str, bool]] = {
    "torch nchw": {},
    "torch nhwc": {"channels_last": True},
    "torch nchw graph": {"graph": True},
    "torch nhwc graph": {"channels_last": True, "graph": True},
    "torch.compile": {"channels_last": True, "compiled": True},
    "torch.compile graph": {"channels_last": True, "compiled": True, "graph": True},
}


def in_torch(
    path: Path,
    target: Target,
    inputs: dict[str, np.ndarray],
    dtype: str | None,
    tf32: bool,
    held: dict[tuple, Any],
    channels_last: bool = False,
    compiled: bool = False,
    graph: bool = False,
) -> Start:
    """An exported program. held: functions that other ways of the same program share."""
    import torch

    on_cuda = target.kind == "cuda"
    device = "cuda" if on_cuda else "cpu"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    given = [torch.tensor(x, device=device) for x in inputs.values()]
    given = [
        x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
        for x in (given if dtype is None else [x.to(getattr(torch, dtype)) for x in given])
    ]
    key = channels_last, compiled
    if key not in held:
        model = torch.export.load(path).module().to(device)
        model = model if dtype is None else model.to(getattr(torch, dtype))
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        held[key] = torch.compile(model, dynamic=False) if compiled else model
    function = held[key]

    def call() -> Any:
        # Ways with and without TF32 take turns.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        with torch.no_grad():
            return function(*given)

    def arrays(out: Any) -> list[np.ndarray]:
        return [x.float().cpu().numpy() for x in torch.utils._pytree.tree_leaves(out)]

    if compiled and not graph:
        torch.backends.cudnn.benchmark = False
        call()  # compiles; cuDNN's search comes with the device's turn
        if on_cuda:
            torch.cuda.empty_cache()  # others share the device until then

    def start() -> Way:
        if not on_cuda:
            torch.set_num_threads(target.threads)
            return Way(call, arrays)
        torch.backends.cudnn.benchmark = True
        call()
        if graph:
            return Way(*_captured(call, arrays))
        return Way(call, arrays, lambda: _peak_bytes(call))

    return start


def _peak_bytes(call: Callable[[], Any]) -> int:
    """The peak of PyTorch's memory during a call, above what is there before it."""
    import torch

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _captured(call: Callable[[], Any], arrays: Callable[[Any], list[np.ndarray]]) -> tuple:
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = call()
    # Kept with the call: the outputs, and the graph that writes them.
    return captured.replay, lambda _: arrays(out)


def reference(
    path: Path, module: Any, inputs: dict[str, np.ndarray], target: Target
) -> list[np.ndarray]:
    """The outputs in float32, by PyTorch's program without TF32, or by TVM's default build."""
    if path.suffix != ".pt2":
        [executable] = default_build(module, target, (False,))
        way = in_tvm(executable, target, inputs, False)
        return way.arrays(way.call())
    import torch

    device = "cuda" if target.kind == "cuda" else "cpu"
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
    model = torch.export.load(path).module().float().to(device)
    with torch.no_grad():
        out = model(*(torch.tensor(x, device=device).float() for x in inputs.values()))
    return [x.cpu().numpy() for x in torch.utils._pytree.tree_leaves(out)]
