"""The command line: exit codes, repro lines, what goes to stdout and what to stderr."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from im2win_tvm import Epilogue, ScheduleError, load
from im2win_tvm.builds import Request, build_all
from im2win_tvm.cli import app
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.target import resolve
from im2win_tvm.toolchain import ToolchainError, find_nvcc

SMALL = "mb1ic3ih8oc4kh3ph1"


@pytest.fixture
def im2win():
    """Runs the command in this process."""

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def broken(monkeypatch):
    """The CPU schedule, with a ReLU that nobody asked for."""
    schedule = SCHEDULES["cpu_blocked"]
    right = type(schedule).schedule

    def wrong(self, problem, config, target, epilogue):
        return right(self, problem, config, target, Epilogue(activation="relu"))

    monkeypatch.setattr(type(schedule), "schedule", wrong)


@pytest.fixture
def nvcc():
    try:
        return find_nvcc()
    except ToolchainError as error:
        pytest.skip(str(error))


def _lines(result):
    return result.stdout.splitlines()


def test_verify_passes(im2win):
    result = im2win("verify", SMALL, "--target", "llvm", "--fill", "both")
    assert result.exit_code == 0, result.output
    lines = _lines(result)
    assert lines[0] == (
        "im2win verify --target llvm --schedule cpu_blocked --fill normal "
        '--dtype float32 --layout NCHW "mb1ic3ih8oc4kh3ph1"'
    )
    assert lines[1].startswith("PASS  largest error ")
    assert lines[2].replace("integer", "normal") == lines[0]
    assert lines[3] == "PASS  largest error 0, relative over all 0"
    assert lines[4:] == ["2 passed, 0 failed"]


@pytest.mark.parametrize("fill", ["integer", "normal"])
def test_verify_fails(im2win, broken, fill, tmp_path):
    results = tmp_path / "new" / "results.json"
    result = im2win("verify", SMALL, "--target", "llvm", "--fill", fill, "--json", results)
    assert result.exit_code == 1
    assert re.match(r"FAIL  \d+ of 256 outputs are wrong, worst at ", _lines(result)[1])
    assert _lines(result)[-1] == "0 passed, 1 failed"
    written = json.loads(results.read_text())
    assert written["counts"] == {"PASS": 0, "FAIL": 1, "SKIP": 0}
    assert written["cases"][0]["repro"] == _lines(result)[0]


def test_the_repro_line_repeats_the_case(im2win, broken):
    first = im2win("verify", SMALL, "--target", "llvm", "--dtype", "float16", "--seed", "3")
    repro = _lines(first)[0]
    assert repro.startswith("im2win verify ")
    second = im2win(*shlex.split(repro)[1:])
    assert second.stdout == first.stdout


def test_the_repro_line_comes_before_the_case(im2win, monkeypatch):
    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("im2win_tvm.verification.verify", crash)
    result = im2win("verify", SMALL, "--target", "llvm")
    assert _lines(result)[0].startswith("im2win verify --target llvm")
    assert result.exit_code != 0


def test_verify_lists(im2win, tmp_path):
    batch = tmp_path / "batch"
    batch.write_text(f'--dt=f32,f16 --stag=axb\n{SMALL}n"named" # a comment\niw9ic4oc4kw3\n')
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"n": 4, "c": 3, "h": 8, "w": 9, "k": 4, "r": 3, "s": 2}\n')
    result = im2win("verify", "--batch", batch, "--batch", rows, "--mb", 2, "--target", "llvm")
    assert result.exit_code == 0, result.output
    assert _lines(result)[-1] == "3 passed, 0 failed, 2 skipped"
    assert '--dtype float16 --layout NHWC "mb2ic3ih8oc4kh3ph1"' in result.stdout
    assert "takes two spatial axes" in result.stdout


def test_nothing_run_is_no_success(im2win):
    result = im2win("verify", "mb1ic4iw9oc4kw3", "--target", "llvm")
    assert result.exit_code == 1
    assert _lines(result)[-1] == "0 passed, 0 failed, 1 skipped"


def test_verify_does_not_start_what_does_not_fit(im2win, monkeypatch):
    monkeypatch.setattr("im2win_tvm.verification.free_bytes", lambda: 1 << 20)
    result = im2win("verify", SMALL, "--target", "llvm")
    assert result.exit_code == 1
    assert "SKIP  needs 7" in result.stdout
    assert "1.0 MiB are free; see --mb" in result.stdout


def test_images_are_compared_a_few_at_a_time(im2win, monkeypatch):
    monkeypatch.setattr("im2win_tvm.verification._CHUNK_BYTES", 3 * 256 * 8)
    result = im2win("verify", SMALL, "--mb", 7, "--target", "llvm", "--fill", "both")
    assert result.exit_code == 0, result.output


def test_emulated_cuda_schedules(im2win):
    arguments = ("verify", SMALL, "--target", "cuda", "--arch", "sm_90", "--emulate")
    result = im2win(*arguments, "--all-schedules")
    assert result.exit_code == 0, result.output
    assert "--arch sm_90 --emulate --schedule cuda_simt --fill integer" in result.stdout
    assert "--schedule cuda_simt_explicit" in result.stdout
    large = im2win("verify", "paper:conv4", "--mb", 1, *arguments[2:])
    assert large.exit_code == 1
    assert "SKIP  4.8 GFLOP: emulation takes up to 4; see --mb" in _lines(large)


def test_export_and_inspect(im2win, tmp_path):
    path = tmp_path / "conv.so"
    arguments = ("export", SMALL, "-o", path, "--target", "llvm", "--bias", "--activation", "relu")
    result = im2win(*arguments)
    assert result.exit_code == 0, result.output
    assert _lines(result)[0] == f"{path}: {path.stat().st_size} bytes"
    assert "epilogue         bias + relu" in _lines(result)
    inspected = im2win("inspect", path)
    assert inspected.exit_code == 0
    assert _lines(inspected)[0] == "problem          mb1ic3ih8oc4kh3ph1 float32 NCHW"
    metadata = json.loads(im2win("inspect", path, "--json").stdout)
    assert metadata == load(path).metadata
    assert metadata == json.loads(im2win(*arguments, "--json").stdout)


def test_inspect_cpu(im2win):
    result = im2win("inspect", "paper:conv9", "--mb", 1, "--target", "llvm", "--tir", "--asm")
    assert result.exit_code == 0, result.output
    assert "schedule         cpu_blocked" in _lines(result)
    assert "not cuda_simt" not in result.stdout
    assert "im2win_conv" in result.stdout.split("--- tir")[1].split("--- asm")[0]
    assert ".text" in result.stdout.split("--- asm")[1]


def test_inspect_cuda(im2win, nvcc):
    arguments = ("inspect", SMALL, "--target", "cuda", "--arch", "sm_90", "--json")
    shown = json.loads(im2win(*arguments, "--cuda", "--ptx").stdout)
    assert shown["rejected"] == {
        "cpu_blocked": "target=cuda: cpu_blocked is for llvm",
        "cuda_depthwise": "groups=1: cuda_depthwise takes two or more (cuda_simt takes any)",
        "cuda_depthwise_mma": "dtype=float32: cuda_depthwise_mma takes float16 and bfloat16",
        "cuda_window_fp32": "arch=sm_90: cuda_window_fp32 takes sm_90a",
        "cuda_thin": "dtype=float32: cuda_thin takes float16 and bfloat16",
        "cuda_thin_tf32": "arch=sm_90: cuda_thin_tf32 takes sm_90a",
        "cuda_thin_fp32": "arch=sm_90: cuda_thin_fp32 takes sm_90a",
        "cuda_window": "dtype=float32: cuda_window takes float16 and bfloat16",
        "cuda_window_tf32": "arch=sm_90: cuda_window_tf32 takes sm_90a",
    }
    assert "__global__" in shown["cuda"]
    assert ".target sm_90" in shown["ptx"]
    kernels = {entry["kernel"]: entry for entry in shown["resources"]}
    assert kernels["im2win_conv_kernel"]["registers"] > 0
    assert kernels["im2win_conv_kernel"]["spill_store_bytes"] == 0


def test_env(im2win):
    found = json.loads(im2win("env", "--json").stdout)
    assert found["versions"]["apache-tvm"]
    assert found["cpu"]["threads"] >= 1
    assert ("missing" in found["cuda"]["nvcc"]) != ("version" in found["cuda"]["nvcc"])
    text = im2win("env").stdout
    assert re.search(r"^processor +\S", text, re.MULTILINE)
    assert re.search(r"^torch +\S", text, re.MULTILINE)


def test_bench(im2win, tmp_path):
    record, chart = tmp_path / "a" / "record.json", tmp_path / "chart.png"
    result = im2win(
        "bench", SMALL, "--target", "llvm", "--against", "none", "--json", record, "--png", chart
    )
    assert result.exit_code == 0, result.output
    assert "best im2win" in result.stdout
    assert json.loads(record.read_text())["layers"][0]["name"] == SMALL
    assert chart.stat().st_size > 0


def test_bench_against_a_list(im2win, tmp_path):
    table = tmp_path / "table.csv"
    result = im2win(
        "bench", SMALL, "--target", "llvm", "--against", "direct, cublas,cudnn", "--csv", table
    )
    assert result.exit_code == 0, result.output
    assert "- direct (" in result.stdout
    rows = table.read_text().splitlines()
    assert [row.split(",")[5] for row in rows[1:4]] == ["cpu_blocked", "direct", "cublas"]
    assert len(rows) == 1 + 3 + 16


def test_bench_against_every_family(im2win, tmp_path):
    table = tmp_path / "table.csv"
    families = "cudnn,cudnn-frontend,cublas,direct,tvm,tvm-tuned,torch"
    result = im2win("bench", SMALL, "--target", "llvm", "--against", families, "--csv", table)
    assert result.exit_code == 0, result.output
    assert "cudnn-frontend (all 4)" in result.stdout
    assert "- tvm tuned (" in result.stdout
    rows = [row.split(",") for row in table.read_text().splitlines()[1:]]
    assert list(dict.fromkeys(row[6] for row in rows[1:])) == families.split(",")


def test_bench_has_no_roofline_of_a_cpu(im2win, tmp_path):
    path = tmp_path / "roofline.png"
    result = im2win("bench", SMALL, "--target", "llvm", "--roofline", path)
    assert result.exit_code == 2
    assert "ceilings are measured on cuda only" in result.stderr
    assert not path.exists()


def test_bench_of_a_wrong_kernel(im2win, broken):
    result = im2win("bench", SMALL, "--target", "llvm", "--against", "none")
    assert result.exit_code == 1
    assert "FAILED cpu_blocked" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "ic3"), "oc is missing"),
        (("verify", "--batch", "/absent"), "/absent"),
        (("verify", SMALL, "--target", "vax"), "target='vax'"),
        (("verify", SMALL, "--target", "llvm", "--schedule", "x"), "allowed for llvm: cpu_blocked"),
        (("verify", SMALL, "--target", "llvm", "--emulate"), "--emulate"),
        (("verify", SMALL, "--dtype", "int4"), "dtype='int4'"),
        (("verify", "--suite", "alexnet"), "suite='alexnet'"),
        (("inspect", "paper:conv13"), "layer='conv13'"),
        (("inspect", "absent.so"), "absent.so: cannot be read"),
        (("inspect", SMALL, "--config", "{}"), "with --schedule only"),
        (("inspect", SMALL, "--schedule", "cpu_blocked", "--config", "{"), "not JSON"),
        (("inspect", SMALL, "--schedule", "cpu_blocked", "--config", "[]"), "a JSON object"),
        (("export", SMALL, "--target", "llvm", "-o", "/absent/x.so"), "/absent"),
        (("bench", SMALL, "--target", "cuda", "--arch", "sm_20"), "arch='sm_20'"),
    ],
)
def test_refusals_are_one_line(im2win, arguments, message):
    result = im2win(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("im2win: error: ")
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify",),
        ("verify", SMALL, "--fill", "zeros"),
        ("verify", SMALL, "--jobs", 0),
        ("verify", SMALL, "--schedule", "cpu_blocked", "--all-schedules"),
        ("bench", SMALL, "--target", "llvm", "--against", "mkl"),
        ("bench", SMALL, "--target", "llvm", "--against", "tvm,mkl"),
        ("export", SMALL, "-o", "x.so", "--activation", "tanh"),
        ("inspect", SMALL, "--target", "llvm", "--ptx"),
    ],
)
def test_usage_errors(im2win, arguments):
    result = im2win(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["bench", "verify", "tune", "export", "inspect", "env"])
def test_help(im2win, command):
    result = im2win(command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


@pytest.mark.parametrize("module", ["im2win_tvm", "im2win_tvm.cli"])
def test_help_does_not_import_tvm(module):
    script = (
        "import runpy, sys\n"
        "sys.argv = ['im2win', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "finally: print('tvm' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_builds_in_other_processes():
    problems = [ConvProblem.parse(f"mb1ic3ih{size}oc4kh3") for size in (5, 6, 7)]
    target = resolve("llvm")
    requests = [Request(problem, target) for problem in problems]
    requests.insert(1, Request(problems[0], target, "cpu_blocked", {"lanes": 3}))
    first, refused, *rest = build_all(requests, jobs=2)
    assert isinstance(refused, ScheduleError)
    assert [kernel.problem for kernel in (first, *rest)] == problems
