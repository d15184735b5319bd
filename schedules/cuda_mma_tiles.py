"""A configuration of `cuda_mma`, and what it amounts to on a problem."""

from dataclasses import dataclass

from ..expr import KAxes, k_axes
from ..problem import ConvProblem

WARP = 32
# Halves of a 128-bit access: of a copy, of a row of an 8x8 matrix, of a store.
CHUNK = 8
# What mma calls the types that it multiplies.
MULTIPLICANDS = {"float16": "f16", "bfloat16": "bf16"}
# mma.m16n8k16: rows are pixels, columns channels.
MMA_P, MMA_M, MMA_K = 16, 8, 16
# wgmma: so many warps multiply together, and a row of their matrix is a pixel.
WARPGROUP, WGMMA_P = 4, 64
# Channels over whose matrices a thread's sums are spread so that it ends up with CHUNK neighbours.
GROUP = 32


@dataclass(frozen=True)
class Config:
    """Tiles and their pipeline.

    block_m, block_p, block_k: output channels, output pixels and input channels of one tap in a
    tile of a block. warp_m, warp_p: of these, outputs of one warp. stages: tiles of the ring in
    shared memory, all but one on their way. blocks: blocks a multiprocessor has to have registers
    for. wgmma: four warps multiply together, asynchronously and straight from shared memory
    (sm_90a); a warp then has all channels of the block, and all but two tiles are on their way.
    """

    block_m: int
    block_p: int
    block_k: int
    warp_m: int
    warp_p: int
    stages: int = 3
    blocks: int = 1
    wgmma: bool = False

    @property
    def threads(self) -> int:
        return (self.block_m // self.warp_m) * (self.block_p // self.warp_p) * WARP


def reduction(problem: ConvProblem, c: Config) -> KAxes:
    """The order of K: channels of one tap, then the next tap, then the next channels."""
    return k_axes(problem, c.block_k, "blocks")


def shared_bytes(c: Config) -> int:
    """Of the ring."""
    return 2 * c.stages * c.block_k * (c.block_m + c.block_p)


def registers(c: Config) -> int:
    """Registers of a thread, about: sums, fragments of a step, three a copied pixel, and the rest.

    At least what nvcc 13.0 took on sm_80 and sm_90 in a dozen configurations that nothing bounds.
    """
    pixels = c.block_p * c.block_k // CHUNK // c.threads
    if c.wgmma:  # no fragments
        return c.warp_m * c.warp_p // WARP + 3 * pixels + 36
    return c.warp_m * c.warp_p // WARP + c.warp_m // 4 + c.warp_p // 4 + 3 * pixels + 48
