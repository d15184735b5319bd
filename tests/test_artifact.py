"""Exported kernels: loaded elsewhere, and refused (never crashed on) when they are not right."""

import importlib.metadata
import os
import platform
import random
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from problems import LAYOUTS

import im2win_tvm
from im2win_tvm import ArtifactError, artifact, reference, tensors, toolchain
from im2win_tvm.problem import ConvProblem

PROBLEM = ConvProblem(2, 3, (9, 11), 5, (3, 2), (2, 1), ((1, 0), (2, 1)))
SOURCES = str(Path(im2win_tvm.__file__).parents[1])


@cache
def compiled(layout="NCHW"):
    return im2win_tvm.compile(
        PROBLEM.replace(layout=layout), "llvm", bias=True, residual=True, activation="relu"
    )


@pytest.fixture
def library(tmp_path):
    """An exported kernel that a test may spoil."""
    return compiled().export(tmp_path / "kernel.so")


def solved(problem):
    made = tensors.fill(problem, "integer", 1, bias=True, residual=True)
    return made, reference.conv2d(made.x, made.w, problem, made.bias, made.residual, "relu")


def assert_runs(kernel):
    made, expected = solved(kernel.problem)
    out = tensors.poisoned(expected.shape, kernel.problem.dtype)
    kernel(made.x, made.w, made.bias, residual=made.residual, out=out)
    np.testing.assert_array_equal(out, expected)


# Loads argv[1], runs it on the arrays of argv[2], writes the output to argv[3].
RUN = """
import sys
import numpy as np
import im2win_tvm
kernel = im2win_tvm.load(sys.argv[1])
given = np.load(sys.argv[2])
out = np.full(kernel.problem.output_shape, np.nan, kernel.problem.dtype)
kernel(given["x"], given["w"], given["bias"], residual=given["residual"], out=out)
np.save(sys.argv[3], out)
loaded = [name for name in sys.modules if name.split(".")[0] == "tvm"]
assert not loaded, loaded
"""


