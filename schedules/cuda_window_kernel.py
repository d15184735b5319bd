"""The kernel of `cuda_window`, in TIRx: who copies, who multiplies, and what they wait for."""

# The bodies below are parsed as TIRx: their names are variables of the kernel, not of Python.

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
from .cuda_window_store import Store
from .cuda_window_tiles import Config, Geometry
from .cuda_window_walk import Taps, Tile
from .hopper import (
    ROW_BYTES,
    WARPGROUP,
    WGMMA_K_BYTES,
    WGMMA_M,
    ClusterSum,
    Position,
    Ring,
    Turns,
    meet_cluster,
    registers,
    rows,
    settle,
    wgmma,
)


def convolve(
    problem: ConvProblem, config: Config, epilogue: Epilogue, whole: ConvProblem, grid: int
):
    """x (or its copy `nhwc`), packed filter (and bias, residual) -> y.

    problem: as the kernel walks through it; whole: as the caller's arrays are shaped. grid: blocks
    that are launched (of a split K, clusters), each of which takes every grid-th tile.
    """
    g, c = Geometry(problem, config), config
    DTYPE = problem.dtype
    outputs, packed_shape = math.prod(whole.output_shape), packed_tiles(g)
    SOURCE = shape(whole) if is_needed(problem) else whole.input_shape
    CONSUMERS, SPLIT, GRID, TILES = c.consumers, c.split, grid, g.tiles
    COPIES, FILTER_TILES, FILTER = g.copies, g.filter_tiles, math.prod(packed_shape[1:])
    MAP, REGISTERS = g.tensor_map, registers(CONSUMERS, c.blocks)
    RESIDENT = c.filter_stages == 0
    STAGED = max(1, CONSUMERS * g.staging_bytes // problem.itemsize)
    GROUPS = c.pixels // 8  # eights of pixels of a warpgroup
    STEPS = ROW_BYTES // WGMMA_K_BYTES
    # Warps that read a stage: of all consumers, or with turns of the one whose turn it is.
    READERS = 4 if c.turns else 4 * CONSUMERS

    # fmt: off
    @T.prim_func
    def function(
        x: T.Buffer(SOURCE, DTYPE),
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
        thread = T.thread_id([c.threads])
        # The same in all lanes of a warp, and the compiler shall know.
        warpgroup: T.let = T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), thread // WARPGROUP, 0, 32, 32)
        packed_flat = T.decl_buffer((math.prod(packed_shape),), DTYPE, data=packed.data)
        y_flat = T.decl_buffer((outputs,), DTYPE, data=y.data)
        if epilogue.residual:
            residual_flat = T.decl_buffer((outputs,), DTYPE, data=residual.data)
        else:
            residual_flat = T.meta_var(None)

        # 1. Shared memory: patches of the input, tiles of the filter, outputs on their way.
        pool = T.SMEMPool()
        pixels = Ring(pool, c.pixel_stages, g.stage_bytes, READERS)
        filters = Ring(pool, g.filter_stages, g.filter_bytes, READERS)
        staging = pool.alloc((STAGED,), DTYPE, align=16)
        pixels.place_barriers(pool)
        filters.place_barriers(pool)
        turns = Turns(pool)
        pool.commit()
        if thread == 0:
            pixels.init()
            filters.init()
            turns.init()
            # What was initialised is to be seen by the copy engine, and below by all threads.
            T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()

        # 2. Everybody begins with this block's first tile, and its share of the cluster's copies.
        tile = Tile(g)
        taps = Taps(g)
        pixels_at = Position(pixels.stages)
        filters_at = Position(filters.stages)
        pixels_at.start()
        filters_at.start()
        taps.start()
        number: T.int32 = block // SPLIT
        first_copy: T.let = rank * COPIES // SPLIT
        copies: T.let = (rank + 1) * COPIES // SPLIT - first_copy
        if SPLIT > 1:
            taps.take(first_copy)
        first_filter: T.let = taps.passed

        if warpgroup == 0:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](REGISTERS.producer)
            # 3. One thread brings the patches of the input,
            if thread == 0:
                while number < TILES:
                    tile.find(number)
                    for _ in T.serial(copies):
                        pixels.expect(pixels_at, g.patch_bytes)
                        pixels.copy_box(pixels_at, x_map, taps.box(tile))
                        pixels_at.advance()
                        taps.advance()
                    taps.channels = 0
                    number = number + GRID
            # 4. another one the tiles of the filter, both as far ahead as there is room.
            if thread == 32:
                if SPLIT > 1:
                    taps.take(copies)
                else:
                    taps.passed = FILTER_TILES
                while number < TILES:
                    tile.find(number)
                    for t in T.serial(taps.passed - first_filter):
                        filters.expect(filters_at, g.filter_bytes)
                        at = T.meta_var((tile.filter * FILTER_TILES + first_filter + t) * FILTER)
                        filters.copy(filters_at, packed_flat.ptr_to([at]), g.filter_bytes)
                        filters_at.advance()
                    # A filter that stays is that of all tiles of the block (see the schedule).
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
            done: T.int32 = 0  # products of the tile

            @T.inline
            def skip_tile():
                # What the other warpgroup takes in its turn.
                pixels_at.skip(COPIES)
                pixels_read.skip(COPIES)
                if not RESIDENT:
                    filters_at.skip(FILTER_TILES)
                    filters_read.skip(FILTER_TILES)

            @T.inline
            def multiply(u, v, row_steps):
                # One tap: 64 channels by the pixels that it meets, over a row of channels.
                view: T.let = pixel_view + T.Cast("uint64", pixels_at.stage * pixels.stage_step
                                                  + rows(u * g.tap_row + v * g.tap_column))
                weights: T.let = filter_view + filters.offset(filters_at)
                # Nobody touches the sums before the products that write them are waited for.
                T.ptx.wgmma.fence.sync.aligned()
                for k in T.unroll(row_steps):
                    for q in T.unroll(c.pieces):
                        wgmma(DTYPE, c.piece_n, sums, q * (c.piece_n // 2),
                              weights + T.uint64(k * (WGMMA_K_BYTES // 16)),
                              view + T.uint64(rows(q * g.piece_rows) + k * (WGMMA_K_BYTES // 16)),
                              T.Or(done > 0, k > 0))
                T.ptx.wgmma.commit_group.sync.aligned()

            my_turn: T.int32 = 1  # the first one's is not waited for
            if c.turns:
                if consumer == 1:
                    my_turn = 0
                    number = number + GRID
                    skip_tile()
            while number < TILES:
                tile.find(number)
                tile.narrow(along_m, along_p)
                done = 0
                if RESIDENT:
                    filters_at.start()
                if c.turns:
                    # The other warpgroup has given its last product to the tensor cores.
                    turns.wait(consumer, my_turn)
                    my_turn = my_turn ^ 1
                # 5. Products: a tap is a shifted view of the patch.
                for copy in T.serial(copies):
                    pixels.wait(pixels_at)
                    for u in T.serial(taps.rows):
                        for v in T.serial(taps.columns):
                            filters.wait(filters_at)
                            if g.last_steps < STEPS:
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
                            if T.And(copy > 0, T.And(u == 0, v == 0)):
                                pixels.release(pixels_read, lane)
                            done = done + 1
                            filters_at.advance()
                    pixels_at.advance()
                    taps.advance()
                taps.channels = 0
                if c.turns:
                    turns.give(1 - consumer, lane)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                settle(sums, c.sums)
                if not RESIDENT:
                    filters.release(filters_read, lane)
                pixels.release(pixels_read, lane)
                if c.turns:
                    skip_tile()
                # 6. Outputs.
                if SPLIT == 1:
                    store.run(tile, local, sums, 0, GROUPS)
                number = number + GRID * (2 if c.turns else 1)
            if SPLIT > 1:
                # The sums of a cluster's blocks meet where the rings were.
                cluster = ClusterSum(pixels.data.data, SPLIT, CONSUMERS * WARPGROUP, GROUPS)
                # The last of this block's consumers has read its operands.
                T.ptx.bar.sync(T.uint32(15), T.uint32(CONSUMERS * WARPGROUP))
                cluster.leave(thread - WARPGROUP, sums)
                meet_cluster()
                cluster.collect(thread - WARPGROUP, rank)
                # Nobody leaves while another one still reads its sums.
                meet_cluster()
                store.run(tile, local, cluster.total, rank * cluster.share, cluster.share)
    # fmt: on

    x = function.params[0]
    copied = is_needed(problem)
    source = tirx.decl_buffer(x.shape, x.dtype, "nhwc") if copied else x
    body = tvm_ffi.structural_map(function.body, (Var, lambda v: source if v.same_as(x) else v))
    unused = ("" if epilogue.bias else "bias", "" if epilogue.residual else "residual")
    parameters = [source, *(p for p in function.params[1:] if p.name not in unused)]
    function = tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)
    vectors = {"y": g.alignment, "residual": g.alignment} | ({} if copied else {"x": 16})
    return function.with_attr(ALIGNMENT, vectors)
