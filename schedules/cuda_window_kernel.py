"""The kernel of `cuda_window`, in TIRx: who copies, who multiplies, and what they wait for."""

# The bodies below are parsed as TIRx: their names are variables of the kernel, not of Python.
# ruff: noqa: F823, F841

import math

import tvm_ffi
from tvm import tirx
from tvm.ir import Var
from tvm.script import tirx as T

from ..epilogue import Epilogue
from ..problem import ConvProblem
from .base import ALIGNMENT
from .cuda_channels_last import is_needed, shape
from .cuda_window_filter import packed_tiles
from .cuda_window_store import Store, is_staged
from .cuda_window_tiles import STAGED_PIXELS, Config, Geometry
from .hopper import (
    ROW_BYTES,
    WARPGROUP,
    WGMMA_K_BYTES,
    WGMMA_M,
    Position,
    Ring,
    registers,
    rows,
    wgmma,
)


@T.meta_class
class Tile:
    """Where the outputs of a block, then of a warpgroup, begin."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        for name in ("filter", "group", "m", "n", "h", "w"):
            setattr(self, name, T.local_scalar("int32"))

    @T.inline
    def find(self, number):
        """Tiles that differ in their channels alone are neighbours: they read the same input."""
        g = T.meta_var(self.geometry)
        self.filter = number % (g.groups * g.m_tiles)
        self.group = self.filter // g.m_tiles
        self.m = self.filter % g.m_tiles * g.config.block_m
        rest: T.let = number // (g.groups * g.m_tiles)
        self.w = rest % g.w_tiles * g.block_w
        self.h = rest // g.w_tiles % g.h_tiles * g.block_h
        self.n = rest // (g.w_tiles * g.h_tiles) * g.block_n

    @T.inline
    def narrow(self, along_m, along_p):
        """To the part of one warpgroup."""
        c = T.meta_var(self.geometry.config)
        self.m = self.m + along_m * WGMMA_M
        if c.columns_apart:
            self.w = self.w + along_p * c.tile_w
        else:
            self.h = self.h + along_p * c.tile_h


@T.meta_class
class Taps:
    """The taps that a copy of the input serves, from copy to copy; see Geometry for the classes."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        for name in ("channels", "class_h", "class_w", "first_h", "first_w"):
            setattr(self, name, T.local_scalar("int32"))

    @T.inline
    def start(self):
        self.channels = 0
        self.class_h = 0
        self.class_w = 0
        self.first_h = 0
        self.first_w = 0

    def _of_class(self, taps, stride, number):
        return (taps - number + stride - 1) // stride

    @property
    def rows(self):
        """Rows of taps that the copy serves."""
        g = self.geometry
        return self._of_class(g.taps_h, g.class_h, self.class_h) if g.copy_h > 1 else 1

    @property
    def columns(self):
        """Columns of taps that the copy serves."""
        g = self.geometry
        return self._of_class(g.taps_w, g.class_w, self.class_w) if g.copy_w > 1 else 1

    @T.inline
    def advance(self):
        g = T.meta_var(self.geometry)
        self.first_w = self.first_w + g.copy_w
        if self.first_w >= self._of_class(g.taps_w, g.class_w, self.class_w):
            self.first_w = 0
            self.first_h = self.first_h + g.copy_h
            if self.first_h >= self._of_class(g.taps_h, g.class_h, self.class_h):
                self.first_h = 0
                self.class_w = self.class_w + 1
                if self.class_w == g.classes_w:
                    self.class_w = 0
                    self.class_h = self.class_h + 1
                    if self.class_h == g.classes_h:
                        self.class_h = 0
                        self.channels = self.channels + 1

    def box(self, tile):
        """Coordinates of the patch of a tile, innermost axis first; negative ones are padding."""
        g = self.geometry
        (top, _), (left, _) = g.problem.padding
        h = tile.h * g.stride_h + (self.class_h + self.first_h * g.class_h) * g.step_h - top
        w = tile.w * g.stride_w + (self.class_w + self.first_w * g.class_w) * g.step_w - left
        pixel = (tile.n, w, h) if g.config.images else (w, h, tile.n)
        return (self.channels * g.row_channels, tile.group, *pixel)


