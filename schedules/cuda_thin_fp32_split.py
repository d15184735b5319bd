"""Float32 as two or three halves and a scale, for windows and filters of `cuda_thin_fp32`.

x = scale (a + b), or scale (a + b + c). The scale is a power of two that brings the largest number
of a block to [2^14, 2^15). a is x / scale rounded to float16, and the next half is the rest.

Of three halves the first one is cut to 8 bits. So products of two of them have 16 bits, and the
tensor cores, which truncate sums, have nothing to cut off but far below their largest; all 24 bits
of x are in the halves. An infinity becomes the largest number of float16 and then the infinity: it
meets one half of the other operand, finite ones meet the rest, and no infinity meets another.
"""

# Bodies of inline functions are parsed as TIRx.

from tvm.script import tirx as T

# The bits of a float32 without those beyond the first 8 of its value.
_EIGHT_BITS = 0xFFFF0000


@T.meta_class
class Halves:
    """Two neighbouring numbers of a block, as `count` words of two halves each."""

    def __init__(self, count: int):
        self.count = count
        self.word = T.alloc_local((count,), "uint32")
        self.rest = T.alloc_local((2,), "float32")

    @T.inline
    def split(self, first, second):
        """Of values that were brought into range."""
        self.rest[0] = first
        self.rest[1] = second
        if self.count == 3:
            T.ptx["cvt.rn.satfinite.f16x2.f32"](
                self.word[0], self.cut(self.rest[1]), self.cut(self.rest[0])
            )
            self.take(0)
            T.ptx["cvt.rn.satfinite.f16x2.f32"](self.word[1], self.rest[1], self.rest[0])
            self.take(1)
        else:
            T.ptx["cvt.rn.satfinite.f16x2.f32"](self.word[0], self.rest[1], self.rest[0])
            self.take(0)
        T.ptx["cvt.rn.f16x2.f32"](self.word[self.count - 1], self.rest[1], self.rest[0])

    @T.inline
    def take(self, number):
        """Away from the rests what is in a word."""
        for e in T.unroll(2):
            self.rest[e] = self.rest[e] - self.value(number, e)

    def cut(self, value):
        """A float32 without its lower bits; NaN stays one, as arithmetic makes them."""
        bits = T.bitwise_and(T.reinterpret("uint32", value), T.uint32(_EIGHT_BITS))
        return T.reinterpret("float32", bits)

    def value(self, number, which):
        """A half of a word as float32."""
        bits = T.bitwise_and(
            T.shift_right(self.word[number], T.uint32(16) * T.Cast("uint32", which)),
            T.uint32(0xFFFF),
        )
        return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))
