"""TIRx kernels for the simulator's tests, each right unless a switch breaks it."""

from tvm.script import tirx as T


def staged(barrier=True, whole=True):
    """y = x reversed within each block of 64, through shared memory."""

    @T.prim_func
    def kernel(x: T.Buffer((192,), "float32"), y: T.Buffer((192,), "float32")):
        T.device_entry()
        block = T.cta_id([3])
        thread = T.thread_id([64])
        tile = T.alloc_shared((64,), "float32")
        tile[thread] = x[block * 64 + thread]
        if barrier:
            if whole:
                T.cuda.cta_sync()
            else:
                if thread < 48:
                    T.cuda.cta_sync()
        y[block * 64 + thread] = tile[63 - thread]

    return kernel


# Sizes of the product below: y[m, n] is the sum over k of a[k, m] * b[k, n].
M, N, K, BLOCK, STEP = 64, 96, 20, 32, 4


def product(stages=3, waits=None, barrier=True, load_first=False, shift=0, ring=None):
    """A tiled product, its tiles in a ring of stages that `cp.async` fills.

    waits: groups that may be under way when a tile is read. load_first: the next tile is asked for
    before the barrier. shift: words that the source is off. ring: stages that the ring has room
    for.
    """
    waits = stages - 2 if waits is None else waits
    ring = stages if ring is None else ring
    steps, size = K // STEP, 2 * STEP * BLOCK

    @T.prim_func
    def kernel(
        a: T.Buffer((K * M,), "float32"),
        b: T.Buffer((K * N,), "float32"),
        y: T.Buffer((M, N), "float32"),
    ):
        T.device_entry()
        across, down = T.cta_id([N // BLOCK, M // BLOCK])
        thread = T.thread_id([64])
        pool = T.SMEMPool()
        tiles = pool.alloc((ring, size), "float32", align=128)
        pool.commit()
        row: T.let = thread // 8 % 4
        column: T.let = thread % 8 * 4
        asked = T.alloc_local((1,), "int32")
        asked[0] = 0

        @T.inline
        def load():
            if asked[0] < steps:
                stage: T.let = asked[0] % ring
                if thread < 32:
                    T.ptx["cp.async.cg.shared.global"](
                        tiles.ptr_to([stage, row * BLOCK + column]),
                        a.ptr_to([(asked[0] * STEP + row) * M + down * BLOCK + column + shift]),
                        16,
                    )
                else:
                    T.ptx["cp.async.cg.shared.global"](
                        tiles.ptr_to([stage, (STEP + row) * BLOCK + column]),
                        b.ptr_to([(asked[0] * STEP + row) * N + across * BLOCK + column]),
                        16,
                    )
                asked[0] = asked[0] + 1
            T.ptx["cp.async.commit_group"]()

        for _ in T.unroll(stages - 1):
            load()
        sums = T.alloc_local((4, 4), "float32")
        left = T.alloc_local((4,), "float32")
        right = T.alloc_local((4,), "float32")
        for i, j in T.grid(4, 4):
            sums[i, j] = T.float32(0)
        m: T.let = thread // 8 * 4
        n: T.let = thread % 8 * 4
        for step in T.serial(steps):
            if waits >= 0:
                T.ptx["cp.async.wait_group"](waits)
            if load_first:
                load()
            if barrier:
                T.cuda.cta_sync()
            if not load_first:
                load()
            for k in T.unroll(STEP):
                for e in T.vectorized(4):
                    left[e] = tiles[step % ring, k * BLOCK + m + e]
                for e in T.vectorized(4):
                    right[e] = tiles[step % ring, (STEP + k) * BLOCK + n + e]
                for i, j in T.grid(4, 4):
                    sums[i, j] = sums[i, j] + left[i] * right[j]
        for i in T.unroll(4):
            for e in T.vectorized(4):
                y[down * BLOCK + m + i, across * BLOCK + n + e] = sums[i, e]

    return kernel


def shared_sums(before=True, after=True, ordered=True):
    """y[cluster, thread] = the sum of x over the cluster's 4 blocks, whose shared memory the first
    block reads.

    before, after: the cluster barriers around the reading. ordered: the first of them releases what
    was written before it.
    """

    @T.prim_func
    def kernel(x: T.Buffer((8, 32), "float32"), y: T.Buffer((64,), "float32")):
        T.device_entry()
        block = T.cta_id([8])
        rank = T.cta_id_in_cluster([4])
        thread = T.thread_id([32])
        part = T.alloc_shared((32,), "float32", align=128)
        part[thread] = x[block, thread]
        if before:
            if ordered:
                T.ptx["barrier.cluster.arrive.release.aligned"]()
            else:
                T.ptx["barrier.cluster.arrive.relaxed.aligned"]()
            T.ptx["barrier.cluster.wait.acquire.aligned"]()
        if rank == 0:
            total: T.float32 = part[thread]
            value: T.float32 = T.float32(0)
            address: T.uint32 = T.uint32(0)
            for other in T.unroll(3):
                T.ptx["mapa.shared::cluster.u32"](
                    address,
                    T.cuda.cvta_generic_to_shared(part.ptr_to([thread])),
                    T.uint32(other + 1),
                )
                T.ptx["ld.shared::cluster.f32"](value, address)
                total = total + value
            y[block // 4 * 32 + thread] = total
        if after:
            T.cuda.cluster_sync()

    return kernel
