"""Named lists of convolutions: which problems people measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from im2win_tvm.problem import ConvProblem

__all__ = ["SUITES", "Layer", "Suite", "SuiteError", "layer", "suite"]


class SuiteError(ValueError):
    """An unknown suite or layer; the message lists the known ones."""


@dataclass(frozen=True)
class Layer:
    """One layer shape: ``problem`` at batch 1, and ``count``, how often the network has it."""

    problem: ConvProblem
    count: int = 1


@dataclass(frozen=True)
class Suite:
    """An ordered list of layers.

    ``variants`` are reachable by name with :func:`layer` and are no part of the list.
    """

    name: str
    description: str
    batch: int
    layers: dict[str, Layer]
    variants: dict[str, Layer] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How often the network has each layer, for weighted sums."""
        return {name: entry.count for name, entry in self.layers.items()}


def suite(
    name: str, batch: int | None = None, dtype: str = "float32", layout: str | None = None
) -> dict[str, ConvProblem]:
    """The problems of a suite by layer name, in order.

    ``batch`` None is the suite's own; ``layout`` None is channels first. Raises SuiteError for an
    unknown name, ProblemError for a batch, dtype or layout that is not allowed.
    """
    chosen = _find(name)
    return {
        title: _configured(entry, chosen, batch, dtype, layout)
        for title, entry in chosen.layers.items()
    }


def layer(
    suite_name: str,
    layer_name: str,
    batch: int | None = None,
    dtype: str = "float32",
    layout: str | None = None,
) -> ConvProblem:
    """One problem of a suite, variants included.

    Raises SuiteError for an unknown suite or layer, ProblemError as :func:`suite` does.
    """
    chosen = _find(suite_name)
    known = {**chosen.layers, **chosen.variants}
    if layer_name not in known:
        raise SuiteError(
            f"layer={layer_name!r}: allowed in suite {suite_name!r}: {', '.join(known)}"
        )
    return _configured(known[layer_name], chosen, batch, dtype, layout)


def _find(name: str) -> Suite:
    if name not in SUITES:
        raise SuiteError(f"suite={name!r}: allowed: {', '.join(SUITES)}")
    return SUITES[name]


def _configured(
    entry: Layer, chosen: Suite, batch: int | None, dtype: str, layout: str | None
) -> ConvProblem:
    return entry.problem.replace(
        batch=chosen.batch if batch is None else batch, dtype=dtype, layout=layout
    )


def _square(
    channels: int, size: int, filters: int, kernel: int, stride: int = 1, count: int = 1,
    padding: int | None = None,
) -> Layer:  # fmt: skip
    """A square layer; padding None keeps the size at stride 1, as the networks do."""
    return Layer(
        ConvProblem(
            1,
            channels,
            (size, size),
            filters,
            kernel,
            stride=stride,
            padding=kernel // 2 if padding is None else padding,
        ),
        count,
    )


def _depthwise(channels: int, size: int, kernel: int, stride: int = 1, count: int = 1) -> Layer:
    """A square layer with a filter of its own for every channel."""
    layer = _square(channels, size, channels, kernel, stride, count)
    return Layer(layer.problem.replace(groups=channels), count)


def _paper(rows: Iterable[tuple[int, int, int, int, int]]) -> dict[str, Layer]:
    return {f"conv{i}": _square(*row, padding=0) for i, row in enumerate(rows, start=1)}


def _bottleneck_stage(
    stage: int, channels: int, size: int, width: int, blocks: int
) -> dict[str, Layer]:
    """One stage of ResNet's bottleneck blocks with the stride on the 3x3, as torchvision has it."""
    stride, wide = (1 if stage == 1 else 2), 4 * width
    out = size // stride
    prefix = f"layer{stage}"
    rest = blocks - 1
    layers = {f"{prefix}-reduce-first": _square(channels, size, width, 1)}
    if stride == 1:
        # Without a stride the first block's 3x3 is like the rest, and its shortcut is shaped like
        # the expanding 1x1 (the stage's input is as wide as its bottleneck).
        layers[f"{prefix}-3x3"] = _square(width, size, width, 3, count=blocks)
        layers[f"{prefix}-expand"] = _square(width, size, wide, 1, count=blocks + 1)
    else:
        layers[f"{prefix}-3x3-first"] = _square(width, size, width, 3, stride)
        layers[f"{prefix}-shortcut"] = _square(channels, size, wide, 1, stride)
        layers[f"{prefix}-3x3"] = _square(width, out, width, 3, count=rest)
        layers[f"{prefix}-expand"] = _square(width, out, wide, 1, count=blocks)
    layers[f"{prefix}-reduce"] = _square(wide, out, width, 1, count=rest)
    return layers