def run_in(python, library, folder):
    """RUN in a process of its own, and its output."""
    made, expected = solved(im2win_tvm.ConvProblem(**im2win_tvm.read_metadata(library)["problem"]))
    np.savez(folder / "given.npz", **made._asdict())
    done = subprocess.run(
        [python, "-c", RUN, str(library), str(folder / "given.npz"), str(folder / "out.npy")],
        env={**os.environ, "PYTHONPATH": SOURCES},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(folder / "out.npy"), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fresh_process_loads_and_runs_it_without_tvm(layout, tmp_path):
    """TVM is installed here: it must not be imported."""
    run_in(sys.executable, compiled(layout).export(tmp_path / "kernel.so"), tmp_path)


def test_an_environment_without_tvm_loads_and_runs_it(library, tmp_path):
    environment = tmp_path / "environment"
    wanted = [
        "apache-tvm-ffi==" + importlib.metadata.version("apache-tvm-ffi"),
        "numpy==" + importlib.metadata.version("numpy"),
    ]
    for command in (
        [sys.executable, "-m", "venv", str(environment)],
        [str(environment / "bin" / "pip"), "install", "--quiet", *wanted],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no environment can be made here: {done.stderr.strip()[-300:]}")
    python = str(environment / "bin" / "python")
    missing = subprocess.run([python, "-c", "import tvm"], capture_output=True, text=True)
    assert "No module named 'tvm'" in missing.stderr
    run_in(python, library, tmp_path)
    # What needs TVM says so by failing to import it, and nothing else.
    needs = subprocess.run(
        [python, "-c", "import im2win_tvm; im2win_tvm.compile"],
        env={**os.environ, "PYTHONPATH": SOURCES},
        capture_output=True,
        text=True,
    )
    assert "No module named 'tvm'" in needs.stderr


def test_metadata_survives_the_export(library):
    kernel = compiled()
    assert im2win_tvm.read_metadata(library) == kernel.metadata
    assert im2win_tvm.read_metadata(str(library))["format"] == 1
    loaded = im2win_tvm.load(library)
    assert (loaded.problem, loaded.epilogue) == (kernel.problem, kernel.epilogue)
    assert loaded.workspace_bytes == kernel.workspace_bytes
    assert_runs(loaded)


def test_an_export_can_be_exported_again(library, tmp_path):
    again = im2win_tvm.load(library).export(tmp_path / "again.so")
    assert again.read_bytes() == library.read_bytes()
    assert_runs(im2win_tvm.load(again))


def test_a_relative_path_is_loaded_from_where_one_is(library, monkeypatch):
    monkeypatch.chdir(library.parent)
    assert_runs(im2win_tvm.load(library.name))


CUTS = {"nothing": 0, "three bytes": 3, "hundred bytes": 100, "ELF header": 64}


@pytest.mark.parametrize("length", [*CUTS, "half", "before the metadata", "in it", "all but one"])
def test_a_truncated_file_is_refused(library, length):
    data = library.read_bytes()
    start = data.find(artifact.MAGIC)
    lengths = CUTS | {
        "half": len(data) // 2,
        "before the metadata": start,
        "in it": start + artifact.HEADER_BYTES - 1,
        "all but one": len(data) - 1,
    }
    library.write_bytes(data[: lengths[length]])
    assert_refused(library, "not a shared library|no im2win_tvm metadata|cut short")


def assert_refused(path, message):
    """By both ways in, with the path, and with nothing loaded."""
    for way in (im2win_tvm.read_metadata, im2win_tvm.load):
        with pytest.raises(ArtifactError, match=message) as caught:
            way(path)
        assert str(path) in str(caught.value)


def test_lengths_everywhere_are_refused(library):
    data = library.read_bytes()
    chance = random.Random(0)
    for length in sorted(chance.randrange(len(data)) for _ in range(60)):
        library.write_bytes(data[:length])
        with pytest.raises(ArtifactError):
            im2win_tvm.load(library)


def test_a_flipped_bit_anywhere_is_refused(library):
    data = library.read_bytes()
    start = data.find(artifact.MAGIC)
    length = len(artifact.MAGIC) + 8 + 32 + 8
    chance = random.Random(0)
    places = {
        "ELF": range(4),
        "header": range(start, start + length),
        "metadata": [start + length + chance.randrange(500) for _ in range(20)],
        "elsewhere": [chance.randrange(len(data)) for _ in range(60)],
    }
    for where, offsets in places.items():
        for offset in offsets:
            spoiled = bytearray(data)
            spoiled[offset] ^= 1 << chance.randrange(8)
            library.write_bytes(spoiled)
            with pytest.raises(ArtifactError):
                pytest.fail(f"{where} {offset}: {im2win_tvm.load(library)}")


def test_code_and_metadata_that_were_altered_are_told_apart_from_cut_ones(library):
    data = bytearray(library.read_bytes())
    code = bytearray(data)
    code[data.find(b"im2win_conv")] ^= 1
    library.write_bytes(code)
    assert_refused(library, r"altered since it was exported \(SHA-256 differs\)")
    text = data.find(b'"batch": 2')
    data[text : text + 10] = b'"batch": 9'
    library.write_bytes(data)
    assert_refused(library, r"altered since it was exported \(SHA-256 differs\)")


def test_appended_bytes_are_refused(library):
    data = library.read_bytes()
    library.write_bytes(data + b"\0" * 512)
    size = len(data)
    assert_refused(library, f"cut short or extended: {size + 512} bytes, exported as {size}")


def test_other_files_are_refused(tmp_path, library):
    text = tmp_path / "text.so"
    text.write_text("no library at all\n")
    assert_refused(text, r"not a shared library \(no ELF header\)")
    text.write_bytes(artifact.MAGIC * 100)
    assert_refused(text, r"not a shared library \(no ELF header\)")
    text.write_bytes(b"\x7fELF" + artifact.MAGIC)
    assert_refused(text, "no im2win_tvm metadata")
    text.write_bytes(b"\x7fELF" + artifact.MAGIC + bytes(artifact.HEADER_BYTES))
    assert_refused(text, "cut short or extended")
    assert_refused(tmp_path / "absent.so", "cannot be read: No such file or directory")
    assert_refused(tmp_path, "cannot be read: Is a directory")


def test_a_foreign_library_is_refused_and_not_run(tmp_path):
    source, trace = tmp_path / "foreign.c", tmp_path / "it ran"
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void run(void) "
        f'{{ fclose(fopen("{trace}", "w")); }}\n'
    )
    foreign = tmp_path / "foreign.so"
    toolchain.run([toolchain.find_cc(), "-shared", "-fPIC", "-o", str(foreign), str(source)])
    assert_refused(foreign, "no im2win_tvm metadata: not exported by Kernel.export")
    assert not trace.exists()


def resealed(library, *changes):
    """Metadata edited in place, length kept, and sealed again: as if so exported."""
    data = library.read_bytes()
    for before, after in changes:
        assert data.count(before) == 1 and len(before) == len(after)
        data = data.replace(before, after)
    library.write_bytes(data)
    artifact.seal(library)
    return library


def test_another_machine_is_refused(library):
    here = platform.machine().encode()
    resealed(library, (b'"machine": "' + here, b'"machine": "' + b"q" * len(here)))
    assert im2win_tvm.read_metadata(library)["target"]["machine"] == "q" * len(here)
    with pytest.raises(ArtifactError, match=f"machine='q+': this machine is '{here.decode()}'"):
        im2win_tvm.load(library)


def test_another_format_is_refused(library):
    resealed(library, (b'"format": 1', b'"format": 7'))
    assert_refused(library, "format=7: this version reads 1; exported by im2win_tvm")


def test_a_processor_that_lacks_features_is_refused(library, monkeypatch):
    monkeypatch.setattr(artifact, "missing_cpu_features", lambda features: ["avx10.2", "apx"])
    with pytest.raises(ArtifactError, match=r"this processor lacks avx10\.2, apx"):
        im2win_tvm.load(library)


def test_features_that_linux_shows_under_other_names(monkeypatch):
    from im2win_tvm import target

    shown = "flags\t\t: fpu pni ssse3 sse4_1 sse4_2 popcnt avx avx2 fma f16c bmi1 abm avx512_vnni\n"
    monkeypatch.setattr(target, "open", lambda _: __import__("io").StringIO(shown), raising=False)
    asked = ("sse3", "sse4.1", "bmi", "lzcnt", "avx512vnni", "avx512f", "gfni", "bmi2")
    assert target.missing_cpu_features(asked) == ["avx512f", "gfni", "bmi2"]


@pytest.mark.parametrize(
    ("arch", "capability", "expected"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_86", (8, 9), True),
        ("sm_80", (9, 0), False),
        ("sm_90", (8, 9), False),
        ("sm_90", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (9, 1), False),
        ("sm_90a", (10, 0), False),
        ("sm_100", (10, 0), True),
        ("sm_100", (10, 3), True),
        ("sm_103", (10, 0), False),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 0), True),
        ("sm_100f", (10, 3), True),
        ("sm_100", (12, 0), False),
        ("sm_120", (12, 1), True),
        ("sm_75", (8, 0), False),
    ],
)
def test_architectures_that_run_on_each_other(arch, capability, expected):
    assert artifact.runs_on(arch, capability) is expected


