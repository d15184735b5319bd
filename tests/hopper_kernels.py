"""Small kernels of the building blocks for Hopper alone, each by itself."""

import math

from tvm.script import tirx as T

import im2win_tvm.parsing  # noqa: F401
from im2win_tvm.schedules.cuda_window_store import Store
from im2win_tvm.schedules.cuda_window_walk import Taps, Tile
from im2win_tvm.schedules.hopper import (
    ClusterSum,
    Position,
    Ring,
    TensorMap,
    Turns,
    meet_cluster,
    wgmma,
)

FLOATS = 256  # of a stage of `ring`, a KiB


def positions(stages, count, turns):
    """Stage and parity after skipping `count` stages and after one step more, again and again."""

    # fmt: off
    @T.prim_func
    def kernel(y: T.Buffer((turns, 4), "int32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([32])
        at = Position(stages)
        at.start()
        for i in T.serial(turns):
            at.skip(count)
            if t == 0:
                y[i, 0] = at.stage
                y[i, 1] = at.turn
            at.advance()
            if t == 0:
                y[i, 2] = at.stage
                y[i, 3] = at.turn
    # fmt: on

    return kernel


def ring(stages, tiles, consumers=1, early=False):
    """y[g] = x, which one thread brings KiB by KiB and warpgroups read; early: before they have."""

    # fmt: off
    @T.prim_func
    def kernel(
        x: T.Buffer((tiles, FLOATS), "float32"),
        y: T.Buffer((consumers, tiles, FLOATS), "float32"),
    ):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([128 * (1 + consumers)])
        pool = T.SMEMPool()
        stage = Ring(pool, stages, FLOATS * 4, 4 * consumers)
        stage.place_barriers(pool)
        pool.commit()
        held = T.decl_buffer((stages * FLOATS,), "float32", data=stage.data.data)
        if t == 0:
            stage.init()
            T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()
        at = Position(stages)
        read = Position(stages)
        at.start()
        read.start()
        if t < 128:
            if t == 0:
                for i in T.serial(tiles):
                    stage.expect(at, FLOATS * 4)
                    stage.copy(at, x.ptr_to([i, 0]), FLOATS * 4)
                    at.advance()
        else:
            for i in T.serial(tiles):
                stage.wait(at)
                if early:
                    stage.release(read, t % 32)
                for e in T.unroll(2):
                    y[t // 128 - 1, i, t % 128 * 2 + e] = held[at.stage * FLOATS + t % 128 * 2 + e]
                T.cuda.warp_sync()
                if not early:
                    stage.release(read, t % 32)
                at.advance()
    # fmt: on

    return kernel


def boxes(stages, tiles, extent, step):
    """y = boxes of eight rows of x, every step-th one, from row -2 on; as they lie in memory."""
    MAP = TensorMap((64, extent), (128,), (64, 8), (1, step))

    # fmt: off
    @T.prim_func
    def kernel(
        x: T.Buffer((extent, 64), "float16"), y: T.Buffer((tiles, 8, 64), "float16"),
    ):
        x_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(MAP.encode(x_map, x.data, "float16"))
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([256])
        pool = T.SMEMPool()
        stage = Ring(pool, stages, 1024, 4)
        stage.place_barriers(pool)
        pool.commit()
        held = T.decl_buffer((stages * 512,), "float16", data=stage.data.data)
        if t == 0:
            stage.init()
            T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()
        at = Position(stages)
        read = Position(stages)
        at.start()
        read.start()
        if t < 128:
            if t == 0:
                for i in T.serial(tiles):
                    stage.expect(at, 1024)
                    stage.copy_box(at, x_map, (0, i * 8 * step - 2))
                    at.advance()
        else:
            for i in T.serial(tiles):
                stage.wait(at)
                for e in T.unroll(4):
                    place: T.let = t % 128 * 4 + e
                    y[i, place // 64, place % 64] = held[at.stage * 512 + place]
                T.cuda.warp_sync()
                stage.release(read, t % 32)
                at.advance()
    # fmt: on

    return kernel


def rows_by_wgmma(dtype, n, first, apart, stage):
    """y = a b^T, of b the rows from `first` on of a stage, eights of them `apart` rows apart."""
    WIDTH = 32 if dtype == "float32" else 64
    ROWS = -(-(first + n // 8 * apart) // 8) * 8
    STEPS = 4

    # fmt: off
    @T.prim_func
    def kernel(
        a: T.Buffer((64, WIDTH), dtype), b: T.Buffer((ROWS, WIDTH), dtype),
        y: T.Buffer((64, n), "float32"),
    ):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([128])
        pool = T.SMEMPool()
        left = Ring(pool, 1, 64 * 128, 4)
        right = Ring(pool, 2, ROWS * 128, 4)
        left.place_barriers(pool)
        right.place_barriers(pool)
        pool.commit()
        left_at = Position(1)
        right_at = Position(2)
        left_at.start()
        right_at.start()
        right_at.skip(stage)
        if t == 0:
            left.init()
            right.init()
            T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()
        if t == 0:
            left.expect(left_at, 64 * 128)
            left.copy(left_at, a.ptr_to([0, 0]), 64 * 128)
            right.expect(right_at, ROWS * 128)
            right.copy(right_at, b.ptr_to([0, 0]), ROWS * 128)
        left.wait(left_at)
        right.wait(right_at)
        sums = T.alloc_local((n // 2,), "float32")
        left_view: T.let = left.descriptor(8, 0)
        right_view: T.let = right.descriptor(apart, first) + T.Cast(
            "uint64", right_at.stage * right.stage_step)
        T.ptx.wgmma.fence.sync.aligned()
        for k in T.unroll(STEPS):
            wgmma(dtype, n, sums, 0, left_view + T.uint64(2 * k), right_view + T.uint64(2 * k),
                  k > 0)
        T.ptx.wgmma.commit_group.sync.aligned()
        T.ptx.wgmma.wait_group.sync.aligned(0)
        for e in T.unroll(n // 2):
            y[t // 32 * 16 + t % 32 // 4 + e % 4 // 2 * 8,
              e // 4 * 8 + t % 4 * 2 + e % 2] = sums[e]
    # fmt: on

    return kernel


def cluster_sum(blocks, fours):
    """y = the sum of a cluster's x, of which every block adds up a share."""

    # fmt: off
    @T.prim_func
    def kernel(
        x: T.Buffer((2, blocks, 128, fours * 4), "float32"),
        y: T.Buffer((2, 128, fours * 4), "float32"),
    ):
        T.device_entry()
        rank = T.cta_id_in_cluster([blocks])
        block = T.cta_id([2 * blocks])
        t = T.thread_id([128])
        memory = T.alloc_shared((fours * 128 * 4,), "float32", align=16)
        sums = T.alloc_local((fours * 4,), "float32")
        together = ClusterSum(memory.data, blocks, 128, fours)
        for i in T.unroll(fours * 4):
            sums[i] = x[block // blocks, rank, t, i]
        together.leave(t, sums)
        meet_cluster()
        together.collect(t, rank)
        meet_cluster()
        for i in T.unroll(together.share):
            if rank * together.share + i < fours:
                for e in T.unroll(4):
                    y[block // blocks, t, (rank * together.share + i) * 4 + e] = (
                        together.total[i * 4 + e])
    # fmt: on

    return kernel


def walk(g, number, copies):
    """Of a tile: where it is, as a whole and for its last warpgroup; and of its copies the taps
    and coordinates that they have."""
    c = g.config

    # fmt: off
    @T.prim_func
    def kernel(at: T.Buffer((2, 6), "int32"), y: T.Buffer((copies, 13), "int32")):
        T.device_entry()
        T.cta_id([1])
        T.thread_id([1])
        tile = Tile(g)
        taps = Taps(g)
        tile.find(number)
        taps.start()
        at[0, 0] = tile.filter
        at[0, 1] = tile.group
        at[0, 2] = tile.m
        at[0, 3] = tile.n
        at[0, 4] = tile.h
        at[0, 5] = tile.w
        for i in T.serial(copies):
            y[i, 0] = taps.channels
            y[i, 1] = taps.class_h
            y[i, 2] = taps.class_w
            y[i, 3] = taps.first_h
            y[i, 4] = taps.first_w
            y[i, 5] = taps.rows
            y[i, 6] = taps.columns
            box = T.meta_var(taps.box(tile))
            y[i, 7] = box[0]
            y[i, 8] = box[1]
            y[i, 9] = box[2]
            y[i, 10] = box[3]
            y[i, 11] = box[4]
            taps.take(1)
            y[i, 12] = taps.passed
        tile.narrow(c.along_m - 1, c.along_p - 1)
        at[1, 0] = tile.filter
        at[1, 1] = tile.group
        at[1, 2] = tile.m
        at[1, 3] = tile.n
        at[1, 4] = tile.h
        at[1, 5] = tile.w
    # fmt: on

    return kernel


def store(g, epilogue, cut):
    """y from sums: of every tile and warpgroup a product of 64 rows by its pixels.

    cut: eights of pixels of a first part; the rest are stored after them.
    """
    p, c = g.problem, g.config
    OUTPUTS, GROUPS = math.prod(p.output_shape), c.pixels // 8

    # fmt: off
    @T.prim_func
    def kernel(
        products: T.Buffer((g.tiles, c.consumers, 64, c.pixels), "float32"),
        bias: T.Buffer((p.out_channels,), p.dtype),
        residual: T.Buffer((OUTPUTS,), p.dtype),
        y: T.Buffer((OUTPUTS,), p.dtype),
    ):
        T.device_entry()
        block = T.cta_id([g.tiles])
        thread = T.thread_id([128 * c.consumers])
        group: T.let = T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), thread // 128, 0, 32, 32)
        local: T.let = thread % 128
        staging = T.alloc_shared(
            (max(1, c.consumers * g.staging_bytes // p.itemsize),), p.dtype, align=16)
        tile = Tile(g)
        tile.find(block)
        tile.narrow(group % c.along_m, group // c.along_m)
        sums = T.alloc_local((c.sums,), "float32")
        for i in T.unroll(c.sums):
            sums[i] = products[block, group, local // 32 * 16 + i % 4 // 2 * 8 + local % 32 // 4,
                               i // 4 * 8 + local % 4 * 2 + i % 2]
        out = Store(g, epilogue, staging, group, (bias, residual, y))
        rest = T.alloc_local(((GROUPS - cut) * 4,), "float32")
        for i in T.unroll((GROUPS - cut) * 4):
            rest[i] = sums[cut * 4 + i]
        if cut > 0:
            out.run(tile, local, sums, 0, cut)
        out.run(tile, local, rest, cut, GROUPS - cut)
    # fmt: on

    return kernel


def by_turns(rounds, waits=True):
    """order[i] = the warpgroup whose turn was the i-th, told by a counter that nothing else guards.

    waits: False lets both go on at once.
    """

    # fmt: off
    @T.prim_func
    def kernel(order: T.Buffer((2 * rounds,), "int32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([256])
        pool = T.SMEMPool()
        count = pool.alloc((1,), "int32", align=16)
        turns = Turns(pool)
        pool.commit()
        if t == 0:
            turns.init()
            count[0] = 0
        T.cuda.cta_sync()
        who: T.let = t // 128
        parity: T.int32 = 1 - who
        for _ in T.serial(rounds):
            if waits:
                turns.wait(who, parity)
                parity = parity ^ 1
            if t % 128 == 0:
                order[count[0]] = who
                count[0] = count[0] + 1
            T.ptx.bar.sync(T.Cast("uint32", who + 1), T.uint32(128))
            turns.give(1 - who, t % 32)
    # fmt: on

    return kernel
