"""The kernel of `cuda_simt_async`, in TIRx: what one block, one warp and one thread do."""

# The bodies below are parsed as TIRx: their names are variables of the kernel, not of Python.
# ruff: noqa: F821, F823, F841

import math

import tvm_ffi
from tvm import te, tirx
from tvm.ir import Var
from tvm.script import tirx as T

from ..epilogue import Epilogue
from ..expr import (
    arguments,
    finish,
    gemm_sizes,
    pack_filter,
    transform,
    window_position,
)
from ..problem import ConvProblem
from .base import ALIGNMENT
from .cuda_elementwise import elementwise
from .cuda_simt_async_tiles import (
    MAX_TABLE_SIZE,
    PADDING,
    VECTOR,
    WARP,
    Config,
    k_tiles,
    lanes_of_m,
    pixel_steps,
    reduction,
    shared_words,
)


def prepare(problem: ConvProblem, config: Config, explicit: bool):
    """The filter in the order of K, a tile of it one contiguous run. Runs once."""
    w = te.placeholder(problem.weight_shape, problem.dtype, name="w")
    axes = reduction(problem, config, explicit)
    return elementwise([w, pack_filter(w, problem, config.block_m, axes)], "packed")


def convolve(problem: ConvProblem, config: Config, epilogue: Epilogue, explicit: bool):
    """x (or I'), packed filter (and bias, residual) -> y."""
    c, sizes, axes = config, gemm_sizes(problem), reduction(problem, config, explicit)
    batch, groups, last = problem.batch, problem.groups, problem.channels_last
    channels, per_group, out_channels = problem.in_channels // groups, sizes.m, problem.out_channels
    (height, width), (rows, columns) = problem.input_size, problem.output_size
    hf, wf = problem.kernel_size
    # Steps that are never taken count as 1: they may be too long for 32 bits.
    sh, sw = (s if n > 1 else 1 for s, n in zip(problem.stride, (rows, columns), strict=True))
    dh, dw = (d if n > 1 else 1 for d, n in zip(problem.dilation, (hf, wf), strict=True))
    top, left = (0, 0) if explicit else (before for before, _ in problem.padding)
    padded = not explicit and any(map(any, problem.padding))
    pixels, outputs = rows * columns, batch * out_channels * rows * columns
    # Distances between neighbours in the source, x or I': channels; windows along a row and down a
    # column of the output; elements along a row and down a column of a window.
    x = arguments(problem).x
    source_shape = [int(extent) for extent in (transform(x, problem) if explicit else x).shape]
    line = (problem.in_channels if last else 1) * source_shape[2 if last else 3]
    in_w = problem.in_channels if last else 1
    in_c = 1 if last else source_shape[2] * line
    if explicit:
        next_column, next_row, tap_column, tap_row = sw * hf * in_w, line, dw * hf * in_w, in_w
    else:
        next_column, next_row, tap_column, tap_row = sw * in_w, sh * line, dw * in_w, dh * line
    in_n = math.prod(source_shape[1:])

    BM, BP, BK, TM, TP = c.block_m, c.block_p, c.block_k, c.thread_m, c.thread_p
    STAGES, SPLIT, THREADS = c.stages, c.split, c.threads
    WARPS = THREADS // WARP
    LM = lanes_of_m(c, problem)
    LP = WARP // LM
    WARPS_P = BP // TP // LP
    GM, GP = TM // VECTOR, TP // VECTOR  # groups of four of a thread
    PITCH = BP + (PADDING if last else 0)
    STAGE = BK * (BM + PITCH)
    M_TILES, P_TILES = -(-per_group // BM), -(-sizes.p // BP)
    K_TILES = k_tiles(problem, c)
    RING, TABLE = shared_words(c, problem, padded)
    ENTRIES = axes.inner
    TAIL = axes.outer * axes.inner > problem.k
    # Copies of a tile: 16 bytes of the filter a thread and step; of the windows 4 bytes. NCHW: a
    # warp takes 32 pixels of one k, and every warp its own rows. NHWC: 8 k of 4 pixels, and every
    # warp its own pixels.
    FILTER_STEPS = -(-(BK * BM // VECTOR) // THREADS)
    PIXEL_STEPS = pixel_steps(c, problem)
    K_STEPS = -(-BK // 8) if last else -(-BK // WARPS)
    NEXT_P, NEXT_K = (4, 8) if last else (WARP, 1)  # from one step to the next
    # Distances that a thread holds at a time: some loads in flight together, few registers.
    RUN_K = min(K_STEPS, 8)

    # A thread's outputs, as vectors along the output's innermost axis: how many positions it has,
    # and vectors or channels at each. WHOLE: each is one aligned vector of the output as well.
    POSITIONS, CHANNELS = (TP, GM) if last else (GP, TM)
    WHOLE = (per_group if last else pixels) % VECTOR == 0
    # Otherwise words are stored one by one. SPREAD: so that neighbouring lanes still store
    # neighbouring pixels, a lane's vector then holds every LP-th pixel of RUN.
    SPREAD, RUN = not last and not WHOLE, LP * VECTOR

    def distance(e):
        """Of element `e` of a window from the first one, in the source."""
        ch, v, u, _ = window_position(problem, axes, 0, e)
        return ch * in_c + u * tap_row + v * tap_column

    def offset(e):
        """Row and column of element `e` in the window, in one word."""
        _, v, u, _ = window_position(problem, axes, 0, e)
        return u * dh * 65536 + v * dw

    def word(p):
        """Where a row of the window tile has pixel `p` of the tile."""
        return p // RUN * RUN + p % LP * VECTOR + p % RUN // LP if SPREAD else p

    def place(s, t, e):
        """Of an element of vector [s, t] among the thread's sums [TM, TP]."""
        return (t * VECTOR + e) * TP + s if last else t * TP + s * VECTOR + e

    # fmt: off
    @T.prim_func
    def function(
        source: T.Buffer(source_shape, "float32"),
        packed: T.Buffer((groups, M_TILES, axes.outer, axes.inner, BM), "float32"),
        bias: T.Buffer((out_channels,), "float32"),
        residual: T.Buffer(problem.output_shape, "float32"),
        y: T.Buffer(problem.output_shape, "float32"),
    ):
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": c.blocks})
        if SPLIT > 1:
            block = T.cta_id([groups * M_TILES * P_TILES * SPLIT])
            rank = T.cta_id_in_cluster([SPLIT])
        else:
            block = T.cta_id([groups * M_TILES * P_TILES])
            rank: T.let = 0
        thread = T.thread_id([THREADS])
        source_flat = T.decl_buffer((batch * in_n,), "float32", data=source.data)
        packed_flat = T.decl_buffer(
            (groups * M_TILES * K_TILES * BK * BM,), "float32", data=packed.data)
        y_flat = T.decl_buffer((outputs,), "float32", data=y.data)
        if epilogue.residual:
            residual_flat = T.decl_buffer((outputs,), "float32", data=residual.data)
        else:
            residual_flat = T.meta_var(None)
        pool = T.SMEMPool()
        ring = pool.alloc((RING,), "float32", align=128)
        if not c.taps:
            table = pool.alloc((TABLE,), "int32", align=16)
        pool.commit()
        lane: T.let = thread % WARP
        warp: T.let = thread // WARP

        # 1. Block tile. Tiles of M are neighbours: they read the same windows, from the L2 cache.
        tile: T.let = block // SPLIT
        m_tile: T.let = tile % M_TILES
        group: T.let = tile // M_TILES % groups
        p_tile: T.let = tile // (M_TILES * groups)

        # 2. Windows that this thread copies from: offset of the first element; where there is
        #    padding, row and column of it as well. Pixels beyond the last repeat the last.
        copy_k: T.let = lane % 8 if last else warp * K_STEPS
        copy_p: T.let = warp * (PIXEL_STEPS * 4) + lane // 8 if last else lane
        start = T.alloc_local((PIXEL_STEPS,), "int32")
        first_row = T.alloc_local((PIXEL_STEPS,), "int32")
        first_column = T.alloc_local((PIXEL_STEPS,), "int32")
        for j in T.unroll(PIXEL_STEPS):
            p: T.let = T.min(p_tile * BP + copy_p + j * NEXT_P, sizes.p - 1)
            if padded:
                first_row[j] = p // columns % rows * sh - top
                first_column[j] = p % columns * sw - left
            start[j] = (p // pixels * in_n + group * (channels * in_c) - (top * line + left * in_w)
                        + p // columns % rows * next_row + p % columns * next_column
                        + (copy_k * in_c if c.taps else 0))

        # 3. Table of distances from a window's first element, in the order of K.
        if not c.taps:
            for step in T.serial(-(-ENTRIES // THREADS)):
                e: T.let = step * THREADS + thread
                if e < ENTRIES:
                    table[e] = T.if_then_else(e < problem.k, distance(e), -1)
                    if padded:
                        # A row beyond every input marks the entries behind the window's end.
                        table[ENTRIES + e] = T.if_then_else(
                            e < problem.k, offset(e), MAX_TABLE_SIZE * 65536 - 65536)
            T.cuda.cta_sync()

        # 4. Copies of the next tile into the next stage, then one step on.
        k_begin: T.let = rank * K_TILES // SPLIT
        k_end: T.let = (rank + 1) * K_TILES // SPLIT
        k_next: T.int32 = k_begin
        filter_next: T.int32 = (((group * M_TILES + m_tile) * K_TILES + k_begin) * (BK * BM)
                                + thread * VECTOR)
        tap_v: T.int32 = k_begin % wf
        tap_u: T.int32 = k_begin % (hf * wf) // wf
        window_next: T.int32 = (
            k_begin // (hf * wf) * (BK * in_c) + tap_u * tap_row + tap_v * tap_column)
        stage_in: T.int32 = 0

        @T.inline
        def copy_word(j, k, at, check, valid):
            # Element k of the tile, of pixel j; zero where it is not valid.
            into = T.meta_var(
                ring.ptr_to([stage_in + BK * BM + k * PITCH + word(copy_p + j * NEXT_P)]))
            if check:
                T.ptx["cp.async.ca.shared.global"](
                    into, source_flat.ptr_to([at]), 4,
                    T.if_then_else(valid, T.uint32(4), T.uint32(0)))
            else:
                T.ptx["cp.async.ca.shared.global"](into, source_flat.ptr_to([at]), 4)

        distance_of = T.alloc_local((RUN_K,), "int32")
        offset_of = T.alloc_local((RUN_K,), "int32")

        @T.inline
        def copy_window(j, i, s, tail):
            k = T.meta_var(copy_k + i * NEXT_K)
            row = T.meta_var(
                first_row[j] + (tap_u * dh if c.taps else offset_of[s] // 65536))
            column = T.meta_var(
                first_column[j] + (tap_v * dw if c.taps else offset_of[s] % 65536))
            inside = T.meta_var(T.And(T.And(row >= 0, row < height),
                                      T.And(column >= 0, column < width)))
            if c.taps:
                copy_word(j, k, start[j] + window_next + i * (NEXT_K * in_c), padded, inside)
            else:
                copy_word(j, k, start[j] + distance_of[s], padded or tail,
                          inside if padded else distance_of[s] >= 0)

        @T.inline
        def copy_windows(tail):
            for run in T.unroll(-(-K_STEPS // RUN_K)):
                # All distances of a run, then its copies: a copy right behind the load that it
                # waits for would hold up every one after it.
                if not c.taps:
                    for s in T.unroll(RUN_K):
                        i = T.meta_var(run * RUN_K + s)
                        if T.And(i < K_STEPS, copy_k + i * NEXT_K < BK):
                            entry: T.let = k_next * BK + copy_k + i * NEXT_K
                            distance_of[s] = table[entry]
                            if padded:
                                offset_of[s] = table[ENTRIES + entry]
                for j in T.unroll(PIXEL_STEPS):
                    for s in T.unroll(RUN_K):
                        i = T.meta_var(run * RUN_K + s)
                        # What does not divide among the warps is left out by the last of them.
                        if T.And(i < K_STEPS,
                                 T.And(copy_p + j * NEXT_P < BP, copy_k + i * NEXT_K < BK)):
                            copy_window(j, i, s, tail)

        @T.inline
        def copy_tile():
            if k_next < k_end:
                for i in T.unroll(FILTER_STEPS):
                    if (i * THREADS + thread) * VECTOR < BK * BM:
                        T.ptx["cp.async.cg.shared.global"](
                            ring.ptr_to([stage_in + (i * THREADS + thread) * VECTOR]),
                            packed_flat.ptr_to([filter_next + i * THREADS * VECTOR]), 16)
                if TAIL and not padded:
                    # The end of the window lies in the last tile alone: the others need no checks.
                    if k_next == K_TILES - 1:
                        copy_windows(True)
                    else:
                        copy_windows(False)
                else:
                    copy_windows(False)
                filter_next = filter_next + BK * BM
                k_next = k_next + 1
                stage_in = T.if_then_else(stage_in == (STAGES - 1) * STAGE, 0, stage_in + STAGE)
                if c.taps:
                    tap_v = tap_v + 1
                    window_next = window_next + tap_column
                    if tap_v == wf:
                        tap_v = 0
                        tap_u = tap_u + 1
                        window_next = window_next + (tap_row - wf * tap_column)
                        if tap_u == hf:
                            tap_u = 0
                            window_next = window_next + (BK * in_c - hf * tap_row)
            # Empty groups at the end keep the count that wait_group relies on.
            T.ptx["cp.async.commit_group"]()

        for _ in T.unroll(STAGES - 1):
            copy_tile()

        # 5. Micro-kernel: a thread's outputs are groups of four, spread over the block so that
        #    neighbouring lanes read neighbouring vectors of shared memory.
        at_m: T.let = warp // WARPS_P * LM + lane // LP
        at_p: T.let = warp % WARPS_P * LP + lane % LP
        acc = T.alloc_local((TM * TP,), "float32")
        a = T.alloc_local((TM,), "float32")
        b = T.alloc_local((TP,), "float32")
        for i in T.unroll(TM * TP):
            acc[i] = T.float32(0)
        stage_out: T.int32 = 0  # in vectors, so that the compiler sees the alignment
        for _ in T.serial(k_end - k_begin):
            # The barrier that publishes this tile also says that all have read the one before:
            # its stage is the one that the next copies fill.
            T.ptx["cp.async.wait_group"](STAGES - 2)
            T.cuda.cta_sync()
            copy_tile()
            for k in T.unroll(BK):
                for g in T.unroll(GM):
                    for e in T.vectorized(VECTOR):
                        a[g * VECTOR + e] = ring[
                            (stage_out + at_m) * VECTOR + k * BM + g * (BM // GM) + e]
                for g in T.unroll(GP):
                    for e in T.vectorized(VECTOR):
                        b[g * VECTOR + e] = ring[
                            (stage_out + at_p) * VECTOR + BK * BM + k * PITCH + g * (BP // GP) + e]
                for i in T.unroll(TM):
                    for j in T.unroll(TP):
                        acc[i * TP + j] = acc[i * TP + j] + a[i] * b[j]
            stage_out = T.if_then_else(
                stage_out == (STAGES - 1) * (STAGE // VECTOR), 0, stage_out + STAGE // VECTOR)

        # 6. Store, with the epilogue on the way.
        share: T.let = thread * VECTOR
        out = T.alloc_local((VECTOR,), "float32")
        extra = T.alloc_local((VECTOR,), "float32")
        where = T.alloc_local((VECTOR,), "int32")  # offset of a pixel in the output, -1 beyond it

        @T.inline
        def locate(s):
            for e in T.unroll(VECTOR if SPREAD else 1):
                p: T.let = p_tile * BP + (
                    at_p * VECTOR + s // VECTOR * (BP // GP) + s % VECTOR if last else
                    at_p // LP * RUN + at_p % LP + e * LP + s * (BP // GP) if SPREAD else
                    at_p * VECTOR + s * (BP // GP))
                where[e] = T.if_then_else(
                    p < sizes.p,
                    p * out_channels if last else
                    p // pixels * (out_channels * pixels) + p % pixels, -1)

        @T.inline
        def store(t):
            m = T.meta_var(m_tile * BM + at_m * VECTOR + (
                t * (BM // GM) if last else t // VECTOR * (BM // GM) + t % VECTOR))
            for e in T.unroll(1 if WHOLE else VECTOR):
                row = T.meta_var(m + e if last else m)
                start = T.meta_var(where[e if SPREAD else 0])
                if T.And(row < per_group, start >= 0):
                    ch: T.let = group * per_group + row
                    at: T.let = start + (ch if last else ch * pixels)
                    if WHOLE:
                        if epilogue.residual:
                            for i in T.vectorized(VECTOR):
                                extra[i] = residual_flat[at + i]
                        for i in T.unroll(VECTOR):
                            out[i] = finish(
                                out[i], ch + i if last else ch, [i], problem, epilogue, bias, extra)
                        for i in T.vectorized(VECTOR):
                            y_flat[at + i] = out[i]
                    else:
                        y_flat[at] = finish(
                            out[e], ch, [at], problem, epilogue, bias, residual_flat)

        if SPLIT == 1:
            for s in T.unroll(POSITIONS):
                locate(s)
                for t in T.unroll(CHANNELS):
                    for e in T.unroll(VECTOR):
                        out[e] = acc[place(s, t, e)]
                    store(t)
        else:
            # The blocks of a cluster leave their sums in shared memory; each adds up and stores
            # its share of the vectors, always in the same order.
            address: T.uint32
            T.cuda.cta_sync()
            for s in T.unroll(POSITIONS):
                for t in T.unroll(CHANNELS):
                    for e in T.vectorized(VECTOR):
                        ring[(s * CHANNELS + t) * THREADS * VECTOR + share + e] = acc[
                            place(s, t, e)]
            T.ptx["barrier.cluster.arrive.release"]()
            T.ptx["barrier.cluster.wait.acquire"]()
            for s in T.unroll(POSITIONS):
                locate(s)
                for t in T.unroll(CHANNELS):
                    if (s * CHANNELS + t) % SPLIT == rank:
                        for e in T.unroll(VECTOR):
                            out[e] = T.float32(0)
                        for other in T.unroll(SPLIT):
                            T.ptx["mapa.shared::cluster.u32"](
                                address,
                                T.cuda.cvta_generic_to_shared(
                                    ring.ptr_to([(s * CHANNELS + t) * THREADS * VECTOR + share])),
                                T.uint32(other))
                            T.ptx["ld.shared::cluster.v4.f32"](
                                extra[0], extra[1], extra[2], extra[3], address)
                            for e in T.unroll(VECTOR):
                                out[e] = out[e] + extra[e]
                        store(t)
            # No block may leave while another reads its shared memory.
            T.ptx["barrier.cluster.arrive.release"]()
            T.ptx["barrier.cluster.wait.acquire"]()
    # fmt: on

    name = "im2win" if explicit else "x"
    source = function.params[0]
    renamed = tirx.decl_buffer(source.shape, source.dtype, name)
    body = tvm_ffi.structural_map(
        function.body, (Var, lambda v: renamed if v.same_as(source) else v)
    )
    unused = ("" if epilogue.bias else "bias", "" if epilogue.residual else "residual")
    parameters = [renamed, *(p for p in function.params[1:] if p.name not in unused)]
    function = tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)
    return function.with_attr(ALIGNMENT, _alignment(WHOLE))


def _alignment(whole: bool) -> dict[str, int]:
    """Bytes that the pointers of a caller's arrays have to be multiples of."""
    return {"y": 4 * VECTOR, "residual": 4 * VECTOR} if whole else {}
