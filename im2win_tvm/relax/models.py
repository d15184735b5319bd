"""Models in files, as Relax modules."""

from __future__ import annotations

import os
from pathlib import Path

import tvm

__all__ = ["SUFFIXES", "ModelError", "read"]

#: Names of files with models: ONNX, and programs of `torch.export.save`.
SUFFIXES = (".onnx", ".pt2")


class ModelError(ValueError):
    """A file that is no model, or one that TVM cannot import; the text says which."""


def read(path: str | os.PathLike) -> tvm.IRModule:
    """The model of a file, its parameters constants. Raises ModelError.

    The file is data: an ONNX model holds no code, and of an exported program PyTorch loads tensors
    and a graph.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ModelError(f"{path}: allowed are files named {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    try:
        return _from_onnx(path) if path.suffix == ".onnx" else _from_torch(path)
    except ImportError as error:
        extra = "onnx" if path.suffix == ".onnx" else "torch"
        raise ModelError(f"{path}: {error}; pip install 'im2win_tvm[{extra}]'") from error
    except Exception as error:  # importers raise what they like
        text = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ModelError(f"{path}: cannot be imported: {text}") from error


def _from_onnx(path: Path) -> tvm.IRModule:
    import onnx
    from tvm.relax.frontend.onnx import from_onnx

    model = onnx.load(path)
    onnx.checker.check_model(model)
    return from_onnx(model, keep_params_in_input=False)


def _from_torch(path: Path) -> tvm.IRModule:
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    return from_exported_program(torch.export.load(path), keep_params_as_input=False)
