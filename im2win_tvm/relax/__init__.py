"""Convolutions of Relax models, TVM's model IR, by kernels of im2win_tvm.

pass_ = im2win_tvm.relax.UseIm2win("llvm")
module = pass_(module)                  # before anything that legalizes or fuses
print(pass_.report)
executable = im2win_tvm.relax.build(module, "llvm")
"""

from .batches import specialise
from .build import build
from .models import ModelError, read
from .report import Layer, Report
from .use_im2win import UseIm2win

__all__ = ["Layer", "ModelError", "Report", "UseIm2win", "build", "read", "specialise"]
