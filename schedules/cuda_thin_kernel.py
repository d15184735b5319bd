"""The kernel of `cuda_thin`, in TIRx: who brings rows, who multiplies, what they wait for."""

# The bodies below are parsed as TIRx: their names are variables of the kernel, not of Python.

import math

from tvm.script import tirx as T

from ..epilogue import Epilogue
from ..problem import ConvProblem
from . import cuda_thin_rows as rows
from .cuda_thin_arrays import load_bias, with_arrays_of
from .cuda_thin_copies import Copier, Slots
from .cuda_thin_filter import packed_filter
from .cuda_thin_loads import Elements
from .cuda_thin_store import Store, place_of_row
from .cuda_thin_tiles import Config, Geometry, registers
from .cuda_thin_turns import InTurn
from .cuda_thin_window import first_word, ring_row, ring_slot, window_of
from .hopper import ATOM_ROWS, ROW_BYTES, WARPGROUP, WGMMA_K_BYTES, Position, settle
from .hopper import Ring as CopyRing

# wgmma's name of the operands, and what follows its scales: B is not transposed.
_KINDS = {
    "float16": ("k16.f32.f16.f16", (0,)),
    "bfloat16": ("k16.f32.bf16.bf16", (0,)),
    "float32": ("k8.f32.tf32.tf32", ()),
}


