// Gives C++ and Python the metadata of a library: `module->GetFunction("im2win_metadata")()`.

#include <string.h>
#include <tvm/ffi/c_api.h>

// A header of HEADER_BYTES, then JSON, then a zero byte; written by artifact.py.
extern const char im2win_artifact[];

enum { HEADER_BYTES = 64 };

TVM_FFI_DLL_EXPORT int __tvm_ffi_im2win_metadata(void* self, const TVMFFIAny* args, int32_t count,
                                                 TVMFFIAny* result) {
  (void)self, (void)args, (void)count;
  const char* json = im2win_artifact + HEADER_BYTES;
  TVMFFIByteArray bytes = {json, strlen(json)};
  return TVMFFIStringFromByteArray(&bytes, result);
}
