#!/usr/bin/env python3
"""Each of the paper's optimisations switched off alone, on this GPU.

    python scripts/ablation.py [--suite paper] [--batch N] [--json FILE] [--png FILE]

Every variant is checked against the reference in the same run. Exits with 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from im2win_tvm import suites  # noqa: E402
from im2win_tvm.bench import ablation, published, report  # noqa: E402
from im2win_tvm.bench.run import BenchError, failures  # noqa: E402
from im2win_tvm.target import TargetError, resolve  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--suite", default="paper", choices=sorted(suites.SUITES))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layout")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    asked = parser.parse_args()
    problems = suites.suite(asked.suite, asked.batch, asked.dtype, asked.layout)
    try:
        record = ablation.ablate(problems, resolve("cuda"))
    except (BenchError, TargetError) as error:
        sys.exit(f"error: {error}")
    means = published.kept_means() if asked.suite == "paper" else None
    if asked.json is not None:
        asked.json.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    if asked.png is not None:
        ablation.draw(record, asked.png, means)
    print("\n".join(report.aligned(ablation.table(record, means))))
    wrong = failures(record)
    if wrong:
        sys.exit("\n".join(["", "wrong:", *wrong]))


if __name__ == "__main__":
    main()
