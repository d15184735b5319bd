"""The tables of whole models from records, of which some have failures."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "models_table.py"
_spec = importlib.util.spec_from_file_location("models_table", SCRIPT)
models_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models_table)

FAILED = {"status": "failed", "reason": "RuntimeError: out of memory"}


def ok(us, mib):
    times = {"steady": {"median_us": us}}
    return {"status": "ok", "times": times, "peak_bytes": mib * 2**20 if mib else None}


@pytest.fixture
def tables(tmp_path, monkeypatch, capsys):
    def rows(**records):
        """Cells of the tables of times and of peaks."""
        for name, entries in records.items():
            entries = [{"name": each} | entry for each, entry in entries.items()]
            path = tmp_path / f"{name.replace('_', '-')}.json"
            path.write_text(json.dumps({"model": {"implementations": entries}}))
        monkeypatch.setattr(sys, "argv", ["models_table.py", str(tmp_path)])
        models_table.main()
        found = [line for line in capsys.readouterr().out.splitlines() if "vgg16" in line]
        return [[cell.strip() for cell in line.strip("|").split("|")][3:] for line in found]

    return rows


@pytest.mark.parametrize(
    ("alone", "peak"),
    [
        ({"im2win": ok(90, 40)}, "40"),
        ({"im2win": ok(90, None)}, "60"),
        ({"im2win": FAILED}, "60"),
        ({"tvm": ok(90, 40)}, "60"),
    ],
)
def test_our_peak_is_that_of_the_record_alone_if_it_has_one(alone, peak, tables):
    both = {"im2win": ok(100, 60), "tvm": ok(200, 50)}
    times, peaks = tables(vgg16_fp16_32=both, vgg16_fp16_32_alone=alone)
    assert times[:4] == ["100", "-", "200", "2.00x"]
    assert peaks == [peak, "50", "-", "-"]


def test_failures_are_gaps(tables):
    entries = {"im2win": FAILED, "tvm": ok(200, 50), "torch nhwc": FAILED}
    times, peaks = tables(vgg16_fp16_32=entries, vgg16_fp16_32_alone={"im2win": ok(90, 40)})
    assert times == ["-", "-", "200", "-", "-", "-", "-", "-", "-", "-"]
    assert peaks == ["40", "50", "-", "-"]
    assert tables(vgg16_fp16_32={})[1] == ["40", "-", "-", "-"]
