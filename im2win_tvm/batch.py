"""Problem lists in files: benchdnn batch files and JSON lines.

A benchdnn batch file holds options and problem descriptors separated by white space, read from
the top; an option holds until it is given again, in included files too, and a ``#`` makes the
rest of its line a comment:

========================  =================================================================
``--mb=0,8``              batch sizes, one case each; 0 is the descriptor's own
``--dt=f32,f16``          dtypes, one case each; ``f16:f16:f16`` is accepted, mixed is not
``--stag=``, ``--dtag=``  layout: ``abx`` channels first, ``axb`` last, ``any`` the default
``--wtag=``               accepted: weights always are in PyTorch's order
``--dir=``, ``--alg=``    ``FWD_B``, ``FWD_D``, ``FWD_I``; ``direct``, ``auto``: no effect
``--skip-impl=``          accepted: no effect
``--reset``               every option as at the start
``--batch=FILE``          another list, relative to this one
========================  =================================================================

Under any other option or value (backward passes, attributes, other dtypes) cases are read, and say
in `unsupported` why they are not the problem that benchdnn would run.

A line that opens with ``{`` is a JSON object instead: ``n c h w`` input, ``k r s`` filters, and
where they differ from the default ``stride``, ``dil`` ([height, width], 1 is dense), ``pad``
([top, left, bottom, right]; ``pad_ops`` replaces it where it has negatives), ``groups``, ``name``.
``oh`` and ``ow`` are checked against the derived output size; with ``"crop": true`` they set it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from im2win_tvm.descriptor import fit_trailing_padding
from im2win_tvm.problem import LAYOUTS, ConvProblem, ProblemError, descriptor_name

__all__ = ["BatchError", "Case", "read_problems"]

_WORD = re.compile(r'(?:"[^"]*"|\S)+')
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_ROOM = 1 << 40
# Tag -> (channels last, number of axes); None where the tag leaves it open.
_TAGS: dict[str, tuple[bool | None, int | None]] = {
    "any": (None, None),
    "abx": (False, None),
    "axb": (True, None),
    "abc": (False, 3),
    "acb": (True, 3),
    "abcd": (False, 4),
    "acdb": (True, 4),
    "abcde": (False, 5),
    "acdeb": (True, 5),
}


class BatchError(ValueError):
    """A problem list that cannot be read; the message opens with file:line."""


class _Unsupported(BatchError):
    """An option of benchdnn that this package has no counterpart for."""


@dataclass(frozen=True)
class Case:
    """One problem of a list. ``name`` is the list's or the descriptor; ``origin`` file:line.

    ``unsupported`` names the options in force that ask for something else than this problem.
    """

    problem: ConvProblem
    name: str
    origin: str
    unsupported: str | None = None


@dataclass
class _Options:
    """What the options seen so far ask for; None is the reader's default."""

    batches: list[int] = field(default_factory=lambda: [0])
    dtypes: list[str | None] = field(default_factory=lambda: [None])
    source_tags: list[str] = field(default_factory=lambda: ["any"])
    target_tags: list[str] = field(default_factory=lambda: ["any"])
    # Messages by option name.
    unsupported: dict[str, str] = field(default_factory=dict)


def read_problems(
    path: str | Path,
    *,
    dtype: str = "float32",
    layout: str | None = None,
    batch: int | None = None,
) -> Iterator[Case]:
    """The cases of a list in order, read as they are asked for.

    ``dtype`` and ``layout`` (None: channels first) hold where the file does not say; ``batch``
    overrides every batch size. Raises BatchError, at the line it reaches, for what cannot be
    read or is no problem.
    """
    reader = _Reader(dtype, layout, batch)
    yield from reader.read(Path(path), str(path))


