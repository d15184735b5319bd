"""The text form of a convolution: oneDNN's (benchdnn's) problem descriptors.

A descriptor is a run of ``<field><integer>`` pairs, for example
``mb128ic64ih56oc64kh3ph1``. This module knows the text only; the type that it describes
is :class:`im2win_tvm.problem.ConvProblem`, whose ``parse`` and ``str()`` call it.

Reading, field by field:

* ``g`` groups (1), ``mb`` batch (2), ``ic`` and ``oc`` channels;
* per axis ``i*`` input, ``o*`` output, ``k*`` kernel, ``s*`` stride (1), ``p*`` padding (0),
  ``d*`` dilation, where **0 is dense**: one less than PyTorch's number;
* axes are ``d``, ``h``, ``w``: the first one named sets the rank (``iw`` alone is 1-D);
* a missing field of an inner axis copies that field of the axis before it;
* ``o*`` without ``p*``: the padding is deduced, the smaller half in front;
* ``o*`` with ``p*``: symmetric padding if it gives that output, else the trailing padding is
  what makes the output exactly that size;
* underscores are ignored; ``n"name"`` ends the descriptor.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from im2win_tvm.problem import ConvProblem

_AXES = "dhw"
_KINDS = "ioskpd"
_FIELDS = ("g", "mb", "ic", "oc", *(kind + axis for kind in _KINDS for axis in _AXES))
_TOKEN = re.compile(r"([A-Za-z]+)([0-9]*)")
_MAX_DIGITS = 18  # every size then fits in a signed 64-bit integer


class ProblemError(ValueError):
    """A convolution that cannot be: the message names the field, its value and what is allowed."""


def output_extent(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Outputs along one axis, in elements; 0 where no window fits.

    ``padding`` is the sum of both sides; ``dilation`` 1 is dense.
    """
    room = size + padding - (dilation * (kernel - 1) + 1)
    return room // stride + 1 if room >= 0 else 0


def fit_trailing_padding(
    size: int, kernel: int, stride: int, before: int, dilation: int, output: int
) -> int | None:
    """Trailing padding with which one axis has exactly ``output`` outputs, or None.

    ``before`` itself is preferred (PyTorch's symmetric padding); otherwise the smallest padding
    that reaches the last window (benchdnn's choice).
    """
    extent = dilation * (kernel - 1) + 1
    exact = max(0, (output - 1) * stride + extent - size - before)
    for after in (before, exact):
        if output_extent(size, kernel, stride, before + after, dilation) == output:
            return after
    return None


def descriptor_name(text: str) -> str | None:
    """The ``n"name"`` part of a descriptor without its quotes; None where there is none.

    Raises ProblemError where ``text`` is no descriptor.
    """
    return _scan(text)[2]


def parse_descriptor(text: str) -> dict[str, Any]:
    """ConvProblem's arguments (all but dtype and layout) from a descriptor.

    Sizes are checked only as far as the text needs; ConvProblem does the rest. Raises
    ProblemError, which shows the text and the position of what is wrong, counted from 0.
    """
    values, places, _ = _scan(text)

    def fail(field: str, reason: str) -> ProblemError:
        return ProblemError(
            f"problem {text!r}, position {places[field]}: {field}={values[field]}: {reason}"
        )

    for field, value in values.items():
        if value == 0 and field[0] not in "pd":
            raise fail(field, "allowed: a positive integer")
    axes = _axes_named(values)
    for inner, outer in zip(axes[1:], axes, strict=False):
        for kind in _KINDS:
            if kind + outer in values and kind + inner not in values:
                values[kind + inner] = values[kind + outer]
                places[kind + inner] = places[kind + outer]
    for field in ("ic", "oc", "i" + axes[0], "k" + axes[0]):
        if field not in values:
            raise ProblemError(
                f"problem {text!r}: {field} is missing; needed: ic, oc, i{axes[0]} and k{axes[0]}"
            )

    padding = []
    for axis in axes:
        size, kernel = values["i" + axis], values["k" + axis]
        stride, dilation = values.get("s" + axis, 1), values.get("d" + axis, 0) + 1
        before, output = values.get("p" + axis), values.get("o" + axis)
        if output is None:
            padding.append((before or 0, before or 0))
            continue
        if before is None:
            needed = (output - 1) * stride + dilation * (kernel - 1) + 1 - size
            # Fewer windows than would fit: the trailing input is unused, nothing to pad.
            before = max(0, needed) // 2
        after = fit_trailing_padding(size, kernel, stride, before, dilation, output)
        if after is None:
            fitting = output_extent(size, kernel, stride, before, dilation)
            raise fail(
                "o" + axis,
                f"with {before} in front, allowed: {max(1, fitting)} or more, or no o{axis} at all",
            )
        padding.append((before, after))
    return {
        "batch": values.get("mb", 2),
        "in_channels": values["ic"],
        "input_size": tuple(values["i" + axis] for axis in axes),
        "out_channels": values["oc"],
        "kernel_size": tuple(values["k" + axis] for axis in axes),
        "stride": tuple(values.get("s" + axis, 1) for axis in axes),
        "padding": tuple(padding),
        "dilation": tuple(values.get("d" + axis, 0) + 1 for axis in axes),
        "groups": values.get("g", 1),
    }


