"""Models in files, as Relax modules."""

from __future__ import annotations

import os
from pathlib import Path

import tvm

from .precision import in_float32, to_float16

__all__ = ["DTYPES", "SUFFIXES", "ModelError", "read"]

#: Names of files with models: ONNX, and programs of `torch.export.save`.
SUFFIXES = (".onnx", ".pt2")
#: What a model may be brought into.
DTYPES = ("float32", "float16")


class ModelError(ValueError):
    """A file that is no model, or one that TVM cannot import; the text says which."""


def read(path: str | os.PathLike, dtype: str | None = None) -> tvm.IRModule:
    """The model of a file, its parameters constants. Raises ModelError.

    dtype: "float16" has convolutions and matrix products computed in it (see `to_float16`), inputs
    stay float32; "float32" has a float16 program of PyTorch computed in float32; None is the
    model's own. A float16 program keeps its float16 inputs unless it is computed in float32.

    The file is data: an ONNX model holds no code, and of an exported program PyTorch loads tensors
    and a graph.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ModelError(f"{path}: allowed are files named {' or '.join(SUFFIXES)}")
    if dtype not in (None, *DTYPES):
        raise ModelError(f"dtype={dtype!r}: allowed for a model are {', '.join(DTYPES)}")
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    try:
        return _from_onnx(path, dtype) if path.suffix == ".onnx" else _from_torch(path, dtype)
    except ImportError as error:
        extra = "onnx" if path.suffix == ".onnx" else "torch"
        raise ModelError(f"{path}: {error}; pip install 'im2win_tvm[{extra}]'") from error
    except Exception as error:  # importers raise what they like
        text = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ModelError(f"{path}: cannot be imported: {text}") from error


def _from_onnx(path: Path, dtype: str | None) -> tvm.IRModule:
    import onnx
    from tvm.relax.frontend.onnx import from_onnx

    model = onnx.load(path)
    onnx.checker.check_model(model)
    module = from_onnx(model, keep_params_in_input=False)
    return to_float16(module) if dtype == "float16" else module


def _from_torch(path: Path, dtype: str | None) -> tvm.IRModule:
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    program = torch.export.load(path)
    was_half = in_float32(program)
    module = from_exported_program(program, keep_params_as_input=False)
    if dtype == "float16" or (was_half and dtype is None):
        return to_float16(module, inputs=was_half)
    return module
