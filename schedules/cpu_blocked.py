"""CPU: a few rows of I' in cache, and a register block of pixels by channels over it.

What the hardware asks for:
* FMA throughput (two a cycle, four cycles deep on current x86) needs at least eight independent
  accumulators, all of them in registers: `tile_rows * tile_columns * vectors` of them.
* Every step of the reduction loads `vectors` vectors of F' and broadcasts one value of I' for each
  pixel. The window is one contiguous run, so the address of pixel (m, q) is one moving pointer
  plus a constant: no index arithmetic is left in the inner loop.
* F' of one channel block is read again for every tile of pixels: it has to stay in the L2 cache
  while a block of rows is computed, and I' of these rows beside it.
"""

import itertools
from dataclasses import dataclass

from tvm import s_tir, te
from tvm.ir import IRModule

from ..epilogue import Epilogue
from ..expr import (
    Place,
    arguments,
    convolution_blocked,
    pack_filter,
    tiled_function,
    transform,
)
from ..expr.transform import window_columns
from ..problem import ConvProblem
from ..target import CpuTarget
from .base import CONV, PREPARE, Schedule

# Half of an L2 cache of 1 MiB (Skylake-SP, Zen 4 and 5; Zen 2 and 3 have half of that): the other
# half is F' and output.
STRIP_BYTES = 512 * 1024
# Smallest first-level data cache in use (32 KiB), less what I' and the output need.
L1_BYTES = 24 * 1024


@dataclass(frozen=True)
class Config:
    """lanes: float32 values in a vector; vectors: of channels in a register block.

    tile_rows x tile_columns: output pixels of a register block. block_rows: output rows whose I'
    is built at once. splits: parts of the output channels that run in parallel; each part builds
    its own I'. unroll: steps of the reduction unrolled.
    """

    lanes: int
    vectors: int
    tile_rows: int
    tile_columns: int
    block_rows: int
    splits: int
    unroll: int = 1

    @property
    def block(self) -> int:
        """Output channels of a register block."""
        return self.lanes * self.vectors


