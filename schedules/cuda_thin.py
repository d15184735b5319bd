"""Tensor cores of Hopper on inputs of few channels: the implicit im2win product for sm_90a.

D[pixel, channel] = W[pixel, k] * F[channel, k], and W is never written anywhere. With few channels
a window's row is a short run of memory, which neither the copy engine nor wgmma's descriptors can
take apart; ordinary threads can.

* One or two warpgroups bring input rows to a ring in shared memory: padding is zeros, NCHW is
  turned round, and rows begin at words there, wherever they do in memory.
* Others multiply. In im2win's order of K a pixel's window is a few runs of words in these rows: a
  thread loads its operands of wgmma from them into registers, and an input row is read once for all
  the windows that it is in.
* The filter is the other operand. All of it stays in shared memory.
* Blocks stay. Each takes a run of output pixels through all images, 64 at a time a warpgroup.

float16, bfloat16 or tf32 in, the input's type out, float32 sums.
"""

from collections.abc import Iterator

from tvm.ir import IRModule

from ..problem import ConvProblem
from ..target import CudaTarget
from .base import CONV, PREPARE, Schedule
from .cuda_thin_cost import CLOCK, candidates, cycles
from .cuda_thin_filter import prepare
from .cuda_thin_kernel import convolve
from .cuda_thin_tiles import (
    MULTIPROCESSOR_BYTES,
    SYSTEM_BYTES,
    Config,
    Geometry,
    overlap,
    registers,
)

# More fill whole rows of 128 bytes well enough for `cuda_window`.
MOST_CHANNELS = 12
# Registers of a consuming thread beside its sums and operands: what nvcc 13.0 needs without
# spilling. Those that one wgmma needs beside them; ptxas counts them among those of the launch.
OTHER_REGISTERS, WGMMA_REGISTERS = 32, 24
_LEAST = dict(block_n=8, warpgroups=1, channels=1, rows=1, stages=2, steps=1, blocks=1, producers=1)
# Offsets are 32 bits wide.
MAX_ELEMENTS = 2**31


class CudaThin(Schedule):
    name = "cuda_thin"
    kind = "cuda"
    clock = CLOCK
    dtypes = ("float16", "bfloat16")
    wider = "cuda_window"  # that takes more channels

    def supports(self, problem, target):
        reason = super().supports(problem, target)
        if reason is None and problem.dtype not in self.dtypes:
            reason = f"dtype={problem.dtype}: {self.name} takes {' and '.join(self.dtypes)}"
        if reason is None and target.arch != "sm_90a":
            reason = f"arch={target.arch}: {self.name} takes sm_90a"
        if reason is None and problem.groups != 1:
            reason = f"groups={problem.groups}: {self.name} takes 1 (cuda_simt takes any)"
        if reason is None and problem.in_channels > MOST_CHANNELS:
            reason = (
                f"in_channels={problem.in_channels}: {self.name} takes up to {MOST_CHANNELS} "
                f"({self.wider} takes any)"
            )
        return reason or self.check(self.smallest(problem), problem, target)

    def check(self, config: Config, problem: ConvProblem, target: CudaTarget) -> str | None:
        c = config
        for field, least in _LEAST.items():
            value = getattr(c, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                return f"{field}={value!r}: allowed are whole numbers from {least}"
        if c.block_n % 8 or c.block_n > 256:
            return f"block_n={c.block_n}: allowed are multiples of 8 up to 256"
        if c.warpgroups > 4:
            return f"warpgroups={c.warpgroups}: allowed are 1 to 4"
        whole = problem.in_channels + problem.in_channels % 2
        if c.channels not in {problem.in_channels, whole if problem.itemsize == 2 else 0}:
            return f"channels={c.channels}: allowed are {problem.in_channels}" + (
                f" and {whole}" if problem.itemsize == 2 and whole != problem.in_channels else ""
            )
        if c.producers > 2:
            return f"producers={c.producers}: allowed are 1 and 2"
        if not isinstance(c.turns, bool):
            return f"turns={c.turns!r}: allowed are True and False"
        if not isinstance(c.by_copies, bool):
            return f"by_copies={c.by_copies!r}: allowed are True and False"
        reason = self.reason_of_pairs(problem, c)
        if reason is not None:
            return reason
        if c.blocks * c.threads > target.threads_per_multiprocessor:
            return f"blocks={c.blocks}: {c.blocks * c.threads} threads a multiprocessor"
        g = self.geometry(problem, c)
        reason = self.reason_of_registers(g)
        if reason is not None:
            return reason
        if c.rows > g.most_rows:
            return f"rows={c.rows}: allowed are 1 to {g.most_rows}"
        if c.stages < g.fewest_stages:
            return f"stages={c.stages}: a tile needs {g.fewest_stages}"
        if not g.fits:
            taken = c.blocks * (g.shared_bytes + SYSTEM_BYTES)
            return (
                f"block_n={c.block_n}, stages={c.stages}: {taken} bytes of "
                f"{MULTIPROCESSOR_BYTES}, shared memory"
            )
        if g.batch * g.image_rows >= MAX_ELEMENTS:
            return f"batch={problem.batch}: 2**31 input rows or more"
        return None

    def geometry(self, problem: ConvProblem, config: Config) -> Geometry:
        return Geometry(problem, config)

    def reason_of_pairs(self, problem: ConvProblem, config: Config) -> str | None:
        """Why no words are in the windows of two pixels, one above the other; None if some are."""
        if not isinstance(config.pairs, bool):
            return f"pairs={config.pairs!r}: allowed are True and False"
        if config.pairs and not overlap(problem):
            return (
                "pairs=True: allowed in NHWC where the windows of two output rows overlap, without "
                "dilation"
            )
        return None

    def reason_of_registers(self, g: Geometry) -> str | None:
        """Why a thread has not enough of them, or None."""
        c, given = g.config, registers(g.config)
        room = min(given.consumer - OTHER_REGISTERS, given.launched - WGMMA_REGISTERS)
        if c.sums + g.held > room:
            return (
                f"steps={c.steps}: {c.sums} sums and {g.held} operands a thread, "
                f"there is room for {room}"
            )
        return None

    def candidates(self, problem: ConvProblem) -> Iterator[Config]:
        return candidates(problem)

    def configs(self, problem: ConvProblem, target: CudaTarget):
        for config in self.candidates(problem):
            if self.check(config, problem, target) is None:
                yield config

    def default(self, problem: ConvProblem, target: CudaTarget) -> Config:
        costs = {c: self.estimate(problem, c, target) for c in self.candidates(problem)}
        ranked = sorted(costs, key=costs.__getitem__)
        found = (c for c in ranked if self.check(c, problem, target) is None)
        return next(found, self.smallest(problem))

    def smallest(self, problem: ConvProblem) -> Config:
        """What takes the least shared memory."""
        config = Config(8, 1, problem.in_channels, 1, 2)
        g = self.geometry(problem, config)
        return Config(8, 1, problem.in_channels, 1, g.fewest_stages)

    def estimate(self, problem: ConvProblem, config: Config, target: CudaTarget) -> float:
        return cycles(Geometry(problem, config), target)

    def schedule(self, problem, config, target, epilogue):
        parts = Geometry(problem, config).parts(target.multiprocessors)
        return IRModule(
            {
                PREPARE: prepare(problem, config),
                CONV: convolve(problem, config, epilogue, parts),
            }
        )


class CudaThinTf32(CudaThin):
    name = "cuda_thin_tf32"
    dtypes = ("float32",)

    def accuracy(self, problem):
        return "tf32"


SCHEDULE, TF32 = CudaThin(), CudaThinTf32()
