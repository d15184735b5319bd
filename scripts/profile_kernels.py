"""What Nsight Compute sees of each layer's kernel: FMA utilisation, DRAM traffic, instructions.

    python scripts/profile_kernels.py --layouts NCHW,NHWC --record OUT.json

Runs on a host with a GPU, ncu and PyTorch. Every kernel is the one that `im2win_tvm.compile` gives
(or `--schedule`'s), built first and then run once under ncu, which replays it with cold caches and
leaves the clocks as they are. Times under ncu are not those of `im2win bench`.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import im2win_tvm
from im2win_tvm import builds, environment, suites, toolchain
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.target import resolve

_FFMA = "sass_thread_inst_executed_op_ffma_pred_on.sum"
METRICS = {
    "time_ns": "gpu__time_duration.sum",
    "ffma_per_cycle": f"smsp__{_FFMA}.per_cycle_elapsed",
    "ffma_peak_per_cycle": f"sm__{_FFMA}.peak_sustained",
    "issue_active_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps_active_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "shared_bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "registers": "launch__registers_per_thread",
}
KERNEL = "im2win_conv_kernel"
# Loads and stores of 128 bits, and the arithmetic they serve.
INSTRUCTIONS = ("FFMA", "LDS.128", "LDG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E", "STG.E.128")


def chosen(options: argparse.Namespace) -> list[tuple[str, ConvProblem]]:
    found = []
    for layout in options.layouts.split(","):
        suite = suites.suite(options.suite, options.batch, layout=layout)
        names = options.layers.split(",") if options.layers else list(suite)
        unknown = [name for name in names if name not in suite]
        if unknown:
            raise SystemExit(f"--layers={','.join(unknown)}: allowed are {', '.join(suite)}")
        found += [(name, suite[name]) for name in names]
    return found


def prepare(problems: list[ConvProblem], schedule: str | None, folder: Path) -> list:
    """Export the kernel of every problem as <number>.so."""
    target = resolve("cuda")
    requests = [builds.Request(problem, target, schedule=schedule) for problem in problems]
    kernels = list(builds.build_all(requests, builds.default_jobs(target)))
    for number, kernel in enumerate(kernels):
        if isinstance(kernel, Exception):
            raise kernel
        kernel.export(folder / f"{number}.so")
    return kernels


def run(folder: Path) -> None:
    """Run what `prepare` left, once each, on random data. ncu watches this process."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    for path in sorted(folder.glob("*.so"), key=lambda path: int(path.stem)):
        kernel = im2win_tvm.load(path)
        shapes = kernel.problem.input_shape, kernel.problem.weight_shape
        x, w = (torch.randn(shape, generator=generator, device="cuda") for shape in shapes)
        kernel(x, kernel.prepare(w))
        torch.cuda.synchronize()
        del x, w
        torch.cuda.empty_cache()


def profiled(folder: Path) -> list[dict[str, float]]:
    """One row of METRICS for every kernel of the folder."""
    ncu = shutil.which("ncu") or shutil.which(str(toolchain.find_nvcc().bin / "ncu"))
    if ncu is None:
        raise SystemExit("no ncu: install Nsight Compute (the CUDA toolkit has it)")
    command = [
        ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
        "--kernel-name", f"regex:^{KERNEL}$", "--metrics", ",".join(METRICS.values()),
        sys.executable, __file__, "--run", str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return parse(done.stdout)


def parse(text: str) -> list[dict[str, float]]:
    """The rows of ncu's raw page: a header, a line of units, a line for each launch."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise SystemExit(f"ncu printed no table:\n{text[-2000:]}")
    header, _units, *rows = csv.reader(io.StringIO("\n".join(lines[start:])))
    missing = [metric for metric in METRICS.values() if metric not in header]
    if missing:
        raise SystemExit(f"ncu did not measure {', '.join(missing)}")
    return [
        {
            name: float(row[header.index(metric)].replace(",", ""))
            for name, metric in METRICS.items()
        }
        for row in rows
    ]


def instructions(library: Path) -> dict[str, int] | None:
    """How often the kernel's SASS has each of INSTRUCTIONS; None without cuobjdump."""
    tool = shutil.which("cuobjdump") or shutil.which(str(toolchain.find_nvcc().bin / "cuobjdump"))
    return count(toolchain.run([tool, "--dump-sass", str(library)])) if tool else None


def count(sass: str) -> dict[str, int]:
    """INSTRUCTIONS in the part of a listing that is the kernel's."""
    parts = re.split(r"Function : (\S+)", sass)
    bodies = [body for name, body in zip(parts[1::2], parts[2::2], strict=True) if name == KERNEL]
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", "".join(bodies))
    seen = Counter(names)
    return {name: seen[name] for name in INSTRUCTIONS}


def entry(name: str, kernel, row: dict[str, float], sass: dict[str, int] | None) -> dict:
    problem = kernel.problem
    return {
        "layer": name,
        "problem": str(problem),
        "layout": problem.layout,
        "schedule": kernel.metadata["schedule"],
        **row,
        "ffma_utilisation": row["ffma_per_cycle"] / row["ffma_peak_per_cycle"],
        "floor_bytes": problem.min_bytes,
        "dram_over_floor": (row["dram_read_bytes"] + row["dram_write_bytes"]) / problem.min_bytes,
        "sass": sass,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", default="paper", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--layers", help="names, with commas; default: all of the suite")
    parser.add_argument("--layouts", default="NCHW,NHWC", help="default: %(default)s")
    parser.add_argument("--schedule", choices=[n for n, s in SCHEDULES.items() if s.kind == "cuda"])
    parser.add_argument("--record", type=Path, help="write the figures as JSON")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run)
        return
    layers = chosen(options)
    with tempfile.TemporaryDirectory(prefix="im2win-") as folder:
        kernels = prepare([problem for _, problem in layers], options.schedule, Path(folder))
        rows = profiled(Path(folder))
        if len(rows) != len(kernels):
            raise SystemExit(f"ncu saw {len(rows)} kernels, {len(kernels)} ran")
        sass = [instructions(Path(folder) / f"{number}.so") for number in range(len(kernels))]
    entries = [
        entry(name, kernel, row, counts)
        for (name, _), kernel, row, counts in zip(layers, kernels, rows, sass, strict=True)
    ]
    print(f"{'layer':8} {'':4} {'us':>8} {'FFMA':>6} {'issue':>6} {'DRAM':>6} {'conflicts':>9}")
    for e in entries:
        print(
            f"{e['layer']:8} {e['layout']:4} {e['time_ns'] / 1e3:8.1f} "
            f"{e['ffma_utilisation']:6.1%} {e['issue_active_percent']:5.1f}% "
            f"{e['dram_over_floor']:5.2f}x {e['shared_bank_conflicts']:9.0f}"
        )
    if options.record:
        figures = {"metrics": METRICS, "layers": entries}
        command = ["python", *sys.argv]
        environment.write_record(options.record, "profile", command, resolve("cuda"), figures)


if __name__ == "__main__":
    main()
