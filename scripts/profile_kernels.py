"""What Nsight Compute sees of each layer's kernel: pipes, DRAM and L2 traffic, instructions.

    python scripts/profile_kernels.py --layouts NCHW,NHWC --record OUT.json
    python scripts/profile_kernels.py --dtype float16 --layouts NHWC --batch 1,32 --record OUT.json

Runs on a host with a GPU, ncu and PyTorch. Every kernel is the one that `im2win_tvm.compile` gives
(or `--schedule`'s), built first and then run once under ncu, which replays it with cold caches and
leaves the clocks as they are. Only the convolution is measured, not the copy of an input into
another layout before it. `time_ns` and `tflops_under_ncu`, the operations of the definition over
that time, are therefore not those of `im2win bench`.

METRICS have to be there. OPTIONAL ones go by other names in other versions of ncu: what it does not
know or gives no number for is null in the record.

`limit` names what a kernel is nearest to the peak of, by a rule of this script: the largest of
`percent_of_peak` if that is LIMIT_PERCENT or more, else "latency" (or too few waves of blocks, or
something that is not among them; shared memory is not: its percentage does not see what wgmma
reads). The percentages are

* FMA: FFMA a cycle over the possible, of float32 on CUDA cores;
* tensor: cycles that the tensor pipe is active, of those that a multiprocessor is. The larger
  of the metrics that count cycles; only where ncu has none of them the rate of wgmma instructions,
  which is below it;
* DRAM and L2: ncu's throughput, the busiest part of the unit.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
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
from im2win_tvm.accuracy import OWN, TF32, AccuracyError, accepted
from im2win_tvm.problem import DTYPES, ConvProblem
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
OPTIONAL = {
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "tensor_hmma_percent": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "tensor_gmma_issue_percent": (
        "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active"
    ),
    "shared_percent": (
        "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed"
    ),
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_to_sm_bytes": "l1tex__m_xbar2l1tex_read_bytes.sum",
    "l2_sm_sectors": "lts__t_sectors_srcunit_tex.sum",  # of 32 bytes, read and written
    "sm_clock_hz": "smsp__cycles_elapsed.avg.per_second",
    "grid_size": "launch__grid_size",
}
LIMIT_PERCENT = 60
KERNEL = "im2win_conv_kernel"
# Loads and stores of 128 bits, and the arithmetic they serve: names as they are in full.
INSTRUCTIONS = ("FFMA", "LDS.128", "LDG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E", "STG.E.128")
# Of Hopper's tensor cores and what feeds them: whatever follows the name, sizes for instance.
HOPPER = ("HGMMA", "HMMA", "UTMALDG", "UBLKCP", "SYNCS", "STSM", "LDSM")


def chosen(options: argparse.Namespace) -> list[tuple[str, ConvProblem]]:
    found = []
    for batch in options.batch:
        for layout in options.layouts.split(","):
            suite = suites.suite(options.suite, batch, options.dtype, layout)
            names = options.layers.split(",") if options.layers else list(suite)
            unknown = [name for name in names if name not in suite]
            if unknown:
                raise SystemExit(f"--layers={','.join(unknown)}: allowed are {', '.join(suite)}")
            found += [(name, suite[name]) for name in names]
    return found


def prepare(
    problems: list[ConvProblem], schedule: str | None, accuracy: str | None, folder: Path
) -> list:
    """Export the kernel of every problem as <number>.so."""
    target = resolve("cuda")
    requests = [
        builds.Request(problem, target, schedule=schedule, accuracy=accuracy)
        for problem in problems
    ]
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
        made = {"generator": generator, "device": "cuda"}
        made["dtype"] = getattr(torch, kernel.problem.dtype)
        x, w = (torch.randn(shape, **made) for shape in shapes)
        kernel(x, kernel.prepare(w))
        torch.cuda.synchronize()
        del x, w
        torch.cuda.empty_cache()


def profiled(folder: Path) -> list[dict[str, float | None]]:
    """One row of METRICS and OPTIONAL for every kernel of the folder."""
    ncu = shutil.which("ncu") or shutil.which(str(toolchain.find_nvcc().bin / "ncu"))
    if ncu is None:
        raise SystemExit("no ncu: install Nsight Compute (the CUDA toolkit has it)")
    asked = [*METRICS.values(), *OPTIONAL.values()]
    while True:
        command = [
            ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
            "--kernel-name", f"regex:^{KERNEL}$", "--metrics", ",".join(asked),
            sys.executable, __file__, "--run", str(folder),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        # One name that ncu does not know, and it measures nothing.
        refused = unknown(done.stdout + done.stderr)
        if not refused.intersection(asked):
            break
        asked = [metric for metric in asked if metric not in refused]
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return parse(done.stdout)


def unknown(text: str) -> set[str]:
    """Those of OPTIONAL that ncu says it cannot find: by their names before the first dot."""
    lines = [line for line in text.splitlines() if "Failed to find metric" in line]
    return {
        metric
        for metric in OPTIONAL.values()
        if any(re.search(rf"\b{metric.split('.')[0]}\b", line) for line in lines)
    }


def parse(text: str) -> list[dict[str, float | None]]:
    """The rows of ncu's raw page: a header, a line of units, a line for each launch.

    What is missing or not a number is None if OPTIONAL, and an error among METRICS.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise SystemExit(f"ncu printed no table:\n{text[-2000:]}")
    header, _units, *rows = csv.reader(io.StringIO("\n".join(lines[start:])))
    launches = [dict(zip(header, row, strict=False)) for row in rows]
    found = [
        {name: number(launch.get(metric)) for name, metric in {**METRICS, **OPTIONAL}.items()}
        for launch in launches
    ]
    missing = [m for name, m in METRICS.items() if any(row[name] is None for row in found)]
    if missing:
        raise SystemExit(f"ncu did not measure {', '.join(missing)}")
    return found


