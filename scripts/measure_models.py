"""Whole models on one GPU: with our kernels through Relax, by TVM's default build, by PyTorch.

python measure_models.py OUT ITEM... [--kernels FOLDER] [--jobs N] [--seconds S]
python measure_models.py OUT ITEM... --kernels FOLDER --build-only sm_90a "NVIDIA H200"
ITEM is MODEL:DTYPE:BATCH, as resnet50:fp16:32; dtypes fp16, fp32 (no TF32).

Run in the root of the tree: models are those of tests/models.py, batch normalisation folded on all
sides, float16 throughout or float32. An item is a process, which writes OUT/ITEM.json as `im2win
bench MODEL --no-layers --json` does; N of them build side by side, and take turns on the GPU.

FOLDER (IM2WIN_CACHE) keeps machine code by its source, TVM's too. --build-only fills it on a
machine without a GPU, for an architecture and a device, where TVM finds a libcuda.so.1.
"""

import argparse
import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DTYPES = {"fp16": "float16", "fp32": "float32"}


def parsed():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("items", nargs="+")
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--profile", action="store_true", help="OUT/ITEM.kernels, times of each")
    parser.add_argument("--build-only", nargs=2, metavar=("ARCH", "DEVICE"))
    parser.add_argument("--one", action="store_true", help="this process measures the only item")
    return parser.parse_args()


def main():
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.kernels is not None:
        os.environ["IM2WIN_CACHE"] = str(options.kernels.resolve())
    if options.one:
        one(options, options.items[0])
        return
    end, waiting, running = time.monotonic() + options.seconds, list(options.items), {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            item = waiting.pop(0)
            log = open(options.out / f"{item.replace(':', '-')}.log", "w")
            more = ["--build-only", *options.build_only] if options.build_only else []
            more += ["--profile"] if options.profile else []
            command = [sys.executable, "-W", "ignore", __file__, str(options.out), item, "--one"]
            running[item] = subprocess.Popen([*command, *more], stdout=log, stderr=log)
        time.sleep(0.2)
        for item, process in list(running.items()):
            if process.poll() is not None:
                del running[item]
                print(f"{item}: exit {process.returncode}", flush=True)
            elif time.monotonic() > end:
                process.kill()
                waiting.clear()


def one(options, item):
    sys.path[:0] = [os.getcwd(), str(Path("tests").resolve())]
    inspect.stack = frames
    name, dtype, batch = item.split(":")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.pt2"
        export(path, name, DTYPES[dtype], int(batch))
        keep_tvms_code()
        if options.build_only:
            build(path, *options.build_only)
            return
        from im2win_tvm.bench import models, timing
        from im2win_tvm.target import resolve

        if options.profile:
            kernels = options.out / f"{item.replace(':', '-')}.kernels"
            models.in_tvm = profiled(models.in_tvm, kernels)
        started = time.monotonic()

        def progress(what):
            print(f"{time.monotonic() - started:6.1f} s  {what}", flush=True)

        record = models.measure(
            path,
            resolve("cuda"),
            limits=timing.Limits(warmup=0.1, seconds=0.2, least=4, most=50),
            layers=False,
            # A graph saves microseconds of the host, where TVM's kernels take milliseconds.
            without=("tvm graph",) if batch != "1" else (),
            progress=progress,
            turn=lambda alone: turn(options.out / "turn", alone),
        )
    record["command"] = f"python scripts/measure_models.py OUT {item}"
    part = options.out / f"{item.replace(':', '-')}.part"
    part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    part.rename(part.with_suffix(".json"))
    print(models.text(record), flush=True)


def export(path, name, dtype, batch):
    import models
    import torch

    side = models.MODELS[name][1]
    model = models.folded(models.model(name)).to(getattr(torch, dtype))
    x = torch.zeros(batch, 3, side, side, dtype=getattr(torch, dtype))
    torch.export.save(torch.export.export(model, (x,)), path)


def profiled(in_tvm, path):
    """`in_tvm`, with microseconds and number of each kernel of a call appended to a file."""

    def measured(executable, target, inputs, graph):
        from torch.profiler import ProfilerActivity, profile

        way = in_tvm(executable, target, inputs, graph)
        if not graph:
            way.call()
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                way.call()
                way.arrays(way.call())
            rows = [(e.device_time_total / 2, e.count / 2, e.key) for e in found.key_averages()]
            with open(path, "a") as file:
                for time_us, count, name in sorted(rows, reverse=True):
                    file.write(f"{time_us:10.1f} {count:5g} {name[:100]}\n")
                file.write("\n")
        return way

    return measured


@contextlib.contextmanager
def turn(path, alone):
    """On the GPU alone among the processes of this script, or with others that do not measure."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def frames(context=1):
    """`inspect.stack` without the text of sources, on which TVM's parser spends a minute."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        code = frame.f_code
        found.append(
            inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None)
        )
        frame = frame.f_back
    return found


def keep_tvms_code():
    """Have TVM compile its own modules by nvcc with its own flags, once for each source."""
    import tvm_ffi
    from tvm.support import nvcc

    from im2win_tvm import toolchain

    os.environ["PATH"] += os.pathsep + str(toolchain.find_nvcc().bin)

    def compiled(source):
        digest = hashlib.sha256(source.encode()).hexdigest()[:32]
        folder = os.environ.get("IM2WIN_CACHE")
        path = Path(folder or tempfile.gettempdir()) / f"tvm-{digest}.cubin"
        if path.exists():
            return path.read_bytes()
        arch = ["-gencode", "arch=compute_90,code=sm_90"]
        code = bytes(nvcc.compile_cuda(source, target_format="cubin", arch=arch, compiler="nvcc"))
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(code)
        part.rename(path)
        return code

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compiled, override=True)


def build(path, arch, device):
    import tvm

    from im2win_tvm import relax
    from im2win_tvm.bench import model_ways
    from im2win_tvm.target import CudaTarget

    # What TVM asks of a Hopper GPU that is here.
    here = {
        "kind": "cuda",
        "arch": "sm_90",
        "max_shared_memory_per_block": 49152,
        "max_threads_per_block": 1024,
        "max_num_threads": 1024,
        "thread_warp_size": 32,
    }
    model_ways.tvm_target_here = lambda target: tvm.target.Target(here, host="llvm")
    module, target = relax.read(path), CudaTarget(arch, device)
    started = time.monotonic()
    model_ways.default_build(module, target, (False,))
    print(f"TVM's {time.monotonic() - started:.1f} s", flush=True)
    rewrite = relax.UseIm2win(target)
    rewritten = rewrite(module)
    print(f"rewritten {time.monotonic() - started:.1f} s\n{rewrite.report}", flush=True)
    relax.build(rewritten, target)
    relax.build(rewritten, target, cuda_graph=True)
    print(f"built {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
