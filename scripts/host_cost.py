"""What a call costs the host, in microseconds: from Python in several ways, and from C++;
on CUDA the launch of an empty kernel beside it.

    python scripts/host_cost.py --target cuda --json OUT.json

Batches of calls are timed, and the median over the batches is told. On CUDA a call has been made
once its launch is queued: nothing waits within a batch, and a batch is smaller than the queue. On a
CPU the kernel runs within the call, and nothing is subtracted for it: it is tiny, has one thread so
as not to wait for others, and is part of the figure from C++, which limits its share of the others.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from timeit import Timer
from typing import Any

import im2win_tvm
from im2win_tvm import environment, toolchain
from im2win_tvm.problem import ConvProblem
from im2win_tvm.target import resolve

PROBLEM = ConvProblem(1, 8, (4, 4), 8, 1)
WARM_UP = 5  # batches

#: What is timed, by name: statements on the names that `measure` gives them.
STATEMENTS = {
    "kernel(x, w, out=out)": "kernel(x, w, **operands, out=out)",
    "kernel(x, w)": "kernel(x, w, **operands)",
    "of that, the allocation": "empty(shape, dtype=dtype, device=device)",
    "kernel.bind(x, w, out=out)()": "bound()",
    "im2win_tvm.torch.conv2d(x, w)": "direct(*convolution)",
    "torch.ops.im2win.conv2d(x, w)": "operator(*convolution)",
    "torch.nn.functional.conv2d(x, w)": "theirs(*convolution[:3])",
    "the function, on PyTorch's tensors": "function(*tensors)",
    "the function, on tvm_ffi's tensors": "function(*converted)",
}
CPP = "the function, from C++ on DLTensors"
LAUNCH = "a launch of an empty kernel, from C++"

SOURCE = r"""
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <chrono>
#include <vector>
namespace ffi = tvm::ffi;

