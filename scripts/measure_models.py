"""Whole models on one GPU: with our kernels through Relax, by TVM's default build, by PyTorch.

python measure_models.py OUT ITEM... [--kernels FOLDER] [--jobs N] [--seconds S] [--profile]
python measure_models.py OUT ITEM... --kernels FOLDER --build-only sm_90a "NVIDIA H200"
ITEM is MODEL:DTYPE:BATCH, as resnet50:fp16:32; dtypes fp16, fp32 (no TF32); with :alone behind it,
our kernels without TVM's and PyTorch's.

Run in the root of the tree: models are those of tests/models.py, batch normalisation folded on all
sides, float16 throughout or float32. An item is a process, which writes OUT/ITEM.json as `im2win
bench MODEL --no-layers --json` does. First all of them compile with PyTorch, which tries kernels on
the GPU. Then they build, N side by side, and whoever is ready measures, with the GPU for itself:
one holds the lock of OUT/turn meanwhile. What else uses the GPU can run as `flock -s OUT/turn ...`.

FOLDER (IM2WIN_CACHE) keeps machine code by its source, TVM's too. --build-only fills it on a
machine without a GPU, for an architecture and a device, where TVM finds a libcuda.so.1. --profile
writes OUT/ITEM.kernels: of each way, after it was timed, the times of the kernels of a call.
"""

import argparse
import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

DTYPES = {"fp16": "float16", "fp32": "float32"}


def parsed():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("items", nargs="+")
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--target", default="cuda", help="llvm tries the script without a GPU")
    parser.add_argument("--build-only", nargs=2, metavar=("ARCH", "DEVICE"))
    parser.add_argument("--one", action="store_true", help="this process measures the only item")
    return parser.parse_args()


def main():
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.kernels is not None:
        options.kernels.mkdir(parents=True, exist_ok=True)
        os.environ["IM2WIN_CACHE"] = str(options.kernels.resolve())
    if options.one:
        one(options, options.items[0])
        return
    Line(options).run()


class Line:
    """The processes of items, and who of them may go on.

    A process writes a line when it wants to compile, build or measure, and waits for an answer.
    """

    def __init__(self, options):
        self.options, self.waiting = options, list(options.items)
        self.running = {}
        # What each does (start, compile, build, measure), and what it waits for.
        self.does, self.wants = {}, {}
        self.selector = selectors.DefaultSelector()
        self.turn = open(options.out / "turn", "w")
        self.is_ours = False

    def run(self):
        end = time.monotonic() + self.options.seconds
        while self.waiting or self.running:
            self.start()
            for key, _ in self.selector.select(0.2):
                self.hear(key.data)
            self.part()
            self.grant()
            if time.monotonic() > end:
                self.waiting.clear()
                for process in self.running.values():
                    process.kill()

    def start(self):
        while self.waiting and self.busy() < self.options.jobs:
            item = self.waiting.pop(0)
            options = self.options
            log = open(options.out / f"{item.replace(':', '-')}.log", "w")
            command = [sys.executable, "-W", "ignore", __file__, str(options.out), item, "--one"]
            command += ["--build-only", *options.build_only] if options.build_only else []
            command += ["--profile"] if options.profile else []
            command += ["--target", options.target]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
            self.selector.register(process.stdout, selectors.EVENT_READ, item)
            self.running[item], self.does[item] = process, "start"

    def busy(self):
        """How many take processors. Those that measure do not count: they are but one."""
        return sum(does in ("start", "compile", "build") for does in self.does.values())

    def hear(self, item):
        pipe = self.running[item].stdout
        said = os.read(pipe.fileno(), 100).decode().split()
        if said:
            self.wants[item], self.does[item] = said[-1], "wait"
        else:
            self.selector.unregister(pipe)

    def part(self):
        """With those that have ended: a worker of theirs may still hold the pipe."""
        for item, process in list(self.running.items()):
            if process.poll() is not None:
                with contextlib.suppress(KeyError):
                    self.selector.unregister(process.stdout)
                print(f"{item}: exit {process.returncode}", flush=True)
                for known in (self.running, self.does, self.wants):
                    known.pop(item, None)

    def grant(self):
        for item in [item for item in self.options.items if item in self.wants]:
            if self.may(self.wants[item]):
                self.does[item] = self.wants.pop(item)
                with contextlib.suppress(BrokenPipeError):
                    os.write(self.running[item].stdin.fileno(), b"\n")

    def may(self, what):
        does = list(self.does.values())
        if what == "build":
            first = self.waiting or "start" in does or "compile" in [*does, *self.wants.values()]
            return not first and self.busy() < self.options.jobs
        if what == "measure":
            return not {"compile", "measure"} & set(does) and self.alone()
        return "measure" not in does and self.busy() < self.options.jobs

    def alone(self):
        """Whether no others use the GPU; from then on they wait for the end."""
        if not self.is_ours:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self.turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.is_ours = True
        return self.is_ours