#: Every suite by name.
SUITES: dict[str, Suite] = {
    entry.name: entry
    for entry in (
        Suite(
            "paper",
            "the twelve layers of the im2win paper, without padding",
            128,
            _paper(
                (
                    (3, 227, 96, 11, 4),
                    (3, 231, 96, 11, 4),
                    (3, 227, 64, 7, 2),
                    (64, 224, 64, 7, 2),
                    (96, 24, 256, 5, 1),
                    (256, 12, 512, 3, 1),
                    (3, 224, 64, 3, 1),
                    (64, 112, 128, 3, 1),
                    (64, 56, 64, 3, 1),
                    (128, 28, 128, 3, 1),
                    (256, 14, 256, 3, 1),
                    (512, 7, 512, 3, 1),
                )
            ),
            # The published GPU release measures layer 4 with half the channels of the paper.
            {"conv4-c32": _square(32, 224, 64, 7, 2, padding=0)},
        ),
        Suite(
            "resnet50",
            "the distinct convolutions of ResNet-50 v1.5 at 224x224, 53 counted with repeats",
            32,
            {
                "conv1": _square(3, 224, 64, 7, 2),
                **_bottleneck_stage(1, 64, 56, 64, 3),
                **_bottleneck_stage(2, 256, 56, 128, 4),
                **_bottleneck_stage(3, 512, 28, 256, 6),
                **_bottleneck_stage(4, 1024, 14, 512, 3),
            },
        ),
        Suite(
            "vgg16",
            "the distinct convolutions of VGG-16 at 224x224, 13 counted with repeats",
            32,
            {
                "conv1_1": _square(3, 224, 64, 3),
                "conv1_2": _square(64, 224, 64, 3),
                "conv2_1": _square(64, 112, 128, 3),
                "conv2_2": _square(128, 112, 128, 3),
                "conv3_1": _square(128, 56, 256, 3),
                "conv3_2": _square(256, 56, 256, 3, count=2),
                "conv4_1": _square(256, 28, 512, 3),
                "conv4_2": _square(512, 28, 512, 3, count=2),
                "conv5_1": _square(512, 14, 512, 3, count=3),
            },
        ),
        Suite(
            "stems",
            "the first layers of ResNet-50, VGG-16, MobileNetV2, ConvNeXt-T and ViT-B/16",
            32,
            {
                "resnet50": _square(3, 224, 64, 7, 2),
                "vgg16": _square(3, 224, 64, 3),
                "mobilenet_v2": _square(3, 224, 32, 3, 2),
                "convnext_tiny": _square(3, 224, 96, 4, 4, padding=0),
                "vit_b_16": _square(3, 224, 768, 16, 16, padding=0),
            },
        ),
        Suite(
            "depthwise",
            "the distinct depthwise convolutions of MobileNetV2 and ConvNeXt-T at 224x224, and the "
            "large ones of RepLKNet-31B",
            128,
            {
                "mobilenet-32": _depthwise(32, 112, 3),
                "mobilenet-96-first": _depthwise(96, 112, 3, 2),
                "mobilenet-144": _depthwise(144, 56, 3),
                "mobilenet-144-first": _depthwise(144, 56, 3, 2),
                "mobilenet-192": _depthwise(192, 28, 3, count=2),
                "mobilenet-192-first": _depthwise(192, 28, 3, 2),
                "mobilenet-384": _depthwise(384, 14, 3, count=4),
                "mobilenet-576": _depthwise(576, 14, 3, count=2),
                "mobilenet-576-first": _depthwise(576, 14, 3, 2),
                "mobilenet-960": _depthwise(960, 7, 3, count=3),
                "convnext-96": _depthwise(96, 56, 7, count=3),
                "convnext-192": _depthwise(192, 28, 7, count=3),
                "convnext-384": _depthwise(384, 14, 7, count=9),
                "convnext-768": _depthwise(768, 7, 7, count=3),
                "replknet-128": _depthwise(128, 56, 31, count=2),
                "replknet-256": _depthwise(256, 28, 29, count=2),
                "replknet-512": _depthwise(512, 14, 27, count=18),
                "replknet-1024": _depthwise(1024, 7, 13, count=2),
            },
        ),
    )
}
