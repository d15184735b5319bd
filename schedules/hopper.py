"""What kernels for Hopper are made of: rings in shared memory, swizzled tiles, tensor maps.

Each is a piece of TIRx that a kernel composes; none knows of convolutions. Sources: PTX ISA 8.x,
sections "mbarrier", "cp.async.bulk", "wgmma"; CUDA Driver API, cuTensorMapEncodeTiled.
"""

# Bodies of inline functions are parsed as TIRx.

from typing import NamedTuple

from tvm import tirx
from tvm.script import tirx as T

# A row of a tile: the span of the widest swizzle, which exchanges the 16-byte chunks of a row by
# the row's number among eight. Eight rows are one atom.
ROW_BYTES, ATOM_ROWS = 128, 8
ATOM_BYTES = ROW_BYTES * ATOM_ROWS
WARPGROUP = 128
# Rows of A of one wgmma, and the bytes of a row that one takes.
WGMMA_M, WGMMA_K_BYTES = 64, 32
# Driver API: CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B.
_SWIZZLE_128B, _PROMOTE_128B = 3, 2
# Driver API: CU_TENSOR_MAP_DATA_TYPE_TFLOAT32, which rounds as it copies.
_TFLOAT32 = 11
# Limits of a tensor map: entries of a box, and steps between the elements that it takes.
MAX_BOX, MAX_STEP = 256, 8

# Registers of a multiprocessor, and the most of a thread, in eights (CUDA C++ Programming Guide).
_REGISTERS, _MOST = 65536, 248


class Registers(NamedTuple):
    """Of a thread: at the launch, and of producing and consuming ones afterwards (setmaxnreg)."""

    launched: int
    producer: int
    consumer: int


