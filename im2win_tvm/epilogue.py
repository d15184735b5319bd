"""What a kernel does to its sums before it stores them; free of TVM, so that loading needs none."""

from dataclasses import dataclass

ACTIVATIONS = (None, "relu", "relu6", "gelu")


@dataclass(frozen=True)
class Epilogue:
    """``y = activation(conv + bias + residual)``, each part optional.

    bias: a vector of out_channels; residual: a tensor of the output's shape; both in the
    problem's dtype, added in float32.
    """

    bias: bool = False
    residual: bool = False
    activation: str | None = None

    def __post_init__(self):
        for field in ("bias", "residual"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}={getattr(self, field)!r}: allowed are True and False")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: allowed are {ACTIVATIONS}")


NONE = Epilogue()