def one(options, item):
    asked, answered = os.dup(1), os.dup(0)
    os.dup2(2, 1)  # what is printed is for the log
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def wait_for(what):
        os.write(asked, f"{what}\n".encode())
        if not os.read(answered, 1):
            sys.exit("nobody grants a turn")

    sys.path[:0] = [os.getcwd(), str(Path("tests").resolve())]
    inspect.stack = frames
    name, dtype, batch, *alone = item.split(":")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.pt2"
        export(path, name, DTYPES[dtype], int(batch))
        keep_tvms_code()
        if options.build_only:
            build(path, *options.build_only)
            return
        from im2win_tvm.bench import models, timing
        from im2win_tvm.target import resolve

        @contextlib.contextmanager
        def turn(alone):
            wait_for("measure" if alone else "compile")
            yield
            if not alone:
                wait_for("build")

        started = time.monotonic()
        kernels = options.out / f"{item.replace(':', '-')}.kernels"

        def progress(what):
            print(f"{time.monotonic() - started:6.1f} s  {what}", flush=True)

        def then(ways):
            try:
                profiled(ways, kernels)
            except Exception:  # the times are there all the same
                traceback.print_exc()

        record = models.measure(
            path,
            resolve(options.target),
            against=[] if alone else None,
            limits=timing.Limits(warmup=0.1, seconds=0.2, least=3, most=50),
            layers=False,
            # A graph saves microseconds of the host, where TVM's kernels take milliseconds.
            without=("tvm graph",) if batch != "1" else (),
            progress=progress,
            turn=turn,
            then=then if options.profile else None,
        )
    record["command"] = f"python scripts/measure_models.py OUT {item}"
    part = options.out / f"{item.replace(':', '-')}.part"
    part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    part.rename(part.with_suffix(".json"))
    print(models.text(record), flush=True)
    os._exit(0)  # the GPU is the next one's: no seconds to free what the end of the process frees


def export(path, name, dtype, batch):
    import models
    import torch

    side = models.MODELS[name][1]
    model = models.folded(models.model(name)).to(getattr(torch, dtype))
    x = torch.zeros(batch, 3, side, side, dtype=getattr(torch, dtype))
    torch.export.save(torch.export.export(model, (x,)), path)


def profiled(ways, path):
    """Write microseconds and number of each kernel of a call, ours and the compiler's."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with open(path, "w") as file:
        for name, way in ways.items():
            if name not in ("im2win", "torch.compile"):
                continue  # each takes a second; one in a graph is the same kernels
            with profile(activities=activities) as found:
                for _ in range(2):
                    way.call()
                if on_gpu:
                    torch.cuda.synchronize()
            rows = [(e.device_time_total / 2, e.count / 2, e.key) for e in found.key_averages()]
            rows = sorted((row for row in rows if row[0] or not on_gpu), reverse=True)
            total, count = (sum(row[n] for row in rows) for n in (0, 1))
            file.write(f"{name}: {total:.1f} us in {count:g} kernels\n")
            for time_us, count, kernel in rows:
                file.write(f"{time_us:10.1f} {count:5g} {kernel[:120]}\n")
            file.write("\n")


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
