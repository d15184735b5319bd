// load KERNEL.so SHAPE...: run an exported kernel of 3 channels of 8 x 8 and 4 filters of 3 x 3, padded
// by 1, on ones. SHAPE: that of its prepared weights, which its metadata tells ("arguments").
//
// Needs the headers and the library of apache-tvm-ffi, and no TVM; see export_and_load.py.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace ffi = tvm::ffi;

struct Heap {
  void AllocData(DLTensor* tensor) {
    tensor->data = std::aligned_alloc(64, (ffi::GetDataSize(*tensor) + 63) / 64 * 64);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

ffi::Tensor Filled(ffi::Shape shape, float value) {
  ffi::Tensor tensor =
      ffi::Tensor::FromNDAlloc(Heap(), shape, {kDLFloat, 32, 1}, DLDevice{kDLCPU, 0});
  float* data = static_cast<float*>(tensor.data_ptr());
  std::fill(data, data + shape.Product(), value);
  return tensor;
}

int main(int argc, char** argv) {
  if (argc < 3) return std::printf("usage: load KERNEL.so SHAPE...\n"), 2;
  ffi::Module library = ffi::Module::LoadFromFile(argv[1]);
  ffi::String metadata = library->GetFunction("im2win_metadata").value()().cast<ffi::String>();
  std::vector<int64_t> shape;
  for (int i = 2; i < argc; ++i) shape.push_back(std::atoll(argv[i]));
  ffi::Tensor x = Filled({1, 3, 8, 8}, 1), w = Filled({4, 3, 3, 3}, 1), y = Filled({1, 4, 8, 8}, 0);
  ffi::Tensor packed = Filled(ffi::Shape(shape), 0);
  library->GetFunction("im2win_prepare").value()(w, packed);
  library->GetFunction("im2win_conv").value()(x, packed, y);
  std::printf("C++: %g; %zu bytes of metadata\n", static_cast<float*>(y.data_ptr())[9], metadata.size());
  return 0;
}
