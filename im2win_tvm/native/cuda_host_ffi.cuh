// What generated host code takes of TVM FFI's C++ headers, over its C functions.
//
// nvcc reads those headers three times for every kernel: 2.7 of a processor's 4.5 seconds.

#include <cuda_runtime.h>

#include <cstdio>
#include <exception>

namespace tvm {
namespace ffi {
namespace {

// Thrown once an error has been told to TVM FFI.
struct Raised {};

// An error of a kind; it begins with `what`, and a message follows.
struct Raise {
  const char* kind;
  const char* what;
  void operator<<(const char* message) const {
    const char* parts[] = {what, message};
    TVMFFIErrorSetRaisedFromCStrParts(kind, parts, 2);
    throw Raised{};
  }
};

void CheckCuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  char message[256];
  std::snprintf(message, sizeof(message), "CUDA Runtime Error: %s (%d): %s",
                cudaGetErrorName(error), static_cast<int>(error), cudaGetErrorString(error));
  Raise{"RuntimeError", ""} << message;
}

// The device of a call, and the one before it afterwards.
class CUDADeviceGuard {
 public:
  explicit CUDADeviceGuard(int device) : device_(device) {
    CheckCuda(cudaGetDevice(&before_));
    if (before_ != device_) CheckCuda(cudaSetDevice(device_));
  }
  ~CUDADeviceGuard() noexcept(false) {
    if (before_ != device_) CheckCuda(cudaSetDevice(before_));
  }
  CUDADeviceGuard(const CUDADeviceGuard&) = delete;

 private:
  int device_, before_;
};

}  // namespace
}  // namespace ffi
}  // namespace tvm

#define TVM_FFI_CHECK(condition, Kind) \
  if (!(condition)) ::tvm::ffi::Raise{#Kind, "Check failed: (" #condition ") is false: "}
#define TVM_FFI_SAFE_CALL_BEGIN() try {
#define TVM_FFI_SAFE_CALL_END()                                         \
  return 0;                                                             \
  }                                                                     \
  catch (const ::tvm::ffi::Raised&) {                                   \
    return -1;                                                          \
  }                                                                     \
  catch (const std::exception& error) {                                 \
    TVMFFIErrorSetRaisedFromCStr("InternalError", error.what());        \
    return -1;                                                          \
  }