def registers(consumers: int, blocks: int) -> Registers:
    """What threads get in a block of one producing and some consuming warpgroups.

    The block is launched with equal shares, in eights, and setmaxnreg takes from no other source:
    what consumers get more is what the producer gives up.
    """
    warpgroups = consumers + 1
    launched = min(_MOST, _REGISTERS // (blocks * warpgroups * WARPGROUP) // 8 * 8)
    producer = 40 if consumers < 3 and launched > 100 else 24
    consumer = (launched * warpgroups - producer) // consumers // 8 * 8
    return Registers(launched, producer, min(consumer, _MOST))


# wgmma's name of the operands, and what follows its scales: neither operand is transposed.
_WGMMA = {
    "float16": ("k16.f32.f16.f16", (0, 0)),
    "bfloat16": ("k16.f32.bf16.bf16", (0, 0)),
    "float32": ("k8.f32.tf32.tf32", ()),
}

# Empty, but it counts as writing the sum and memory, and compilers keep such statements in order.
_SETTLE = """
__forceinline__ __device__ void im2win_settle(float* sum) {
  asm volatile("" : "+f"(*sum) : : "memory");
}
"""

_TENSOR_COPY = "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes"
_BULK_COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


@T.meta_class
class Position:
    """A place in a ring, and the parity of the turn that it belongs to."""

    def __init__(self, stages: int):
        self.stages = stages
        self.stage = T.local_scalar("int32")
        self.turn = T.local_scalar("int32")

    @T.inline
    def start(self):
        self.stage = 0
        self.turn = 0

    @T.inline
    def advance(self):
        self.stage = self.stage + 1
        if self.stage == self.stages:
            self.stage = 0
            self.turn = self.turn ^ 1

    @T.inline
    def skip(self, count):
        """Go on by as many stages as somebody else takes, a number known when this is compiled."""
        self.stage = self.stage + count % self.stages
        self.turn = self.turn ^ (count // self.stages % 2)
        if self.stage >= self.stages:
            self.stage = self.stage - self.stages
            self.turn = self.turn ^ 1


@T.inline
def settle(sums, count):
    """After a wait for wgmma: nothing that reads its sums comes before the wait.

    The wait names no registers, so to a compiler sums look ready where wgmma is issued.
    """
    for i in T.unroll(count):
        T.cuda.func_call("im2win_settle", T.address_of(sums[i]), source_code=_SETTLE)


@T.meta_class
class Ring:
    """Stages that copies fill and warps read, each with two mbarriers.

    full: the bytes of a copy have arrived. empty: `readers` warps have read what was there.
    """

    def __init__(self, pool, stages: int, stage_bytes: int, readers: int):
        self.stages, self.stage_bytes, self.readers = stages, stage_bytes, readers
        self.data = pool.alloc((stages * stage_bytes,), "uint8", align=ATOM_BYTES)
        self.full = self.empty = None

    def place_barriers(self, pool):
        """After all that has to be aligned more."""
        self.full = pool.alloc((self.stages,), "uint64", align=8)
        self.empty = pool.alloc((self.stages,), "uint64", align=8)

    @T.inline
    def init(self):
        for i in T.unroll(self.stages):
            T.ptx.mbarrier.init.shared.b64(self.full.ptr_to([i]), T.uint32(1))
            T.ptx.mbarrier.init.shared.b64(self.empty.ptr_to([i]), T.uint32(self.readers))

    @T.inline
    def expect(self, at, nbytes):
        """Wait until the stage was read, and say what is to arrive in it."""
        # A stage that nobody filled yet counts as read: the parity before the first turn's.
        T.cuda.mbarrier_wait(self.empty.ptr_to([at.stage]), at.turn ^ 1)
        T.ptx.mbarrier.arrive.expect_tx.shared.b64(self.full.ptr_to([at.stage]), T.uint32(nbytes))

    @T.inline
    def wait(self, at):
        """Until the bytes are there."""
        T.cuda.mbarrier_wait(self.full.ptr_to([at.stage]), at.turn)

    @T.inline
    def release(self, at, lane):
        """Say for this warp that it has read the stage, and go on to the next."""
        if lane == 0:
            T.ptx.mbarrier.arrive.shared.b64(self.empty.ptr_to([at.stage]), T.uint32(1))
        at.advance()

    @T.inline
    def copy(self, at, source, nbytes):
        """Bytes that lie in a row."""
        T.ptx[_BULK_COPY](
            self.data.ptr_to([at.stage * self.stage_bytes]),
            source,
            T.uint32(nbytes),
            self.full.ptr_to([at.stage]),
        )

    @T.inline
    def copy_box(self, at, tensor_map, coordinates):
        """A box of a tensor."""
        T.ptx[_TENSOR_COPY.format(len(coordinates))](
            self.data.ptr_to([at.stage * self.stage_bytes]),
            T.address_of(tensor_map),
            *coordinates,
            self.full.ptr_to([at.stage]),
        )

    def descriptor(self, group_rows: int, first_row):
        """wgmma's view of rows from `first_row` on, eights of them `group_rows` rows apart.

        Without the stage: add `stage_step` for each. Rows need not start at an atom: the swizzle
        goes by the address that is read, not by the row's number in the matrix.
        """
        start = T.cuda.cvta_generic_to_shared(self.data.ptr_to([0])) // 16
        fixed = (1 << 62) | (group_rows * ROW_BYTES // 16 << 32) | (1 << 16)
        return T.uint64(fixed) + T.Cast("uint64", start) + T.Cast("uint64", rows(first_row))

    def offset(self, at):
        """Of a stage in a descriptor."""
        return T.Cast("uint64", at.stage * self.stage_step)

    @property
    def stage_step(self) -> int:
        """From stage to stage in a descriptor."""
        return self.stage_bytes // 16


@T.meta_class
class Turns:
    """Which of two warpgroups has its turn: an mbarrier each, passed by the other one's warps."""

    def __init__(self, pool):
        self.passed = pool.alloc((2,), "uint64", align=8)

    @T.inline
    def init(self):
        for i in T.unroll(2):
            T.ptx.mbarrier.init.shared.b64(self.passed.ptr_to([i]), T.uint32(WARPGROUP // 32))

    @T.inline
    def wait(self, who, parity):
        T.cuda.mbarrier_wait(self.passed.ptr_to([who]), parity)

    @T.inline
    def give(self, who, lane):
        if lane == 0:
            T.ptx.mbarrier.arrive.shared.b64(self.passed.ptr_to([who]), T.uint32(1))


def rows(count):
    """So many rows in a descriptor, which counts in 16 bytes."""
    return count * (ROW_BYTES // 16)


def wgmma(dtype: str, n: int, sums, first: int, a, b, adds):
    """64 rows of A by `n` of B, added to the sums from `first` on, or put there if not `adds`."""
    kind, transposed = _WGMMA[dtype]
    held = [sums[first + i] for i in range(n // 2)]
    name = f"wgmma.mma_async.sync.aligned.m64n{n}{kind}"
    return T.ptx[name](*held, a, b, adds, 1, 1, *transposed)


class TensorMap(NamedTuple):
    """A tensor as the copy engine sees it, innermost axis first.

    sizes: in elements. strides: in bytes, of all axes but the innermost. box: elements that a copy
    brings of each axis. steps: from one of them to the next.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def spans(self) -> tuple[int, ...]:
        """Elements of each axis from the first of a box to its last."""
        return tuple((b - 1) * s + 1 for b, s in zip(self.box, self.steps, strict=True))

    def reason(self) -> str | None:
        """Why there is no such map, or None."""
        if max(self.spans) > MAX_BOX:
            return f"a box over {self.spans} elements: allowed are up to {MAX_BOX} of an axis"
        for step in self.steps:
            if not 1 <= step <= MAX_STEP:
                return f"steps of {self.steps}: allowed are 1 to {MAX_STEP}"
        for stride in self.strides:
            if stride % 16 or stride >= 1 << 40:
                return f"strides of {self.strides} bytes: allowed are multiples of 16 below 2**40"
        return None

    def encode(self, variable, data, dtype: str):
        """The host's call that writes the map; zeros come from beyond the tensor."""
        return tirx.tensormap_encode_tiled(
            variable, data,
            *map(T.int64, self.sizes), *map(T.int64, self.strides),
            *map(T.int32, self.spans), *map(T.int32, self.steps),
            descriptor_dtype=dtype, rank=len(self.sizes), swizzle=_SWIZZLE_128B,
            l2_promotion=_PROMOTE_128B,
            force_cu_dtype=_TFLOAT32 if dtype == "float32" else -1,
        )  # fmt: skip


@T.meta_class
class ClusterSum:
    """Sums of the blocks of a cluster, each of which then has the total of a share of them.

    Sums lie in fours: four of each thread side by side. They are added in the order of the blocks,
    so that equal inputs give equal outputs.
    """

    def __init__(self, memory, blocks: int, threads: int, fours: int):
        self.blocks, self.threads, self.fours = blocks, threads, fours
        self.share = -(-fours // blocks)
        self.parts = T.decl_buffer((fours * threads * 4,), "float32", data=memory)
        self.total = T.alloc_local((self.share * 4,), "float32")
        self.part = T.alloc_local((4,), "float32")
        self.address = T.local_scalar("uint32")

    @T.inline
    def leave(self, thread, sums):
        """Put this block's sums where the others can read them; nobody may need the memory."""
        for i in T.unroll(self.fours):
            for e in T.vectorized(4):
                self.parts[(i * self.threads + thread) * 4 + e] = sums[i * 4 + e]

    @T.inline
    def collect(self, thread, rank):
        """`total` becomes that of the fours from `rank * share` on. All blocks have left theirs."""
        for i in T.unroll(self.share):
            for e in T.unroll(4):
                self.total[i * 4 + e] = T.float32(0)
            if rank * self.share + i < self.fours:
                for other in T.unroll(self.blocks):
                    T.ptx["mapa.shared::cluster.u32"](
                        self.address,
                        T.cuda.cvta_generic_to_shared(
                            self.parts.ptr_to(
                                [((rank * self.share + i) * self.threads + thread) * 4]
                            )
                        ),
                        T.uint32(other),
                    )
                    T.ptx["ld.shared::cluster.v4.f32"](
                        self.part[0], self.part[1], self.part[2], self.part[3], self.address
                    )
                    for e in T.unroll(4):
                        self.total[i * 4 + e] = self.total[i * 4 + e] + self.part[e]


@T.inline
def meet_cluster():
    """All threads of a cluster wait for each other; what they wrote before can be read after."""
    T.ptx["barrier.cluster.arrive.release"]()
    T.ptx["barrier.cluster.wait.acquire"]()
