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


HOPPER_SASS = """
		Function : im2win_copy_kernel
        /*0000*/                   STSM.16.M88.4 [R2], R4 ;
		Function : im2win_conv_kernel
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3+URZ], R2 ;
        /*0110*/              @!P0 SYNCS.ARRIVE.TRANS64.RED.A1T0 RZ, [R3+URZ], RZ ;
        /*0120*/             @!UP0 UTMALDG.4D [UR8], [UR4], desc[UR6] ;
        /*0130*/                   UTMALDG.4D.MULTICAST [UR8], [UR4], UR3 ;
        /*0140*/                   UBLKCP.S.G [UR4], [UR8], UR9 ;
        /*0150*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0160*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0170*/                   STSM.16.MT88.4 [R2], R4 ;
        /*0180*/               @P1 STG.E.128 desc[UR8][R2.64], R4 ;
"""
ALL = profile_kernels.METRICS | profile_kernels.OPTIONAL


def table(*rows, without=()):
    """What ncu prints for these launches, in its own order of columns."""
    names = [name for name in reversed(ALL) if name not in without]
    header = ["ID", "Kernel Name", *(ALL[name] for name in names)]
    units = ["", "", *("byte" for _ in names)]
    lines = [header, units, *([0, "im2win_conv_kernel", *(row[n] for n in names)] for row in rows)]
    text = "\n".join(",".join(f'"{value}"' for value in line) for line in lines)
    return f"==PROF== Connected to process 1\nok\n{text}\n"


def row(**changes):
    return {name: 10.0 + i for i, name in enumerate(ALL)} | changes


def test_tables_of_ncu_are_read():
    rows = [row(dram_read_bytes="1,234,567"), row(time_ns=5)]
    assert profile_kernels.parse(table(*rows)) == [row(dram_read_bytes=1234567.0), row(time_ns=5.0)]


def test_optional_metrics_may_be_missing():
    given = row(l2_percent="n/a", tensor_percent="(!) nan", dram_percent="nan", grid_size="")
    nothing = dict.fromkeys(
        ("l2_percent", "tensor_percent", "dram_percent", "grid_size", "sm_clock_hz")
    )
    assert profile_kernels.parse(table(given, without=["sm_clock_hz"])) == [row(**nothing)]


