"""The script around Nsight Compute, with a profiler that prints what it is told to."""

import importlib.util
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from im2win_tvm import suites
from im2win_tvm.target import CudaTarget

SCRIPT = Path(__file__).parents[1] / "scripts" / "profile_kernels.py"
_spec = importlib.util.spec_from_file_location("profile_kernels", SCRIPT)
profile_kernels = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(profile_kernels)

SASS = """
		Function : im2win_prepare_kernel
        /*0000*/                   FFMA R1, R2, R3, R4 ;
		Function : im2win_conv_kernel
        /*0de0*/                   LDS.128 R76, [R92] ;           /* 0x000000005c4c7984 */
        /*0df0*/              @!P0 LDGSTS.E.BYPASS.128 [R91], desc[UR8][R76.64] ;
        /*0e00*/             @!UP1 LDGSTS.E [R93+0x2000], desc[UR8][R78.64] ;
        /*0e10*/                   FFMA R1, R2.reuse, R3, R4 ;
        /*0e20*/                   FFMA R1, R2, R3, R4 ;
        /*0e30*/               @P2 STG.E.128 desc[UR8][R2.64], R4 ;
        /*10e30*/                  FFMA R9, R2, R3, R4 ;
"""


def table(*rows):
    """What ncu prints for these launches, in its own order of columns."""
    names = [*reversed(profile_kernels.METRICS)]
    header = ["ID", "Kernel Name", *(profile_kernels.METRICS[name] for name in names)]
    units = ["", "", *("byte" for _ in names)]
    lines = [header, units, *([0, "im2win_conv_kernel", *(row[n] for n in names)] for row in rows)]
    text = "\n".join(",".join(f'"{value}"' for value in line) for line in lines)
    return f"==PROF== Connected to process 1\nok\n{text}\n"


def row(**changes):
    return {name: 10.0 + i for i, name in enumerate(profile_kernels.METRICS)} | changes


def test_tables_of_ncu_are_read():
    rows = [row(dram_read_bytes="1,234,567"), row(time_ns=5)]
    assert profile_kernels.parse(table(*rows)) == [row(dram_read_bytes=1234567.0), row(time_ns=5.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM\n", "ncu printed no table:\n==ERROR== ERR_NVGPUCTRPERM"),
        (table(row()).replace("dram__bytes_read.sum", "n/a"), "did not measure dram__bytes_read"),
    ],
)
def test_what_is_no_table_is_an_error(text, message):
    with pytest.raises(SystemExit, match=message):
        profile_kernels.parse(text)


def test_instructions_of_the_kernel_alone_are_counted():
    assert profile_kernels.count(SASS) == {
        "FFMA": 3,
        "LDS.128": 1,
        "LDG.E.128": 0,
        "LDGSTS.E.BYPASS.128": 1,
        "LDGSTS.E": 1,
        "STG.E.128": 1,
    }


def test_layers_are_named_or_refused():
    options = SimpleNamespace(suite="paper", batch=2, layouts="NHWC,NCHW", layers="conv9,conv1")
    found = profile_kernels.chosen(options)
    expected = [
        (name, suites.suite("paper", 2, layout=layout)[name])
        for layout in ("NHWC", "NCHW")
        for name in ("conv9", "conv1")
    ]
    assert found == expected
    options.layers = "conv9,conv13"
    with pytest.raises(SystemExit, match="--layers=conv13: allowed are conv1, conv2"):
        profile_kernels.chosen(options)


def test_the_whole_script(tmp_path, monkeypatch, capsys):
    """Two layers, kernels that are never run, and a profiler found on the PATH."""
    problems = suites.suite("paper", 2)
    floor = problems["conv9"].min_bytes
    rows = [
        row(ffma_per_cycle=64, ffma_peak_per_cycle=128, dram_read_bytes=floor, dram_write_bytes=0),
        row(),
    ]
    (tmp_path / "table").write_text(table(*rows))
    ncu = tmp_path / "ncu"
    ncu.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/table\n')
    ncu.chmod(ncu.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def prepare(given, schedule, folder):
        assert schedule is None
        described = {"schedule": {"name": "cuda_simt"}}
        return [SimpleNamespace(problem=p, metadata=described) for p in given]

    monkeypatch.setattr(profile_kernels, "prepare", prepare)
    monkeypatch.setattr(profile_kernels, "instructions", lambda library: None)
    monkeypatch.setattr(profile_kernels, "resolve", lambda kind: CudaTarget("sm_90"))
    monkeypatch.setattr(profile_kernels.environment, "device_slug", lambda target: "some-device")
    arguments = "--batch 2 --layers conv9,conv1 --layouts NCHW --record"
    record = tmp_path / "made" / "profile.json"
    monkeypatch.setattr("sys.argv", ["profile_kernels.py", *arguments.split(), str(record)])
    profile_kernels.main()
    asked = (tmp_path / "asked").read_text()
    assert "--clock-control none" in asked and "regex:^im2win_conv_kernel$" in asked
    found = json.loads(record.read_text())
    assert [entry["layer"] for entry in found["layers"]] == ["conv9", "conv1"]
    first = found["layers"][0]
    assert (first["ffma_utilisation"], first["dram_over_floor"]) == (0.5, 1.0)
    assert first["problem"] == str(problems["conv9"])
    assert found["device"] == "some-device" and found["metrics"] == profile_kernels.METRICS
    assert "50.0%" in capsys.readouterr().out

    (tmp_path / "table").write_text(table(row()))
    with pytest.raises(SystemExit, match="ncu saw 1 kernels, 2 ran"):
        profile_kernels.main()