def test_cuda_architectures_are_checked_when_loading(monkeypatch):
    metadata = {"target": {"kind": "cuda", "arch": "sm_80", "machine": platform.machine()}}
    monkeypatch.setattr(artifact, "compute_capability", lambda: None)
    with pytest.raises(
        ArtifactError, match=r"k\.so: built for CUDA arch='sm_80': there is no CUDA"
    ):
        artifact.check_machine(metadata, "k.so")
    monkeypatch.setattr(artifact, "compute_capability", lambda: (9, 0))
    with pytest.raises(ArtifactError, match="arch='sm_80': this device is sm_90"):
        artifact.check_machine(metadata, "k.so")
    monkeypatch.setattr(artifact, "compute_capability", lambda: (8, 6))
    artifact.check_machine(metadata, "k.so")


def test_a_failed_export_leaves_the_existing_file(library, monkeypatch):
    before = library.read_bytes()

    def fail(source, destination):
        Path(destination).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space left"):
        compiled("NHWC").export(library)
    assert library.read_bytes() == before
    assert os.listdir(library.parent) == [library.name]


def test_an_export_to_nowhere_is_an_error(tmp_path):
    with pytest.raises(OSError):
        compiled().export(tmp_path / "absent" / "kernel.so")
    assert os.listdir(tmp_path) == []


def test_exports_keep_to_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = compiled().export(tmp_path / "kernel.so")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750


def test_a_loaded_library_may_be_replaced(library):
    """The old kernel goes on from the old file, a new load takes the new one."""
    old = im2win_tvm.load(library)
    assert_runs(old)
    compiled("NHWC").export(library)
    assert_runs(old)
    new = im2win_tvm.load(library)
    assert new.problem.layout == "NHWC"
    assert_runs(new)
    assert_runs(old)


def test_the_header_is_what_c_reads(library):
    """native/metadata.c takes the text 64 bytes after the magic, up to a zero byte."""
    data = library.read_bytes()
    start = data.find(artifact.MAGIC)
    assert artifact.HEADER_BYTES == 64 and data.count(artifact.MAGIC) == 1
    (length,) = struct.unpack_from("<Q", data, start + 56)
    text = data[start + 64 : start + 64 + length]
    assert text.startswith(b"{") and text.endswith(b"}") and data[start + 64 + length] == 0


def test_metadata_without_what_loading_needs_is_refused(library):
    resealed(library, (b'"target":', b'"targat":'))
    assert_refused(library, "target missing in the metadata")
