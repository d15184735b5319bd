"""The kernel of `cuda_window_fp32`, in TIRx: who copies, splits, multiplies, and who waits."""

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
from .cuda_window_fp32_filter import packed_shape
from .cuda_window_fp32_split import Split, Splitter
from .cuda_window_fp32_tiles import LOW, ROW_CHANNELS, STEP, Config, SplitGeometry, registers
from .cuda_window_store import Store
from .cuda_window_walk import Taps, Tile
from .hopper import (
    WARPGROUP,
    WGMMA_M,
    ClusterSum,
    Position,
    Ring,
    Turns,
    meet_cluster,
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
    g, c = SplitGeometry(problem, config), config
    outputs, PACKED = math.prod(whole.output_shape), packed_shape(g)
    CONSUMERS, SPLIT, GRID, TILES = c.consumers, c.split, grid, g.tiles
    COPIES, FILTER_TILES, FILTER = g.copies, g.filter_tiles, PACKED[1]
    MAP, REGISTERS = g.tensor_map, registers(CONSUMERS)
    RESIDENT = c.filter_stages == 0
    GROUPS = c.pixels // 8  # eights of pixels of a warpgroup
    BLOCK_M, BY_PATCH = c.block_m, c.block == "patch"
    HELD = g.held
    STEPS = 2  # products over a row of channels
    # Columns of taps of a copy. Where all copies have as many, the loop is unrolled: the compiler
    # moves all sums to other registers and back once a round.
    if g.class_w == 1 or g.copy_w == 1:
        COLUMNS, over_columns = g.copy_w, T.unroll
    else:
        COLUMNS, over_columns = None, T.serial

    # fmt: off
    @T.prim_func
    def function(
        x: T.Buffer(shape(whole), "float32"),
        packed: T.Buffer(PACKED, "float32"),
        bias: T.Buffer((whole.out_channels,), "float32"),
        residual: T.Buffer(whole.output_shape, "float32"),
        y: T.Buffer(whole.output_shape, "float32"),
    ):
        x_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        # Bits as they are: a map of floats would round them for tf32.
        T.evaluate(MAP.encode(x_map, x.data, "uint32"))
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        if SPLIT > 1:
            rank = T.cta_id_in_cluster([SPLIT])
        else:
            rank = T.meta_var(0)
        block = T.cta_id([GRID * SPLIT])
        thread = T.thread_id([g.threads])
        # The same in all lanes of a warp, and the compiler shall know.
        warpgroup: T.let = T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), thread // WARPGROUP, 0, 32, 32)
        packed_flat = T.decl_buffer((math.prod(PACKED),), "float32", data=packed.data)
        y_flat = T.decl_buffer((outputs,), "float32", data=y.data)
        if epilogue.residual:
            residual_flat = T.decl_buffer((outputs,), "float32", data=residual.data)
        else:
            residual_flat = T.meta_var(None)

        # 1. Shared memory: patches and their scales, tiles of the filter and theirs.
        pool = T.SMEMPool()
        pixels = Ring(pool, c.pixel_stages, g.stage_bytes, 4 * CONSUMERS)
        filters = Ring(pool, g.filter_stages, g.filter_bytes, 4 * CONSUMERS)
        weights = pool.alloc((g.filter_stages * BLOCK_M,), "float32", align=16)
        splitter = Splitter(g, pixels, pool)
        pixels.place_barriers(pool)
        filters.place_barriers(pool)
        splitter.place_barriers(pool)
        turns = Turns(pool)
        pool.commit()
        if thread == 0:
            pixels.init()
            filters.init()
            splitter.init()
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
                        filters.expect(filters_at, g.filter_bytes + g.weight_bytes)
                        at = T.meta_var((tile.filter * FILTER_TILES + first_filter + t) * FILTER)
                        filters.copy(filters_at, packed_flat.ptr_to([at]), g.filter_bytes)
                        T.ptx["cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"](
                            weights.ptr_to([filters_at.stage * BLOCK_M]),
                            packed_flat.ptr_to([at + BLOCK_M * ROW_CHANNELS]),
                            T.uint32(g.weight_bytes), filters.full.ptr_to([filters_at.stage]))
                        filters_at.advance()
                    # A filter that stays is that of all tiles of the block (see the schedule).
                    number = TILES if RESIDENT else number + GRID
            if SPLIT > 1:
                meet_cluster()
                meet_cluster()
        elif warpgroup == 1:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](REGISTERS.splitter)
            # 5. A warpgroup makes halves of each patch as it lands.
            mine = Split()
            mine.buffer = 0
            while number < TILES:
                for _ in T.serial(copies):
                    splitter.run(pixels_at, thread % WARPGROUP, mine)
                    pixels_at.advance()
                number = number + GRID
            if SPLIT > 1:
                meet_cluster()
                meet_cluster()
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](REGISTERS.consumer)
            consumer: T.let = warpgroup - 2
            local: T.let = thread % WARPGROUP
            lane: T.let = thread % 32
            along_m: T.let = consumer % c.along_m
            along_p: T.let = consumer // c.along_m
            sums = T.alloc_local((c.sums,), "float32")  # of the tile, rounded to nearest
            parts = T.alloc_local((c.sums,), "float32")  # of a tap and a row of channels, scaled
            weight = T.alloc_local((2,), "float32")  # scales of its two rows of the filter,
            held = T.alloc_local((HELD,), "float32")  # of its images in a patch, or of two pixels
            factor = T.alloc_local((2 * HELD,), "float32")  # and both together
            filter_view: T.let = filters.descriptor(8, along_m * WGMMA_M)
            pixel_view: T.let = pixels.descriptor(g.group_rows, along_p * g.warpgroup_rows)
            # The thread's first pixel in a patch, and its first row in a tile of the filter.
            first_pixel: T.let = along_p * g.warpgroup_rows + lane % 4 * 2
            first_row: T.let = along_m * WGMMA_M + local // 32 * 16 + lane // 4
            store = Store(g, epilogue, weights, consumer, (bias, residual_flat, y_flat))
            my_turn: T.int32 = 1 - consumer  # the first one's is not waited for

            @T.inline
            def multiply(tap_rows, row_steps):
                # One tap: 64 channels by the pixels that it meets, over a row of channels; small
                # products first, as the tensor cores truncate what they add.
                view: T.let = pixel_view + T.Cast("uint64", pixels_at.stage * pixels.stage_step
                                                  + rows(tap_rows))
                filter_rows: T.let = filter_view + filters.offset(filters_at)
                if CONSUMERS == 2:
                    # The other warpgroup has given its products to the tensor cores: so one
                    # promotes while the other multiplies, and not both at once.
                    turns.wait(consumer, my_turn)  # noqa: F823
                    my_turn = my_turn ^ 1  # noqa: F841
                # Nobody touches the parts before the products that write them are waited for.
                T.ptx.wgmma.fence.sync.aligned()
                for product in T.unroll(3):
                    # Filter and pixels: high and low, low and high, high and high.
                    low_f = T.meta_var(T.Cast("uint64", product % 2 * LOW))
                    low_p = T.meta_var(T.Cast("uint64", (2 - product) // 2 * LOW))
                    for k in T.unroll(row_steps):
                        for q in T.unroll(c.pieces):
                            wgmma("float16", c.piece_n, parts, q * (c.piece_n // 2),
                                  filter_rows + low_f + T.uint64(k * STEP),
                                  view + low_p + T.uint64(rows(q * g.piece_rows) + k * STEP),
                                  T.Or(product > 0, k > 0))
                T.ptx.wgmma.commit_group.sync.aligned()
                if CONSUMERS == 2:
                    turns.give(1 - consumer, lane)

            @T.inline
            def hold():
                # The scales of a patch: of images 2 t and 2 t + 1 of every eight.
                if c.images:
                    for i in T.unroll(HELD // 2):
                        for e in T.vectorized(2):
                            held[i * 2 + e] = splitter.scales[
                                (pixels_at.stage * (g.period // 2) + i * 4 + lane % 4) * 2 + e]
                else:
                    held[0] = splitter.scales[pixels_at.stage]

            @T.inline
            def weigh():
                # The scales of a tap's tile of the filter, times those of the pixels.
                for half in T.unroll(2):
                    weight[half] = weights[filters_at.stage * BLOCK_M + first_row + half * 8]
                if BY_PATCH:
                    for half in T.unroll(2):
                        for i in T.unroll(HELD):
                            factor[half * HELD + i] = held[i] * weight[half]

            @T.inline
            def promote(tap_rows):
                # Parts become sums: times the scales, powers of two, and rounded to nearest.
                at: T.let = pixels_at.stage * g.patch_rows + first_pixel + tap_rows
                for q in T.unroll(c.pieces):
                    for j in T.unroll(c.piece_n // 8):
                        if not BY_PATCH:
                            for e in T.vectorized(2):
                                held[e] = splitter.scales[
                                    (at + q * g.piece_rows + j * g.group_rows) * 2 + e]
                            for half in T.unroll(2):
                                for e in T.unroll(2):
                                    factor[half * 2 + e] = held[e] * weight[half]
                        for half in T.unroll(2):
                            for e in T.unroll(2):
                                i = T.meta_var((q * (c.piece_n // 8) + j) * 4 + half * 2 + e)
                                which = T.meta_var(half * HELD + (j * 2 % HELD + e) % HELD)
                                T.ptx["fma.rn.f32"](sums[i], parts[i], factor[which], sums[i])

            while number < TILES:
                tile.find(number)
                tile.narrow(along_m, along_p)
                for i in T.unroll(c.sums):
                    sums[i] = T.float32(0)
                if RESIDENT:
                    filters_at.start()
                # 6. Products: a tap is a shifted view of the patch.
                for _ in T.serial(copies):
                    splitter.wait(pixels_at)
                    if BY_PATCH:
                        hold()
                    for u in T.serial(taps.rows):
                        for v in over_columns(taps.columns if COLUMNS is None else COLUMNS):
                            filters.wait(filters_at)
                            tap_rows: T.let = u * g.tap_row + v * g.tap_column
                            if g.last_steps < STEPS:
                                if taps.channels == g.channel_rows - 1:
                                    multiply(tap_rows, g.last_steps)
                                else:
                                    multiply(tap_rows, STEPS)
                            else:
                                multiply(tap_rows, STEPS)
                            weigh()
                            T.ptx.wgmma.wait_group.sync.aligned(0)
                            settle(parts, c.sums)
                            promote(tap_rows)
                            if RESIDENT:
                                filters_at.advance()
                            else:
                                # The copy engine may overwrite the scales that this warp has read:
                                # they were read, which a release alone does not say to it.
                                T.ptx.fence.proxy.async_.shared__cta()
                                T.cuda.warp_sync()
                                filters.release(filters_at, lane)
                    # All lanes have read the patch's scales: it may be filled again.
                    T.cuda.warp_sync()
                    pixels.release(pixels_at, lane)
                    taps.advance()
                taps.channels = 0
                # 7. Outputs.
                if SPLIT == 1:
                    store.run(tile, local, sums, 0, GROUPS)
                number = number + GRID
            if SPLIT > 1:
                # The sums of a cluster's blocks meet where the rings were.
                cluster = ClusterSum(pixels.data.data, SPLIT, CONSUMERS * WARPGROUP, GROUPS)
                # The last of this block's consumers has read its operands.
                T.ptx.bar.sync(T.uint32(15), T.uint32(CONSUMERS * WARPGROUP))
                cluster.leave(thread - 2 * WARPGROUP, sums)
                meet_cluster()
                cluster.collect(thread - 2 * WARPGROUP, rank)
                # Nobody leaves while another one still reads its sums.
                meet_cluster()
                store.run(tile, local, cluster.total, rank * cluster.share, cluster.share)
    # fmt: on

    x = function.params[0]
    copied = is_needed(whole)
    source = tirx.decl_buffer(x.shape, x.dtype, "nhwc") if copied else x
    body = tvm_ffi.structural_map(function.body, (Var, lambda v: source if v.same_as(x) else v))
    unused = ("" if epilogue.bias else "bias", "" if epilogue.residual else "residual")
    parameters = [source, *(p for p in function.params[1:] if p.name not in unused)]
    function = tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)
    vectors = {"y": g.alignment, "residual": g.alignment} | ({} if copied else {"x": 16})
    return function.with_attr(ALIGNMENT, vectors)
