"""`im2win env`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, processor, GPU and compilers: what a bug report needs."""
    from .. import environment

    found = environment.describe()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name, value in _rows(found):
        print(f"{name:<16} {value}")


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, cuda = found["cpu"], found["cuda"]
    rows = [(name, version or "not installed") for name, version in found["versions"].items()]
    rows += [
        ("git commit", found["git_commit"] or "none: installed, or no git here"),
        ("system", found["system"]),
        ("processor", f"{cpu['model']}, {cpu['threads']} threads, LLVM {cpu['llvm']}"),
        ("features", " ".join(cpu["features"])),
        ("GPU", f"{cuda['gpu']} ({cuda['arch']})" if cuda["gpu"] else "none"),
        ("CUDA driver", cuda["driver_supports"] or "none"),
    ]
    rows += [(f"GPU {name}", value) for name, value in (cuda["nvidia_smi"] or {}).items()]
    nvcc = cuda["nvcc"]
    rows.append(("nvcc", nvcc.get("missing") or f"{nvcc['version']} at {nvcc['path']}"))
    return rows
