"""CUDA cores: the paper's kernel, a tiled product of filters and windows with K in window order.

One block computes `block_m` channels by `block_p` output pixels, one thread `thread_m` by
`thread_p` of them. Two forms of the same kernel:

* IMPLICIT: the im2win transform happens on the way from the input to shared memory; I' is never in
  global memory, and the kernel needs no workspace.
* EXPLICIT, the paper's own: a first kernel writes I' to global memory, the second reads it.

What the hardware asks for (sm_70 and later):
* Arithmetic: a multiprocessor does 64 (sm_70, sm_80) or 128 FMAs (sm_86, sm_90) a cycle, and its
  shared memory delivers 32 words meanwhile. With 8 x 8 outputs a thread, 16 words serve 64 FMAs;
  with 1 x 1, 2 words serve one.
* Shared memory: a vector of four words (LDS.128) a thread, neighbouring threads on neighbouring
  vectors, is free of bank conflicts. A thread's outputs are therefore groups of four, `block/2`
  apart, and not eight in a row.
* Latency: a load from global memory takes hundreds of cycles. With two stages of shared memory the
  next tile is on its way while the current one is multiplied.
"""

import itertools
from dataclasses import dataclass, replace

from tvm import s_tir, te
from tvm.ir import IRModule

from ..epilogue import Epilogue
from ..expr import (
    KAxes,
    Place,
    arguments,
    convolution_gemm,
    gemm_sizes,
    k_axes,
    pack_filter,
    tiled_function,
    transform,
    window,
    window_by_offset,
    window_offsets,
)
from ..problem import ConvProblem
from ..target import CudaTarget
from .base import ALIGNMENT, CONV, PREPARE, TRANSFORM, Schedule
from .cuda_elementwise import elementwise, im2win_elements, write_im2win

# CUDA C++ Programming Guide, compute capabilities: largest grid extent of y and z.
MAX_GRID_YZ = 65535
# Words between rows of the window tile: with channels innermost, neighbouring threads write down a
# column of it, and rows of a multiple of 32 words would put them all in one bank.
PADDING = 4