class _Reader:
    def __init__(self, dtype: str, layout: str | None, batch: int | None) -> None:
        self._dtype = dtype
        self._layout = layout
        self._batch = batch
        self._options = _Options()
        self._open: list[Path] = []

    def read(self, path: Path, origin: str) -> Iterator[Case]:
        """Cases of one file; ``origin`` is what asked for it."""
        resolved = path.resolve()
        if resolved in self._open:
            raise BatchError(f"{origin}: {path} includes itself; allowed: a file not yet open")
        self._open.append(resolved)
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    yield from self._line(line.strip(), path, f"{path}:{number}")
        except (OSError, UnicodeDecodeError) as error:
            raise BatchError(
                f"{origin}: cannot read {path}: {error}; allowed: a UTF-8 text file"
            ) from error
        finally:
            self._open.pop()

    def _line(self, line: str, path: Path, origin: str) -> Iterator[Case]:
        if line.startswith("{"):
            yield from self._row(line, origin)
            return
        for word in _WORD.findall(line):
            if word.startswith("#"):
                return
            if word.startswith("--batch="):
                yield from self.read(path.parent / word.removeprefix("--batch="), origin)
            elif word.startswith("-"):
                self._option(word, origin)
            else:
                yield from self._cases(
                    origin,
                    lambda dtype, layout, word=word: ConvProblem.parse(
                        word, dtype=dtype, layout=layout
                    ),
                    lambda word=word: descriptor_name(word),
                )

    def _option(self, word: str, origin: str) -> None:
        name = word.partition("=")[0]
        try:
            self._set(word, origin)
            self._options.unsupported.pop(name, None)
        except _Unsupported as error:
            self._options.unsupported[name] = str(error)

    def _set(self, word: str, origin: str) -> None:
        name, equals, value = word.partition("=")
        options = self._options

        def listed(convert: Callable[[str], Any]) -> list[Any]:
            return [convert(entry) for entry in value.split(",")]

        def refuse(allowed: str) -> BatchError:
            return _Unsupported(f"{origin}: option {word!r}: allowed: {allowed}")

        def one_of(*allowed: str) -> Callable[[str], str]:
            def check(entry: str) -> str:
                if entry.lower() not in allowed:
                    raise refuse(f"{name}={'|'.join(allowed)}, or a comma list of these")
                return entry.lower()

            return check

        def dtype(entry: str) -> str:
            parts = set(entry.split(":"))
            if len(parts) != 1 or not parts <= set(_DTYPES):
                raise refuse(
                    f"--dt={'|'.join(_DTYPES)}, the same for all tensors, or a comma list of these"
                )
            return _DTYPES[parts.pop()]

        def size(entry: str) -> int:
            if re.fullmatch("[0-9]{1,18}", entry) is None:
                allowed = "--mb=N with N of 0 or more, or a comma list of these"
                raise BatchError(f"{origin}: option {word!r}: allowed: {allowed}")
            return int(entry)

        if word == "--reset":
            self._options = _Options()
        elif name == "--mb":
            options.batches = listed(size)
        elif name == "--dt":
            options.dtypes = listed(dtype)
        elif name == "--stag":
            options.source_tags = listed(one_of(*_TAGS))
        elif name == "--dtag":
            options.target_tags = listed(one_of(*_TAGS))
        elif name == "--wtag":
            listed(one_of(*_TAGS))
        elif name == "--dir":
            listed(one_of("fwd_b", "fwd_d", "fwd_i"))
        elif name == "--alg":
            listed(one_of("direct", "auto"))
        elif name != "--skip-impl" or not equals:
            raise refuse(
                "--mb= --dt= --stag= --dtag= --wtag= --dir= --alg= --skip-impl= --batch= --reset"
            )

    def _cases(
        self,
        origin: str,
        build: Callable[[str, str | None], ConvProblem],
        title: Callable[[], str | None],
    ) -> Iterator[Case]:
        """The cases of one problem: every combination of the options' lists."""
        options = self._options
        for dtype, source, target, size in product(
            options.dtypes,
            options.source_tags,
            options.target_tags,
            options.batches if self._batch is None else [self._batch],
        ):
            try:
                # The list's layout depends on the rank, which only the problem knows.
                problem = build(dtype or self._dtype, None)
                layout = self._tagged(source, target, problem.spatial_rank, origin)
                problem = problem.replace(layout=self._layout if layout is None else layout)
                if size or self._batch is not None:
                    problem = problem.replace(batch=size)
                name = title() or str(problem)
            except ProblemError as error:
                raise BatchError(f"{origin}: {error}") from error
            yield Case(problem, name, origin, "; ".join(options.unsupported.values()) or None)

    def _tagged(self, source: str, target: str, rank: int, origin: str) -> str | None:
        """The layout that two tags ask for, None where both leave it open."""
        asked = set()
        for tag in (source, target):
            last, axes = _TAGS[tag]
            if axes is not None and axes != rank + 2:
                raise BatchError(
                    f"{origin}: tag {tag!r} has {axes} axes; allowed: abx, axb, any, "
                    f"or a tag of {rank + 2} axes"
                )
            if last is not None:
                asked.add(LAYOUTS[rank][last])
        if len(asked) > 1:
            raise BatchError(
                f"{origin}: --stag={source} with --dtag={target}: allowed: "
                "the same layout for input and output"
            )
        return asked.pop() if asked else None

    def _row(self, line: str, origin: str) -> Iterator[Case]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BatchError(f"{origin}: not JSON: {error}; allowed: one object a line") from error
        title = row.get("name")
        if title is not None and not isinstance(title, str):
            raise BatchError(f"{origin}: name={title!r}: allowed: a string")
        yield from self._cases(
            origin,
            lambda dtype, layout: _row_problem(row, dtype, layout, origin),
            lambda: title,
        )