def number(text: str | None) -> float | None:
    """A figure of ncu's; None for "n/a" and the like, and for what is not finite."""
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def instructions(library: Path, metadata: dict) -> dict[str, int] | None:
    """How often the kernel's SASS has each instruction of interest; None without cuobjdump."""
    tool = shutil.which("cuobjdump") or shutil.which(str(toolchain.find_nvcc().bin / "cuobjdump"))
    if tool is None:
        return None
    hopper = metadata["target"]["arch"] == "sm_90a" and metadata["accuracy"] != OWN["float32"]
    return count(toolchain.run([tool, "--dump-sass", str(library)]), hopper)


def count(sass: str, hopper: bool = False) -> dict[str, int]:
    """INSTRUCTIONS, and those of HOPPER if asked, in the part of a listing that is the kernel's."""
    parts = re.split(r"Function : (\S+)", sass)
    bodies = [body for name, body in zip(parts[1::2], parts[2::2], strict=True) if name == KERNEL]
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", "".join(bodies))
    seen = Counter(names)
    found = {name: seen[name] for name in INSTRUCTIONS}
    if hopper:
        plain = Counter(name.split(".")[0] for name in names)
        found |= {name: plain[name] for name in HOPPER}
    return found


def percent_of_peak(row: dict[str, float | None]) -> dict[str, float | None]:
    """What `limit` compares: how near its peak each unit is."""
    cycles = [row[n] for n in ("tensor_percent", "tensor_hmma_percent") if row[n] is not None]
    return {
        "FMA": 100 * row["ffma_per_cycle"] / row["ffma_peak_per_cycle"],
        "tensor": max(cycles, default=row["tensor_gmma_issue_percent"]),
        "DRAM": row["dram_percent"],
        "L2": row["l2_percent"],
    }


def limit(percentages: dict[str, float | None]) -> str:
    """The unit nearest its peak, "latency" where none is at LIMIT_PERCENT of it."""
    known = {name: value for name, value in percentages.items() if value is not None}
    nearest = max(known, key=known.get, default=None)
    return nearest if nearest and known[nearest] >= LIMIT_PERCENT else "latency"