@dataclass(frozen=True)
class Config:
    """Tile sizes, and the paper's optimisations, each a field of its own.

    block_m, block_p, block_k: output channels, output pixels and window elements of a block's
    tile. thread_m, thread_p: outputs of a thread (1 x 1: no micro-kernel). shared: stage tiles in
    shared memory (otherwise threads read global memory). double_buffer: two stages of it, one
    filled while the other is multiplied. prefetch: a tile goes through registers, loaded before
    the current one is multiplied and stored to shared memory after. vector: words in one load.
    taps: a tile of K is `block_k` channels of one tap, so that its addresses differ by constants;
    otherwise it is `block_k` neighbours in window order, each with its own division by Hf * Wf.
    table: these divisions are done once a block, into a table in shared memory (only where the
    windows need no padding: in I', or in an input without any).
    """

    block_m: int
    block_p: int
    block_k: int
    thread_m: int
    thread_p: int
    shared: bool = True
    double_buffer: bool = True
    prefetch: bool = True
    vector: int = 4
    taps: bool = False
    table: bool = False

    @property
    def threads(self) -> int:
        return (self.block_m // self.thread_m) * (self.block_p // self.thread_p)


class CudaSimt(Schedule):
    kind = "cuda"

    def __init__(self, name: str, explicit: bool):
        self.name = name
        self.explicit = explicit

    def check(self, config: Config, problem: ConvProblem, target: CudaTarget) -> str | None:
        c = config
        for field in ("block_m", "block_p", "block_k", "thread_m", "thread_p"):
            value = getattr(c, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                return f"{field}={value!r}: allowed are whole numbers from 1"
        for field in ("shared", "double_buffer", "prefetch", "taps", "table"):
            if not isinstance(getattr(c, field), bool):
                return f"{field}={getattr(c, field)!r}: allowed are True and False"
        if c.vector not in (1, 2, 4):
            return f"vector={c.vector!r}: allowed are 1, 2 and 4"
        for block, thread in (("block_m", "thread_m"), ("block_p", "thread_p")):
            if getattr(c, block) % getattr(c, thread):
                return f"{thread}={getattr(c, thread)}: a divisor of {block}={getattr(c, block)}"
            width = getattr(c, thread)
            if width > c.vector and width % c.vector:
                return f"{thread}={width}: a divisor or a multiple of vector={c.vector}"
        if not 32 <= c.threads <= 1024:
            return (
                f"block_m={c.block_m}, block_p={c.block_p}, thread_m={c.thread_m}, "
                f"thread_p={c.thread_p}: {c.threads} threads; allowed are 32 to 1024"
            )
        if c.thread_m * c.thread_p > 128:
            return f"thread_m={c.thread_m}, thread_p={c.thread_p}: more than 128 accumulators"
        if (c.double_buffer or c.prefetch or c.table) and not c.shared:
            return "shared=False: double_buffer, prefetch and table need shared=True"
        if c.table and not self._table_works(problem):
            return f"table=True: padding={problem.padding} is read in the kernel, windows differ"
        taken = self._shared_bytes(c, problem)
        if taken > target.shared_bytes:
            allowed = target.shared_bytes
            return f"block_k={c.block_k}: {taken} bytes of shared memory, {allowed} allowed"
        sizes = gemm_sizes(problem)
        axes = _axes(problem, c)
        if sizes.groups * _rounded_m(problem, c) * axes.outer * axes.inner >= 2**31:
            return f"block_m={c.block_m}: in whole tiles the filter has 2**31 elements or more"
        if sizes.groups > MAX_GRID_YZ or -(-sizes.m // c.block_m) > MAX_GRID_YZ:
            return f"block_m={c.block_m}: more than {MAX_GRID_YZ} blocks along y or z"
        return None

    def _table_works(self, problem: ConvProblem) -> bool:
        return self.explicit or not any(map(any, problem.padding))

    def _shared_bytes(self, c: Config, problem: ConvProblem) -> int:
        axes = _axes(problem, c)
        stages = (2 if c.double_buffer else 1) if c.shared else 0
        tiles = [c.block_k * width * stages for width in (c.block_m, c.block_p + PADDING)]
        table = axes.outer * axes.inner if c.table else 0
        sizes = [4 * table, *(problem.itemsize * tile for tile in tiles)]
        # TVM starts every array on a multiple of 64 bytes.
        return sum(-(-size // 64) * 64 for size in sizes)

    def configs(self, problem: ConvProblem, target: CudaTarget):
        for m, p, k, tm, tp, double, prefetch, taps, table in itertools.product(
            (8, 16, 32, 64, 96, 128), (32, 64, 128, 256), (4, 8, 16, 32), (1, 2, 4, 8), (2, 4, 8),
            (True, False), (True, False), (True, False), (True, False),
        ):  # fmt: skip
            config = Config(
                m, p, k, tm, tp, double_buffer=double, prefetch=prefetch, taps=taps, table=table
            )
            if self.check(config, problem, target) is None:
                yield config

    def default(self, problem: ConvProblem, target: CudaTarget) -> Config:
        sizes = gemm_sizes(problem)
        # As tall as the channels allow: the height with the least work on padding, where a lower
        # tile counts more because it reads each window element for fewer channels.
        heights = [h for h in (128, 96, 64, 32, 16, 8, 4, 2) if h < 2 * sizes.m] or [1]
        block_m = min(heights, key=lambda h: -(-sizes.m // h) * h * (1 + 8 / h))
        thread_m = min(8, block_m)
        # A tile of one tap's channels where they come in whole tiles; otherwise, where a warp reads
        # along pixels and K is long enough to pay for it, the table of offsets.
        channels = problem.in_channels // problem.groups
        taps = channels % 16 == 0
        plain = not (taps or problem.channels_last)
        table = plain and problem.k > 64 and self._table_works(problem)
        # 8 x 8 outputs a thread and 64 to 128 threads a block, so that several blocks share a
        # multiprocessor and cover each other's barriers.
        thread_p = 8 if block_m >= 16 else 4
        narrow = problem.channels_last or table
        block_p = 64 if block_m >= 96 or narrow else 128
        block_k = 8 if block_m == 64 and narrow else 16
        rows = block_m // thread_m
        while rows * (block_p // thread_p) < 64:
            block_p *= 2
        # A small output is spread over the multiprocessors (H100: 132) before threads grow fat.
        blocks = -(-sizes.m // block_m) * sizes.groups
        while blocks * -(-sizes.p // block_p) < 132 and rows * (block_p // thread_p) > 32:
            if block_p > 32:
                block_p //= 2
            elif thread_p > 2:
                thread_p //= 2
            else:
                break
            if rows * (block_p // thread_p) < 32:
                thread_p //= 2
        config = Config(block_m, block_p, block_k, thread_m, thread_p, taps=taps, table=table)
        if self._shared_bytes(config, problem) > target.shared_bytes:
            config = replace(config, table=False)
        return config

    def supports(self, problem, target):
        reason = super().supports(problem, target)
        if reason is None and problem.dtype == "bfloat16":
            reason = f"dtype=bfloat16: {self.name} takes float32 and float16"
        if reason is None and gemm_sizes(problem).groups > MAX_GRID_YZ:
            reason = f"groups={problem.groups}: {self.name} takes up to {MAX_GRID_YZ}"
        if reason is None and self.explicit and im2win_elements(problem) >= 2**31:
            reason = f"input_shape={problem.input_shape}: I' has 2**31 elements or more"
        return reason or self.check(self.default(problem, target), problem, target)

    def schedule(self, problem, config, target, epilogue):
        module = {PREPARE: prepare(problem, config)}
        if self.explicit:
            module[TRANSFORM] = write_im2win(problem)
        module[CONV] = convolve(problem, config, epilogue, self.explicit)
        return IRModule(module)


def _axes(problem: ConvProblem, c: Config) -> KAxes:
    return k_axes(problem, c.block_k, "taps" if c.taps else "window")


def _rounded_m(problem: ConvProblem, config: Config) -> int:
    return -(-gemm_sizes(problem).m // config.block_m) * config.block_m


def prepare(problem: ConvProblem, config: Config):
    """The filter in window order, channels innermost. Runs once."""
    w = te.placeholder(problem.weight_shape, problem.dtype, name="w")
    # All channels of a group side by side: one block, of M rounded up to whole tiles.
    axes = _axes(problem, config)
    packed = pack_filter(w, problem, _rounded_m(problem, config), axes)
    return elementwise([w, packed], "packed")


def convolve(problem: ConvProblem, config: Config, epilogue: Epilogue, explicit: bool):
    """x (or I'), packed filter (and bias, residual) -> y."""
    c = config
    sizes = gemm_sizes(problem)
    # M, P and K are rounded up to whole tiles: windows are zero there, and only y is checked.
    axes = _axes(problem, c)
    p_padded = -(-sizes.p // c.block_p) * c.block_p
    height, width = problem.output_size

    args = arguments(problem, epilogue)
    m_padded = _rounded_m(problem, c)
    packed = te.placeholder(
        (problem.groups, 1, axes.outer, axes.inner, m_padded), problem.dtype, name="packed"
    )
    iw = transform(args.x, problem)
    if explicit:
        iw = te.placeholder(iw.shape, problem.dtype, name="im2win")
    source = iw if explicit else args.x
    if c.table:
        offsets = window_offsets(problem, axes, explicit)
        windows = window_by_offset(source, offsets, problem, axes, p_padded, explicit)
    else:
        windows = window(iw, problem, axes, p_padded)
    acc = convolution_gemm(windows, packed)

    def place(g, m, p):
        inside = []
        if m_padded > sizes.m:
            inside.append(m < sizes.m)
        if p_padded > sizes.p:
            inside.append(p < sizes.p)
        n, row, column = p // (height * width), p // width % height, p % width
        return Place(n, g * sizes.m + m, row, column, inside)

    function = tiled_function([source, packed], acc, place, problem, args, epilogue)
    sch = s_tir.Schedule(function)
    y, conv, windows = (sch.get_sblock(name) for name in ("y", "conv", "window"))
    if not explicit and not c.table:
        sch.compute_inline(sch.get_sblock("im2win"))

    # 1. Block tile: every axis of the product, cut into blocks.
    g, m, p = sch.get_loops(y)

    # 2. Micro-kernel: a thread's outputs are `vector`-wide groups, spread over the block so that
    #    neighbouring threads read neighbouring vectors of shared memory.
    wide_m, wide_p = min(c.vector, c.thread_m), min(c.vector, c.thread_p)
    mb, mv, mt, mi = sch.split(
        m, [m_padded // c.block_m, c.thread_m // wide_m, c.block_m // c.thread_m, wide_m]
    )
    pb, pv, pt, pi = sch.split(
        p, [p_padded // c.block_p, c.thread_p // wide_p, c.block_p // c.thread_p, wide_p]
    )
    sch.reorder(g, mb, pb, mv, pv, mt, pt, mi, pi)
    ym, yp = mi, pi
    thread = sch.fuse(mt, pt)
    for loop, axis in (
        (g, "blockIdx.z"), (mb, "blockIdx.y"), (pb, "blockIdx.x"),
        (mv, "vthread.y"), (pv, "vthread.x"), (thread, "threadIdx.x"),
    ):  # fmt: skip
        sch.bind(loop, axis)

    # 3. Accumulators in registers; K in tiles, and steps of one K inside a tile.
    sch.compute_at(conv, thread, preserve_unit_loops=True)
    sch.set_scope(conv, 0, "local")
    *_, gi, mi, pi, outer, inner = sch.get_loops(conv)
    inner, ki = sch.split(inner, [axes.inner // c.block_k, c.block_k])
    sch.reorder(outer, inner, ki, gi, mi, pi)
    kt = sch.fuse(outer, inner)

    # 4. Shared memory: tiles of filter and windows, loaded by all threads together. The window
    #    tile is where the im2win transform happens.
    if c.shared:
        a = sch.cache_read(conv, 1, "shared")
        sch.compute_at(a, kt, preserve_unit_loops=True)
        sch.set_scope(windows, 0, "shared")
        sch.compute_at(windows, kt, preserve_unit_loops=True)
        _load_filter_tile(sch, a, c)
        _load_window_tile(sch, windows, c, problem)
    else:
        sch.compute_inline(windows)
    if c.table:
        table = sch.get_sblock("offsets")
        sch.set_scope(table, 0, "shared")
        sch.compute_at(table, thread, preserve_unit_loops=True)
        loop = sch.fuse(*sch.get_loops(table)[-2:])
        _, threads = sch.split(loop, [None, c.threads])
        sch.bind(threads, "threadIdx.x")

    # 5. Fragments: a thread's channels and pixels of one K step, in vector loads.
    if c.shared:
        for operand in (1, 0):
            fragment = sch.cache_read(conv, operand, "local")
            sch.compute_at(fragment, ki, preserve_unit_loops=True)
            sch.vectorize(sch.get_loops(fragment)[-1])
    # Without shared memory, addresses of a whole unrolled tile would not fit in the registers.
    for loop in (ki, mi, pi) if c.shared else (mi, pi):
        sch.unroll(loop)
    init = sch.decompose_reduction(conv, kt)
    for loop in sch.get_loops(init)[-2:]:
        sch.unroll(loop)

    # 6. Store: whole vectors where the output has them, so that a warp writes full sectors.
    if _vectors_of_output(problem, c):
        if problem.channels_last:
            sch.reorder(yp, ym)
        sch.vectorize(ym if problem.channels_last else yp)

    # 7. Prefetch: tile t + 1 waits in registers while tile t is multiplied, so that no FMA waits
    #    for global memory. The children of the loop over tiles are then [load, store] of the
    #    filter, of the windows, and the multiplication; `order` puts both loads before it and both
    #    stores after it. Double buffer: the stores go to a second stage of shared memory, and do
    #    not wait for the last thread to have read the first.
    if c.prefetch:
        for block in (a, windows):
            sch.annotate(block, "tirx.manifest_shared_memory_local_stage", 1)
            if c.double_buffer:
                sch.annotate(block, "double_buffer_scope", 0)
        sch.annotate(kt, "software_pipeline_stage", [0, 0, 0, 0, 1])
        sch.annotate(kt, "software_pipeline_order", [0, 3, 1, 4, 2])
    elif c.double_buffer:
        sch.annotate(kt, "software_pipeline_stage", [0, 0, 1])
        sch.annotate(kt, "software_pipeline_order", [0, 1, 2])
    return sch.mod["main"].with_attr(ALIGNMENT, _alignment(problem, c, explicit))


def _vectors_of_output(problem: ConvProblem, c: Config) -> bool:
    """Whether a thread's group of neighbouring outputs is one aligned vector in memory."""
    if c.vector == 1:
        return False
    if problem.channels_last:
        return c.thread_m >= c.vector and gemm_sizes(problem).m % c.vector == 0
    height, width = problem.output_size
    return c.thread_p >= c.vector and height * width % c.vector == 0


def _vectors_of_input(problem: ConvProblem, c: Config) -> bool:
    """Whether `vector` neighbouring positions of a window are one aligned vector in memory."""
    channels = problem.in_channels // problem.groups
    return problem.channels_last and c.vector > 1 and channels % c.vector == 0


def _alignment(problem: ConvProblem, c: Config, explicit: bool) -> dict[str, int]:
    """Bytes that the pointers of a caller's arrays have to be multiples of."""
    vector = c.vector * problem.itemsize
    aligned = {}
    if _vectors_of_output(problem, c):
        aligned |= {"y": vector, "residual": vector}
        aligned |= {"bias": vector} if problem.channels_last else {}
    if _vectors_of_input(problem, c) and not explicit:
        aligned["x"] = vector
    return aligned


def _load_filter_tile(sch, block, c: Config) -> None:
    """block_k rows of block_m words, contiguous in global memory and in shared memory."""
    width = c.vector if c.block_m % c.vector == 0 else 1
    loop = sch.fuse(*sch.get_loops(block)[-2:])
    _, threads, vector = sch.split(loop, [None, c.threads, width])
    sch.bind(threads, "threadIdx.x")
    sch.vectorize(vector)


def _load_window_tile(sch, block, c: Config, problem: ConvProblem) -> None:
    """block_k x block_p words: each thread walks the axis that is contiguous in global memory."""
    k, p = sch.get_loops(block)[-2:]
    if problem.channels_last:
        sch.reorder(p, k)
        sch.storage_align(block, 0, axis=-2, factor=32, offset=PADDING)
        loop = sch.fuse(p, k)
    else:
        loop = sch.fuse(k, p)
    width = c.vector if _vectors_of_input(problem, c) and c.block_k % c.vector == 0 else 1
    _, threads, vector = sch.split(loop, [None, c.threads, width])
    sch.bind(threads, "threadIdx.x")
    if width > 1:
        sch.vectorize(vector)


IMPLICIT = CudaSimt("cuda_simt", explicit=False)
EXPLICIT = CudaSimt("cuda_simt_explicit", explicit=True)
