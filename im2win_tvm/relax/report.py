"""What became of the convolutions of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..problem import ConvProblem

__all__ = ["Layer", "Report"]


@dataclass
class Layer:
    """A convolution of the model: what computes it, and with what of its surroundings.

    schedule, origin: ours, and where its configuration comes from; None and the reason where TVM's
    own kernel stays. convolution: what is computed, where that is known.
    """

    name: str
    problem: str
    operators: list[str]
    schedule: str | None
    origin: str
    convolution: ConvProblem | None = None


@dataclass
class Report:
    """What `UseIm2win` did; its text is a table."""

    layers: list[Layer] = field(default_factory=list)

    @property
    def replaced(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.schedule is not None]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} of {len(self.layers)} convolutions replaced"]
        wide = max((len(layer.problem) for layer in self.layers), default=0)
        for layer in self.layers:
            what = layer.schedule or "TVM"
            text = f"{'+'.join(layer.operators)}; {layer.origin}"
            lines.append(f"{layer.name:8} {layer.problem:{wide}} {what:18} {text}")
        return "\n".join(lines)
