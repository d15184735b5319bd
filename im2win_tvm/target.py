"""Where a kernel is to run: the processor with its vector units, or a CUDA architecture."""

import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from . import cuda_driver

KINDS = ("llvm", "cuda")

# LLVM's feature name -> the flag that Linux shows in /proc/cpuinfo, for the extensions that
# generated code may use. Names that differ only in punctuation need no entry.
_CPUINFO_NAME = {"sse3": "pni", "bmi": "bmi1", "lzcnt": "abm"}
_VECTOR_FEATURES = (
    "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2",
    "lzcnt", "avxvnni", "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "avx512ifma",
    "avx512vbmi", "avx512vbmi2", "avx512vnni", "avx512bitalg", "avx512vpopcntdq", "avx512bf16",
    "avx512fp16", "avx512vp2intersect", "gfni", "vaes", "vpclmulqdq",
)  # fmt: skip


class TargetError(ValueError):
    """A target, architecture or processor that is unknown or absent."""


@dataclass(frozen=True)
class CpuTarget:
    """A processor as LLVM names it (`cpu`), its vector features, and the threads to plan for."""

    cpu: str
    features: tuple[str, ...]
    threads: int
    machine: str

    kind = "llvm"

    @property
    def lanes(self) -> int:
        """float32 values in one vector register."""
        if "avx512f" in self.features:
            return 16
        return 8 if "avx2" in self.features else 4

    @property
    def registers(self) -> int:
        """Vector registers of the instruction set."""
        return 32 if "avx512f" in self.features or self.machine == "aarch64" else 16

    def tvm(self):
        """The `tvm.target.Target`."""
        import tvm

        return tvm.target.Target({"kind": "llvm", "mcpu": self.cpu, "num-cores": self.threads})

    def __str__(self):
        return f"llvm ({self.cpu}, {self.threads} threads)"


@dataclass(frozen=True)
class CudaTarget:
    """A CUDA architecture, such as ``sm_90``, and the GPU whose tuning records are meant.

    device: the product name of that GPU; None takes those of every GPU of the architecture.
    """

    arch: str
    device: str | None = None

    kind = "cuda"

    @cached_property
    def capability(self) -> int:
        """The number in the name: 90 for ``sm_90`` and ``sm_90a``."""
        return int(re.sub(r"\D", "", self.arch))

    @property
    def shared_bytes(self) -> int:
        """Static shared memory of a block (CUDA C++ Programming Guide, compute capabilities)."""
        return 48 * 1024

    @property
    def multiprocessors(self) -> int:
        """To plan for where no device is asked: those of A100, RTX 3090, RTX 4090, H100, B200."""
        return {80: 108, 86: 82, 89: 128, 90: 132, 100: 148}.get(self.capability, 108)

    @property
    def threads_per_multiprocessor(self) -> int:
        """CUDA C++ Programming Guide, compute capabilities."""
        return {75: 1024, 86: 1536, 87: 1536, 89: 1536, 120: 1536, 121: 1536}.get(
            self.capability, 2048
        )

    @property
    def shared_bytes_per_multiprocessor(self) -> int:
        """Shared memory that the blocks of a multiprocessor divide, 1 KiB each for the system.

        A block that sizes it at launch may take all of it (same source).
        """
        small = {75: 64, 80: 164, 86: 100, 87: 164, 89: 100, 120: 100, 121: 100}
        return small.get(self.capability, 96 if self.capability < 80 else 228) * 1024

    def tvm(self, host: str = "cuda_host"):
        """The `tvm.target.Target`; host code is C++ in the same translation unit."""
        import tvm

        return tvm.target.Target({"kind": "cuda", "arch": self.arch}, host=host)

    def __str__(self):
        return f"cuda ({self.arch})"


Target = CpuTarget | CudaTarget


