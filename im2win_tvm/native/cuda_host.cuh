// What generated host code asks of CUDA at every call, asked once.
//
// Tensor maps: cuTensorMapEncodeTiled comes from the driver that is there when a kernel is called, so
// that a library loads without one, and is called once for each address. Attributes of a kernel: once
// for each device.

#include <atomic>
#include <cstdint>
#include <cuda.h>
#include <cuda_runtime.h>

// Without linkage: the dynamic loader merges static variables of templates over all libraries.
namespace {

// Tensors that a kernel is called with by turns, for instance the buffers of a pipeline.
constexpr unsigned kTensorMaps = 16;

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled FindEncodeTiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                   &found);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  return reinterpret_cast<EncodeTiled>(function);
}

// Everything but the address is the same at every call from one place (Site) of the source.
template <int Site, typename... Rest>
CUresult EncodeOnce(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                    Rest... rest) {
  struct Entry {
    void* address;
    CUtensorMap map;
  };
  static thread_local Entry entries[kTensorMaps];
  // Allocations start at multiples of 256 bytes at least; larger ones further apart.
  const auto bits = reinterpret_cast<uintptr_t>(address);
  Entry& entry = entries[((bits >> 8) ^ (bits >> 16) ^ (bits >> 21)) % kTensorMaps];
  if (entry.address != address) {
    static const EncodeTiled encode = FindEncodeTiled();
    if (encode == nullptr) return CUDA_ERROR_NOT_FOUND;
    entry.address = nullptr;
    const CUresult result = encode(&entry.map, type, rank, address, rest...);
    if (result != CUDA_SUCCESS) return result;
    entry.address = address;
  }
  *map = entry.map;
  return CUDA_SUCCESS;
}

// As the CUDA runtime does with modules, it takes a device for one that is not reset: after
// cudaDeviceReset a kernel's attributes are gone, and its launch fails.
template <int Site, typename Kernel>
cudaError_t SetAttributeOnce(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  static std::atomic<uint64_t> devices{0};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (devices.load(std::memory_order_acquire) & bit) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, attribute, value);
  if (error == cudaSuccess) devices.fetch_or(bit, std::memory_order_release);
  return error;
}

}  // namespace

#define cuTensorMapEncodeTiled EncodeOnce<__COUNTER__>
// Generated code asks for the text of an error and has one of its own to go with.
#define cuGetErrorString(error, text) static_cast<void>(error)
#define cudaFuncSetAttribute SetAttributeOnce<__COUNTER__>
