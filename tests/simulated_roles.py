"""Kernels whose warps have roles, for the simulator's tests, right unless a switch breaks them."""

import numpy as np
import tvm
from tvm.script import tirx as T

# y[m, p] is the sum over taps t and channels c of f[t, c, m] * x[2 p + t - 1, c].
TAPS, STRIDE, PAD = 3, 2, 1
M, PIXELS, CHANNELS, WIDTH = 64, 32, 72, 60
ROW = 64  # channels of a row of shared memory
ROWS, MINE = -(-CHANNELS // ROW), PIXELS // 2
PATCH = PIXELS + 1  # of the taps 0 and 2; that of tap 1 takes a pixel less
STAGE, FILTER = -(-PATCH * 128 // 1024) * 1024, M * 128
COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
COPY_2D = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"


def pack(f):
    """f [tap, channel, m] as the tiles that `pipeline` copies: [row of channels, tap, m, channel],
    16-byte chunks exchanged by m."""
    padded = np.zeros((TAPS, ROWS * ROW, M), "float16")
    padded[:, :CHANNELS] = f
    tiles = padded.reshape(TAPS, ROWS, 8, 8, M).transpose(1, 0, 4, 2, 3)
    packed = np.empty_like(tiles)
    for m in range(M):
        packed[:, :, m, np.arange(8) ^ m % 8] = tiles[:, :, m]
    return packed.reshape(ROWS, TAPS, M * ROW).copy()


def encode(variable, data, box=(ROW, 2 * PATCH - 1), stride=CHANNELS * 2, swizzle=3, steps=(1, 2)):
    """The map of x."""
    return tvm.tirx.tensormap_encode_tiled(
        variable, data, T.int64(CHANNELS), T.int64(WIDTH), T.int64(stride), *map(T.int32, box),
        *map(T.int32, steps), descriptor_dtype="float16", rank=2, swizzle=swizzle)  # fmt: skip


def pipeline(fault="", stages=2, **options):
    """One thread copies patches of x, another tiles of f, two warpgroups multiply."""
    BYTES = PATCH * 128 - (16 if fault == "bytes" else 0)
    FIXED = (1 << 62) | (64 << 32) | (1 << 16)
    PARITY = 1 if fault == "parity" else 0

    # fmt: off
    @T.prim_func
    def kernel(
        x: T.Buffer((WIDTH, CHANNELS), "float16"),
        f: T.Buffer((ROWS, TAPS, M * ROW), "float16"),
        y: T.Buffer((M, PIXELS), "float32"),
    ):
        x_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode(x_map, x.data, **options))
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([384])
        group: T.let = T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), t // 128, 0, 32, 32)
        pool = T.SMEMPool()
        patches = pool.alloc((stages * STAGE,), "uint8", align=1024)
        tiles = pool.alloc((stages * FILTER,), "uint8", align=1024)
        full = pool.alloc((2 * stages,), "uint64", align=8)
        empty = pool.alloc((2 * stages,), "uint64", align=8)
        pool.commit()
        if t == 0:
            for i in T.unroll(2 * stages):
                T.ptx.mbarrier.init.shared.b64(full.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(empty.ptr_to([i]), T.uint32(8))
            if fault != "fence":
                T.ptx.fence.proxy.async_.shared__cta()
        if fault != "sync":
            T.cuda.cta_sync()
        i: T.int32 = 0  # copies so far
        j: T.int32 = 0
        if group == 0:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](40)
            if t == 0:
                for row in T.serial(ROWS):
                    for phase in T.serial(STRIDE):
                        T.cuda.mbarrier_wait(empty.ptr_to([i % stages]), (i // stages % 2) ^ 1)
                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(
                            full.ptr_to([i % stages]), T.uint32(BYTES))
                        T.ptx[COPY_2D](
                            patches.ptr_to([i % stages * STAGE]), T.address_of(x_map), row * ROW,
                            phase - PAD, full.ptr_to([i % stages]))
                        i = i + 1
            if t == 32:
                for row in T.serial(ROWS):
                    for n in T.serial(TAPS):
                        T.cuda.mbarrier_wait(
                            empty.ptr_to([stages + j % stages]), (j // stages % 2) ^ 1)
                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(
                            full.ptr_to([stages + j % stages]), T.uint32(FILTER))
                        T.ptx[COPY](
                            tiles.ptr_to([j % stages * FILTER]),
                            f.ptr_to([row, T.if_then_else(n == 2, 1, n * 2), 0]),
                            T.uint32(FILTER), full.ptr_to([stages + j % stages]))
                        j = j + 1
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](232)
            sums = T.alloc_local((MINE // 2,), "float32")
            lane: T.let = t % 32
            a_at: T.let = T.uint64(FIXED) + T.Cast(
                "uint64", T.cuda.cvta_generic_to_shared(tiles.ptr_to([0])) // 16)
            b_at: T.let = T.uint64(FIXED) + T.Cast(
                "uint64", T.cuda.cvta_generic_to_shared(patches.ptr_to([0])) // 16
                + (group - 1) * MINE * 8)
            for _ in T.serial(ROWS):
                for phase in T.serial(STRIDE):
                    if fault != "full":
                        T.cuda.mbarrier_wait(
                            full.ptr_to([i % stages]), (i // stages % 2) ^ PARITY)
                    for n in T.serial(2 - phase):
                        T.cuda.mbarrier_wait(full.ptr_to([stages + j % stages]), j // stages % 2)
                        T.ptx.wgmma.fence.sync.aligned()
                        for k in T.unroll(4):
                            T.ptx[f"wgmma.mma_async.sync.aligned.m64n{MINE}k16.f32.f16.f16"](
                                *[sums[e] for e in range(MINE // 2)],
                                a_at + T.Cast("uint64", j % stages * (FILTER // 16) + k * 2),
                                b_at + T.Cast("uint64", i % stages * (STAGE // 16) + n * 8 + k * 2),
                                T.Or(j > 0, k > 0), 1, 1, 0, 0)
                        T.ptx.wgmma.commit_group.sync.aligned()
                        if fault == "early":
                            if lane == 0:
                                T.ptx.mbarrier.arrive.shared.b64(
                                    empty.ptr_to([stages + j % stages]), T.uint32(1))
                        T.ptx.wgmma.wait_group.sync.aligned(0)
                        if fault != "early":
                            if lane == 0:
                                T.ptx.mbarrier.arrive.shared.b64(
                                    empty.ptr_to([stages + j % stages]), T.uint32(1))
                        j = j + 1
                    if lane < (0 if fault == "empty" else 1):
                        T.ptx.mbarrier.arrive.shared.b64(empty.ptr_to([i % stages]), T.uint32(1))
                    i = i + 1
            if fault == "sums":
                T.ptx[f"wgmma.mma_async.sync.aligned.m64n{MINE}k16.f32.f16.f16"](
                    *[sums[e] for e in range(MINE // 2)], a_at, b_at, True, 1, 1, 0, 0)
            for e in T.unroll(MINE // 2):
                y[t % 128 // 32 * 16 + lane // 4 + e % 4 // 2 * 8,
                  (group - 1) * MINE + e // 4 * 8 + lane % 4 * 2 + e % 2] = sums[e]
    # fmt: on

    return kernel


def ping_pong(turns=5, fault=""):
    """Two warpgroups append themselves to a number in shared memory, turn by turn."""

    # fmt: off
    @T.prim_func
    def kernel(y: T.Buffer((1,), "int32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([256])
        group: T.let = t // 128
        number = T.alloc_shared((1,), "int32")
        turn = T.alloc_shared((2,), "uint64", align=8)
        parity: T.int32 = 1 - group
        if t == 0:
            for i in T.unroll(2):
                T.ptx.mbarrier.init.shared.b64(turn.ptr_to([i]), T.uint32(4))
            number[0] = 0
        T.cuda.cta_sync()
        for _ in T.serial(turns + (1 if fault == "one more" else 0)):
            if fault == "no wait":
                if group == 1:
                    T.cuda.mbarrier_wait(turn.ptr_to([group]), parity)
            else:
                T.cuda.mbarrier_wait(turn.ptr_to([group]), parity)
            parity = parity ^ 1
            if t % 128 == 0:
                number[0] = number[0] * 10 + group + 1
            if t % 32 == 0:
                T.ptx.mbarrier.arrive.shared.b64(
                    turn.ptr_to([1 - group]), T.uint32(5 if fault == "count" else 1))
        if group == 1:
            if fault == "one more":
                T.cuda.mbarrier_wait(turn.ptr_to([1]), parity)
        T.cuda.cta_sync()
        if t == 0:
            y[0] = number[0]
    # fmt: on

    return kernel


def named(fault=""):
    """y = x reversed in each half by its warpgroup; then the first half goes to the second too."""
    COUNT = 128 if fault == "count" else 256

    # fmt: off
    @T.prim_func
    def kernel(x: T.Buffer((256,), "float32"), y: T.Buffer((384,), "float32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([256])
        group: T.let = t // 128
        tile = T.alloc_shared((256,), "float32")
        if group == 0:
            tile[t] = x[t]
            T.ptx.bar.sync(T.Cast("uint32", group + 1), T.uint32(128))
            y[t] = tile[127 - t]
            if fault != "arrive":
                T.ptx.bar.arrive(T.uint32(5), T.uint32(256))
        else:
            tile[t] = x[t]
            if fault != "own":
                T.ptx.bar.sync(T.Cast("uint32", group + 1), T.uint32(128))
            y[t] = tile[383 - t]
            if fault != "sync":
                T.ptx.bar.sync(T.uint32(5), T.uint32(COUNT))
            y[t + 128] = tile[t - 128]
    # fmt: on

    return kernel


def cluster_sum(fault=""):
    """y = the sum of a cluster's two parts of x, which one copy brings to both blocks.

    Block 1 tells block 0 through an mbarrier of that block that its part is there.
    """

    # fmt: off
    @T.prim_func
    def kernel(x: T.Buffer((2, 512), "float32"), y: T.Buffer((2, 512), "float32")):
        T.device_entry()
        block = T.cta_id([4])
        rank = T.cta_id_in_cluster([2])
        t = T.thread_id([128])
        tile = T.alloc_shared((512,), "float32", align=128)
        part = T.alloc_shared((512,), "float32", align=128)
        full = T.alloc_shared((1,), "uint64", align=8)
        ready = T.alloc_shared((1,), "uint64", align=8)
        mine = T.alloc_local((4,), "float32")
        other = T.alloc_local((4,), "float32")
        address: T.uint32 = T.uint32(0)
        if t == 0:
            T.ptx.mbarrier.init.shared.b64(full.ptr_to([0]), T.uint32(1))
            T.ptx.mbarrier.init.shared.b64(ready.ptr_to([0]), T.uint32(4))
            T.ptx.fence.mbarrier_init.release.cluster()
            T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([0]), T.uint32(2048))
        if fault == "relaxed":  # enough behind the fence: nothing else was written
            T.ptx["barrier.cluster.arrive.relaxed"]()
            T.ptx["barrier.cluster.wait.acquire"]()
        elif fault != "born":
            T.cuda.cluster_sync()
        if t == 0:
            if rank == 0:
                T.ptx[COPY + ".multicast::cluster"](
                    tile.ptr_to([0]), x.ptr_to([block // 2, 0]), T.uint32(2048),
                    full.ptr_to([0]), T.uint16(3))
        T.cuda.mbarrier_wait(full.ptr_to([0]), 0)
        # Each block takes its half, doubled.
        for e in T.vectorized(4):
            mine[e] = tile[t * 4 + e] * T.Cast("float32", rank + 1)
        for e in T.vectorized(4):
            part[t * 4 + e] = mine[e]
        if rank == 1:
            T.cuda.warp_sync()
            if t % 32 == 0:
                T.ptx["mapa.shared::cluster.u32"](
                    address, T.cuda.cvta_generic_to_shared(ready.ptr_to([0])), T.uint32(0))
                T.ptx.mbarrier.arrive.release.cluster.shared__cluster.b64(address)
        else:
            if fault != "ready":
                T.cuda.mbarrier_wait(ready.ptr_to([0]), 0)
            T.ptx["mapa.shared::cluster.u32"](
                address, T.cuda.cvta_generic_to_shared(part.ptr_to([t * 4])), T.uint32(1))
            T.ptx["ld.shared::cluster.v4.f32"](other[0], other[1], other[2], other[3], address)
            for e in T.vectorized(4):
                y[block // 2, t * 4 + e] = mine[e] + other[e]
        if fault != "leave":
            T.cuda.cluster_sync()
    # fmt: on

    return kernel


def shifted(kind, n=16, first=3, apart=10, fenced=True, adds=False):
    """y = a b^T by a warpgroup, b's rows from row `first` of a tile on, eights of them `apart` rows
    apart: what threads wrote, row by row, 16-byte chunks exchanged."""
    SIZE, K = (4, 8) if kind == "tf32" else (2, 16)
    DTYPE = "uint32" if SIZE == 4 else "uint16"
    WIDTH = 128 // SIZE
    EACH = WIDTH // 8
    ROWS = first + n // 8 * apart
    KIND = "tf32.tf32" if kind == "tf32" else f"{kind}.{kind}"
    LAST = [] if kind == "tf32" else [0, 0]
    FIXED = (1 << 62) | (1 << 16)

    # fmt: off
    @T.prim_func
    def kernel(
        a: T.Buffer((64, WIDTH), DTYPE), b: T.Buffer((ROWS, WIDTH), DTYPE),
        y: T.Buffer((64, n), "float32"),
    ):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([128])
        a_tile = T.alloc_shared((64 * WIDTH,), DTYPE, align=1024)
        b_tile = T.alloc_shared((ROWS * WIDTH,), DTYPE, align=1024)
        sums = T.alloc_local((n // 2,), "float32")
        for i in T.serial(64 * WIDTH // 128):
            row: T.let = (i * 128 + t) // WIDTH
            k: T.let = (i * 128 + t) % WIDTH
            chunk: T.let = k // EACH ^ row % 8
            a_tile[row * WIDTH + chunk * EACH + k % EACH] = a[row, k]
            if row < ROWS:
                b_tile[row * WIDTH + chunk * EACH + k % EACH] = b[row, k]
        if fenced:
            T.ptx.fence.proxy.async_.shared__cta()
        T.ptx.bar.sync(T.uint32(1), T.uint32(128))
        a_at: T.let = T.uint64(FIXED + (64 << 32)) + T.Cast(
            "uint64", T.cuda.cvta_generic_to_shared(a_tile.ptr_to([0])) // 16)
        b_at: T.let = T.uint64(FIXED + (apart * 8 << 32)) + T.Cast(
            "uint64", T.cuda.cvta_generic_to_shared(b_tile.ptr_to([first * WIDTH])) // 16)
        for step in T.unroll(4):
            T.ptx[f"wgmma.mma_async.sync.aligned.m64n{n}k{K}.f32.{KIND}"](
                *[sums[e] for e in range(n // 2)], a_at + T.uint64(2) * step,
                b_at + T.uint64(2) * step, T.Or(step > 0, adds), 1, 1, *LAST)
        T.ptx.wgmma.commit_group.sync.aligned()
        T.ptx.wgmma.wait_group.sync.aligned(0)
        for e in T.unroll(n // 2):
            y[t // 32 * 16 + t % 32 // 4 + e % 4 // 2 * 8,
              e // 4 * 8 + t % 4 * 2 + e % 2] = sums[e]
    # fmt: on

    return kernel


def copied_out(fault=""):
    """y = 2 x and z = 3 x by copies out of one buffer: of bytes, and of boxes that z cuts off."""

    def encode_out(variable, data):
        return tvm.tirx.tensormap_encode_tiled(
            variable, data, T.int64(60), T.int64(3), T.int64(240), T.int32(32), T.int32(4),
            T.int32(1), T.int32(1), descriptor_dtype="float32", rank=2, swizzle=3)  # fmt: skip

    # fmt: off
    @T.prim_func
    def kernel(
        x: T.Buffer((4, 32), "float32"), y: T.Buffer((4, 32), "float32"),
        z: T.Buffer((3, 60), "float32"),
    ):
        z_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_out(z_map, z.data))
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([128])
        tile = T.alloc_shared((128,), "float32", align=1024)
        tile[t] = x[t // 32, t % 32] * T.float32(2)
        if fault != "fence":
            T.ptx.fence.proxy.async_.shared__cta()
        if fault != "sync":
            T.cuda.cta_sync()
        if t == 0:
            T.ptx["cp.async.bulk.global.shared::cta.bulk_group"](
                y.ptr_to([0, 0]), tile.ptr_to([0]), T.uint32(512))
            T.ptx["cp.async.bulk.commit_group"]()
            T.ptx["cp.async.bulk.wait_group.read"](1 if fault == "wait" else 0)
        T.cuda.cta_sync()
        # 16-byte chunks exchanged by the row.
        tile[t // 32 * 32 + (t % 32 // 4 ^ t // 32) * 4 + t % 4] = (
            x[t // 32, t % 32] * T.float32(3))
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()
        if t == 0:
            for i in T.unroll(2):
                T.ptx["cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group"](
                    T.address_of(z_map), i * 32, 0, tile.ptr_to([0]))
            T.ptx["cp.async.bulk.commit_group"]()
            if fault == "read":
                y[0, 0] = z[0, 0]
            if fault != "end":
                T.ptx["cp.async.bulk.wait_group"](0)
    # fmt: on

    return kernel