class CpuBlocked(Schedule):
    name = "cpu_blocked"
    kind = "llvm"

    def supports(self, problem: ConvProblem, target: CpuTarget) -> str | None:
        reason = super().supports(problem, target)
        if reason is None and problem.dtype == "bfloat16":
            reason = f"dtype=bfloat16: {self.name} takes float32 and float16"
        return reason

    def check(self, config: Config, problem: ConvProblem, target: CpuTarget) -> str | None:
        for field, value in vars(config).items():
            if not isinstance(value, int) or value < 1:
                return f"{field}={value!r}: allowed are whole numbers from 1"
        pixels = config.tile_rows * config.tile_columns
        # One register holds the broadcast value, `vectors` hold F'.
        needed = pixels * config.vectors + config.vectors + 1
        if needed > target.registers:
            return (
                f"tile_rows*tile_columns={pixels}, vectors={config.vectors}: need {needed} vector "
                f"registers, {target.cpu} has {target.registers}"
            )
        if config.block_rows % config.tile_rows:
            return f"block_rows={config.block_rows}: a multiple of tile_rows={config.tile_rows}"
        if config.lanes & (config.lanes - 1) or config.lanes > target.lanes:
            return f"lanes={config.lanes}: a power of two up to {target.lanes} on {target.cpu}"
        blocks = -(-(problem.out_channels // problem.groups) // config.block)
        if blocks % config.splits:
            return f"splits={config.splits}: a divisor of the {blocks} blocks of output channels"
        return None

    def configs(self, problem: ConvProblem, target: CpuTarget):
        per_group = problem.out_channels // problem.groups
        height, width = problem.output_size
        lanes = target.lanes
        while lanes > 1 and lanes // 2 >= per_group:
            lanes //= 2
        most_vectors = -(-per_group // lanes)
        for vectors in range(1, min(4, most_vectors) + 1):
            pixels = (target.registers - 1 - vectors) // vectors
            for rows in range(1, min(height, pixels) + 1):
                # Only the widest tile of each number of columns a row is cut into.
                widest = min(width, pixels // rows)
                for cut in sorted({-(-width // -(-width // c)) for c in range(1, widest + 1)}):
                    blocks = -(-per_group // (lanes * vectors))
                    for row_tiles, splits in itertools.product(
                        _cuts(-(-height // rows)), _cuts(blocks)
                    ):
                        config = Config(lanes, vectors, rows, cut, row_tiles * rows, splits)
                        if self.check(config, problem, target) is None:
                            yield config

    def default(self, problem: ConvProblem, target: CpuTarget) -> Config:
        configs = self.configs(problem, target)
        return min(configs, key=lambda c: self.estimate(problem, c, target))

    def estimate(self, problem: ConvProblem, config: Config, target: CpuTarget) -> float:
        return estimated_cycles(config, problem, target)

    def scratch_bytes(self, problem, config, target):
        channels = problem.in_channels // problem.groups
        strip = channels * config.block_rows * width_of_strip(problem, config) * 4
        return strip + config.tile_rows * config.tile_columns * config.block * 4

    def schedule(self, problem, config, target, epilogue):
        return IRModule(
            {
                PREPARE: prepare(problem, config),
                CONV: convolve(problem, config, epilogue),
            }
        )


def _cuts(extent: int) -> list[int]:
    """Sizes that cut `extent` into 1, 2, 3 ... nearly equal parts, a few of them."""
    sizes = {-(-extent // parts) for parts in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)}
    return sorted(sizes | {1})


def estimated_cycles(config: Config, problem: ConvProblem, target: CpuTarget) -> float:
    """A model of the time on one core-complex: issue slots, cache traffic and idle threads.

    It ranks configurations; its unit is roughly a cycle of the slowest thread.
    """
    height, width = problem.output_size
    per_group = problem.out_channels // problem.groups
    blocks = -(-per_group // config.block)
    pixels = config.tile_rows * config.tile_columns
    # Two FMA and two loads a cycle; fewer than eight chains leave the FMA units waiting. F' comes
    # from L2 at 32 bytes a cycle unless a block of it stays in L1. Looping costs most of a cycle.
    fma = max(pixels * config.vectors, 8) / 2
    loads = (pixels + config.vectors) / 2
    panel_bytes = problem.k * config.block * 4
    streamed = config.block * 4 / 32 if panel_bytes > L1_BYTES else 0
    per_tile = problem.k * (max(fma, loads, streamed) + 0.8)
    # Channels-first, a block is stored word by word, in runs of a tile's columns, which LLVM makes
    # vectors of where eight divides them.
    runs = 0.1 if problem.channels_last else 1 + 3 / config.tile_columns
    if config.tile_columns % 8 == 0:
        runs *= 0.6
    per_tile += pixels * config.block * runs * (1 if config.vectors <= 2 else 3)
    tiles = -(-width // config.tile_columns) * (config.block_rows // config.tile_rows)
    # F' comes from further away once for each block of rows, and I' is gathered element by
    # element, about one a cycle.
    panel = panel_bytes / 32
    strip = (
        problem.in_channels // problem.groups * config.block_rows * width_of_strip(problem, config)
    )
    spill = 1.0 if strip * 4 <= STRIP_BYTES else 2.0
    blocks_a_split = -(-blocks // config.splits)
    task = strip * spill + blocks_a_split * (per_tile * tiles + panel) * (0.9 + 0.1 * spill)
    tasks = problem.batch * problem.groups * -(-height // config.block_rows) * config.splits
    # The runtime hands out tasks as threads come free; what is left over at the end is idle time.
    return -(-tasks // target.threads) * (task + 2000)


def width_of_strip(problem: ConvProblem, config: Config) -> int:
    """Elements in one row of one channel of I' as this configuration stages it."""
    columns = -(-problem.output_size[1] // config.tile_columns) * config.tile_columns
    return window_columns(problem, columns) * problem.kernel_size[0]


def prepare(problem: ConvProblem, config: Config):
    """The filter in window order, one channel block side by side, in float32. Runs once."""
    w = te.placeholder(problem.weight_shape, problem.dtype, name="w")
    packed = pack_filter(w, problem, config.block, dtype="float32")
    sch = s_tir.Schedule(te.create_prim_func([w, packed]))
    g, b, *_ = sch.get_loops(sch.get_sblock("packed"))
    sch.parallel(sch.fuse(g, b))
    return sch.mod["main"]


def convolve(problem: ConvProblem, config: Config, epilogue: Epilogue):
    """x, packed filter (and bias, residual) -> y."""
    c = config
    sch = s_tir.Schedule(expression(problem, c, epilogue))
    _, _, b, m, q, _ = (int(sch.get(loop).extent) for loop in sch.get_loops(sch.get_sblock("y")))
    parts = [c.splits, b // c.splits]
    rows = [m // c.block_rows, c.block_rows // c.tile_rows, c.tile_rows]
    columns = [q // c.tile_columns, c.tile_columns]
    lay_out(sch, problem, c, parts, rows, columns)
    return sch.mod["main"]


def expression(problem: ConvProblem, config: Config, epilogue: Epilogue):
    """The function that is scheduled: its output is rounded up to whole tiles of `config`."""
    c = config
    height, width = problem.output_size
    per_group = problem.out_channels // problem.groups
    # Rows and columns are rounded up to whole tiles, so that no tile needs a bounds check; I' is
    # zero there, and the output is stored with a check of its own.
    rows = -(-height // c.block_rows) * c.block_rows
    columns = -(-width // c.tile_columns) * c.tile_columns
    blocks = -(-per_group // c.block)

    args = arguments(problem, epilogue)
    packed = te.placeholder(
        (problem.groups, blocks, 1, problem.k, c.block), "float32", name="packed"
    )
    # I' in float32 whatever the input: fp16 is widened once an element and not once a use.
    iw = transform(args.x, problem, rows=rows, outputs=columns, dtype="float32")
    acc = convolution_blocked(iw, packed, problem, rows, columns)

    def place(n, g, b, m, q, i):
        inside = []
        if blocks * c.block > per_group:
            inside.append(b * c.block + i < per_group)
        if rows > height:
            inside.append(m < height)
        if columns > width:
            inside.append(q < width)
        return Place(n, g * per_group + b * c.block + i, m, q, inside)

    return tiled_function([args.x, packed], acc, place, problem, args, epilogue)


def lay_out(sch: s_tir.Schedule, problem: ConvProblem, config: Config, parts, rows, columns):
    """Schedule an `expression`; the tiles may be numbers, or what a search samples.

    parts: of the blocks of channels, and blocks in each. rows: blocks of rows, tiles in each, rows
    of a tile. columns: tiles, and columns of one. Of `config` count `vectors`, `lanes`, `unroll`.
    """
    c = config
    y, conv, im2win = (sch.get_sblock(name) for name in ("y", "conv", "im2win"))

    # 1. Cut the output into tasks (image, group, rows, part of the channels), and each task into
    #    register blocks. Rows inside channels: F' of a block is reused while it is in L2.
    n, g, b, m, q, i = sch.get_loops(y)
    part, b = sch.split(b, parts)
    m, mt, mi = sch.split(m, rows)
    qt, qi = sch.split(q, columns)
    sch.reorder(n, g, m, part, b, mt, qt, *((mi, qi, i) if problem.channels_last else (i, mi, qi)))
    if not problem.channels_last:
        # The block is stored column by column. Rolled, LLVM makes vector scatters of the loop,
        # which Zen 5 carries out more slowly than scalar stores.
        sch.unroll(i)
    task = sch.fuse(n, g, m, part)
    sch.parallel(task)

    # 2. The accumulators of one register block, and I' of one block of rows.
    sch.compute_at(conv, qt, preserve_unit_loops=True)
    sch.compute_at(im2win, task, preserve_unit_loops=True)

    # 3. Inside the block: reduction outside, pixels and channel vectors unrolled, so that every
    #    accumulator has a constant index and LLVM keeps it in a register for the whole reduction.
    reductions = 2 if problem.dilation[1] == 1 else 3  # see convolution_blocked
    *_, mi, qi, i = sch.get_loops(conv)[:-reductions]
    reduction = sch.get_loops(conv)[-reductions:]
    iv, il = sch.split(i, [c.vectors, c.lanes])
    if c.unroll > 1:
        k, step = sch.split(reduction[-1], [None, c.unroll])
        reduction = [*reduction[:-1], k, step]
        sch.unroll(step)
    sch.reorder(*reduction, mi, qi, iv, il)
    for loop in (mi, qi, iv):
        sch.unroll(loop)
    sch.vectorize(il)
    init = sch.decompose_reduction(conv, reduction[0])
    *_, mi, qi, iv, il = sch.get_loops(init)
    for loop in (mi, qi, iv):
        sch.unroll(loop)
    sch.vectorize(il)

    # 4. The transform walks x along its rows: for each of the Hf rows, a run of columns.
    if not problem.channels_last:
        *_, k = sch.get_loops(im2win)
        col, u = sch.split(k, [None, problem.kernel_size[0]])
        sch.reorder(u, col)


SCHEDULE = CpuBlocked()
