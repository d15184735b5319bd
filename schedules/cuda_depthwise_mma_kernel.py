"""The kernel of `cuda_depthwise_mma`, in TIRx: what one block, one warp and one lane do."""

# The bodies below are parsed as TIRx: their names are variables of the kernel, not of Python.

from tvm import tirx
from tvm.script import tirx as T

from ..epilogue import Epilogue
from ..problem import ConvProblem
from .base import ALIGNMENT
from .cuda_depthwise_mma_patch import Patch
from .cuda_depthwise_mma_store import Store
from .cuda_depthwise_mma_tiles import CHUNK, LINES, MULTIPLICANDS, WARP, WIDE, Config, Geometry

# Threads of a block that packs the filter.
THREADS = 256
# Bits of float32: infinity, whose exponent NaNs have too; and a NaN.
INFINITY, NAN = 0x7F800000, 0x7FC00000


def prepare(problem: ConvProblem, config: Config):
    """The filter as the product takes it, ``[C, taps_h * parts * 64 + 8]``. Runs once.

    Part j of a filter row is an 8x8 matrix: in row g and column k it has tap 8 (j + first part) +
    k - g + left, or zero. Lane 4 g + k // 2 holds two neighbours. The last eight elements of a
    channel are zero, or NaN where one of its taps is infinite or NaN.
    """
    g = Geometry(problem, config)
    DTYPE, SIZE = problem.dtype, g.channels * g.packed

    # fmt: off
    @T.prim_func
    def function(
        w: T.Buffer(problem.weight_shape, DTYPE),
        packed: T.Buffer((g.channels, g.packed), DTYPE),
    ):
        T.device_entry()
        block = T.cta_id([-(-SIZE // THREADS)])
        thread = T.thread_id([THREADS])
        at: T.let = block * THREADS + thread
        if at < SIZE:
            channel: T.let = at // g.packed
            element: T.let = at % g.packed
            value = T.alloc_local((1,), "float32")
            value[0] = T.float32(0)
            if element < g.filter:
                lane: T.let = element % (2 * WARP) // 2
                part: T.let = element // (2 * WARP) % g.parts + g.first_part
                u: T.let = element // (2 * WARP * g.parts)
                v: T.let = part * CHUNK + lane % 4 * 2 + element % 2 - lane // 4 + g.left
                if T.And(v >= 0, v < g.taps_w):
                    value[0] = T.Cast("float32", w[channel, 0, u, v])
            else:
                for u in T.serial(g.taps_h):
                    for v in T.serial(g.taps_w):
                        tap: T.let = T.Cast("float32", w[channel, 0, u, v])
                        # By its bits: TVM takes "not less" for "greater", and NaN is neither.
                        if T.bitwise_and(T.reinterpret("uint32", tap),
                                         T.uint32(INFINITY)) == T.uint32(INFINITY):
                            value[0] = T.reinterpret("float32", T.uint32(NAN))
            packed[channel, element] = T.Cast(DTYPE, value[0])
    # fmt: on

    return function


def convolve(problem: ConvProblem, config: Config, epilogue: Epilogue):
    """x, packed filter (and bias, residual) -> y."""
    g, c = Geometry(problem, config), config
    DTYPE, KIND = problem.dtype, MULTIPLICANDS[problem.dtype]
    MMA16 = f"mma.sync.aligned.m16n8k16.row.col.f32.{KIND}.{KIND}.f32"
    MMA8 = f"mma.sync.aligned.m16n8k8.row.col.f32.{KIND}.{KIND}.f32"
    UNITS = c.images * g.lines  # eights of output rows of a warp
    PARTS, PAIRS = g.parts, (g.parts + 2) // 2
    RESIDUAL = epilogue.residual

    # fmt: off
    @T.prim_func
    def function(
        x: T.Buffer(problem.input_shape, DTYPE),
        packed: T.Buffer((g.channels, g.packed), DTYPE),
        bias: T.Buffer((g.channels,), DTYPE),
        residual: T.Buffer(problem.output_shape, DTYPE),
        y: T.Buffer(problem.output_shape, DTYPE),
    ):
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": c.blocks})
        block = T.cta_id([g.blocks])
        thread = T.thread_id([c.threads])
        x_flat = T.decl_buffer((g.inputs,), DTYPE, data=x.data)
        packed_flat = T.decl_buffer((g.channels * g.packed,), DTYPE, data=packed.data)
        words = T.decl_buffer((g.channels * g.packed // 2,), "uint32", data=packed.data)
        y_flat = T.decl_buffer((g.outputs,), DTYPE, data=y.data)
        if RESIDUAL:
            residual_flat = T.decl_buffer((g.outputs,), DTYPE, data=residual.data)
        else:
            residual_flat = T.meta_var(None)
        pool = T.SMEMPool()
        memory = pool.alloc((g.zeros + CHUNK,), DTYPE, align=16)
        pool.commit()
        lane: T.let = thread % WARP
        warp: T.let = thread // WARP

        # 1. What this block computes: a channel for each warp. Channels are neighbours.
        first_channel: T.let = block % g.channel_blocks * c.channels
        first_row: T.let = block // g.channel_blocks % g.bands * g.band
        first_image: T.let = block // (g.channel_blocks * g.bands) * c.images
        first_in: T.let = T.max(first_row - g.top, 0)
        patch = Patch(g, x_flat, memory, (first_image, first_channel, first_in))
        store = Store(g, epilogue, memory, (first_image, first_channel, first_row),
                      (x_flat, packed_flat, bias, residual_flat, y_flat))
        own: T.let = first_channel + warp

        # 2. The input.
        patch.load(thread)
        # It is there, what others have copied too.
        T.cuda.cta_sync()

        # 3. Products: filter rows one after the other, each with all rows of outputs.
        sums = T.alloc_local((g.sums,), "float32")
        part = T.alloc_local((PARTS + 3,), "uint32")
        a = T.alloc_local((PAIRS * 4,), "uint32")
        b = T.alloc_local((g.loads * 4,), "uint32")

        @T.inline
        def load_parts(u):
            for j in T.unroll(PARTS):
                part[j + 1] = words[own * (g.packed // 2) + (u * PARTS + j) * WARP + lane]

        @T.inline
        def multiply(at, tile):
            # Pieces of the input that 16 columns read: pairs, and single ones at the edges.
            first = T.meta_var(T.max(tile * 2 + g.first_part, 0))
            last = T.meta_var(T.min(tile * 2 + g.last_part + 1, g.pieces - 1))
            for pair in T.unroll(PAIRS):
                piece = T.meta_var(tile * 2 + g.first_part + pair * 2)
                held = T.meta_var([sums[at + r] for r in range(4)])
                if T.And(piece >= first, piece < last):
                    T.ptx[MMA16](*held, *[a[pair * 4 + r] for r in range(4)],
                                 b[piece + g.odd], b[piece + g.odd + 1], *held)
                if T.And(piece >= first, piece == last):
                    T.ptx[MMA8](*held, a[pair * 4], a[pair * 4 + 1], b[piece + g.odd], *held)
                if T.And(piece + 1 == first, piece + 1 <= last):
                    T.ptx[MMA8](
                        *held, a[pair * 4 + 2], a[pair * 4 + 3], b[piece + g.odd + 1], *held)

        if own < g.channels:
            # Zero; or NaN, so that all outputs are computed again.
            for i in T.unroll(g.sums):
                sums[i] = T.Cast("float32", packed_flat[own * g.packed + g.filter])
            for j in T.unroll(PARTS + 3):
                part[j] = T.uint32(0)
            load_parts(0)
            for u in T.serial(g.taps_h):
                # 16x16 of the Toeplitz matrix are its parts j, j - 1 below; j + 1, j beside.
                for pair in T.unroll(PAIRS):
                    a[pair * 4] = part[pair * 2 + 1]
                    a[pair * 4 + 1] = part[pair * 2]
                    a[pair * 4 + 2] = part[pair * 2 + 2]
                    a[pair * 4 + 3] = part[pair * 2 + 1]
                # Those of the next row are on their way while this one is multiplied.
                load_parts(T.min(u + 1, g.taps_h - 1))
                for unit in T.unroll(UNITS):
                    patch.read(b, unit // g.lines, warp,
                               first_row + unit % g.lines * LINES + u - g.top, lane)
                    for tile in T.unroll(g.tiles):
                        multiply((unit * g.tiles + tile) * 4, tile)
        # All have read the patch: outputs take its place.
        T.cuda.cta_sync()

        # 4. Outputs.
        if own < g.channels:
            store.leave(sums, warp, lane)
        # They are there, those of others too.
        T.cuda.cta_sync()
        store.run(thread)
    # fmt: on

    unused = ("" if epilogue.bias else "bias", "" if RESIDUAL else "residual")
    parameters = [p for p in function.params if p.name not in unused]
    function = tirx.PrimFunc(parameters, function.body, function.ret_type, function.attrs)
    each = CHUNK if problem.channels_last else g.copy
    return function.with_attr(ALIGNMENT, {"x": each * problem.itemsize, "y": WIDE})
