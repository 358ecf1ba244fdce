#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "status.h"

// The same tags as in cuda.h, so that a handle means the same type where both are included.
struct CUctx_st;
struct CUstream_st;
struct CUevent_st;

// The part of the CUDA driver API that the core uses, declared by hand: building needs no CUDA toolkit, running needs
// no more than the driver, and one build serves every CUDA version. A name is the symbol that the driver exports, with
// the version suffix that cuda.h adds by macro. Source: CUDA Driver API reference, sections 6.2 to 6.19, and cuda.h of
// CUDA 13.0; driver_test.cpp compares the signatures with cuda.h wherever one is at hand.
#define CHUNKFT_CUDA_FUNCTIONS(X)                                                                  \
  X(cuInit, (unsigned flags))                                                                      \
  X(cuDriverGetVersion, (int* version))                                                            \
  X(cuGetErrorName, (CuResult error, const char** name))                                           \
  X(cuGetErrorString, (CuResult error, const char** text))                                         \
  X(cuDeviceGetCount, (int* count))                                                                \
  X(cuDeviceGet, (CuDevice * device, int ordinal))                                                 \
  X(cuDeviceGetName, (char* name, int capacity, CuDevice device))                                  \
  X(cuDeviceTotalMem_v2, (std::size_t * bytes, CuDevice device))                                   \
  X(cuDeviceGetAttribute, (int* value, int attribute, CuDevice device))                            \
  X(cuDevicePrimaryCtxRetain, (CuContext * context, CuDevice device))                              \
  X(cuDevicePrimaryCtxRelease_v2, (CuDevice device))                                               \
  X(cuCtxGetCurrent, (CuContext * context))                                                        \
  X(cuCtxPushCurrent_v2, (CuContext context))                                                      \
  X(cuCtxPopCurrent_v2, (CuContext * context))                                                     \
  X(cuStreamCreate, (CuStream * stream, unsigned flags))                                           \
  X(cuStreamDestroy_v2, (CuStream stream))                                                         \
  X(cuStreamWaitEvent, (CuStream stream, CuEvent event, unsigned flags))                           \
  X(cuStreamSynchronize, (CuStream stream))                                                        \
  X(cuEventCreate, (CuEvent * event, unsigned flags))                                              \
  X(cuEventDestroy_v2, (CuEvent event))                                                            \
  X(cuEventRecord, (CuEvent event, CuStream stream))                                               \
  X(cuEventQuery, (CuEvent event))                                                                 \
  X(cuEventSynchronize, (CuEvent event))                                                           \
  X(cuEventElapsedTime, (float* milliseconds, CuEvent start, CuEvent end))                         \
  X(cuMemAlloc_v2, (CuDevicePtr * address, std::size_t bytes))                                     \
  X(cuMemFree_v2, (CuDevicePtr address))                                                           \
  X(cuMemcpyHtoDAsync_v2, (CuDevicePtr dst, const void* src, std::size_t bytes, CuStream stream))  \
  X(cuMemcpyDtoHAsync_v2, (void* dst, CuDevicePtr src, std::size_t bytes, CuStream stream))        \
  X(cuMemHostRegister_v2, (void* address, std::size_t bytes, unsigned flags))                      \
  X(cuMemHostUnregister, (void* address))

namespace chunkft {

using CuResult = int;  // an enum in cuda.h; an int by the C ABI
using CuDevice = int;
using CuContext = CUctx_st*;
using CuStream = CUstream_st*;
using CuEvent = CUevent_st*;
using CuDevicePtr = unsigned long long;

inline constexpr CuResult kCudaSuccess = 0;
inline constexpr CuResult kCudaDeinitialized = 4;  // the driver is shutting down with the process
inline constexpr CuResult kCudaNotReady = 600;
inline constexpr unsigned kCuStreamNonBlocking = 0x1;    // no implicit ordering with the legacy default stream
inline constexpr unsigned kCuEventDefault = 0x0;         // records its time
inline constexpr unsigned kCuEventDisableTiming = 0x2;
inline constexpr unsigned kCuMemHostRegisterPortable = 0x1;  // page-locked for every context, torch's included
inline constexpr int kCuAttributeComputeMajor = 75;
inline constexpr int kCuAttributeComputeMinor = 76;

// The loaded driver. Immutable, never unloaded: events and streams of other libraries live in it.
class DriverApi {
 public:
  // Loads `library`, a name or path for dlopen, and looks up every function; no CUDA call is made.
  // Fails with kDriver naming the library, or the first symbol that it lacks.
  static Result<DriverApi> load(const std::string& library);

  // $CHUNKFT_LIBCUDA if set and not empty, else libcuda.so.1.
  static std::string default_library();

  // load(default_library()) followed by cuInit, done once a process and library; a failure is not remembered.
  static Result<const DriverApi*> shared();

  const std::string& library() const { return library_; }

  // What a failed `function` returned, with the driver's own name and text for it.
  Error error(CuResult result, const char* function, std::size_t bytes = 0) const;
  Status check(CuResult result, const char* function, std::size_t bytes = 0) const;

#define CHUNKFT_DECLARE(symbol, parameters) CuResult(*symbol) parameters = nullptr;
  CHUNKFT_CUDA_FUNCTIONS(CHUNKFT_DECLARE)
#undef CHUNKFT_DECLARE

 private:
  std::string library_;
};

struct CudaDevice {
  std::string name;
  std::size_t total_bytes = 0;
  int compute_major = 0;
  int compute_minor = 0;
};

// What `chunkft doctor` shows of the driver.
struct CudaFacts {
  std::string library;
  int driver_version = 0;  // 1000 * major + 10 * minor of the CUDA version that the driver supports
  std::vector<CudaDevice> devices;
};

Result<CudaFacts> cuda_facts();

}  // namespace chunkft
