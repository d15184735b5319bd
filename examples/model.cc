// model RUNTIME.so MODEL.so DEVICE SHAPE...: run "main" of an exported Relax model on ones of SHAPE, in
// float32. RUNTIME.so: TVM's libtvm_runtime.so, or libtvm_runtime_cuda.so where DEVICE is cuda; else cpu.
//
// Needs the headers and the library of apache-tvm-ffi; no Python and no compiler; see relax_model.py.

#include <dlfcn.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

struct Heap {
  void AllocData(DLTensor* tensor) {
    tensor->data = std::aligned_alloc(64, (ffi::GetDataSize(*tensor) + 63) / 64 * 64);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

int main(int argc, char** argv) {
  if (argc < 5) return std::printf("usage: model RUNTIME.so MODEL.so cpu|cuda SHAPE...\n"), 2;
  // Registers the virtual machine and the device.
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) return std::printf("%s\n", dlerror()), 2;
  bool on_gpu = std::string(argv[3]) == "cuda";
  std::vector<int64_t> shape;
  for (int i = 4; i < argc; ++i) shape.push_back(std::atoll(argv[i]));

  ffi::Module library = ffi::Module::LoadFromFile(argv[2]);
  ffi::Module machine =
      library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  // Of each device its type, number and allocator (2 keeps what was freed); the CPU comes last.
  int device = on_gpu ? kDLCUDA : kDLCPU, pooled = 2;
  ffi::Function initialize = machine->GetFunction("vm_initialization").value();
  if (on_gpu) {
    initialize(device, 0, pooled, static_cast<int>(kDLCPU), 0, pooled);
  } else {
    initialize(device, 0, pooled);
  }

  ffi::Tensor x = ffi::Tensor::FromNDAlloc(Heap(), ffi::Shape(shape), {kDLFloat, 32, 1},
                                           DLDevice{kDLCPU, 0});
  std::fill_n(static_cast<float*>(x.data_ptr()), ffi::Shape(shape).Product(), 1.0f);
  // These copy to the device what is not there yet; "main" itself takes arrays of the device.
  machine->GetFunction("set_input").value()("main", x);
  machine->GetFunction("invoke_stateful").value()("main");
  // A model has one output, or several by number.
  ffi::Function output = machine->GetFunction("get_output").value();
  bool one = machine->GetFunction("get_output_arity").value()("main").cast<int64_t>() < 0;
  ffi::Tensor y = (one ? output("main") : output("main", 0)).cast<ffi::Tensor>();
  std::vector<float> values(y.shape().Product());
  ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes")(
      y, static_cast<void*>(values.data()), values.size() * sizeof(float));
  std::printf("C++: %zu outputs, the first %.6g\n", values.size(), values[0]);
  return 0;
}
