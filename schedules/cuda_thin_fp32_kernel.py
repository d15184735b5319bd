"""The kernel of `cuda_thin_fp32`, in TIRx: that of `cuda_thin` with operands that are split.

The tensor cores truncate as they add. Of two halves they add up a group of steps only, small
products first, and a sum that rounds to nearest takes the result. Of three halves the products of
the first ones have sums of their own, in which nothing is lost; the others meet them at the end.
"""

# The bodies below are parsed as TIRx: their names are variables of the kernel, not of Python.

import math

from tvm.script import tirx as T

from ..epilogue import Epilogue
from ..problem import ConvProblem
from . import cuda_thin_rows as rows
from .cuda_thin_arrays import load_bias, with_arrays_of
from .cuda_thin_fp32_filter import packed_shape
from .cuda_thin_fp32_rows import MeasuredElements, Pixels
from .cuda_thin_fp32_split import Halves
from .cuda_thin_fp32_tiles import PRODUCTS, STEP, WARPS, SplitGeometry
from .cuda_thin_store import Store, place_of_row
from .cuda_thin_tiles import Config, registers
from .cuda_thin_turns import InTurn
from .cuda_thin_window import RingWindow, ring_row
from .hopper import ATOM_ROWS, ROW_BYTES, WARPGROUP, WGMMA_K_BYTES, WGMMA_M, Position, settle
from .hopper import Ring as CopyRing


