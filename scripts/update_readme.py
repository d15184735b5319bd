#!/usr/bin/env python3
"""Write a page's tables of results from records.

    python scripts/update_readme.py [--into PAGE.md] RECORD...

They go between the two marks in PAGE.md, the README unless told.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from im2win_tvm.accuracy import OWN  # noqa: E402
from im2win_tvm.bench import report  # noqa: E402
from im2win_tvm.bench.rivals import wanted  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def section(path: Path, page: Path) -> str:
    """One record's caption and table, on a page."""
    record = json.loads(path.read_text())
    layer = record["layers"][0]
    link = os.path.relpath(path.resolve(), page.resolve().parent)
    place = path.resolve().relative_to(ROOT).as_posix()
    # Where the file was when it was written does not matter.
    command = "im2win_tvm.bench.run"  # by a program; else by the command that it names
    if record["command"] is not None:
        command = re.sub(r"(?<=--json )\S+", place, record["command"])
    state = next(iter(next(e for e in layer["implementations"] if e.get("times"))["times"]))
    kind = "" if wanted(layer) == OWN[layer["dtype"]] else f" in {wanted(layer)}"
    batches = {each["batch"] for each in record["layers"]}
    least, most = min(batches), max(batches)
    batch = f"batch {least}" if least == most else f"batches of {least} to {most}"
    caption = (
        f"{report.device_line(record)}. {layer['dtype']}{kind} {layer['layout']}, {batch}, "
        f"median of {state}-cache calls, measured by `{command}` on {record['date'][:10]} "
        f"([record]({link}))."
    )
    return f"{caption}\n\n{report.markdown(record)}"


def main() -> None:
    """Replace what stands between the two marks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--into", type=Path, default=ROOT / "README.md", help="default: README.md")
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD")
    options = parser.parse_args()
    page = options.into
    text = page.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{page}: {BEGIN} or {END} is missing")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    tables = "\n\n".join(section(path, page) for path in options.records)
    page.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


if __name__ == "__main__":
    main()
