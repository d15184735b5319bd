"""The simulator: ldmatrix and mma.sync give the product of the matrices that they are given."""

import numpy as np
import pytest
from simulated_arrays import RNG, nan
from tvm.script import tirx as T

from im2win_tvm.simulate import SimulationError, run

# Rows of g = lane // 4 and g + 8, columns of t = lane % 4: PTX ISA, fragments of mma.m16n8k16.
M, N, K = 16, 8, 16


def through_shared_memory(transposed, lanes=32):
    """y = a b for two warps; b lies as [k, n] where `transposed`, else as [n, k]."""
    shape = (K, N) if transposed else (N, K)
    # b takes two 8x8 matrices: lanes 0 to 7 and 8 to 15 give their rows.
    load_b = f"ldmatrix.sync.aligned.m8n8.x2{'.trans' if transposed else ''}.shared.b16"

    @T.prim_func
    def kernel(
        a: T.Buffer((2, M, K), "float16"),
        b: T.Buffer((2, *shape), "float16"),
        y: T.Buffer((2, M, N), "float32"),
    ):
        T.device_entry()
        T.cta_id([1])
        thread = T.thread_id([64])
        warp: T.let = thread // 32
        lane: T.let = thread % 32
        pool = T.SMEMPool()
        a_tile = pool.alloc((2, M, K), "float16", align=128)
        b_tile = pool.alloc((2, *shape), "float16", align=128)
        pool.commit()
        for i in T.unroll(8):
            a_tile[warp, (lane * 8 + i) // K, (lane * 8 + i) % K] = a[
                warp, (lane * 8 + i) // K, (lane * 8 + i) % K]  # fmt: skip
        for i in T.unroll(4):
            b_tile[warp, (lane * 4 + i) // shape[1], (lane * 4 + i) % shape[1]] = b[
                warp, (lane * 4 + i) // shape[1], (lane * 4 + i) % shape[1]]  # fmt: skip
        T.cuda.cta_sync()
        left = T.alloc_local((4,), "uint32")
        right = T.alloc_local((2,), "uint32")
        total = T.alloc_local((4,), "float32")
        for i in T.unroll(4):
            total[i] = T.float32(1)
        if lane < lanes:
            T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                left[0], left[1], left[2], left[3],
                a_tile.ptr_to([warp, lane % 16, lane // 16 * 8]))  # fmt: skip
            if transposed:
                T.ptx[load_b](right[0], right[1], b_tile.ptr_to([warp, lane % 16, 0]))
            else:
                row: T.let = b_tile.ptr_to([warp, lane % 8, lane // 8 % 2 * 8])
                T.ptx[load_b](right[0], right[1], row)
        T.ptx["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"](
            total[0], total[1], total[2], total[3], left[0], left[1], left[2], left[3],
            right[0], right[1], total[0], total[1], total[2], total[3])  # fmt: skip
        for i in T.unroll(4):
            y[warp, lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] = total[i]

    return kernel


def whole(*shape):
    """Numbers of few bits: every product and sum of them is exact."""
    return RNG.integers(-8, 9, shape).astype("float32")


@pytest.mark.parametrize("transposed", [False, True])
def test_product_through_shared_memory(transposed):
    a, b = whole(2, M, K), whole(2, K, N)
    given = b if transposed else b.transpose(0, 2, 1)
    arrays = {
        "a": a.astype("float16"),
        "b": np.ascontiguousarray(given, "float16"),
        "y": nan(2, M, N),
    }
    run(through_shared_memory(transposed), arrays)
    np.testing.assert_array_equal(arrays["y"], 1 + a @ b)


def test_part_of_a_warp_is_refused():
    arrays = {"a": np.zeros((2, M, K), "float16"), "b": np.zeros((2, N, K), "float16")}
    with pytest.raises(SimulationError, match="of a whole warp, by some of its threads"):
        run(through_shared_memory(False, lanes=31), arrays | {"y": nan(2, M, N)})


@pytest.mark.parametrize(("dtype", "k"), [("bf16", 16), ("bf16", 8), ("tf32", 8), ("tf32", 4)])
def test_product_of_registers(dtype, k):
    """Fragments by the ISA's tables, from 32-bit words [row, word] of a and [column, word] of b."""
    each = 2 if dtype == "bf16" else 1  # elements of a word
    words = k // each
    lefts, rights = 2 * words // 4, words // 4
    name = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{dtype}.{dtype}.f32"

    @T.prim_func
    def kernel(
        a: T.Buffer((M, words), "uint32"),
        b: T.Buffer((N, words), "uint32"),
        y: T.Buffer((M, N), "float32"),
    ):
        T.device_entry()
        T.cta_id([1])
        lane = T.thread_id([32])
        left = T.alloc_local((lefts,), "uint32")
        right = T.alloc_local((rights,), "uint32")
        total = T.alloc_local((4,), "float32")
        for i in T.unroll(lefts):
            left[i] = a[lane // 4 + i % 2 * 8, lane % 4 + i // 2 * 4]
        for i in T.unroll(rights):
            right[i] = b[lane // 4, lane % 4 + i * 4]
        for i in T.unroll(4):
            total[i] = T.float32(0)
        T.ptx[name](
            *[total[i] for i in range(4)], *[left[i] for i in range(lefts)],
            *[right[i] for i in range(rights)], *[total[i] for i in range(4)])  # fmt: skip
        for i in T.unroll(4):
            y[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] = total[i]

    a, b = whole(M, k), whole(k, N)
    y = nan(M, N)
    run(kernel, {"a": as_words(a, dtype), "b": as_words(b.T, dtype), "y": y})
    np.testing.assert_array_equal(y, a @ b)


def as_words(matrix, dtype):
    """Rows as 32-bit words; in tf32 with bits set that do not count."""
    bits = np.ascontiguousarray(matrix, "float32").view("uint32")
    if dtype == "tf32":
        return bits | 0x1FFF
    return np.ascontiguousarray((bits >> 16).astype("uint16")).view("uint32")


def together(waits, swizzle=1):
    """y = a b^T for a of 64 rows by a warpgroup, whose operands then change.

    waits: whether the product is waited for before that.
    """

    @T.prim_func
    def kernel(
        a: T.Buffer((64, 64), "float16"),
        b: T.Buffer((8, 64), "float16"),
        y: T.Buffer((64, 8), "float32"),
    ):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([128])
        pool = T.SMEMPool()
        a_tile = pool.alloc((64 * 64,), "float16", align=1024)
        b_tile = pool.alloc((8 * 64,), "float16", align=1024)
        pool.commit()
        total = T.alloc_local((4,), "float32")
        for i in T.unroll(4):
            total[i] = T.float32(0)
        # Rows of 128 bytes, their 16-byte chunks exchanged by the row's number.
        for i in T.serial(32):
            row: T.let = (i * 128 + t) // 64
            k: T.let = (i * 128 + t) % 64
            a_tile[row * 64 + (k // 8 ^ row % 8) * 8 + k % 8] = a[row, k]
        for i in T.serial(4):
            row_b: T.let = (i * 128 + t) // 64
            k_b: T.let = (i * 128 + t) % 64
            b_tile[row_b * 64 + (k_b // 8 ^ row_b) * 8 + k_b % 8] = b[row_b, k_b]
        T.cuda.cta_sync()
        common: T.let = T.uint64((swizzle << 62) | (64 << 32) | (1 << 16))
        a_at: T.let = common + T.Cast(
            "uint64", T.cuda.cvta_generic_to_shared(a_tile.ptr_to([0])) // 16)  # fmt: skip
        b_at: T.let = common + T.Cast(
            "uint64", T.cuda.cvta_generic_to_shared(b_tile.ptr_to([0])) // 16)  # fmt: skip
        T.ptx["wgmma.fence.sync.aligned"]()
        for step in T.unroll(4):
            T.ptx["wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"](
                total[0], total[1], total[2], total[3], a_at + T.uint64(2) * step,
                b_at + T.uint64(2) * step, step > 0, 1, 1, 0, 0)  # fmt: skip
        T.ptx["wgmma.commit_group.sync.aligned"]()
        if waits:
            T.ptx["wgmma.wait_group.sync.aligned"](0)
        T.cuda.cta_sync()
        b_tile[t] = T.Cast("float16", T.float32(77))
        T.cuda.cta_sync()
        T.ptx["wgmma.wait_group.sync.aligned"](0)
        for i in T.unroll(4):
            y[t // 32 * 16 + t % 32 // 4 + i // 2 * 8, t % 4 * 2 + i % 2] = total[i]

    return kernel


def test_product_of_a_warpgroup():
    a, b, y = whole(64, 64), whole(8, 64), nan(64, 8)
    run(together(True), {"a": a.astype("float16"), "b": b.astype("float16"), "y": y})
    np.testing.assert_array_equal(y, a @ b.T)


def test_operands_that_change_before_they_were_waited_for():
    arrays = {"a": np.ones((64, 64), "float16"), "b": np.ones((8, 64), "float16")}
    with pytest.raises(SimulationError, match="an operand changed before it was waited for"):
        run(together(False), arrays | {"y": nan(64, 8)})


def test_descriptors_that_are_not_simulated():
    arrays = {"a": np.ones((64, 64), "float16"), "b": np.ones((8, 64), "float16")}
    with pytest.raises(SimulationError, match="descriptors without a swizzle are not simulated"):
        run(together(True, swizzle=0), arrays | {"y": nan(64, 8)})


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_stored_from_registers(number, transposed):
    """Of pairs of numbers, rounded to halves, that a lane holds of row lane // 4 of a matrix."""
    name = f"stmatrix.sync.aligned.m8n8.x{number}{'.trans' if transposed else ''}.shared.b16"

    @T.prim_func
    def kernel(
        x: T.Buffer((number, 8, 8), "float32"),
        y: T.Buffer((number, 8, 8), "float16"),
    ):
        T.device_entry()
        T.cta_id([1])
        lane = T.thread_id([32])
        tile = T.alloc_shared((number, 8, 8), "float16", align=16)
        held = T.alloc_local((number,), "uint32")
        for i in T.unroll(number):
            T.ptx["cvt.rn.f16x2.f32"](
                held[i], x[i, lane // 4, lane % 4 * 2 + 1], x[i, lane // 4, lane % 4 * 2]
            )
        T.ptx[name](
            tile.ptr_to([lane // 8 % number, lane % 8, 0]), *[held[i] for i in range(number)]
        )
        T.cuda.cta_sync()
        for i in T.serial(number * 2):
            y[i // 2, i % 2 * 4 + lane // 8, lane % 8] = tile[
                i // 2, i % 2 * 4 + lane // 8, lane % 8]  # fmt: skip

    x, y = (
        RNG.standard_normal((number, 8, 8)).astype("float32"),
        nan(number, 8, 8).astype("float16"),
    )
    run(kernel, {"x": x, "y": y})
    expected = x.transpose(0, 2, 1) if transposed else x
    np.testing.assert_array_equal(y, expected.astype("float16"))
