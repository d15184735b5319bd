"""The compilers that turn generated code into a shared library: a C compiler, and nvcc."""

import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

#: Seconds that one run of a compiler may take: nvcc needs a few for a kernel.
LIMIT = 600.0
# Seconds until what was killed is gone and its output read.
_ENDING = 5.0


class ToolchainError(RuntimeError):
    """A compiler that is missing or that failed; the text says what to install or what it said."""


class Nvcc(NamedTuple):
    """nvcc, and where its libraries are."""

    path: Path
    libraries: Path

    @property
    def bin(self) -> Path:
        return self.path.parent


def find_cc() -> str:
    """The C compiler: ``$CC``, or the first of cc, gcc and clang on the PATH."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = name and shutil.which(name)
        if found:
            return found
    raise ToolchainError(
        "no C compiler found: kernels are linked with one; install it (Debian: apt-get install gcc "
        "libc6-dev) or set CC"
    )


@functools.cache
def find_nvcc() -> Nvcc:
    """nvcc from ``$CUDA_HOME`` or ``$CUDA_PATH``, the PATH, /usr/local/cuda, or PyPI's wheels."""
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    on_path = shutil.which("nvcc")
    roots += [str(Path(on_path).resolve().parent.parent)] if on_path else []
    roots += ["/usr/local/cuda"]
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or []) if nvidia else []:
        roots += [str(root) for root in sorted(Path(folder).glob("cu[0-9]*"), reverse=True)]
    for root in filter(None, roots):
        nvcc = Path(root) / "bin" / "nvcc"
        if not os.access(nvcc, os.X_OK):
            continue
        for library in (Path(root) / "lib64", Path(root) / "lib"):
            if (library / "libcudart_static.a").exists():
                return Nvcc(nvcc, library)
        # Debian's wrapper scripts: nvcc knows its own libraries.
        return Nvcc(nvcc, Path(root) / "lib64")
    raise ToolchainError(
        "no nvcc found: CUDA kernels are compiled with it; pip install 'im2win_tvm[cuda]', or "
        "install the CUDA toolkit and set CUDA_HOME or put nvcc on the PATH"
    )


@functools.cache
def nvcc_version() -> str:
    """The release of nvcc, ``"13.0"`` for instance."""
    text = run([str(find_nvcc().path), "--version"])
    return re.search(r"release (\d+\.\d+)", text)[1]


def run(command: list[str]) -> str:
    """Run a compiler and return what it printed.

    Raises ToolchainError with the end of its output if it fails or takes longer than LIMIT; it is
    ended then, with all that it started.
    """
    try:
        # In a group of its own: nvcc and gcc leave the work to children, which outlive them.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        raise ToolchainError(f"{command[0]}: {error}") from error
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        said = _end(process)
        raise ToolchainError(
            f"{' '.join(command)}\ntook more than {LIMIT:g} s and was ended"
            + (f"; it printed:\n{said[-4000:]}" if said else "")
        ) from None
    except BaseException:  # Ctrl-C does not reach another group
        _end(process)
        raise
    if process.returncode != 0:
        raise ToolchainError(f"{' '.join(command)}\nfailed:\n{output[-4000:]}")
    return output


def _end(process: subprocess.Popen) -> str:
    """Kill a process and its group; what it printed, if that can be had."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one may have left the group with the pipe
        return process.communicate(timeout=_ENDING)[0]
    return ""


def include_flags() -> list[str]:
    """Where tvm_ffi's C headers are."""
    from tvm_ffi import libinfo

    return ["-I", libinfo.find_include_path(), "-I", libinfo.find_dlpack_include_path()]


