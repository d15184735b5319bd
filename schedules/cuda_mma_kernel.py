"""The kernel of `cuda_mma`, in TIRx: what one block, one warp and one thread do."""

# The bodies below are parsed as TIRx: their names are variables of the kernel, not of Python.
# ruff: noqa: F823, F841

import math

import tvm_ffi
from tvm import te, tirx
from tvm.ir import Var
from tvm.script import tirx as T

from ..epilogue import Epilogue
from ..expr import finish, gemm_sizes, window_position
from ..problem import ConvProblem
from .base import ALIGNMENT
from .cuda_channels_last import is_needed, padded_channels, shape
from .cuda_elementwise import elementwise
from .cuda_mma_tiles import (
    CHUNK,
    GROUP,
    MMA_K,
    MMA_M,
    MMA_P,
    MULTIPLICANDS,
    WARP,
    WARPGROUP,
    WGMMA_P,
    Config,
    reduction,
    shared_bytes,
)
from .hopper import settle


def prepare(problem: ConvProblem, config: Config):
    """The filter as the product takes it, a tile of it one contiguous run. Runs once.

    For mma.sync ``[G, ceil(Og / block_m), K tiles, block_k / 16, block_m / 16, 32 lanes, 8]``: the
    eight halves are what a lane holds of two matrices of 16 k by 8 channels. For wgmma ``[..., K
    tiles, 1, block_m, 8, 8]``: rows of 64 k, their chunks swizzled by the row as those of pixels.
    Column n of matrix j of the four in GROUP is channel 8 (n // 2) + 2 j + n % 2, so that the two
    columns of a lane in each of the four are eight neighbours.
    """
    sizes, axes, c = gemm_sizes(problem), reduction(problem, config), config
    w = te.placeholder(problem.weight_shape, problem.dtype, name="w")
    tiles = -(-sizes.m // c.block_m)

    def element(group, tile, outer, step, pair, lane, held):
        if c.wgmma:
            matrix, column, k = pair // 8, pair % 8, (lane ^ (pair % 8)) * CHUNK + held
        else:
            matrix, column = pair * 2 + held // 4, lane // 4
            k = step * MMA_K + held % 4 // 2 * 8 + lane % 4 * 2 + held % 2
        channel = matrix // 4 * GROUP + column // 2 * 8 + matrix % 4 * 2 + column % 2
        ch, v, u, inside = window_position(problem, axes, outer, k)
        o = tile * c.block_m + channel
        return tirx.if_then_else(
            tirx.all(*inside, o < sizes.m),
            w[group * sizes.m + o, ch, u, v],
            tirx.const(0, problem.dtype),
        )

    whole = (sizes.groups, tiles, axes.outer, *_packed_tile(c))
    return elementwise([w, te.compute(whole, element, name="packed")], "packed")


def _packed_tile(c: Config) -> tuple[int, ...]:
    if c.wgmma:
        return (1, c.block_m, c.block_k // CHUNK, CHUNK)
    return (c.block_k // MMA_K, c.block_m // 16, WARP, CHUNK)


def convolve(problem: ConvProblem, config: Config, epilogue: Epilogue):
    """x (or its copy `nhwc`), packed filter (and bias, residual) -> y."""
    c, sizes, axes = config, gemm_sizes(problem), reduction(problem, config)
    groups, out_channels, per_group = problem.groups, problem.out_channels, sizes.m
    last, copied = problem.channels_last, is_needed(problem)
    source_shape, channels = shape(problem), padded_channels(problem)
    (height, width), (rows, columns) = problem.input_size, problem.output_size
    hf, wf = problem.kernel_size
    # Steps that are never taken count as 1: they may be too long for 32 bits.
    sh, sw = (s if n > 1 else 1 for s, n in zip(problem.stride, (rows, columns), strict=True))
    dh, dw = (d if n > 1 else 1 for d, n in zip(problem.dilation, (hf, wf), strict=True))
    top, left = (before for before, _ in problem.padding)
    padded = any(map(any, problem.padding))
    in_w = source_shape[-1]
    line = in_w * width
    in_n, pixels = line * height, rows * columns
    inputs, outputs = math.prod(source_shape), math.prod(problem.output_shape)
    RAGGED = channels % c.block_k != 0  # the last tile of channels holds fewer

    DTYPE, KIND = problem.dtype, MULTIPLICANDS[problem.dtype]
    MMA = f"mma.sync.aligned.m16n8k16.row.col.f32.{KIND}.{KIND}.f32"
    WGMMA = f"wgmma.mma_async.sync.aligned.m64n{config.block_m}k16.f32.{KIND}.{KIND}"
    # Descriptor of a matrix in shared memory (PTX ISA, wgmma): rows of 128 bytes, eight of them
    # 1024 bytes from the next eight, swizzled by 128 bytes; the address is added.
    DESCRIPTOR = (1 << 62) | (1024 // 16 << 32) | (1 << 16)
    BM, BP, BK, STAGES, THREADS = c.block_m, c.block_p, c.block_k, c.stages, c.threads
    M_TILES, P_TILES, K_TILES = -(-per_group // BM), -(-sizes.p // BP), axes.outer
    WARPS_M = BM // c.warp_m
    MP, MM = c.warp_p // MMA_P, c.warp_m // MMA_M  # matrices of a warp's tile
    # Tiles on their way: the one being read, and with wgmma the one before, keep their stage.
    AHEAD = STAGES - 2 if c.wgmma else STAGES - 1
    # Halves of a stage: the filter's fragments, then a row of BK channels for each pixel.
    FILTER = BM * BK
    STAGE = FILTER + BP * BK
    # Copies of a tile, 128 bits each: CHUNKS neighbouring threads take the channels of a pixel.
    CHUNKS = BK // CHUNK
    FILTER_STEPS = FILTER // CHUNK // THREADS
    PIXEL_STEPS = BP * CHUNKS // THREADS
    NEXT_P = THREADS // CHUNKS
    # Eight rows at the same chunk lie in eight different 16-byte columns of the 128 bytes that
    # shared memory gives in a cycle: chunks are exchanged within a row by the row's number.
    ROWS_OF_LINE = max(1, 8 // CHUNKS)
    # Eight channels of a thread are one aligned vector of y.
    WHOLE = last and per_group % CHUNK == 0

    def place(p, chunk):
        """Where the pixels' tile has chunk `chunk` of pixel `p`, in halves."""
        return (p * CHUNKS + (chunk ^ (p // ROWS_OF_LINE % CHUNKS))) * CHUNK

    # fmt: off
    @T.prim_func
    def function(
        x: T.Buffer(source_shape, DTYPE),
        packed: T.Buffer((groups, M_TILES, K_TILES, *_packed_tile(c)), DTYPE),
        bias: T.Buffer((out_channels,), DTYPE),
        residual: T.Buffer(problem.output_shape, DTYPE),
        y: T.Buffer(problem.output_shape, DTYPE),
    ):
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": c.blocks})
        block = T.cta_id([groups * M_TILES * P_TILES])
        thread = T.thread_id([THREADS])
        x_flat = T.decl_buffer((inputs,), DTYPE, data=x.data)
        packed_flat = T.decl_buffer(
            (groups * M_TILES * K_TILES * FILTER,), DTYPE, data=packed.data)
        y_flat = T.decl_buffer((outputs,), DTYPE, data=y.data)
        if epilogue.residual:
            residual_flat = T.decl_buffer((outputs,), DTYPE, data=residual.data)
        else:
            residual_flat = T.meta_var(None)
        pool = T.SMEMPool()
        ring = pool.alloc((shared_bytes(c) // 2,), DTYPE, align=1024)
        pool.commit()
        words = T.decl_buffer((shared_bytes(c) // 4,), "uint32", data=ring.data)
        lane: T.let = thread % WARP
        warp: T.let = thread // WARP

        # 1. Block tile. Tiles of M are neighbours: they read the same windows, from the L2 cache.
        m_tile: T.let = block % M_TILES
        group: T.let = block // M_TILES % groups
        p_tile: T.let = block // (M_TILES * groups)

        # 2. Windows that this thread copies from: offset of its chunk of the first tap; where
        #    there is padding, row and column of it as well. Pixels beyond the last repeat it.
        chunk: T.let = thread % CHUNKS
        copy_p: T.let = thread // CHUNKS
        start = T.alloc_local((PIXEL_STEPS,), "int32")
        first_row = T.alloc_local((PIXEL_STEPS,), "int32")
        first_column = T.alloc_local((PIXEL_STEPS,), "int32")
        for j in T.unroll(PIXEL_STEPS):
            p: T.let = T.min(p_tile * BP + copy_p + j * NEXT_P, sizes.p - 1)
            if padded:
                first_row[j] = p // columns % rows * sh - top
                first_column[j] = p % columns * sw - left
            start[j] = (p // pixels * in_n + group * channels + chunk * CHUNK
                        + (p // columns % rows * sh - top) * line
                        + (p % columns * sw - left) * in_w)

        # 3. Copies of the next tile into the next stage, then one step on.
        k_next: T.int32 = 0
        tap_u: T.int32 = 0
        tap_v: T.int32 = 0
        channel: T.int32 = chunk * CHUNK  # of this thread's chunk, in the group
        window_next: T.int32 = 0
        filter_next: T.int32 = (group * M_TILES + m_tile) * (K_TILES * FILTER) + thread * CHUNK
        stage_in: T.int32 = 0

        @T.inline
        def copy_pixels(j):
            row = T.meta_var(first_row[j] + tap_u * dh)
            column = T.meta_var(first_column[j] + tap_v * dw)
            inside = T.meta_var(T.And(T.And(row >= 0, row < height),
                                      T.And(column >= 0, column < width)))
            within = T.meta_var(channel < channels)
            valid = T.meta_var(
                T.And(inside, within) if padded and RAGGED else inside if padded else within)
            into = T.meta_var(
                ring.ptr_to([stage_in + FILTER + place(copy_p + j * NEXT_P, chunk)]))
            if padded or RAGGED:
                # Zeros from beyond the input, and from beyond its channels.
                T.ptx["cp.async.cg.shared.global"](
                    into, x_flat.ptr_to([start[j] + window_next]), 16,
                    T.if_then_else(valid, T.uint32(16), T.uint32(0)))
            else:
                T.ptx["cp.async.cg.shared.global"](
                    into, x_flat.ptr_to([start[j] + window_next]), 16)

        @T.inline
        def copy_tile():
            if k_next < K_TILES:
                for i in T.unroll(FILTER_STEPS):
                    T.ptx["cp.async.cg.shared.global"](
                        ring.ptr_to([stage_in + (i * THREADS + thread) * CHUNK]),
                        packed_flat.ptr_to([filter_next + i * THREADS * CHUNK]), 16)
                for j in T.unroll(PIXEL_STEPS):
                    copy_pixels(j)
                filter_next = filter_next + FILTER
                k_next = k_next + 1
                stage_in = T.if_then_else(stage_in == (STAGES - 1) * STAGE, 0, stage_in + STAGE)
                tap_v = tap_v + 1
                window_next = window_next + dw * in_w
                if tap_v == wf:
                    tap_v = 0
                    tap_u = tap_u + 1
                    window_next = window_next + (dh * line - wf * dw * in_w)
                    if tap_u == hf:
                        tap_u = 0
                        channel = channel + BK
                        window_next = window_next + (BK - hf * dh * line)
            # Empty groups at the end keep the count that wait_group relies on.
            T.ptx["cp.async.commit_group"]()

        for _ in T.unroll(AHEAD):
            copy_tile()

        # 4. Matrices of a warp: rows are pixels, columns channels. A lane gives the address of one
        #    row of the four 8x8 matrices that make 16 pixels by 16 channels.
        warp_m: T.let = warp % WARPS_M * c.warp_m
        warp_p: T.let = (
            warp // WARPGROUP * (WARPGROUP * c.warp_p) + warp % WARPGROUP * MMA_P if c.wgmma
            else warp // WARPS_M * c.warp_p)
        acc = T.alloc_local((MP * MM * 4,), "float32")
        a = T.alloc_local((MP * 4,), "uint32")
        b = T.alloc_local((MM * 2,), "uint32")
        for i in T.unroll(MP * MM * 4):
            acc[i] = T.float32(0)
        stage_out: T.int32 = 0  # in vectors, so that the compiler sees the alignment

        @T.inline
        def multiply_alone():
            for step in T.unroll(BK // MMA_K):
                for pair in T.unroll(MM // 2):
                    for e in T.vectorized(4):
                        b[pair * 4 + e] = words[
                            (stage_out + (step * (BM // 16) + warp_m // 16 + pair) * WARP + lane)
                            * 4 + e]
                for i in T.unroll(MP):
                    T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                        a[i * 4], a[i * 4 + 1], a[i * 4 + 2], a[i * 4 + 3],
                        ring.ptr_to([stage_out * CHUNK + FILTER + place(
                            warp_p + i * MMA_P + lane % 16, step * 2 + lane // 16)]))
                for i in T.unroll(MP):
                    for j in T.unroll(MM):
                        T.ptx[MMA](
                            *[acc[(i * MM + j) * 4 + r] for r in range(4)],
                            *[a[i * 4 + r] for r in range(4)],
                            b[j * 2], b[j * 2 + 1],
                            *[acc[(i * MM + j) * 4 + r] for r in range(4)])

        @T.inline
        def multiply_together():
            # Four warps at once, on shared memory as it is; the tile before may still be read.
            T.ptx["wgmma.fence.sync.aligned"]()
            for step in T.unroll(BK // MMA_K):
                for i in T.unroll(MP):
                    T.ptx[WGMMA](
                        *[acc[i * MM * 4 + r] for r in range(MM * 4)],
                        pixels_at + T.Cast("uint64", stage_out + i * (WGMMA_P * BK // CHUNK)
                                           + step * (MMA_K // CHUNK)),
                        filter_at + T.Cast("uint64", stage_out + step * (MMA_K // CHUNK)),
                        T.bool(True), 1, 1, 0, 0)
            T.ptx["wgmma.commit_group.sync.aligned"]()

        if c.wgmma:
            filter_at: T.let = T.uint64(DESCRIPTOR) + T.Cast(
                "uint64", T.cuda.cvta_generic_to_shared(ring.ptr_to([0])) // 16)
            pixels_at: T.let = filter_at + T.Cast(
                "uint64", (FILTER + warp // WARPGROUP * (WARPGROUP * c.warp_p * BK)) // CHUNK)

        @T.inline
        def take_tile(last):
            T.ptx["cp.async.wait_group"](AHEAD - 1)
            if c.wgmma:
                # Copies are ordinary writes, and wgmma reads in another way: a fence between.
                T.ptx["fence.proxy.async.shared::cta"]()
            # The barrier publishes this tile. It also says that nobody reads the one before, with
            # wgmma the one before that: its stage is the one that the next copies fill.
            T.cuda.cta_sync()
            if c.wgmma:
                multiply_together()
                if not last:
                    copy_tile()
                T.ptx["wgmma.wait_group.sync.aligned"](0 if last else 1)
            else:
                copy_tile()
                multiply_alone()
            stage_out = T.if_then_else(
                stage_out == (STAGES - 1) * (STAGE // CHUNK), 0, stage_out + STAGE // CHUNK)

        if c.wgmma:
            for _ in T.serial(K_TILES - 1):
                take_tile(False)
            # On its own: where the loop alone issued wgmma, ptxas 13.0 moved reads of the sums in
            # front of a wait behind it.
            take_tile(True)
            settle(acc, MP * MM * 4)
        else:
            for _ in T.serial(K_TILES):
                take_tile(False)

        # 5. Store, with the epilogue on the way: a lane has eight neighbouring channels of a
        #    pixel, a pair of each of four matrices.
        out = T.alloc_local((CHUNK,), DTYPE)
        extra = T.alloc_local((CHUNK,), DTYPE)
        for i in T.unroll(MP):
            for half in T.unroll(2):
                p: T.let = (p_tile * BP + warp_p + i * (WGMMA_P if c.wgmma else MMA_P) + half * 8
                            + lane // 4)
                for q in T.unroll(c.warp_m // GROUP):
                    m: T.let = m_tile * BM + warp_m + q * GROUP + lane % 4 * CHUNK
                    ch: T.let = group * per_group + m
                    at: T.let = p * out_channels + ch if last else (
                        p // pixels * (out_channels * pixels) + ch * pixels + p % pixels)
                    if WHOLE:
                        if T.And(p < sizes.p, m < per_group):
                            if epilogue.residual:
                                for e in T.vectorized(CHUNK):
                                    extra[e] = residual_flat[at + e]
                            for e in T.unroll(CHUNK):
                                out[e] = finish(
                                    acc[(i * MM + q * 4 + e // 2) * 4 + half * 2 + e % 2],
                                    ch + e, [e], problem, epilogue, bias, extra)
                            for e in T.vectorized(CHUNK):
                                y_flat[at + e] = out[e]
                    else:
                        for e in T.unroll(CHUNK):
                            into = T.meta_var(at + (e if last else e * pixels))
                            if T.And(p < sizes.p, m + e < per_group):
                                y_flat[into] = finish(
                                    acc[(i * MM + q * 4 + e // 2) * 4 + half * 2 + e % 2],
                                    ch + e, [into], problem, epilogue, bias, residual_flat)
    # fmt: on

    x = function.params[0]
    source = tirx.decl_buffer(x.shape, x.dtype, "nhwc") if copied else x
    body = tvm_ffi.structural_map(function.body, (Var, lambda v: source if v.same_as(x) else v))
    unused = ("" if epilogue.bias else "bias", "" if epilogue.residual else "residual")
    parameters = [source, *(p for p in function.params[1:] if p.name not in unused)]
    function = tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)
    vectors = ({} if copied else {"x": 16}) | ({"y": 16, "residual": 16} if WHOLE else {})
    return function.with_attr(ALIGNMENT, vectors)
