// Compares what driver_api.h declares by hand with a public cuda.h: types of functions and handles, values of constants.
// It is included by driver_test.cpp where CMake found a header, and compiled against every header at hand by
// tests/test_driver_prototypes.py, which also spoils each declaration in turn and sees it found here.

#include <type_traits>

// Every version of a function under the name that the driver exports, none renamed by a macro.
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>

#include "driver_api.h"

namespace chunkft::prototypes {

// CUresult and CUdevice_attribute are enums in cuda.h and int in our table; all else must be the same type.
template <typename T>
struct Abi {
  using type = T;
};
template <typename T>
  requires std::is_enum_v<T>
struct Abi<T> {
  static_assert(sizeof(T) == sizeof(int));
  using type = int;
};
template <typename R, typename... Args>
struct Abi<R (*)(Args...)> {
  using type = typename Abi<R>::type (*)(typename Abi<Args>::type...);
};

#define CHUNKFT_COMPARE(symbol, parameters)                                                            \
  static_assert(std::is_same_v<typename Abi<decltype(&::symbol)>::type, decltype(DriverApi::symbol)>, \
                "signature of " #symbol " differs from cuda.h");
CHUNKFT_CUDA_FUNCTIONS(CHUNKFT_COMPARE)
#undef CHUNKFT_COMPARE

#define CHUNKFT_SAME_TYPE(ours, theirs)                                                          \
  static_assert(std::is_same_v<ours, typename Abi<theirs>::type> && sizeof(ours) == sizeof(theirs), \
                "type " #ours " differs from " #theirs);
CHUNKFT_SAME_TYPE(CuResult, CUresult)
CHUNKFT_SAME_TYPE(CuDevice, CUdevice)
CHUNKFT_SAME_TYPE(CuContext, CUcontext)
CHUNKFT_SAME_TYPE(CuStream, CUstream)
CHUNKFT_SAME_TYPE(CuEvent, CUevent)
CHUNKFT_SAME_TYPE(CuDevicePtr, CUdeviceptr)
#undef CHUNKFT_SAME_TYPE

#define CHUNKFT_SAME_VALUE(ours, theirs)                                  \
  static_assert(static_cast<int>(ours) == static_cast<int>(theirs), \
                "value of " #ours " differs from " #theirs);
CHUNKFT_SAME_VALUE(kCudaSuccess, CUDA_SUCCESS)
CHUNKFT_SAME_VALUE(kCudaDeinitialized, CUDA_ERROR_DEINITIALIZED)
CHUNKFT_SAME_VALUE(kCudaNotReady, CUDA_ERROR_NOT_READY)
CHUNKFT_SAME_VALUE(kCuStreamNonBlocking, CU_STREAM_NON_BLOCKING)
CHUNKFT_SAME_VALUE(kCuEventDefault, CU_EVENT_DEFAULT)
CHUNKFT_SAME_VALUE(kCuEventDisableTiming, CU_EVENT_DISABLE_TIMING)
CHUNKFT_SAME_VALUE(kCuMemHostRegisterPortable, CU_MEMHOSTREGISTER_PORTABLE)
CHUNKFT_SAME_VALUE(kCuAttributeComputeMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
CHUNKFT_SAME_VALUE(kCuAttributeComputeMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
#undef CHUNKFT_SAME_VALUE

}  // namespace chunkft::prototypes