def test_metrics_that_ncu_does_not_know_are_named():
    text = (
        r"==ERROR== Failed to find metric regex:^lts__t_sectors_srcunit_tex\.(sum|avg)$"
        "\n"
        "==PROF== dram__throughput\n"
        "==ERROR== Failed to find metric regex:^dram__bytes_read.sum$\n"
    )
    assert profile_kernels.unknown(text) == {"lts__t_sectors_srcunit_tex.sum"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM\n", "ncu printed no table:\n==ERROR== ERR_NVGPUCTRPERM"),
        (table(row()).replace("dram__bytes_read.sum", "n/a"), "did not measure dram__bytes_read"),
        (table(row(), row(registers="n/a")), "did not measure launch__registers_per_thread$"),
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


def test_instructions_of_hopper_are_counted_whatever_their_sizes():
    assert profile_kernels.count(HOPPER_SASS, hopper=True) == {
        **dict.fromkeys(profile_kernels.INSTRUCTIONS, 0),
        "STG.E.128": 1,
        "HGMMA": 2,
        "HMMA": 0,
        "UTMALDG": 2,
        "UBLKCP": 1,
        "SYNCS": 2,
        "STSM": 1,
        "LDSM": 0,
    }


@pytest.mark.parametrize(
    ("arch", "accuracy", "more"),
    [
        ("sm_90a", "fp16", True),
        ("sm_90a", "tf32", True),
        ("sm_90a", "fp32", False),
        ("sm_80", "bf16", False),
    ],
)
def test_which_instructions_are_counted(monkeypatch, arch, accuracy, more):
    monkeypatch.setattr(profile_kernels.shutil, "which", lambda name: name)
    monkeypatch.setattr(profile_kernels.toolchain, "run", lambda command: HOPPER_SASS)
    metadata = {"target": {"arch": arch}, "accuracy": accuracy}
    found = profile_kernels.instructions(Path("kernel.so"), metadata)
    expected = (*profile_kernels.INSTRUCTIONS, *(profile_kernels.HOPPER if more else ()))
    assert tuple(found) == expected


@pytest.mark.parametrize(
    ("changes", "tensor", "expected"),
    [
        (dict(tensor_percent=59.9, tensor_hmma_percent=60.0), 60.0, "tensor"),
        (dict(tensor_percent=59.9), 59.9, "latency"),
        (dict(tensor_percent=None, tensor_hmma_percent=None), 1.0, "latency"),
        (dict(tensor_percent=61.0, dram_percent=85.0, l2_percent=70.0), 61.0, "DRAM"),
        (dict(tensor_percent=61.0, dram_percent=None, l2_percent=70.0), 61.0, "L2"),
        (dict(ffma_per_cycle=96.0), 5.0, "FMA"),
    ],
)
def test_the_limit_is_what_is_nearest_its_peak(changes, tensor, expected):
    measured = dict(
        ffma_per_cycle=0.0, ffma_peak_per_cycle=128.0, tensor_percent=5.0, tensor_hmma_percent=5.0,
        tensor_gmma_issue_percent=1.0, dram_percent=5.0, l2_percent=5.0,
    )  # fmt: skip
    percentages = profile_kernels.percent_of_peak(measured | changes)
    assert percentages["tensor"] == tensor
    assert profile_kernels.limit(percentages) == expected


def test_layers_are_named_or_refused():
    options = SimpleNamespace(
        suite="paper", batch=[2, 3], dtype="float16", layouts="NHWC,NCHW", layers="conv9,conv1"
    )
    found = profile_kernels.chosen(options)
    expected = [
        (name, suites.suite("paper", batch, "float16", layout)[name])
        for batch in (2, 3)
        for layout in ("NHWC", "NCHW")
        for name in ("conv9", "conv1")
    ]
    assert found == expected
    options.layers = "conv9,conv13"
    with pytest.raises(SystemExit, match="--layers=conv13: allowed are conv1, conv2"):
        profile_kernels.chosen(options)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Kernels that are never run, a profiler found on the PATH that prints the file `table`."""
    ncu = tmp_path / "ncu"
    # A metric that it does not know is an error, whatever else is asked.
    ncu.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/asked
case "$*" in *srcunit_tex*)
    echo '==ERROR== Failed to find metric regex:^lts__t_sectors_srcunit_tex.sum$'; exit 1;;
esac
cat {tmp_path}/table
"""
    )
    ncu.chmod(ncu.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    seen = []

    def prepare(given, schedule, accuracy, folder):
        seen.append((schedule, accuracy))
        described = {"schedule": {"name": "cuda_simt"}, "accuracy": "some"}
        return [SimpleNamespace(problem=p, metadata=described) for p in given]

    monkeypatch.setattr(profile_kernels, "prepare", prepare)
    monkeypatch.setattr(profile_kernels, "instructions", lambda library, metadata: None)
    monkeypatch.setattr(profile_kernels, "resolve", lambda kind: CudaTarget("sm_90"))
    monkeypatch.setattr(profile_kernels.environment, "device_slug", lambda target: "some-device")

    def run(arguments):
        monkeypatch.setattr("sys.argv", ["profile_kernels.py", *arguments.split()])
        profile_kernels.main()
        return seen.pop()

    return run


def test_the_whole_script(tmp_path, script, capsys):
    problem = suites.suite("paper", 2)["conv9"]
    floor = problem.min_bytes
    first = row(
        ffma_per_cycle=64, ffma_peak_per_cycle=128, dram_read_bytes=floor, dram_write_bytes=0,
        time_ns=problem.flops / 1e3,
    )  # fmt: skip
    (tmp_path / "table").write_text(table(first, row(l2_percent="n/a"), without=["l2_sm_sectors"]))
    record = tmp_path / "made" / "profile.json"
    arguments = f"--batch 2 --layers conv9,conv1 --layouts NCHW --record {record}"
    assert script(arguments) == (None, None)
    refused, asked = (tmp_path / "asked").read_text().splitlines()
    assert "--clock-control none" in asked and "regex:^im2win_conv_kernel$" in asked
    assert asked == refused.replace(",lts__t_sectors_srcunit_tex.sum", "")
    found = json.loads(record.read_text())
    assert [entry["layer"] for entry in found["layers"]] == ["conv9", "conv1"]
    first, second = found["layers"]
    assert (first["ffma_utilisation"], first["dram_over_floor"]) == (0.5, 1.0)
    assert first["tflops_under_ncu"] == pytest.approx(1.0)
    assert first["problem"] == str(problem)
    assert (first["batch"], first["dtype"], first["accuracy"]) == (2, "float32", "some")
    assert first["percent_of_peak"]["FMA"] == 50.0 and first["limit"] == "latency"
    assert second["percent_of_peak"]["L2"] is None and second["l2_sm_sectors"] is None
    assert second["limit"] == "FMA"
    assert found["device"] == "some-device" and found["metrics"] == ALL
    printed = capsys.readouterr().out.splitlines()
    assert " 50.0% " in printed[1] and printed[1].endswith(" latency")
    assert printed[2].endswith(" FMA")

    (tmp_path / "table").write_text(table(row()))
    with pytest.raises(SystemExit, match="ncu saw 1 kernels, 2 ran"):
        script(arguments)


def test_batches_dtypes_and_accuracy(tmp_path, script, capsys):
    (tmp_path / "table").write_text(table(row(), row()))
    assert script("--batch 1,2 --layers conv9 --layouts NHWC --accuracy tf32") == (None, "tf32")
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:3]] == [
        ["conv9", "NHWC", "1"],
        ["conv9", "NHWC", "2"],
    ]
    with pytest.raises(SystemExit):
        script("--dtype float16 --accuracy tf32")
    assert "accuracy='tf32': allowed for float16: fp16" in capsys.readouterr().err