def convolve(problem: ConvProblem, config: Config, epilogue: Epilogue, parts: int):
    """x, packed filter (and bias, residual) -> y.

    parts: blocks that divide the pixels among them, tiles in a row each.
    """
    g, c = Geometry(problem, config), config
    DTYPE = problem.dtype
    inputs, outputs = math.prod(problem.input_shape), math.prod(problem.output_shape)
    packed_shape = packed_filter(g)
    FILTER = math.prod(packed_shape[1:])
    BITS = "uint16" if problem.itemsize == 2 else "uint32"
    CONSUMERS, BLOCK_N, REGISTERS = c.warpgroups, c.block_n, registers(c)
    KIND, TRANSPOSED = _KINDS[DTYPE]
    WGMMA = f"wgmma.mma_async.sync.aligned.m64n{BLOCK_N}{KIND}"
    PARTS, TILES, N_TILES = parts, g.tiles, g.n_tiles
    STAGED = max(1, CONSUMERS * g.staging_bytes // 4)
    STEPS, EACH = g.k_steps, c.steps
    GROUPS = -(-STEPS // EACH)  # of steps, whose operands are loaded together
    PASS = (GROUPS - 1) // 2  # the group after which another warpgroup may begin
    CHUNK_STEPS = ROW_BYTES // WGMMA_K_BYTES
    PLACES = g.tile_places

    # fmt: off
    @T.prim_func
    def function(
        x: T.Buffer(problem.input_shape, DTYPE),
        packed: T.Buffer(packed_shape, DTYPE),
        bias: T.Buffer((problem.out_channels,), DTYPE),
        residual: T.Buffer(problem.output_shape, DTYPE),
        y: T.Buffer(problem.output_shape, DTYPE),
    ):
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": c.blocks})
        block = T.cta_id([PARTS * N_TILES])
        thread = T.thread_id([c.threads])
        # The same in all lanes of a warp, and the compiler shall know.
        warpgroup: T.let = T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), thread // WARPGROUP, 0, 32, 32)
        x_bits = T.decl_buffer((inputs,), BITS, data=x.data)
        packed_flat = T.decl_buffer((math.prod(packed_shape),), DTYPE, data=packed.data)
        y_flat = T.decl_buffer((outputs,), DTYPE, data=y.data)
        if epilogue.residual:
            residual_flat = T.decl_buffer((outputs,), DTYPE, data=residual.data)
        else:
            residual_flat = T.meta_var(None)

        # 1. Shared memory: the filter, input rows, bias, and in NCHW sums on their way.
        pool = T.SMEMPool()
        weights = CopyRing(pool, 1, g.filter_bytes, 1)
        ring = rows.Ring(pool, g, 4 * CONSUMERS, 1 if g.by_copies else rows.WARPS)
        slots = Slots(pool, g)
        added = pool.alloc((BLOCK_N,), "float32", align=16)
        staging = pool.alloc((STAGED,), "float32", align=16)
        weights.place_barriers(pool)
        ring.place_barriers(pool)
        slots.place_barriers(pool)
        pool.commit()

        # 2. This block's channels, and its share of the tiles of 64 pixels, in a row.
        n_tile: T.let = block % N_TILES
        part: T.let = block // N_TILES
        first_channel: T.let = n_tile * BLOCK_N
        first_tile: T.let = part * (TILES // PARTS) + T.min(part, TILES % PARTS)
        end_tile: T.let = first_tile + TILES // PARTS + T.if_then_else(part < TILES % PARTS, 1, 0)
        first_row: T.let = ring_row(g, first_tile * PLACES)
        last_row: T.let = ring_row(g, T.min(end_tile * PLACES, g.places) - 1) + g.read_rows - 1
        stages: T.let = (last_row - first_row) // c.rows + 1
        if thread == 0:
            weights.init()
            ring.init()
            if g.by_copies:
                slots.init()
        ring.clear(thread, c.threads)
        slots.clear(thread, c.threads)
        # What was initialised is to be seen by the copy engine, and below by all threads.
        T.ptx.fence.proxy.async_.shared__cta()
        if epilogue.bias:
            load_bias(g, bias, added, first_channel, thread)
        T.cuda.cta_sync()

        weights_at = Position(1)
        weights_at.start()
        if warpgroup >= CONSUMERS:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](REGISTERS.producer)
            # 3. One copy brings the filter, which stays; rows come by copies or by threads.
            local: T.let = thread % WARPGROUP
            if thread == CONSUMERS * WARPGROUP:
                weights.expect(weights_at, g.filter_bytes)
                weights.copy(weights_at, packed_flat.ptr_to([n_tile * FILTER]), g.filter_bytes)
            if g.by_copies:
                warp: T.let = (warpgroup - CONSUMERS) * rows.WARPS + T.tvm_warp_shuffle(
                    T.uint32(0xFFFFFFFF), local // 32, 0, 32, 32)
                copier = Copier(g, ring, slots, x_bits, warp, thread % 32, first_row)
                copier.run_all(stages)
            else:
                loads = Elements(g, ring.data, x_bits, local)
                producer = rows.Producer(
                    g, ring, x_bits, local, first_row, loads, warpgroup - CONSUMERS)
                producer.run_all(stages, thread % 32)
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](REGISTERS.consumer)
            local: T.let = thread % WARPGROUP
            sums = T.alloc_local((c.sums,), "float32")
            filter_view: T.let = weights.descriptor(ATOM_ROWS, 0)
            # Operands of two groups of steps: one is loaded while the other is multiplied.
            window = window_of(g)
            window.start(thread % 4)
            reader = rows.Reader(ring, thread % 32)
            reader.start()
            store = Store(g, epilogue, added, staging, warpgroup, (residual_flat, y_flat))
            turns = InTurn(CONSUMERS, warpgroup)
            tile: T.int32 = first_tile + warpgroup
            weights.wait(weights_at)

            @T.inline
            def multiply(group):
                # Nobody touches sums and operands before the products are waited for.
                T.ptx.wgmma.fence.sync.aligned()
                for s in T.unroll(EACH):
                    if group * EACH + s < STEPS:
                        step = T.meta_var(group * EACH + s)
                        T.ptx[WGMMA](
                            *[sums[i] for i in range(c.sums)],
                            *[window.operand(group, s, r) for r in range(4)],
                            filter_view + T.Cast("uint64", (
                                step // CHUNK_STEPS * (BLOCK_N * ROW_BYTES)
                                + step % CHUNK_STEPS * WGMMA_K_BYTES) // 16),
                            step > 0, 1, 1, *TRANSPOSED)
                T.ptx.wgmma.commit_group.sync.aligned()

            @T.inline
            def give_back():
                # Stages above the tile's rows, after the last tile all.
                reader.give_back(T.if_then_else(
                    tile < end_tile,
                    (ring_row(g, T.min(tile * PLACES, g.places - 1)) - first_row) // c.rows,
                    stages))

            give_back()
            while tile < end_tile:
                # 4. The tile's rows, and in them the windows of this thread's two pixels. Places
                #    beyond the last repeat it.
                last: T.let = T.min(tile * PLACES + PLACES, g.places) - 1
                reader.wait((ring_row(g, last) + g.read_rows - 1 - first_row) // c.rows + 1)
                low_place = T.meta_var(T.min(tile * PLACES + place_of_row(g, local, 0), last))
                high_place = T.meta_var(T.min(tile * PLACES + place_of_row(g, local, 1), last))
                low: T.let = first_word(g, low_place, ring_slot(g, low_place, first_row))
                high: T.let = first_word(g, high_place, ring_slot(g, high_place, first_row))
                # 5. Products.
                if c.turns:
                    if tile > first_tile:
                        turns.wait()
                for group in T.unroll(GROUPS):
                    window.fill(ring.data, group, low, high)
                    multiply(group)
                    if c.turns and group == PASS:
                        # Who has the next tile may begin: two multiply at a time.
                        if tile + 1 < end_tile:
                            turns.pass_on()
                    if group < GROUPS - 1:
                        # The group before is over: its operands may be loaded over.
                        T.ptx.wgmma.wait_group.sync.aligned(1)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                settle(sums, c.sums)
                # 6. Rows that the next tile does not need are given back.
                done: T.let = tile
                tile = tile + CONSUMERS
                give_back()
                # 7. Outputs.
                store.run(done, first_channel, local, sums)
    # fmt: on

    return with_arrays_of(epilogue, function, g)
