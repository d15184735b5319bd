"""What a figure depends on besides the code: the device, the driver, the versions, the commit."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import __version__, cuda_driver, toolchain
from .target import Target, cpu_model, device_arch, resolve

__all__ = [
    "cpu",
    "cuda",
    "describe",
    "device_name",
    "device_slug",
    "driver_version",
    "git_commit",
    "package_version",
    "slug",
    "versions",
    "write_record",
]

_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "numpy", "torch")
_SMI_FIELDS = (
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
)


def package_version(package: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of what it stands on; None is not installed."""
    return {
        "python": platform.python_version(),
        "im2win_tvm": __version__,
        **{name: package_version(name) for name in _PACKAGES},
    }


def cpu() -> dict[str, Any]:
    """The processor, as the system and as LLVM see it."""
    here = resolve("llvm")
    return {
        "model": cpu_model(),
        "llvm": here.cpu,
        "threads": here.threads,
        "features": list(here.features),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def cuda() -> dict[str, Any]:
    """The GPU and the CUDA tools: None for a GPU that is not there, text for what to install."""
    try:
        nvcc: dict[str, str] = {
            "path": str(toolchain.find_nvcc().path),
            "version": toolchain.nvcc_version(),
        }
    except toolchain.ToolchainError as error:
        nvcc = {"missing": str(error)}
    return {
        "gpu": cuda_driver.device_name(),
        "arch": device_arch(),
        "driver_supports": cuda_driver.driver_version(),
        "nvidia_smi": _nvidia_smi(),
        "nvcc": nvcc,
    }


def _nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks and power limit of the first GPU; None without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "-i", "0", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(_SMI_FIELDS):
        return None
    return dict(zip(_SMI_FIELDS, values, strict=True))


def git_commit() -> str | None:
    """The commit of the source tree this package runs from, ``+changes`` if it was edited.

    Where git cannot tell (no git, an installed package): what $IM2WIN_COMMIT says, or None.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return os.environ.get("IM2WIN_COMMIT")

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    if not commit:
        return os.environ.get("IM2WIN_COMMIT")
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def describe() -> dict[str, Any]:
    """Everything of this module in one JSON-ready object."""
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "system": platform.platform(),
        "cpu": cpu(),
        "cuda": cuda(),
    }


def driver_version() -> str | None:
    """The version of the GPU's driver; without nvidia-smi the CUDA version that it supports."""
    smi = _nvidia_smi()
    return smi["driver_version"] if smi is not None else cuda_driver.driver_version()


def device_name(target: Target) -> str | None:
    """The device that `target` is for, as records name it; None for any GPU of an architecture."""
    if target.kind == "cuda":
        return target.device
    return f"{cpu_model()} {target.cpu} {target.threads} threads"


def slug(device: str) -> str:
    """The folder name of a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def device_slug(target: Target) -> str:
    """The folder name of the device that `target` is for, in records; its architecture if none."""
    return slug(device_name(target) or target.arch)


def write_record(
    path: Path, kind: str, command: list[str], target: Target, figures: dict[str, Any]
) -> None:
    """Write a record of a run as JSON: `figures`, after where, when and by which command.

    kind: what the run was, as a reader of records tells them apart. Folders are made.
    """
    record = {
        "format": 1,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "device": device_slug(target),
        "environment": describe(),
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