def write_descriptor(problem: ConvProblem) -> str:
    """The shortest descriptor that both benchdnn and :func:`parse_descriptor` read as ``problem``.

    dtype and layout are not part of it.
    """
    axes = _AXES[-problem.spatial_rank :]
    per_axis = list(
        zip(
            problem.input_size,
            problem.output_size,
            problem.kernel_size,
            problem.stride,
            problem.padding,
            problem.dilation,
            strict=True,
        )
    )
    if len(set(per_axis)) == 1:
        axes, per_axis = axes[:1], per_axis[:1]
    # benchdnn copies an inner axis as a whole or not at all, so a field is written for every
    # axis or for none.
    inputs, outputs, kernels, strides, padding, dilation = zip(*per_axis, strict=True)
    uneven = any(before != after for before, after in padding)

    def fields(kind: str, values: tuple[int, ...]) -> str:
        return "".join(f"{kind}{axis}{value}" for axis, value in zip(axes, values, strict=True))

    text = f"g{problem.groups}" if problem.groups != 1 else ""
    text += f"mb{problem.batch}ic{problem.in_channels}" + fields("i", inputs)
    text += f"oc{problem.out_channels}"
    if uneven:
        text += fields("o", outputs)
    text += fields("k", kernels)
    if any(value != 1 for value in strides):
        text += fields("s", strides)
    before = tuple(pair[0] for pair in padding)
    if uneven or any(before):
        text += fields("p", before)
    if any(value != 1 for value in dilation):
        text += fields("d", tuple(value - 1 for value in dilation))
    return text


def _axes_named(values: dict[str, int]) -> str:
    """The axes that the fields speak of, outermost first; "hw" where they name none."""
    idle = {"s": 1, "p": 0, "d": 0}
    for position, axis in enumerate(_AXES):
        # A full-form descriptor of fewer axes may spell out sd1, pd0 or dd0.
        named = [kind for kind in _KINDS if kind + axis in values]
        if any(values[kind + axis] != idle.get(kind) for kind in named):
            return _AXES[position:]
    return "hw"


def _scan(text: str) -> tuple[dict[str, int], dict[str, int], str | None]:
    """Field values, field positions and the name of a descriptor."""
    if not isinstance(text, str):
        raise ProblemError(f"problem {text!r}: allowed: a descriptor string")
    values: dict[str, int] = {}
    places: dict[str, int] = {}
    end = len(text.rstrip())
    position = len(text) - len(text.lstrip())
    if position >= end:
        raise ProblemError(f"problem {text!r} is empty; allowed: fields such as ic3ih8oc4kh3")

    def fail(reason: str) -> ProblemError:
        rest = text[position : min(end, position + 20)]
        return ProblemError(f"problem {text!r}, position {position}: {rest!r}: {reason}")

    while position < end:
        if text[position] == "_":
            position += 1
            continue
        if text[position] == "n":
            name = text[position + 1 : end]
            if name[:1] == '"':
                if len(name) < 2 or name[-1] != '"' or '"' in name[1:-1]:
                    raise fail('the name is not one quoted word; allowed: n"name" at the end')
                name = name[1:-1]
            return values, places, name
        token = _TOKEN.match(text, position, end)
        if token is None or token[1] not in _FIELDS:
            raise fail(f"unknown field; allowed: {' '.join(_FIELDS)} and n")
        field, digits = token.groups()
        if not 1 <= len(digits) <= _MAX_DIGITS:
            raise fail(f"{field} needs a number; allowed: 1 to {_MAX_DIGITS} digits")
        if field in values:
            raise fail(f"{field} was given before; allowed: once")
        values[field], places[field] = int(digits), position
        position = token.end()
    return values, places, None