def entry(
    name: str, kernel, row: dict[str, float | None], sass: dict[str, int] | None
) -> dict[str, object]:
    problem = kernel.problem
    percentages = percent_of_peak(row)
    return {
        "layer": name,
        "problem": str(problem),
        "batch": problem.batch,
        "dtype": problem.dtype,
        "layout": problem.layout,
        "accuracy": kernel.metadata["accuracy"],
        "schedule": kernel.metadata["schedule"],
        **row,
        "ffma_utilisation": row["ffma_per_cycle"] / row["ffma_peak_per_cycle"],
        "tflops_under_ncu": problem.flops / row["time_ns"] / 1e3,
        "floor_bytes": problem.min_bytes,
        "dram_over_floor": (row["dram_read_bytes"] + row["dram_write_bytes"]) / problem.min_bytes,
        "percent_of_peak": percentages,
        "limit": limit(percentages),
        "sass": sass,
    }


def show(entries: list[dict]) -> None:
    """The table, one line a kernel; times and TFLOPS are those under ncu."""

    def percent(value: float | None) -> str:
        return f"{'-':>6}" if value is None else f"{value:5.1f}%"

    width = max(len(e["layer"]) for e in entries)
    units = [f"{name:>6}" for name in (*entries[0]["percent_of_peak"], "shared", "issue")]
    print(
        f"{'layer':{width}} {'':4} {'batch':>5} {'us':>8} {'TFLOPS':>6} {' '.join(units)} "
        f"{'bytes':>6} {'conflicts':>9} limit"
    )
    for e in entries:
        values = *e["percent_of_peak"].values(), e["shared_percent"], e["issue_active_percent"]
        print(
            f"{e['layer']:{width}} {e['layout']:4} {e['batch']:5} {e['time_ns'] / 1e3:8.1f} "
            f"{e['tflops_under_ncu']:6.1f} {' '.join(map(percent, values))} "
            f"{e['dram_over_floor']:5.2f}x {e['shared_bank_conflicts']:9.0f} {e['limit']}"
        )
    print("us, TFLOPS: under ncu, cold caches; bytes: of DRAM, over the floor")


def batches(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", default="paper", help="default: %(default)s")
    parser.add_argument(
        "--batch", type=batches, default="128", help="one or more, with commas; default: 128"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--accuracy", choices=[TF32], help="of float32; default: its own, fp32")
    parser.add_argument("--layers", help="names, with commas; default: all of the suite")
    parser.add_argument("--layouts", default="NCHW,NHWC", help="default: %(default)s")
    parser.add_argument("--schedule", choices=[n for n, s in SCHEDULES.items() if s.kind == "cuda"])
    parser.add_argument("--record", type=Path, help="write the figures as JSON")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run)
        return
    try:
        accepted(options.dtype, options.accuracy)
    except AccuracyError as error:
        parser.error(str(error))
    layers = chosen(options)
    with tempfile.TemporaryDirectory(prefix="im2win-") as folder:
        problems = [problem for _, problem in layers]
        kernels = prepare(problems, options.schedule, options.accuracy, Path(folder))
        rows = profiled(Path(folder))
        if len(rows) != len(kernels):
            raise SystemExit(f"ncu saw {len(rows)} kernels, {len(kernels)} ran")
        sass = [
            instructions(Path(folder) / f"{number}.so", kernel.metadata)
            for number, kernel in enumerate(kernels)
        ]
    entries = [
        entry(name, kernel, row, counts)
        for (name, _), kernel, row, counts in zip(layers, kernels, rows, sass, strict=True)
    ]
    show(entries)
    if options.record:
        figures = {"metrics": {**METRICS, **OPTIONAL}, "layers": entries}
        command = ["python", *sys.argv]
        environment.write_record(options.record, "profile", command, resolve("cuda"), figures)


if __name__ == "__main__":
    main()