def resolve(
    target: "str | Target | None" = None, *, arch: str | None = None, threads: int | None = None
) -> Target:
    """Turn what a user says into a target.

    target: ``"llvm"``, ``"cuda"``, an already resolved target, or None for what is here (CUDA
    where a GPU is present, otherwise the CPU). arch: a CUDA architecture such as ``"sm_90"`` or
    an LLVM processor such as ``"x86-64-v3"``; None is the one that is here. threads (CPU only):
    the threads to plan for, by default the processors this process may use. A CUDA target names
    the GPU that is here where that has the architecture.
    """
    if isinstance(target, CpuTarget | CudaTarget):
        if arch is not None or threads is not None:
            raise TargetError(f"arch={arch!r}, threads={threads!r}: {target} has its own")
        return target
    if target is None:
        target = "cuda" if device_arch() is not None else "llvm"
    if target == "cuda":
        if threads is not None:
            raise TargetError(f"threads={threads!r}: allowed for the target 'llvm' only")
        return _cuda(arch)
    if target == "llvm":
        return _cpu(arch, threads)
    raise TargetError(f"target={target!r}: allowed are {', '.join(map(repr, KINDS))}")


def _cuda(arch: str | None) -> CudaTarget:
    if arch is None:
        arch = device_arch()
        if arch is None:
            raise TargetError(
                "arch=None: there is no CUDA device here to take the architecture from; "
                "name one, such as arch='sm_90'"
            )
    match = re.fullmatch(r"sm_(\d{2,3})[af]?", arch)
    if match is None or int(match[1]) < 70:
        raise TargetError(f"arch={arch!r}: allowed are 'sm_70' and later, as in nvcc -arch")
    here = device_arch()
    # sm_90a is for the same GPU as sm_90.
    same = here is not None and CudaTarget(here).capability == CudaTarget(arch).capability
    return CudaTarget(arch, cuda_driver.device_name() if same else None)


def _cpu(cpu: str | None, threads: int | None) -> CpuTarget:
    import tvm

    codegen = tvm.target.codegen
    machine = platform.machine()
    if cpu is None:
        cpu = codegen.llvm_get_system_cpu()
    # Asked first: TVM only warns about a name it does not know, and then builds for SSE2.
    known = [str(name) for name in codegen.llvm_get_cpu_archlist(tvm.target.Target("llvm"))]
    if cpu not in known:
        raise TargetError(
            f"arch={cpu!r}: LLVM knows no such processor for {machine}; "
            f"allowed are, among {len(known)}, {', '.join(known[-6:])}"
        )
    if threads is None:
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        threads = len(affinity(0)) if affinity else os.cpu_count()
    if not isinstance(threads, int) or threads < 1:
        raise TargetError(f"threads={threads!r}: allowed are whole numbers from 1")
    enabled = codegen.llvm_get_cpu_features(tvm.target.Target({"kind": "llvm", "mcpu": cpu}))
    enabled = {str(name) for name in enabled}
    features = tuple(f for f in _VECTOR_FEATURES if f in enabled)
    return CpuTarget(cpu, features, threads, machine)


def device_arch() -> str | None:
    """Architecture of the first CUDA device, ``"sm_86"`` for instance; None where there is none.

    Of Hopper ``"sm_90a"``: what it alone can do is for code of this name.
    """
    capability = cuda_driver.compute_capability()
    if capability is None:
        return None
    return f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")


def missing_cpu_features(features: tuple[str, ...]) -> list[str]:
    """Those of `features` that this processor lacks (empty where the system does not tell)."""
    try:
        with open("/proc/cpuinfo") as file:
            line = next((row for row in file if row.startswith("flags")), None)
    except OSError:
        return []
    if line is None:
        return []
    present = {_plain(flag) for flag in line.split(":", 1)[1].split()}
    return [f for f in features if _plain(_CPUINFO_NAME.get(f, f)) not in present]


def _plain(name: str) -> str:
    return name.replace(".", "").replace("_", "")


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    with suppress(OSError), open("/proc/cpuinfo") as file:  # Linux only
        for row in file:
            if row.startswith("model name"):
                return row.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