def convolve(problem: ConvProblem, config: Config, epilogue: Epilogue, whole: ConvProblem, grid: int):
    """x (or its copy `nhwc`), packed filter (and bias, residual) -> y.

    problem: as the kernel walks through it; whole: as the caller's arrays are shaped. grid: blocks
    that are launched (of a split K, clusters), each of which takes every grid-th tile.
    """
    g, c = Geometry(problem, config), config
    DTYPE, copied = problem.dtype, is_needed(whole)
    inputs, outputs = math.prod(shape(whole)), math.prod(whole.output_shape)
    packed_shape, FILTER = packed_tiles(g), g.filter_bytes // problem.itemsize
    THREADS, CONSUMERS, SPLIT = c.threads, c.consumers, c.split
    REGISTERS = registers(CONSUMERS, c.blocks)
    GRID, TILES = grid, g.tiles
    RESIDENT = c.filter_stages == 0
    GROUPS = c.pixels // 8  # eights of pixels of a warpgroup
    SHARE = -(-GROUPS // SPLIT)  # of them, those that one block of a cluster stores
    STEPS = ROW_BYTES // WGMMA_K_BYTES
    RAGGED = g.last_steps < STEPS
    # Warps that read a stage: of all consumers, or with turns of the one whose turn it is.
    READERS = 4 if c.turns else 4 * CONSUMERS
    MAP = g.tensor_map
    COPIES, FILTER_TILES = g.copies, g.filter_tiles
    OUT_BYTES = c.sums * 4 * WARPGROUP

    # fmt: off
    @T.prim_func
    def function(
        x: T.Buffer(shape(whole), DTYPE),
        packed: T.Buffer(packed_shape, DTYPE),
        bias: T.Buffer((whole.out_channels,), DTYPE),
        residual: T.Buffer(whole.output_shape, DTYPE),
        y: T.Buffer(whole.output_shape, DTYPE),
    ):
        x_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(MAP.encode(x_map, x.data, DTYPE))
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": c.blocks})
        if SPLIT > 1:
            rank = T.cta_id_in_cluster([SPLIT])
        else:
            rank = T.meta_var(0)
        block = T.cta_id([GRID * SPLIT])
        thread = T.thread_id([THREADS])
        # The same in all lanes of a warp, and the compiler shall know.
        warpgroup: T.let = T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), thread // WARPGROUP, 0, 32, 32)
        packed_flat = T.decl_buffer((math.prod(packed_shape),), DTYPE, data=packed.data)
        y_flat = T.decl_buffer((outputs,), DTYPE, data=y.data)
        if epilogue.residual:
            residual_flat = T.decl_buffer((outputs,), DTYPE, data=residual.data)
        else:
            residual_flat = T.meta_var(None)

        pool = T.SMEMPool()
        pixels = Ring(pool, c.pixel_stages, g.stage_bytes, READERS)
        filters = Ring(pool, g.filter_stages, g.filter_bytes, READERS)
        staging = pool.alloc((CONSUMERS * 2 * STAGED_PIXELS * WGMMA_M,), DTYPE, align=1024)
        pixels.place_barriers(pool)
        filters.place_barriers(pool)
        turn = pool.alloc((2,), "uint64", align=8)
        pool.commit()
        if thread == 0:
            pixels.init()
            filters.init()
            for i in T.unroll(2):
                T.ptx.mbarrier.init.shared.b64(turn.ptr_to([i]), T.uint32(4))
            # What was initialised is to be seen by the copy engine, and below by all threads.
            T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()

        @T.inline
        def meet_cluster():
            T.ptx["barrier.cluster.arrive.release"]()
            T.ptx["barrier.cluster.wait.acquire"]()

        tile = Tile(g)
        taps = Taps(g)
        pixels_at = Position(pixels.stages)
        filters_at = Position(filters.stages)
        pixels_at.start()
        filters_at.start()
        taps.start()
        number: T.int32 = block // SPLIT
        # Of the copies of a tile, those of this block of a cluster.
        first_copy: T.let = rank * COPIES // SPLIT
        last_copy: T.let = (rank + 1) * COPIES // SPLIT
        skipped: T.int32 = 0  # tiles of the filter before them
        if SPLIT > 1:
            for _ in T.serial(first_copy):
                skipped = skipped + taps.rows * taps.columns
                taps.advance()
        mine: T.int32 = 0

        if warpgroup == 0:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](REGISTERS.producer)
            # 1. One thread brings the patches of the input,
            if thread == 0:
                while number < TILES:
                    tile.find(number)
                    for _ in T.serial(last_copy - first_copy):
                        pixels.expect(pixels_at, g.patch_bytes)
                        pixels.copy_box(pixels_at, x_map, taps.box(tile))
                        pixels_at.advance()
                        taps.advance()
                    taps.channels = 0
                    number = number + GRID
            # 2. another one the tiles of the filter, each for as many taps as there is room.
            if thread == 32:
                if SPLIT > 1:
                    mine = 0
                    for _ in T.serial(last_copy - first_copy):
                        mine = mine + taps.rows * taps.columns
                        taps.advance()
                else:
                    mine = FILTER_TILES
                while number < TILES:
                    tile.find(number)
                    for t in T.serial(mine):
                        filters.expect(filters_at, g.filter_bytes)
                        filters.copy(
                            filters_at,
                            packed_flat.ptr_to([((tile.filter * FILTER_TILES + skipped + t)
                                                 * FILTER)]),
                            g.filter_bytes)
                        filters_at.advance()
                    # A filter that stays is the same for all tiles of a block: see the schedule.
                    number = TILES if RESIDENT else number + GRID
            if SPLIT > 1:
                meet_cluster()
                meet_cluster()
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](REGISTERS.consumer)
            consumer: T.let = warpgroup - 1
            local: T.let = thread % WARPGROUP
            lane: T.let = thread % 32
            along_m: T.let = 0 if c.turns else consumer % c.along_m
            along_p: T.let = 0 if c.turns else consumer // c.along_m
            sums = T.alloc_local((c.sums,), "float32")
            filter_view: T.let = filters.descriptor(8, along_m * WGMMA_M)
            pixel_view: T.let = pixels.descriptor(g.group_rows, along_p * g.warpgroup_rows)
            store = Store(g, epilogue, staging, consumer, (bias, residual_flat, y_flat))
            # Behind by one product: what it read may be filled again.
            pixels_read = Position(pixels.stages)
            filters_read = Position(filters.stages)
            pixels_read.start()
            filters_read.start()
            my_turn: T.int32 = 1
            done: T.int32 = 0
            if c.turns:
                number = number + consumer * GRID
                if consumer == 1:
                    pixels_at.skip(COPIES)
                    pixels_read.skip(COPIES)
                    if not RESIDENT:
                        filters_at.skip(FILTER_TILES)
                        filters_read.skip(FILTER_TILES)
                    my_turn = 0

            @T.inline
            def multiply(u, v, row_steps):
                # One tap: 64 channels by the pixels that it meets, over a row of channels.
                view: T.let = pixel_view + T.Cast("uint64", pixels_at.stage * pixels.stage_step
                                                  + rows(u * g.tap_row + v * g.tap_column))
                weights: T.let = filter_view + T.Cast(
                    "uint64", filters_at.stage * filters.stage_step)
                # Sums that a product yet to be waited for writes are not to be touched meanwhile.
                T.ptx.wgmma.fence.sync.aligned()
                for k in T.unroll(row_steps):
                    for q in T.unroll(c.pieces):
                        wgmma(DTYPE, c.piece_n, sums, q * (c.piece_n // 2),
                              weights + T.uint64(k * (WGMMA_K_BYTES // 16)),
                              view + T.uint64(rows(q * g.piece_rows) + k * (WGMMA_K_BYTES // 16)),
                              T.Or(done > 0, k > 0))
                T.ptx.wgmma.commit_group.sync.aligned()

            while number < TILES:
                tile.find(number)
                tile.narrow(along_m, along_p)
                done = 0
                if RESIDENT:
                    filters_at.start()
                if c.turns:
                    # The other warpgroup has given its last product to the tensor cores.
                    T.cuda.mbarrier_wait(turn.ptr_to([consumer]), my_turn)
                    my_turn = my_turn ^ 1
                # 3. Products: a tap is a shifted view of the patch.
                for copy in T.serial(last_copy - first_copy):
                    pixels.wait(pixels_at)
                    for u in T.serial(taps.rows):
                        for v in T.serial(taps.columns):
                            filters.wait(filters_at)
                            if RAGGED:
                                if taps.channels == g.channel_rows - 1:
                                    multiply(u, v, g.last_steps)
                                else:
                                    multiply(u, v, STEPS)
                            else:
                                multiply(u, v, STEPS)
                            # All but this product are over: others may fill what they read.
                            T.ptx.wgmma.wait_group.sync.aligned(1)
                            if not RESIDENT:
                                if done > 0:
                                    filters.release(filters_read, lane)
                                    filters_read.advance()
                            if T.And(copy > 0, T.And(u == 0, v == 0)):
                                pixels.release(pixels_read, lane)
                                pixels_read.advance()
                            done = done + 1
                            filters_at.advance()
                    pixels_at.advance()
                    taps.advance()
                taps.channels = 0
                if c.turns:
                    if lane == 0:
                        T.ptx.mbarrier.arrive.shared.b64(turn.ptr_to([1 - consumer]), T.uint32(1))
                T.ptx.wgmma.wait_group.sync.aligned(0)
                for i in T.unroll(c.sums):
                    T.ptx["mov.f32"](sums[i], sums[i])  # keeps reads of the sums behind the wait
                if not RESIDENT:
                    filters.release(filters_read, lane)
                    filters_read.advance()
                pixels.release(pixels_read, lane)
                pixels_read.advance()
                if c.turns:
                    pixels_at.skip(COPIES)
                    pixels_read.skip(COPIES)
                    if not RESIDENT:
                        filters_at.skip(FILTER_TILES)
                        filters_read.skip(FILTER_TILES)
                # 4. Outputs.
                if SPLIT == 1:
                    store.run(tile, local, sums, 0, GROUPS)
                number = number + GRID * (2 if c.turns else 1)
            if SPLIT > 1:
                # The blocks of a cluster leave their sums where the rings were; each adds up and
                # stores a share of the pixels, always in the same order.
                parts = T.decl_buffer((CONSUMERS * GROUPS * WARPGROUP * 4,), "float32",
                                      data=pixels.data.data)
                T.ptx.bar.sync(T.uint32(15), T.uint32(CONSUMERS * WARPGROUP))
                for j in T.unroll(GROUPS):
                    for e in T.vectorized(4):
                        parts[((consumer * GROUPS + j) * WARPGROUP + local) * 4 + e] = sums[
                            j * 4 + e]
                meet_cluster()
                total = T.alloc_local((SHARE * 4,), "float32")
                part = T.alloc_local((4,), "float32")
                address: T.uint32 = T.uint32(0)
                for j in T.unroll(SHARE):
                    for e in T.unroll(4):
                        total[j * 4 + e] = T.float32(0)
                    if rank * SHARE + j < GROUPS:
                        for other in T.unroll(SPLIT):
                            T.ptx["mapa.shared::cluster.u32"](
                                address,
                                T.cuda.cvta_generic_to_shared(parts.ptr_to(
                                    [((consumer * GROUPS + rank * SHARE + j) * WARPGROUP + local)
                                     * 4])),
                                T.uint32(other))
                            T.ptx["ld.shared::cluster.v4.f32"](
                                part[0], part[1], part[2], part[3], address)
                            for e in T.unroll(4):
                                total[j * 4 + e] = total[j * 4 + e] + part[e]
                # Nobody leaves while another one still reads its sums.
                meet_cluster()
                store.run(tile, local, total, rank * SHARE, SHARE)
    # fmt: on

    x = function.params[0]
    source = tirx.decl_buffer(x.shape, x.dtype, "nhwc") if copied else x
    body = tvm_ffi.structural_map(function.body, (Var, lambda v: source if v.same_as(x) else v))
    unused = ("" if epilogue.bias else "bias", "" if epilogue.residual else "residual")
    parameters = [source, *(p for p in function.params[1:] if p.name not in unused)]
    function = tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)
    vectors = ({} if copied else {"x": 16}) | (
        {"y": 16, "residual": 16} if is_staged(g) else {})
    return function.with_attr(ALIGNMENT, vectors)
