"""An exported kernel in a C++ program that knows tvm_ffi and nothing of Python."""

import shutil
import subprocess
from pathlib import Path

import pytest

import im2win_tvm
from im2win_tvm import toolchain
from im2win_tvm.problem import ConvProblem

CPP = r"""
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
namespace ffi = tvm::ffi;

struct Heap {
  void AllocData(DLTensor* t) {
    size_t bytes = (ffi::GetDataSize(*t) + 63) / 64 * 64;
    t->data = aligned_alloc(64, bytes);
  }
  void FreeData(DLTensor* t) { free(t->data); }
};

ffi::Tensor tensor(ffi::Shape shape) {
  return ffi::Tensor::FromNDAlloc(Heap(), shape, DLDataType{kDLFloat, 32, 1}, DLDevice{kDLCPU, 0});
}

int main(int, char** argv) {
  ffi::Module library = ffi::Module::LoadFromFile(argv[1]);
  ffi::String json = library->GetFunction("im2win_metadata").value()().cast<ffi::String>();
  std::string text(json.data(), json.size());
  for (const char* part : {"\"batch\": 1", "\"layout\": \"NCHW\"", "\"im2win_prepare\""})
    if (text.find(part) == std::string::npos) return std::printf("no %s in it\n", part), 1;
  // 1 2 3 / 4 5 6 / 7 8 9 with weights 1 10 / 100 1000: 5421 6532 / 8754 9865.
  ffi::Tensor x = tensor({1, 1, 3, 3}), w = tensor({1, 1, 2, 2}), y = tensor({1, 1, 2, 2});
  for (int i = 0; i < 9; ++i) static_cast<float*>(x.data_ptr())[i] = i + 1;
  for (int i = 0; i < 4; ++i) static_cast<float*>(w.data_ptr())[i] = std::pow(10, i);
  for (int i = 0; i < 4; ++i) static_cast<float*>(y.data_ptr())[i] = NAN;
  ffi::Tensor packed = tensor({PACKED});
  library->GetFunction("im2win_prepare").value()(w, packed);
  library->GetFunction("im2win_conv").value()(x, packed, y);
  for (int i = 0; i < 4; ++i) std::printf("%g ", static_cast<float*>(y.data_ptr())[i]);
  try {
    library->GetFunction("im2win_conv").value()(w, packed, y);
  } catch (const ffi::Error& error) {
    std::printf("%s\n", error.kind().c_str());
  }
  return 0;
}
"""


def test_a_cpp_program_loads_and_runs_it(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here (Debian: apt-get install g++)")
    from tvm_ffi import libinfo

    kernel = im2win_tvm.compile(ConvProblem(1, 1, (3, 3), 1, 2), "llvm")
    library = kernel.export(tmp_path / "kernel.so")
    packed = ", ".join(map(str, kernel.metadata["arguments"]["packed"]["shape"]))
    source, program = tmp_path / "main.cc", tmp_path / "main"
    source.write_text(CPP.replace("PACKED", packed))
    folder = Path(libinfo.find_libtvm_ffi()).parent
    toolchain.run([
        compiler, "-std=c++17", "-O1", *toolchain.include_flags(), "-o", str(program), str(source),
        "-L", str(folder), "-ltvm_ffi", f"-Wl,-rpath,{folder}",
    ])  # fmt: skip
    done = subprocess.run([str(program), str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *values, error = done.stdout.split()
    assert [float(value) for value in values] == [5421, 6532, 8754, 9865]
    assert error in ("ValueError", "TypeError")
