#!/usr/bin/env python3
"""Write the README's table of results from records: python scripts/update_readme.py RECORD..."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from im2win_tvm.accuracy import OWN  # noqa: E402
from im2win_tvm.bench import report  # noqa: E402
from im2win_tvm.bench.rivals import wanted  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def section(path: Path) -> str:
    """One record's caption and table."""
    record = json.loads(path.read_text())
    layer = record["layers"][0]
    link = path.resolve().relative_to(ROOT).as_posix()
    # Where the file was when it was written does not matter.
    command = re.sub(r"(?<=--json )\S+", link, record["command"])
    state = next(iter(next(e for e in layer["implementations"] if e.get("times"))["times"]))
    kind = "" if wanted(layer) == OWN[layer["dtype"]] else f" in {wanted(layer)}"
    caption = (
        f"{report.device_line(record)}. {layer['dtype']}{kind} {layer['layout']}, batch "
        f"{layer['batch']}, median of {state}-cache calls, measured by `{command}` "
        f"on {record['date'][:10]} ([record]({link}))."
    )
    return f"{caption}\n\n{report.markdown(record)}"


def main(paths: list[str]) -> None:
    """Replace what stands between the two marks."""
    if not paths:
        sys.exit(__doc__)
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{readme}: {BEGIN} or {END} is missing")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    tables = "\n\n".join(section(Path(path)) for path in paths)
    readme.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