def _row_problem(row: dict[str, Any], dtype: str, layout: str | None, origin: str) -> ConvProblem:
    missing = [key for key in ("n", "c", "h", "w", "k", "r", "s") if key not in row]
    if missing:
        raise BatchError(f"{origin}: {missing[0]} is missing; needed: n c h w k r s")
    pads = row.get("pad", [0, 0, 0, 0])
    if _is_sides(pads) and min(pads) < 0:
        # Negative trailing padding says that trailing input is unused.
        pads = row.get("pad_ops", pads)
    if not _is_sides(pads):
        raise BatchError(f"{origin}: pad={pads!r}: allowed: [top, left, bottom, right], integers")
    top, left, bottom, right = pads
    stated = (row.get("oh"), row.get("ow"))
    crop = row.get("crop") is True
    if crop:
        # Room for any window, until the output size says how much of it is used.
        bottom = right = _ROOM
    problem = ConvProblem(
        row["n"],
        row["c"],
        (row["h"], row["w"]),
        row["k"],
        (row["r"], row["s"]),
        stride=row.get("stride", 1),
        padding=((top, bottom), (left, right)),
        dilation=row.get("dil", 1),
        groups=row.get("groups", 1),
        dtype=dtype,
        layout=layout,
    )
    if crop:
        return _cropped(problem, stated, origin)
    for key, size, derived in zip(("oh", "ow"), stated, problem.output_size, strict=True):
        if size is not None and size != derived:
            raise BatchError(
                f"{origin}: {key}={size!r}: allowed: {derived}, which the other fields give"
            )
    return problem


def _is_sides(pads: object) -> bool:
    return (
        isinstance(pads, list)
        and len(pads) == 4
        and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in pads)
    )


def _cropped(problem: ConvProblem, stated: tuple[Any, Any], origin: str) -> ConvProblem:
    """``problem`` with the trailing padding that gives the ``stated`` output size."""
    padding = []
    for axis, (key, size) in enumerate(zip(("oh", "ow"), stated, strict=True)):
        before = problem.padding[axis][0]
        after = None
        if isinstance(size, int) and size > 0:
            after = fit_trailing_padding(
                problem.input_size[axis],
                problem.kernel_size[axis],
                problem.stride[axis],
                before,
                problem.dilation[axis],
                size,
            )
        if after is None:
            raise BatchError(
                f"{origin}: {key}={size!r}: allowed: a size that some trailing padding gives"
            )
        padding.append((before, after))
    return problem.replace(padding=tuple(padding))