def convolve(problem: ConvProblem, config: Config, epilogue: Epilogue, parts: int):
    """x, packed filter (and bias, residual) -> y.

    parts: blocks that divide the pixels among them, tiles in a row each.
    """
    g, c = SplitGeometry(problem, config), config
    inputs, outputs = math.prod(problem.input_shape), math.prod(problem.output_shape)
    FILTER, IMAGE = g.filter_bytes // 4, g.image_bytes
    CONSUMERS, BLOCK_N, REGISTERS = c.warpgroups, c.block_n, registers(c)
    WGMMA = f"wgmma.mma_async.sync.aligned.m64n{BLOCK_N}k16.f32.f16.f16"
    PARTS, TILES, N_TILES = parts, g.tiles, g.n_tiles
    STAGED = max(1, CONSUMERS * g.staging_bytes // 4)
    STEPS, EACH, GROUPS, PERIOD = g.k_steps, c.steps, g.groups, g.period
    PASS = (GROUPS - 1) // 2  # the group after which another warpgroup may begin
    CHUNK_STEPS = ROW_BYTES // WGMMA_K_BYTES
    HALVES = g.halves

    def place(group, step, half):
        """Of a step's four registers of operands: of a group, and one of the halves."""
        return ((group % 2 * EACH + step) * HALVES + half) * 4

    # fmt: off
    @T.prim_func
    def function(
        x: T.Buffer(problem.input_shape, "float32"),
        packed: T.Buffer(packed_shape(g), "float32"),
        bias: T.Buffer((problem.out_channels,), "float32"),
        residual: T.Buffer(problem.output_shape, "float32"),
        y: T.Buffer(problem.output_shape, "float32"),
    ):
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": c.blocks})
        block = T.cta_id([PARTS * N_TILES])
        thread = T.thread_id([c.threads])
        # The same in all lanes of a warp, and the compiler shall know.
        warpgroup: T.let = T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), thread // WARPGROUP, 0, 32, 32)
        x_bits = T.decl_buffer((inputs,), "uint32", data=x.data)
        packed_flat = T.decl_buffer((N_TILES * FILTER,), "float32", data=packed.data)
        y_flat = T.decl_buffer((outputs,), "float32", data=y.data)
        if epilogue.residual:
            residual_flat = T.decl_buffer((outputs,), "float32", data=residual.data)
        else:
            residual_flat = T.meta_var(None)

        # 1. Shared memory: the filter with its scales, input rows and the largest of each, bias,
        #    and in NCHW sums on their way.
        pool = T.SMEMPool()
        weights = CopyRing(pool, 1, g.filter_bytes, 1)
        scales = T.decl_buffer((BLOCK_N,), "float32", data=weights.data.data,
                               elem_offset=HALVES * IMAGE // 4)
        ring = rows.Ring(pool, g, WARPS * CONSUMERS)
        tops = pool.alloc((g.tops,), "uint32", align=16)
        added = pool.alloc((BLOCK_N,), "float32", align=16)
        staging = pool.alloc((STAGED,), "float32", align=16)
        weights.place_barriers(pool)
        ring.place_barriers(pool)
        pool.commit()

        # 2. This block's channels, and its share of the tiles of 64 pixels, in a row.
        n_tile: T.let = block % N_TILES
        part: T.let = block // N_TILES
        first_channel: T.let = n_tile * BLOCK_N
        first_tile: T.let = part * (TILES // PARTS) + T.min(part, TILES % PARTS)
        end_tile: T.let = first_tile + TILES // PARTS + T.if_then_else(part < TILES % PARTS, 1, 0)
        first_row: T.let = ring_row(g, first_tile * WGMMA_M)
        last_row: T.let = ring_row(g, T.min(end_tile * WGMMA_M, g.pixels) - 1) + g.window_rows - 1
        stages: T.let = (last_row - first_row) // c.rows + 1
        if thread == 0:
            weights.init()
            ring.init()
            # What was initialised is to be seen by the copy engine, and below by all threads.
            T.ptx.fence.proxy.async_.shared__cta()
        ring.clear(thread, c.threads)
        if epilogue.bias:
            load_bias(g, bias, added, first_channel, thread)
        T.cuda.cta_sync()

        weights_at = Position(1)
        weights_at.start()
        if warpgroup >= CONSUMERS:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](REGISTERS.producer)
            # 3. One copy brings the filter, which stays; all threads bring rows.
            local: T.let = thread % WARPGROUP
            if thread == CONSUMERS * WARPGROUP:
                weights.expect(weights_at, g.filter_bytes)
                weights.copy(weights_at, packed_flat.ptr_to([n_tile * FILTER]), g.filter_bytes)
            loads = MeasuredElements(g, ring.data, x_bits, local, tops)
            producer = rows.Producer(
                g, ring, x_bits, local, first_row, loads, warpgroup - CONSUMERS)
            producer.run_all(stages, thread % 32)
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](REGISTERS.consumer)
            local: T.let = thread % WARPGROUP
            sums = T.alloc_local((c.sums,), "float32")
            partial = T.alloc_local((c.sums,), "float32")
            # Operands of two groups of steps: one is split while the other is multiplied.
            held = T.alloc_local((g.held,), "uint32")
            filter_view: T.let = weights.descriptor(ATOM_ROWS, 0)
            window = RingWindow(g)
            window.start(thread % 4)
            pixels = Pixels(g, tops)
            halves = Halves(HALVES)
            reader = rows.Reader(ring, thread % 32)
            reader.start()
            store = Store(g, epilogue, added, staging, warpgroup, (residual_flat, y_flat))
            turns = InTurn(CONSUMERS, warpgroup)
            tile: T.int32 = first_tile + warpgroup
            weights.wait(weights_at)

            @T.inline
            def load(group):
                # Rows g and g + 8 of A, of two fours of words each of the first eight and the next.
                for s in T.unroll(EACH):
                    if group * EACH + s < STEPS:
                        for r in T.unroll(4):
                            four = T.meta_var((group * EACH + s) * (STEP // 4) + r // 2 * 2)
                            first, second = T.meta_var([
                                pixels.into[r % 2] * T.reinterpret("float32", window.load(
                                    ring.data, pixels.word[r % 2], four + e))
                                for e in range(2)])
                            halves.split(first, second)
                            for half in T.unroll(HALVES):
                                held[place(group, s, half) + r] = halves.word[half]

            @T.inline
            def multiply(group, products):
                # The first of a list of products, and then the others.
                of_x, of_w = T.meta_var(products[0])
                apart = T.meta_var(len(products) == 1 and HALVES == 3)
                target = T.meta_var(sums if apart else partial)
                for s in T.unroll(EACH):
                    if group * EACH + s < STEPS:
                        step = T.meta_var(group * EACH + s)
                        adds = T.meta_var(
                            step > 0 if apart
                            else T.Or(group % PERIOD * EACH + s > 0,
                                      len(products) < len(PRODUCTS[HALVES])))
                        T.ptx[WGMMA](
                            *[target[i] for i in range(c.sums)],
                            *[held[place(group, s, of_x) + r] for r in range(4)],
                            filter_view + T.Cast("uint64", (
                                of_w * IMAGE + step // CHUNK_STEPS * (BLOCK_N * ROW_BYTES)
                                + step % CHUNK_STEPS * WGMMA_K_BYTES) // 16),
                            adds, 1, 1, 0)
                if len(products) > 1:
                    multiply(group, products[1:])

            @T.inline
            def promote(first):
                # Partial sums become sums, rounded to nearest.
                for i in T.unroll(c.sums):
                    sums[i] = partial[i] if first else sums[i] + partial[i]

            @T.inline
            def undo():
                # Both scales of every sum.
                for j in T.unroll(BLOCK_N // 8):
                    for e in T.unroll(2):
                        weight: T.let = scales[j * 8 + thread % 4 * 2 + e]
                        sums[j * 4 + e] = sums[j * 4 + e] * (weight * pixels.back(0))
                        sums[j * 4 + 2 + e] = sums[j * 4 + 2 + e] * (weight * pixels.back(1))

            @T.inline
            def give_back():
                # Stages above the tile's rows, after the last tile all.
                reader.give_back(T.if_then_else(
                    tile < end_tile,
                    (ring_row(g, T.min(tile * WGMMA_M, g.pixels - 1)) - first_row) // c.rows,
                    stages))

            give_back()
            while tile < end_tile:
                # 4. The tile's rows, and in them the windows of this thread's two pixels. Pixels
                #    beyond the last repeat it.
                last: T.let = T.min(tile * WGMMA_M + WGMMA_M, g.pixels) - 1
                reader.wait((ring_row(g, last) + g.window_rows - 1 - first_row) // c.rows + 1)
                for half in T.unroll(2):
                    pixels.find(half, T.min(tile * WGMMA_M + place_of_row(g, local, half), last),
                                first_row, thread % 4)
                # 5. Products.
                load(0)
                if c.turns:
                    if tile > first_tile:
                        turns.wait()
                for group in T.unroll(GROUPS):
                    # Nobody touches sums and operands before the products are waited for.
                    T.ptx.wgmma.fence.sync.aligned()
                    multiply(group, PRODUCTS[HALVES])
                    T.ptx.wgmma.commit_group.sync.aligned()
                    if c.turns and group == PASS:
                        # Who has the next tile may begin: two multiply at a time.
                        if tile + 1 < end_tile:
                            turns.pass_on()
                    if group < GROUPS - 1:
                        if group % PERIOD > 0:
                            # The group before is over: its operands may be loaded over.
                            T.ptx.wgmma.wait_group.sync.aligned(1)
                        load(group + 1)
                    if T.Or(group % PERIOD == PERIOD - 1, group == GROUPS - 1):
                        T.ptx.wgmma.wait_group.sync.aligned(0)
                        settle(partial, c.sums)
                        if HALVES == 3:
                            settle(sums, c.sums)
                        promote(T.And(group < PERIOD, HALVES == 2))
                undo()
                # 6. Rows that the next tile does not need are given back.
                done: T.let = tile
                tile = tile + CONSUMERS
                give_back()
                # 7. Outputs.
                store.run(done, first_channel, local, sums)
    # fmt: on

    return with_arrays_of(epilogue, function, g)
