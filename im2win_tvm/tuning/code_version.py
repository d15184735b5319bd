"""A version of the code that a schedule generates, by which a record is current or stale.

It is a hash of the source that writes that code: the schedule's file, and those of the tensor
expressions and of other schedules that it imports, and that these import. Comments, docstrings and
formatting do not count: no kernel depends on them, and correcting one must not throw away hours of
measuring. `schedules/base.py` does not count either: it is the contract, and generates nothing. Nor
does a model of costs (`*_cost.py`): it ranks configurations, and a better fit changes no kernel.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..schedules import Schedule

__all__ = ["code_version", "digest", "sources"]

_PACKAGE = __name__.split(".")[0]
_PARTS = (f"{_PACKAGE}.expr", f"{_PACKAGE}.schedules")
_CONTRACT = f"{_PACKAGE}.schedules.base"
_COST = "_cost"
# Hexadecimal digits: 64 bits, for telling versions apart and not for security.
_DIGITS = 16


def code_version(schedule: Schedule) -> str | None:
    """The version of what `schedule` generates; None where its source cannot be read."""
    return _version(type(schedule).__module__)


@functools.cache
def _version(module: str) -> str | None:
    try:
        return digest({name: path.read_text() for name, path in sources(module).items()})
    except (ImportError, OSError, SyntaxError, ValueError):
        return None


def digest(texts: Mapping[str, str]) -> str:
    """The version of Python sources by module name."""
    code = {name: _code(ast.parse(text)) for name, text in texts.items()}
    return hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()[:_DIGITS]


def sources(module: str) -> dict[str, Path]:
    """By name, the files that decide what the schedules of `module` generate.

    Raises ImportError or ValueError where `module` has no source file.
    """
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path, package = _locate(name)
        found[name] = path
        for home in _imports(ast.parse(path.read_text()), package):
            counts = any(home == part or home.startswith(part + ".") for part in _PARTS)
            if counts and home != _CONTRACT and not home.endswith(_COST):
                waiting.append(home)
    return found


def _locate(module: str) -> tuple[Path, str]:
    """A module's file, and the package that its relative imports start from."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.has_location or spec.origin is None:
        raise ImportError(f"{module}: has no source file")
    return Path(spec.origin), module if spec.submodule_search_locations else spec.parent or ""


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """The modules in which what a source imports is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (_home(base, alias.name) for alias in node.names)


def _home(base: str, name: str) -> str:
    """The module in which `name` is written, where a package only hands it on."""
    if not base.startswith(_PARTS):
        return base
    path, package = _locate(base)
    if package != base:
        return base
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    inner = "." * node.level + (node.module or "")
                    return _home(importlib.util.resolve_name(inner, package), alias.name)
    submodule = f"{base}.{name}"
    return base if importlib.util.find_spec(submodule) is None else submodule


def _code(node: Any) -> str:
    """A syntax tree as text, without positions and docstrings.

    Fields that are empty are left out, so that those which a later Python adds change nothing.
    """
    if isinstance(node, ast.AST):
        fields = [(field, value) for field, value in ast.iter_fields(node) if value is not None]
        shown = [f"{field}={_code(value)}" for field, value in fields if value != []]
        return f"{type(node).__name__}({','.join(shown)})"
    if isinstance(node, list):
        return f"[{','.join(_code(entry) for entry in node if not _is_text(entry))}]"
    return repr(node)


def _is_text(node: Any) -> bool:
    """Whether a statement is a docstring, or another string that does nothing."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