def link_cpu_library(output: Path, objects: list[str], sources: list[Path]) -> None:
    """Link LLVM's object files with our C sources into a shared library.

    The pointers that generated code calls its host through become private to the library: the
    ones set by host.c stay, whatever runtime is loaded in the same process.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        script.write("{ global: *; local: __TVMBackend*; };\n")
        script.flush()
        run([
            find_cc(), "-shared", "-fPIC", "-O2", "-fopenmp", *include_flags(),
            "-o", str(output), *objects, *map(str, sources),
            f"-Wl,--version-script={script.name}",
        ])  # fmt: skip


def gencode(arch: str) -> list[str]:
    """nvcc's flags for code of exactly this architecture."""
    digits = arch.removeprefix("sm_")
    return ["-gencode", f"arch=compute_{digits},code=sm_{digits}"]


# ptxas weighs registers against blocks that fit, and may spill a word or two to keep one block
# more. Where it does, it is asked again to take the registers.
_REGISTERS = ((), ("-Xptxas", "--register-usage-level=0"))


# TVM's own functions use the operators of half precision, which other headers turn off.
_OPERATORS = (
    "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "--expt-relaxed-constexpr",
)  # fmt: skip


def build_cuda_library(output: Path, source: Path, arch: str, extra: list[Path]) -> str:
    """Compile one CUDA translation unit, kernels and host code, into a shared library.

    Returns what ptxas reports of registers, shared memory and spills. No --use_fast_math: the
    fp32 class promises what plain fp32 arithmetic gives.
    """
    from tvm_ffi import libinfo

    nvcc = find_nvcc()
    for flags in _REGISTERS:
        report = run([
            str(nvcc.path), "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", *gencode(arch),
            "-Xptxas", "-v", *flags, "-diag-suppress", "174,177", *include_flags(),
            "-o", str(output), str(source), *map(str, extra),
            "-L", str(nvcc.libraries),
            "-L", str(Path(libinfo.find_libtvm_ffi()).parent), "-ltvm_ffi",
        ])  # fmt: skip
        if not any(kernel.spill_store_bytes for kernel in parse_resources(report)):
            break
    return report


def compile_cubin(source: str, arch: str) -> bytes:
    """The machine code of a CUDA source, with the flags that kernels of their own get.

    On all processors that are here: a whole model is one source.
    """
    with tempfile.TemporaryDirectory(prefix="im2win-") as folder:
        unit, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        unit.write_text(source)
        for flags in _REGISTERS:
            report = run([
                str(find_nvcc().path), "-O3", "-std=c++17", "-cubin", *gencode(arch),
                "--split-compile=0", "-Xptxas", "-v", *flags, "-diag-suppress", "174,177",
                *_OPERATORS, "-o", str(cubin), str(unit),
            ])  # fmt: skip
            ours = (k for k in parse_resources(report) if "im2win" in k.kernel)
            if not any(kernel.spill_store_bytes for kernel in ours):
                break
        return cubin.read_bytes()


def compile_ptx(source: str, arch: str) -> str:
    """The PTX of a CUDA source."""
    with tempfile.TemporaryDirectory(prefix="im2win-") as folder:
        unit, ptx = Path(folder) / "kernel.cu", Path(folder) / "kernel.ptx"
        unit.write_text(source)
        digits = arch.removeprefix("sm_")
        run([
            str(find_nvcc().path), "-O3", "-std=c++17", "-ptx", f"-arch=compute_{digits}",
            "-diag-suppress", "174,177", *include_flags(), "-o", str(ptx), str(unit),
        ])  # fmt: skip
        return ptx.read_text()


class Resources(NamedTuple):
    """What one kernel takes of a multiprocessor, from ptxas."""

    kernel: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def parse_resources(report: str) -> list[Resources]:
    """The kernels in a report of ``ptxas -v``."""
    found = []
    for part in re.split(r"Compiling entry function '", report)[1:]:
        shared = re.search(r"(\d+) bytes smem", part)
        spills = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        found.append(
            Resources(
                part.split("'", 1)[0],
                int(re.search(r"Used (\d+) registers", part)[1]),
                int(shared[1]) if shared else 0,
                *(int(value) for value in spills.groups()),
            )
        )
    return found
