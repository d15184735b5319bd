"""The simulator: each fault of a kernel is found and named."""

import numpy as np
import pytest
import simulated_kernels as kernels
import tvm
from simulated_arrays import nan, normal, operands
from tvm.script import tirx as T

from im2win_tvm.lower import lower
from im2win_tvm.schedules.base import ALIGNMENT, CONV
from im2win_tvm.simulate import SimulationError, run, statements


def test_a_loop_that_waits_for_what_never_comes(monkeypatch):
    def make(last):
        @T.prim_func
        def kernel(y: T.Buffer((64,), "int32")):
            T.device_entry()
            T.cta_id([1])
            t = T.thread_id([64])
            n: T.int32 = 0
            while n < 10 or y[t] == last:
                n = n + 1
            y[t] = n

        return kernel

    # So many passes are allowed, and not one more.
    monkeypatch.setattr(statements, "LONGEST_WHILE", 10)
    y = np.arange(64, dtype="int32")
    run(make(64), {"y": y})
    np.testing.assert_array_equal(y, np.full(64, 10))
    message = r"while loop has not ended after 10 passes by block 0 thread 5 in `n.* == 5`"
    with pytest.raises(SimulationError, match=message) as error:
        run(make(5), {"y": np.arange(64, dtype="int32")})
    assert "y[" in error.value.statement
    assert (error.value.block, error.value.thread) == ((0, 0, 0), (5, 0, 0))


FAULTS = {
    "without wait_group": ({"waits": -1}, "read .* a copy of .*, not waited for, is to fill"),
    "wait_group off by one": ({"waits": 2}, "read .* a copy of .*, not waited for, is to fill"),
    "without barrier": ({"barrier": False}, "read of a word that .* wrote, no barrier between"),
    "stage still read": ({"load_first": True}, "write of a word that .* read, no barrier between"),
    "ring too small": ({"ring": 2}, "a copy of .*, not waited for, is to fill"),
    "misaligned": (
        {"shift": 1},
        "a: 16 bytes not aligned to them: by block .* thread 0 at byte 4 ",
    ),
    "before the array": ({"shift": -4}, "a: 16 bytes outside its 5120: by .* at byte -16"),
    "after the array": ({"shift": 64}, "a: 16 bytes outside its 5120: by .* at byte 5120"),
}


@pytest.mark.parametrize(("switches", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_of_a_product(switches, message):
    with pytest.raises(SimulationError, match=message):
        run(kernels.product(**switches), operands())


def test_alignment_is_what_the_parameter_declares():
    function = kernels.product()
    module = tvm.IRModule({CONV: function})
    with pytest.raises(SimulationError, match="y: access of 16 bytes not aligned"):
        run(lower(module)[CONV], operands())
    declared = function.with_attr(ALIGNMENT, {"y": 16})
    run(lower(tvm.IRModule({CONV: declared}))[CONV], operands())


CLUSTER_FAULTS = {
    "before": "shared memory of another block before a cluster barrier shows that it runs",
    "after": r"block 1 may have left the cluster, no barrier keeps it: access to its shared memory",
    "ordered": "read of a word that block 1 thread 0 wrote, no barrier between",
}


@pytest.mark.parametrize("switch", CLUSTER_FAULTS)
def test_faults_in_a_cluster(switch):
    with pytest.raises(SimulationError, match=CLUSTER_FAULTS[switch]):
        run(kernels.shared_sums(**{switch: False}), {"x": normal(8, 32), "y": nan(64)})


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("arrive", "arrive", "second barrier.cluster.arrive without a wait between"),
        ("wait", "arrive", "barrier.cluster.wait without an arrive before it"),
        ("one block", "arrive", "barrier.cluster.wait before every block of the cluster arrived"),
        ("one thread", "arrive", "barrier.cluster.arrive in divergent code: not reached by"),
    ],
)
def test_faults_of_cluster_barriers(first, second, message):
    @T.prim_func
    def kernel(y: T.Buffer((1,), "float32")):
        T.device_entry()
        block = T.cta_id([2])
        T.cta_id_in_cluster([2])
        t = T.thread_id([32])
        if first == "one block":
            if block == 0:
                T.cuda.cluster_sync()
        if first == "one thread":
            if t == 0:
                T.cuda.cluster_sync()
        if first == "arrive":
            T.ptx["barrier.cluster.arrive"]()
        if first == "wait":
            T.ptx["barrier.cluster.wait"]()
        T.ptx["barrier.cluster.arrive"]()

    with pytest.raises(SimulationError, match=message):
        run(kernel, {"y": nan(1)})


def one_statement(which):
    """A block of 64 threads that does one thing wrong."""

    @T.prim_func
    def kernel(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        T.device_entry()
        block = T.cta_id([2])
        t = T.thread_id([64])
        tile = T.alloc_shared((64, 2), "float32", align=16)
        local = T.alloc_local((4,), "float32")
        if which == "shared never written":
            y[t] = tile[t, 0]
        if which == "register never written":
            if t < 50:
                local[2] = 1.0
            y[t] = local[2]
        if which == "index":
            y[t] = x[t + block]
        if which == "axis":
            tile[t // 2, t % 2 + 1] = 0.0
        if which == "registers":
            local[t] = 0.0
        if which == "two threads":
            tile[t // 2, 1] = x[t]
        if which == "two blocks":
            y[t] = x[t]
        if which == "vector":
            if t < 10:
                for e in T.vectorized(4):
                    y[t + e] = 0.0
        if which == "division":
            y[0] = T.Cast("float32", 5 // (t - 3))
        if which == "window":
            T.ptx["st.shared.f32"](T.uint32(2 << 24), x[t])
        if which == "end of shared memory":
            T.ptx["st.shared.f32"](T.Cast("uint32", t * 16), x[t])

    return kernel


WRONG = {
    "shared never written": "shared memory: read of a word never written: by block 0 thread 0",
    "register never written": r"local\[2\]: read of a register never written by block 0 thread 50",
    "index": r"x: index 64 outside \[0, 64\): access by block 1 thread 63",
    "axis": r"tile: index 2 of axis 1 outside \[0, 2\): access by block 0 thread 1",
    "registers": r"local: index 4 outside \[0, 4\): access by block 0 thread 4",
    "two threads": "write of a word that block 0 thread 1 writes in the same statement",
    "two blocks": "y: write of a word that block 1 thread 0 writes in the same statement",
    "vector": "y: access of 16 bytes not aligned to them: by block 0 thread 1 at byte 4",
    "division": "division by zero by block 0 thread 3",
    "window": "not an address of shared memory: by block 0 thread 0",
    "end of shared memory": "shared memory: 4 bytes outside its 512: by block 0 thread 32",
}


@pytest.mark.parametrize("which", WRONG)
def test_wrong_statements(which):
    with pytest.raises(SimulationError, match=WRONG[which]):
        run(one_statement(which), {"x": normal(64), "y": nan(64)})


def test_what_is_not_simulated_says_so():
    @T.prim_func
    def kernel(y: T.Buffer((64,), "float32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([64])
        y[t] = T.Cast("float32", T.cuda.clock64())

    with pytest.raises(SimulationError, match=r"tirx\.cuda\.clock64 is not simulated"):
        run(kernel, {"y": nan(64)})
    with pytest.raises(
        SimulationError, match=r"y: the function takes float32\[64\].* float32\[63\]"
    ):
        run(kernel, {"y": nan(63)})
    with pytest.raises(SimulationError, match="arrays: no y"):
        run(kernel, {})
