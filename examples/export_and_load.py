"""Export a kernel as one shared library, and load it without TVM: from Python, and from C++.

The C++ program is load.cc, beside this file; it needs g++.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tvm_ffi import libinfo

import im2win_tvm

PYTHON = """
import sys, numpy as np, im2win_tvm
kernel = im2win_tvm.load(sys.argv[1])
x = np.ones(kernel.problem.input_shape, np.float32)
w = np.ones(kernel.problem.weight_shape, np.float32)
print("Python:", kernel(x, w)[0, 0, 1, 1], "TVM imported:", "tvm" in sys.modules)
"""

problem = im2win_tvm.ConvProblem(1, 3, (8, 8), 4, (3, 3), padding=1)
with tempfile.TemporaryDirectory() as folder:
    library = im2win_tvm.compile(problem, "llvm").export(Path(folder) / "conv.so")
    print("exported", library.stat().st_size, "bytes")
    subprocess.run([sys.executable, "-c", PYTHON, library], check=True)

    compiler = shutil.which("g++")
    if compiler is None:
        sys.exit("no g++ here (Debian: apt-get install g++): the C++ part is left out")
    program, runtime = Path(folder) / "load", Path(libinfo.find_libtvm_ffi())
    includes = [libinfo.find_include_path(), libinfo.find_dlpack_include_path()]
    command = [compiler, "-std=c++17", Path(__file__).parent / "load.cc", "-o", program]
    command += [f"-I{path}" for path in includes] + [runtime, f"-Wl,-rpath,{runtime.parent}"]
    subprocess.run(command, check=True)
    shape = im2win_tvm.read_metadata(library)["arguments"]["packed"]["shape"]
    subprocess.run([program, library, *map(str, shape)], check=True)
