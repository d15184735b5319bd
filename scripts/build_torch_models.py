"""Compile the kernels that models need on an H100, on a machine without a GPU.

python build_torch_models.py FOLDER ITEM...     ITEM is MODEL:DTYPE:BATCH, as resnet50:fp16:32

Run in the root of the tree whose kernels are meant (PYTHONPATH to it). FOLDER gets one library a
kernel, which measure_torch_models.py finds by the problem (not by the key of the package's own
cache, which covers source and records), photo.pt with the inputs, and index.jsonl: which schedule
and configuration each has. What lies there already is kept: it may be stopped and begun again.
"""

import copy
import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, "tests")
import models
import torch

import im2win_tvm.torch as ours
from im2win_tvm.torch import operator

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}


def accuracy_of(dtype):
    return "tf32" if dtype == "tf32" else None


def name_of(problem, accuracy, bias):
    """Of a library: what is asked for, and nothing of how it is made."""
    text = json.dumps([dataclasses.asdict(problem), accuracy, bias], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def problems(item):
    """The distinct (problem, bias) of an item, with counts, seen by running it without data."""
    name, dtype, batch = item.split(":")
    model = (
        models.folded(models.model(name)).to(DTYPES[dtype]).to(memory_format=torch.channels_last)
    )
    model = copy.deepcopy(model).to("meta")
    ours.convert(model)
    side = models.MODELS[name][1]
    x = torch.empty(int(batch), 3, side, side, dtype=DTYPES[dtype], device="meta")
    x = x.to(memory_format=torch.channels_last)
    found = {}

    def see(module, arguments):
        # On CUDA all that follows is in this format; on "meta" a transposed convolution leaves it.
        x = arguments[0].to(memory_format=torch.channels_last)
        call = operator._Call(
            tuple(x.shape),
            tuple(module.weight.shape),
            module.bias is not None,
            tuple(module.stride),
            tuple(ours.module.numbers(module)),
            tuple(module.dilation),
            module.groups,
            accuracy_of(dtype),
            x.dtype,
            x.device,
            operator._is_channels_last(x),
        )
        key = call.problem(), call.bias
        found[key] = found.get(key, 0) + 1

    for module in model.modules():
        if isinstance(module, ours.Conv2d):
            module.register_forward_pre_hook(see)
    with torch.no_grad():
        model(x)
    return found


def main(folder, items):
    from im2win_tvm import compiler
    from im2win_tvm.target import CudaTarget

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "photo.pt").exists():
        sides = {side for _, side in models.MODELS.values()}
        torch.save({side: models.photograph(side)[0] for side in sides}, folder / "photo.pt")
    target = CudaTarget("sm_90a", "NVIDIA H100 80GB HBM3")
    for item in items:
        wanted = problems(item)
        accuracy = accuracy_of(item.split(":")[1])
        missing = [
            k for k in wanted if not (folder / f"{name_of(k[0], accuracy, k[1])}.so").exists()
        ]
        print(
            f"{item}: {sum(wanted.values())} convolutions, {len(wanted)} kernels, "
            f"{len(missing)} to build",
            flush=True,
        )
        for problem, bias in missing:
            started = time.time()
            entry = {
                "item": item,
                "problem": str(problem),
                "layout": problem.layout,
                "dtype": problem.dtype,
                "accuracy": accuracy,
                "bias": bias,
            }
            try:
                kernel = compiler.compile(problem, target, accuracy=accuracy, bias=bias)
                kernel.export(folder / f"{name_of(problem, accuracy, bias)}.so")
                entry |= {"schedule": kernel.metadata["schedule"]}
            except Exception as error:
                entry |= {"error": f"{type(error).__name__}: {error}"}
            entry["seconds"] = round(time.time() - started, 1)
            with open(folder / "index.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
            how = entry.get("error") or entry["schedule"]["name"]
            print(f"  {entry['problem']} {how} {entry['seconds']} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--count":
        for item in sys.argv[2:]:
            wanted = problems(item)
            print(item, sum(wanted.values()), len(wanted))
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
