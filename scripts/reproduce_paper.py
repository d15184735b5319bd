#!/usr/bin/env python3
"""The paper's experiments on this GPU: speed, memory and ablation, with the published figures.

    python scripts/reproduce_paper.py [--out FOLDER] [--batch N] [--layers conv9,conv10] [--quick]

Measures the paper's layers in float32 and NCHW against cuDNN (algorithms and engines), im2col with
cuBLAS, a direct convolution, TVM's conv2d (default and tuned) and PyTorch, then each optimisation
switched off alone. What is not installed or not tuned is a gap. Writes reproduction.json and .csv,
rates.png, memory.png, ablation.png and roofline.png. Needs a CUDA device, PyTorch and nvcc. Exits
with 1 if any output is wrong.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from im2win_tvm import environment, suites  # noqa: E402
from im2win_tvm.bench import (  # noqa: E402
    ablation,
    published,
    report,
    reproduction,
    roofline,
    rows,
    timing,
)
from im2win_tvm.bench.baselines import COMPETITORS, implementations  # noqa: E402
from im2win_tvm.bench.run import BenchError, failures, run  # noqa: E402
from im2win_tvm.target import Target, TargetError, resolve  # noqa: E402

#: Fewer calls: figures within a few percent, for a first look.
QUICK = timing.Limits(warmup=0.05, seconds=0.1, least=5, most=20)


def chosen_layers(names: str | None, batch: int) -> dict:
    """The paper's layers by name, all of them or those of a comma-separated list."""
    every = suites.suite("paper", batch)
    if names is None:
        return every
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in every:
            sys.exit(f"layers={name!r}: allowed: {', '.join(every)}")
    return {name: every[name] for name in wanted}


def measure(problems: dict, target: Target, limits: timing.Limits | None) -> dict:
    """Everything as one record; progress on stderr."""

    def step(what: str) -> None:
        print(f"  {what}", file=sys.stderr, flush=True)

    print("speed and memory", file=sys.stderr, flush=True)
    bench = run(problems, target, implementations(target, list(COMPETITORS)), limits, step)
    print("ablation", file=sys.stderr, flush=True)
    without = ablation.ablate(problems, target, limits, step)
    return {
        "format": bench["format"],
        "kind": "reproduction",
        "command": shlex.join(["python", *sys.argv]),
        "bench": bench,
        "memory": reproduction.memory(bench),
        "ablation": without,
        "published": {
            "source": published.SOURCE,
            "layers": {name: row._asdict() for name, row in published.PAPER.items()},
            "kept": published.kept_means(),
        },
    }


def write(record: dict, folder: Path) -> None:
    """The record and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, allow_nan=False)
    (folder / "reproduction.json").write_text(text + "\n")
    bench = record["bench"]
    reproduction.draw_rates(bench, folder / "rates.png")
    reproduction.draw_memory(bench, folder / "memory.png")
    ablation.draw(record["ablation"], folder / "ablation.png", published.kept_means())
    if bench.get("ceilings"):
        roofline.draw(bench, folder / "roofline.png")
    (folder / "reproduction.csv").write_text(rows.text(bench))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="default: docs/results/<device>/paper")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--layers", metavar="NAMES", help="comma-separated; default: all twelve")
    parser.add_argument("--quick", action="store_true", help="fewer timed calls")
    asked = parser.parse_args()
    problems = chosen_layers(asked.layers, asked.batch)
    try:
        target = resolve("cuda")
        record = measure(problems, target, QUICK if asked.quick else None)
    except (BenchError, TargetError) as error:
        sys.exit(f"error: {error}")
    folder = asked.out or ROOT / "docs" / "results" / environment.device_slug(target) / "paper"
    write(record, folder)
    print(report.text(record["bench"]))
    print("\nours (the paper's):")
    print("\n".join(report.aligned(reproduction.summary(record["bench"]))))
    print("\nspeed kept with one optimisation off:")
    print("\n".join(report.aligned(ablation.table(record["ablation"], published.kept_means()))))
    print(f"\nwritten to {folder}")
    wrong = failures(record["bench"]) + failures(record["ablation"])
    if wrong:
        sys.exit("\n".join(["", "wrong:", *wrong]))


if __name__ == "__main__":
    main()
