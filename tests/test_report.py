"""What is printed and drawn of a record, and the units in it."""

import copy

import pytest

from im2win_tvm.bench import chart, report, units
from im2win_tvm.bench.run import failures


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (units.microseconds, 1.234, "1.23"),
        (units.microseconds, 123.44, "123.4"),
        (units.microseconds, 12345.6, "12346"),
        (units.size, 0, "0"),
        (units.size, 1023, "1023 B"),
        (units.size, 1536, "1.5 KiB"),
        (units.size, 3 << 20, "3.0 MiB"),
        (units.size, 5 << 30, "5.0 GiB"),
        (units.ratio, 1.005, "1.00x"),
    ],
)
def test_units(write, value, expected):
    assert write(value) == expected


def test_rates():
    assert units.throughput(2e9, 1000.0, "TFLOPS") == pytest.approx(2.0)
    assert units.throughput(2e9, 1000.0, "GFLOPS") == pytest.approx(2000.0)
    assert units.bandwidth(3e6, 1000.0) == pytest.approx(3.0)
    assert units.geomean([1.0, 4.0]) == pytest.approx(2.0)
    assert units.geomean([]) is None


def _entry(name, family, us, workspace, status="ok", reason=None):
    entry = {"name": name, "family": family, "status": status, "reason": reason}
    if status != "absent":
        entry["workspace_bytes"] = workspace
    if status in ("ok", "outside"):
        entry["times"] = {"warm": {"median_us": us, "iqr_us": 1.0, "n": 9}}
    return entry


def _layer(name, *entries):
    return {
        "name": name,
        "problem": "mb1ic3ih8oc4kh3",
        "dtype": "float32",
        "layout": "NCHW",
        "batch": 1,
        "flops": 2_000_000,
        "min_bytes": 100_000,
        "implementations": list(entries),
    }


@pytest.fixture
def record():
    gap = "PyTorch is not installed"
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "target": {"kind": "llvm"},
        "environment": {
            "git_commit": "0123456789abcdef",
            "versions": {"python": "3.12.1", "apache-tvm": "0.27", "torch": "2.13"},
            "cpu": {"model": "Processor", "llvm": "znver5", "threads": 2},
        },
        "protocol": {
            "clock": "wall time",
            "cache": "warm",
            "order": "turns",
            "limits": {"warmup": 0.2},
        },
        "layers": [
            _layer(
                "one",
                _entry("fast", "im2win", 100.0, 2048),
                _entry("slow", "im2win", 150.0, 0),
                _entry("tvm", "tvm", 400.0, None),
                _entry("torch nchw", "torch", 0, 0, "absent", gap),
            ),
            _layer(
                "two",
                _entry("fast", "im2win", 200.0, 4096),
                _entry("slow", "im2win", 0, 0, "failed", "3 of 8 outputs are wrong"),
                _entry("tvm", "tvm", 100.0, None, "outside", "relative error 0.0001"),
                _entry("torch nchw", "torch", 0, 0, "absent", gap),
            ),
        ],
    }


def test_report(record):
    assert report.text(record).splitlines() == [
        "Processor (znver5), 2 threads; Python 3.12.1, TVM 0.27, PyTorch 2.13",
        "llvm, float32 NCHW batch 1; 2026-01-02T03:04:05+00:00, commit 0123456789ab",
        "wall time; warm; warm-up 200 ms each, turns, medians",
        "",
        "layer  fast us  slow us  tvm us  torch nchw us  best im2win  GFLOPS  GB/s  vs tvm"
        "  vs torch  im2win workspace  tvm workspace  torch workspace",
        "one      100.0    150.0   400.0              -         fast    20.0   1.0   4.00x"
        "         -           2.0 KiB              ?                -",
        "two      200.0   FAILED  ~100.0              -         fast    10.0   0.5  ~0.50x"
        "         -           4.0 KiB              ?                -",
        "",
        "vs tvm: geomean 1.41x (0.50x to 4.00x), faster on 1 of 2",
        "  not faster on two 0.50x",
        "- torch nchw (all layers): PyTorch is not installed",
        "FAILED slow (two): 3 of 8 outputs are wrong",
        "~ outside the accuracy class: tvm (two): relative error 0.0001",
        "workspace '?': not told by the implementation",
    ]


def test_markdown(record):
    assert report.markdown(record).splitlines() == [
        "| layer | im2win us | GFLOPS | TVM us | vs TVM | im2win workspace |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| one | 100.0 | 20.0 | 400.0 | 4.00x | 2.0 KiB |",
        "| two | 200.0 | 10.0 | ~100.0 | ~0.50x | 4.0 KiB |",
        "| geomean |  |  |  | **1.41x** |  |",
    ]


def test_cold_and_hot_columns(record):
    for layer in record["layers"]:
        for entry in layer["implementations"]:
            if "times" in entry:
                cold = entry["times"].pop("warm")
                entry["times"] = {"cold": cold, "hot": cold | {"median_us": 50.0}}
    head, first, _ = report.table(record)
    assert first[head.index("fast us")] == "100.0"
    assert first[head.index("im2win hot us")] == "50.00"


def test_failures_are_listed(record):
    assert failures(record) == ["two: slow: 3 of 8 outputs are wrong"]


def test_chart(record, tmp_path):
    path = tmp_path / "chart.png"
    chart.draw(record, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_record_without_a_best_is_printed(record):
    emptied = copy.deepcopy(record)
    for layer in emptied["layers"]:
        for entry in layer["implementations"]:
            entry.pop("times", None)
            entry |= {"status": "failed", "reason": "wrong"}
    assert "FAILED fast, slow, tvm, torch nchw (all layers): wrong" in report.text(emptied)
    assert report.markdown(emptied).splitlines()[-1] == "| geomean |  |  |  |"