// Seconds of every batch of calls of the library's im2win_conv.
ffi::Array<double> Time(ffi::String library, ffi::Array<ffi::Tensor> tensors, int batches,
                        int calls, ffi::Function synchronize) {
  ffi::Module module = ffi::Module::LoadFromFile(library);
  ffi::Function conv = module->GetFunction("im2win_conv").value();
  std::vector<DLTensor> views;
  for (const ffi::Tensor& tensor : tensors) views.push_back(*tensor.GetDLTensorPtr());
  std::vector<ffi::AnyView> arguments;
  for (DLTensor& view : views) arguments.push_back(&view);
  std::vector<double> seconds;
  for (int batch = 0; batch < batches; ++batch) {
    auto start = std::chrono::steady_clock::now();
    for (int call = 0; call < calls; ++call) {
      ffi::Any result;
      conv.CallPacked(arguments.data(), static_cast<int>(arguments.size()), &result);
    }
    std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    synchronize();
    seconds.push_back(took.count());
  }
  return ffi::Array<double>(seconds.begin(), seconds.end());
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(time, Time);
"""

#: What is left of a call when nothing is checked and nothing computed.
LAUNCH_SOURCE = r"""
#include <cuda.h>
#include <cuda_runtime.h>
#include <chrono>

struct Maps { CUtensorMap x, y; };

__global__ void Nothing(const __grid_constant__ Maps, const void*, const void*, void*) {}

extern "C" int Time(int batches, int calls, double* seconds) {
  const int shared = 200 * 1024;
  cudaFuncSetAttribute(Nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  Maps maps = {};
  for (int batch = 0; batch < batches; ++batch) {
    auto start = std::chrono::steady_clock::now();
    for (int call = 0; call < calls; ++call) {
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(1);
      config.blockDim = dim3(384);
      config.dynamicSmemBytes = shared;
      cudaLaunchKernelEx(&config, Nothing, maps, (const void*)nullptr, (const void*)nullptr,
                         (void*)nullptr);
    }
    std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    seconds[batch] = took.count();
    cudaDeviceSynchronize();
  }
  return cudaGetLastError();
}
"""


def launches(folder: Path, arch: str, batches: int, calls: int) -> list[float]:
    """Seconds of every batch of launches of an empty kernel with the arguments of ours."""
    source, library = folder / "launch.cu", folder / "launch.so"
    source.write_text(LAUNCH_SOURCE)
    toolchain.build_cuda_library(library, source, arch, [])
    seconds = (ctypes.c_double * batches)()
    if error := ctypes.CDLL(str(library)).Time(batches, calls, seconds):
        raise SystemExit(f"an empty kernel was not launched: CUDA error {error}")
    return list(seconds)


def build_cpp(folder: Path) -> Path:
    """SOURCE as a library."""
    from tvm_ffi import libinfo

    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("no C++ compiler (Debian: apt-get install g++)")
    source, library = folder / "host_cost.cc", folder / "host_cost.so"
    source.write_text(SOURCE)
    runtime = Path(libinfo.find_libtvm_ffi())
    toolchain.run([
        compiler, "-std=c++17", "-O2", "-shared", "-fPIC", *toolchain.include_flags(),
        "-o", str(library), str(source), str(runtime), f"-Wl,-rpath,{runtime.parent}",
    ])  # fmt: skip
    return library


def python_costs(
    names: dict[str, Any], batches: int, calls: int, synchronize: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of every batch of each of STATEMENTS, which take turns."""
    timers = {name: Timer(statement, globals=names) for name, statement in STATEMENTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for batch in range(WARM_UP + batches):
        for name, timer in timers.items():
            took = timer.timeit(calls)
            synchronize()
            if batch >= WARM_UP:
                seconds[name].append(took)
    return seconds


def measure(kernel: Any, device: str, batches: int, calls: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of one call, in microseconds, by what is timed."""
    import torch
    import tvm_ffi

    import im2win_tvm.torch  # has PyTorch know the operator

    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    # Kernels with a workspace, which these are not, run a transform before.
    if [call["function"] for call in kernel.metadata["calls"]] != ["im2win_conv"]:
        raise SystemExit(f"{kernel}: runs more than im2win_conv")
    made = {
        name: torch.ones(argument["shape"], dtype=getattr(torch, argument["dtype"]), device=device)
        for name, argument in kernel.metadata["arguments"].items()
    }
    prepared = kernel.prepare(made["w"])
    made["packed"] = prepared.packed
    x, out = made["x"], made["y"]
    operands = {name: made[name] for name in ("bias", "residual") if name in made}
    tensors = [made[name] for name in kernel.metadata["calls"][0]["arguments"]]
    image = x.permute(0, 3, 1, 2) if kernel.problem.layout == "NHWC" else x
    # Weights that stay; a size of 1, so that nothing else is needed.
    rest = ((1, 1), (0, 0), (1, 1), 1, None, True)
    with tempfile.TemporaryDirectory(prefix="im2win-") as folder:
        library = kernel.export(Path(folder) / "kernel.so")
        names = {
            "kernel": kernel, "x": x, "w": prepared, "operands": operands, "out": out,
            "empty": torch.empty, "shape": tuple(out.shape), "dtype": x.dtype, "device": x.device,
            "convolution": (image, made["w"], operands.get("bias"), *rest),
            "direct": im2win_tvm.torch.conv2d, "operator": torch.ops.im2win.conv2d,
            "theirs": torch.nn.functional.conv2d,
            "bound": kernel.bind(x, prepared, **operands, out=out),
            "function": tvm_ffi.load_module(str(library)).im2win_conv,
            "tensors": tensors, "converted": [tvm_ffi.from_dlpack(t) for t in tensors],
        }  # fmt: skip
        seconds = python_costs(names, batches, calls, synchronize)
        cpp = tvm_ffi.load_module(str(build_cpp(Path(folder))))
        times = cpp.time(str(library), tensors, WARM_UP + batches, calls, synchronize)
        seconds[CPP] = list(times)[WARM_UP:]
        if device == "cuda":
            arch = kernel.metadata["target"]["arch"]
            seconds[LAUNCH] = launches(Path(folder), arch, WARM_UP + batches, calls)[WARM_UP:]
    return {name: summary([1e6 * s / calls for s in took]) for name, took in seconds.items()}


def summary(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 3), "lower": round(low, 3), "upper": round(high, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=("llvm", "cuda"), default="llvm")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--layout", default="NCHW", help="default: %(default)s")
    parser.add_argument("--epilogue", action="store_true", help="with bias and residual")
    parser.add_argument("--batches", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--calls", type=int, default=100, help="in a batch; default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the figures as a record")
    options = parser.parse_args()
    if options.batches < 2 or not 1 <= options.calls <= 500:
        raise SystemExit("--batches: from 2; --calls: from 1 to 500, for CUDA queues about 1000")
    if options.target == "llvm":
        # OpenMP reads it when it is loaded: with PyTorch, which TVM imports if it is installed.
        os.environ["OMP_NUM_THREADS"] = "1"
    target = resolve(options.target)
    problem = PROBLEM.replace(dtype=options.dtype, layout=options.layout)
    kernel = im2win_tvm.compile(problem, target, bias=options.epilogue, residual=options.epilogue)
    device = "cpu" if options.target == "llvm" else "cuda"
    costs = measure(kernel, device, options.batches, options.calls)
    where = environment.device_name(target)
    print(f"{problem} {problem.dtype} on {where}: us a call, and the middle half")
    for name, cost in costs.items():
        print(f"{name:36} {cost['median']:7.2f}   {cost['lower']:.2f} to {cost['upper']:.2f}")
    if options.json:
        figures = {
            "problem": str(problem),
            "dtype": problem.dtype,
            "layout": problem.layout,
            "schedule": kernel.metadata["schedule"],
            "epilogue": kernel.metadata["epilogue"],
            "batches": options.batches,
            "calls_per_batch": options.calls,
            "host_us_per_call": costs,
        }
        command = ["python", *sys.argv]
        environment.write_record(options.json, "host-cost", command, target, figures)


if __name__ == "__main__":
    main()
