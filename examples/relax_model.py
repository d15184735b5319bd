"""A PyTorch model through TVM's Relax with kernels of im2win_tvm, against PyTorch's outputs.

Then the same model as one shared library, in a C++ program without Python: model.cc, beside this
file. Needs PyTorch (pip install 'im2win_tvm[torch]'), and g++ for the last part.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import tvm
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program
from tvm_ffi import libinfo

from im2win_tvm.relax import UseIm2win, build

model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
    torch.nn.BatchNorm2d(32),
    torch.nn.ReLU(),
    torch.nn.Conv2d(32, 32, 3, padding=1),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(2),
    torch.nn.Flatten(),
    torch.nn.Linear(32 * 16 * 16, 10),
).eval()
x = torch.ones(1, 3, 64, 64)

module = from_exported_program(torch.export.export(model, (x,)))
rewrite = UseIm2win("llvm")
module = rewrite(module)
print(rewrite.report)

executable = build(module, "llvm")
machine = relax.VirtualMachine(executable, tvm.cpu())
[y] = machine["main"](tvm.runtime.tensor(x.numpy()))
with torch.no_grad():
    error = np.abs(y.numpy() - model(x).numpy()).max()
print(f"largest difference from PyTorch: {error:.1e}")
assert error < 1e-4

compiler = shutil.which("g++")
if compiler is None:
    sys.exit("no g++ here (Debian: apt-get install g++): the C++ part is left out")
with tempfile.TemporaryDirectory() as folder:
    library, program = Path(folder) / "model.so", Path(folder) / "model"
    executable.export_library(str(library))
    runtime = Path(libinfo.find_libtvm_ffi())
    includes = [libinfo.find_include_path(), libinfo.find_dlpack_include_path()]
    command = [compiler, "-std=c++17", Path(__file__).parent / "model.cc", "-o", program, "-ldl"]
    command += [f"-I{path}" for path in includes] + [runtime, f"-Wl,-rpath,{runtime.parent}"]
    subprocess.run(command, check=True)
    machine_library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime.so"
    command = [program, machine_library, library, "cpu", *map(str, x.shape)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
print(f"Python: the first {y.numpy()[0, 0]:.6g}", said, sep="\n", end="")
assert abs(float(said.split()[-1]) - y.numpy()[0, 0]) < 1e-5
