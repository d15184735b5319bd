"""Whole models on one GPU: PyTorch as it is, and with convolutions of im2win_tvm.

python measure_torch_models.py OUT ITEM... [--kernels FOLDER] [--item-seconds S] [--seconds S]
    [--no-compile]
ITEM is MODEL:DTYPE:BATCH, as resnet50:fp16:32; dtypes fp16, bf16, fp32 (no TF32), tf32.

Run in the root of the tree (it imports tests/models.py and the package from there), with
build_torch_models.py beside this file and the FOLDER that it filled. Every item is a process of its
own with a time limit, and OUT/ITEM.json is written after each step, so that nothing measured is
lost. Kernels that FOLDER does not have are compiled here if there is nvcc, else PyTorch computes.

Measured, batch normalisation folded and channels_last on all sides, cudnn.benchmark on:
  torch, torch-graph                  PyTorch eager; the same in a CUDA graph
  im2win, im2win-graph                im2win_tvm.torch.convert(model, x, freeze=True), which keeps
                                      PyTorch's where it is faster, judged eager and in graphs
  all-graph                           every convolution ours that can be, in a CUDA graph
  torch-compile(-graph), im2win-compile(-graph)      torch.compile of torch and of im2win-graph
A time is the median over rounds of the mean of a group of calls back to back between two events
(steady state, warm clocks). Peak memory: PyTorch's, above what is there before the call.
Errors are against the model in float32 without TF32, of the first images.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent


def parsed():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("items", nargs="+")
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--item-seconds", type=float, default=150)
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--one", action="store_true", help="this process measures the only item")
    return parser.parse_args()


def main():
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        Item(options).run()
        return
    end = time.monotonic() + options.seconds
    for item in options.items:
        left = min(options.item_seconds, end - time.monotonic())
        if left < 20:
            print(f"{item}: no time left", flush=True)
            continue
        command = [sys.executable, "-W", "ignore", __file__, str(options.out), item, "--one"]
        command += ["--item-seconds", str(left)]
        command += ["--kernels", str(options.kernels)] if options.kernels else []
        command += ["--no-compile"] if options.no_compile else []
        started = time.monotonic()
        try:
            code = subprocess.run(command, timeout=left).returncode
            said = "done" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            said = "time limit"
        print(f"{item}: {said} after {time.monotonic() - started:.0f} s", flush=True)


class Item:
    def __init__(self, options):
        self.end = time.monotonic() + options.item_seconds
        self.path = options.out / f"{options.items[0].replace(':', '-')}.json"
        self.name, self.dtype, self.batch = options.items[0].split(":")
        self.batch, self.options, self.compiled_runs = int(self.batch), options, []
        self.record = {"item": options.items[0], "times_us": {}, "peak_bytes": {}, "errors": {}}
        self.rounds = {}

    def write(self):
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.record, indent=1))
        os.replace(temporary, self.path)

    def run(self):
        sys.path[:0] = [os.getcwd(), str(Path("tests").resolve()), str(HERE)]
        import copy

        import models
        import torch
        from build_torch_models import DTYPES, accuracy_of

        import im2win_tvm.torch as ours
        from im2win_tvm import environment

        self.torch, self.accuracy = torch, accuracy_of(self.dtype)
        kernels = self.prebuilt(ours)
        self.record |= {
            "device": torch.cuda.get_device_name(),
            "versions": environment.versions() | {"cudnn": torch.backends.cudnn.version()},
            "cuda": environment.cuda(),
        }
        torch.backends.cudnn.benchmark = True
        tf32 = self.dtype == "tf32"
        side = models.MODELS[self.name][1]
        x = self.photographs(models, side).cuda()
        base = models.folded(models.model(self.name)).cuda()
        self.tf32(False)
        self.images = min(self.batch, 8)
        with torch.no_grad():
            self.expected = base(x[: self.images]).float().cpu()
        self.tf32(tf32)
        last = torch.channels_last
        x = x.to(DTYPES[self.dtype]).to(memory_format=last)
        theirs = base.to(DTYPES[self.dtype]).to(memory_format=last)
        torch.cuda.empty_cache()
        self.x = x
        self.step("torch", theirs)
        self.step("torch-graph", theirs, graph=True)
        mine = copy.deepcopy(theirs)
        self.converted("im2win", ours, mine)
        self.step("im2win", mine)
        graphed = copy.deepcopy(theirs)
        self.converted("im2win-graph", ours, graphed, graph=True)
        self.step("im2win-graph", graphed, graph=True)
        every = copy.deepcopy(theirs)
        ours.convert(every, accuracy=self.accuracy, freeze=True)
        self.step("all-graph", every, graph=True)
        self.record["kernels"] = kernels.counts
        self.write()
        runs = {"torch": (theirs, False), "im2win": (mine, False), "torch-graph": (theirs, True),
                "im2win-graph": (graphed, True), "all-graph": (every, True)}  # fmt: skip
        for _ in range(2):
            for name, (model, graph) in runs.items():
                self.step(name, model, graph, again=True)
        if self.options.no_compile:
            return
        for name, model in (("torch-compile", theirs), ("im2win-compile", graphed)):
            self.compiled(name, model)
        for name, model, graph in self.compiled_runs * 2:
            self.step(name, model, graph, again=True)

    def compiled(self, name, model):
        started = time.monotonic()
        function = self.torch.compile(model, fullgraph=True, dynamic=False)
        if self.step(name, function):
            self.step(f"{name}-graph", function, graph=True)
            self.compiled_runs += [(name, function, False), (f"{name}-graph", function, True)]
        self.record.setdefault("compile_seconds", {})[name] = round(time.monotonic() - started, 1)
        self.write()

    def prebuilt(self, ours):
        from build_torch_models import name_of

        from im2win_tvm.artifact import ArtifactError
        from im2win_tvm.kernel import load
        from im2win_tvm.kernel_cache import KernelCache

        folder = self.options.kernels

        class Prebuilt(KernelCache):
            def __init__(self):
                super().__init__()
                self.counts = {"prebuilt": 0, "compiled": 0}
                self.held = {}

            def get(self, problem, target, *, accuracy=None, epilogue=None):
                name = name_of(problem, accuracy, epilogue.bias)
                path = folder / f"{name}.so" if folder else None
                if path is not None and path.exists() and name not in self.held:
                    try:
                        self.held[name] = load(path)
                        self.counts["prebuilt"] += 1
                    except ArtifactError as error:
                        print(f"{path}: {error}", flush=True)
                if name not in self.held:
                    self.held[name] = super().get(
                        problem, target, accuracy=accuracy, epilogue=epilogue
                    )
                    self.counts["compiled"] += 1
                return self.held[name]

        ours.operator.CACHE = Prebuilt()
        return ours.operator.CACHE

    def photographs(self, models, side):
        saved = self.options.kernels / "photo.pt" if self.options.kernels else None
        if saved is not None and saved.exists():
            image = self.torch.load(saved)[side]
        else:
            image = models.photograph(side)[0]
        return self.torch.stack([image.roll(7 * n, 2) for n in range(self.batch)])

    def tf32(self, allowed):
        self.torch.backends.cudnn.allow_tf32 = allowed
        self.torch.backends.cuda.matmul.allow_tf32 = allowed

    def converted(self, name, ours, model, graph=False):
        started = time.monotonic()
        try:
            report = ours.convert(model, self.x, accuracy=self.accuracy, freeze=True, graph=graph)
        except Exception as error:
            self.failed(f"convert {name}", error)
            return
        self.record.setdefault("convert", {})[name] = {
            "seconds": round(time.monotonic() - started, 1),
            "replaced": len(report.replaced),
            "of": len(report.modules),
            "modules": [vars(entry) for entry in report.modules],
        }
        self.torch.cuda.empty_cache()
        self.write()

    def failed(self, what, error):
        print(f"{self.record['item']}: {what}: {type(error).__name__}: {error}", flush=True)
        self.record.setdefault("failed", {})[what] = traceback.format_exc()[-3000:]
        self.torch.cuda.empty_cache()
        self.write()

    def step(self, name, model, graph=False, again=False):
        """Check, memory and one round of times of one way; whether it went well."""
        if time.monotonic() > self.end - 5 and again:
            return False
        try:
            with self.torch.no_grad():
                self.measure(name, model, graph, again)
        except Exception as error:
            self.failed(name, error)
            return False
        self.write()
        return True

    def measure(self, name, model, graph, again):
        torch, x = self.torch, self.x
        call = lambda: model(x)  # noqa: E731
        call()
        if not again:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        output = call()
        torch.cuda.synchronize()
        if not again:
            self.record["peak_bytes"][name] = torch.cuda.max_memory_allocated() - before
        if graph:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream().wait_stream(stream)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                output = model(x)
            output.fill_(float("nan"))
            call = captured.replay
            call()
        if not again:
            self.agreement(name, output)
        self.rounds.setdefault(name, []).extend(self.groups(call))
        times = self.rounds[name]
        self.record["times_us"][name] = {
            "median": statistics.median(times),
            "least": min(times),
            "most": max(times),
            "n": len(times),
        }
        del output, call
        if graph:
            del captured
        torch.cuda.empty_cache()

    def groups(self, call, warm=0.2, seconds=0.5):
        """Microseconds of a call, of each of several groups."""
        torch = self.torch
        torch.cuda.synchronize()
        started, calls = time.perf_counter(), 0
        while time.perf_counter() - started < warm or calls < 2:
            call()
            torch.cuda.synchronize()
            calls += 1
        one = (time.perf_counter() - started) / calls
        size = max(1, min(50, int(seconds / 10 / one)))
        found = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(size):
                call()
            end.record()
            end.synchronize()
            found.append(1e3 * start.elapsed_time(end) / size)
        return found

    def agreement(self, name, output):
        y, wanted = output[: self.images].float().cpu(), self.expected
        found = {
            "relative": ((y - wanted).abs().max() / wanted.abs().max()).item(),
            "finite": bool(y.isfinite().all()),
        }
        if y.dim() == 2 and y.shape[1] <= 1000:
            same = [
                set(a.topk(5).indices.tolist()) == set(b.topk(5).indices.tolist())
                for a, b in zip(y, wanted, strict=False)
            ]
            found["same_top5"] = f"{sum(same)} of {len(same)} images"
        elif y.dim() == 4:
            found["same_class"] = (y.argmax(1) == wanted.argmax(1)).float().mean().item()
        self.record["errors"][name] = found


if __name__ == "__main__":
    main()
