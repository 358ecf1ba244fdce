// The functions of libcuda that the core uses, under their own names and with their own signatures.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

#include "call.h"
#include "driver_api.h"
#include "fakecuda.h"

using namespace fakecuda;
using chunkft::CuContext;
using chunkft::CuDevice;
using chunkft::CuDevicePtr;
using chunkft::CuEvent;
using chunkft::CuResult;
using chunkft::CuStream;

// Declared from the core's own table, so that a definition below with another signature does not compile.
#define FAKECUDA_DECLARE(symbol, parameters) extern "C" FAKECUDA_EXPORT CuResult symbol parameters;
CHUNKFT_CUDA_FUNCTIONS(FAKECUDA_DECLARE)
#undef FAKECUDA_DECLARE

#define FAKECUDA_ENTER(needs)             \
  Call call(__func__, Needs::needs);      \
  if (call.code() != kSuccess) return call.code(); \
  [[maybe_unused]] Simulator& simulator = call.simulator()

namespace {

struct ErrorName {
  int code;
  const char* name;
  const char* text;
};

constexpr ErrorName kErrors[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {kContextIsDestroyed, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {kAlreadyRegistered, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {kNotRegistered, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

const ErrorName* find_error(int code) {
  for (const ErrorName& error : kErrors) {
    if (error.code == code) return &error;
  }
  return nullptr;
}

void* pointer(std::uintptr_t value) { return reinterpret_cast<void*>(value); }

std::string bytes_text(std::size_t bytes) { return std::to_string(bytes) + " bytes"; }

// Both directions of an asynchronous copy.
CuResult copy(Call& call, void* dst, const void* src, std::size_t bytes, const void* handle, bool to_device) {
  Simulator& simulator = call.simulator();
  Stream* stream = call.stream(handle);
  if (stream == nullptr) return call.code();
  const void* device = to_device ? dst : src;
  const void* host = to_device ? src : dst;
  if (simulator.on_device(device, bytes) != Simulator::Place::kInside) {
    return call.misuse(kInvalidValue, "of " + bytes_text(bytes) + " is not inside one device allocation");
  }
  if (simulator.on_device(host, bytes) != Simulator::Place::kOutside) {
    return call.misuse(kInvalidValue, "of " + bytes_text(bytes) + " was given device memory as host memory");
  }
  const Simulator::Place place = Simulator::locate(simulator.registrations, host, bytes);
  if (place == Simulator::Place::kPartly) {
    return call.misuse(kInvalidValue, "of " + bytes_text(bytes) + " is partly outside of registered host memory");
  }
  const bool pageable = place == Simulator::Place::kOutside;
  if (pageable && !simulator.pageable_allowed) {
    return call.misuse(kInvalidValue, "of " + bytes_text(bytes) + " is outside of registered host memory");
  }
  const std::uintptr_t from = number(src), to = number(dst);
  const std::string what = (to_device ? "copy to the device of " : "copy to the host of ") + bytes_text(bytes);
  simulator.submit(number(handle), *stream, what, {{from, from + bytes, false}, {to, to + bytes, true}},
                   kCopyMicroseconds + static_cast<double>(bytes) / kBytesPerMicrosecond,
                   [=] { std::memcpy(dst, src, bytes); });
  if (pageable) {
    // The call may block, but nobody may rely on it: the host learns nothing.
    ++simulator.host_syncs;
  }
  return kSuccess;
}

}  // namespace

CuResult cuInit(unsigned flags) {
  FAKECUDA_ENTER(kNothing);
  if (flags != 0) return call.misuse(kInvalidValue, "flags must be 0");
  simulator.process = getpid();
  return kSuccess;
}

CuResult cuDriverGetVersion(int* version) {
  FAKECUDA_ENTER(kNothing);
  *version = 13000;
  return kSuccess;
}

CuResult cuGetErrorName(CuResult error, const char** name) {
  const ErrorName* found = find_error(error);
  *name = found ? found->name : nullptr;
  return found ? kSuccess : kInvalidValue;
}

CuResult cuGetErrorString(CuResult error, const char** text) {
  const ErrorName* found = find_error(error);
  *text = found ? found->text : nullptr;
  return found ? kSuccess : kInvalidValue;
}

CuResult cuDeviceGetCount(int* count) {
  FAKECUDA_ENTER(kInit);
  *count = simulator.device_count;
  return kSuccess;
}

CuResult cuDeviceGet(CuDevice* device, int ordinal) {
  FAKECUDA_ENTER(kInit);
  if (ordinal < 0 || ordinal >= simulator.device_count) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

CuResult cuDeviceGetName(char* name, int capacity, CuDevice device) {
  FAKECUDA_ENTER(kInit);
  if (device < 0 || device >= simulator.device_count) return kInvalidDevice;
  std::snprintf(name, static_cast<std::size_t>(capacity), "Fake device %d", device);
  return kSuccess;
}

CuResult cuDeviceTotalMem_v2(std::size_t* bytes, CuDevice device) {
  FAKECUDA_ENTER(kInit);
  if (device < 0 || device >= simulator.device_count) return kInvalidDevice;
  *bytes = std::size_t{1} << 30;
  return kSuccess;
}

CuResult cuDeviceGetAttribute(int* value, int attribute, CuDevice device) {
  FAKECUDA_ENTER(kInit);
  if (device < 0 || device >= simulator.device_count) return kInvalidDevice;
  switch (attribute) {
    case chunkft::kCuAttributeComputeMajor:
      *value = 9;
      return kSuccess;
    case chunkft::kCuAttributeComputeMinor:
      *value = 0;
      return kSuccess;
    default:
      return call.misuse(kInvalidValue, "asked for attribute " + std::to_string(attribute));
  }
}

CuResult cuDevicePrimaryCtxRetain(CuContext* context, CuDevice device) {
  FAKECUDA_ENTER(kInit);
  if (device < 0 || device >= simulator.device_count) return kInvalidDevice;
  for (auto& [handle, alive] : simulator.contexts) {
    if (alive.device != device) continue;
    ++alive.retained;
    *context = static_cast<CuContext>(pointer(handle));
    return kSuccess;
  }
  const std::uintptr_t handle = simulator.new_handle();
  simulator.contexts[handle] = {device, 1};
  *context = static_cast<CuContext>(pointer(handle));
  return kSuccess;
}

CuResult cuDevicePrimaryCtxRelease_v2(CuDevice device) {
  FAKECUDA_ENTER(kInit);
  for (auto& [handle, alive] : simulator.contexts) {
    if (alive.device != device) continue;
    if (--alive.retained == 0) simulator.release_context(handle);
    return kSuccess;
  }
  return call.misuse(kInvalidContext, "of a device whose primary context is not retained");
}

CuResult cuCtxGetCurrent(CuContext* context) {
  FAKECUDA_ENTER(kInit);
  const auto& stack = Call::context_stack();
  *context = stack.empty() ? nullptr : static_cast<CuContext>(pointer(stack.back()));
  return kSuccess;
}

CuResult cuCtxPushCurrent_v2(CuContext context) {
  FAKECUDA_ENTER(kInit);
  if (simulator.contexts.count(number(context)) == 0) return call.missing(context, "context");
  Call::context_stack().push_back(number(context));
  return kSuccess;
}

CuResult cuCtxPopCurrent_v2(CuContext* context) {
  FAKECUDA_ENTER(kInit);
  auto& stack = Call::context_stack();
  if (stack.empty()) return call.misuse(kInvalidContext, "of an empty stack");
  if (context != nullptr) *context = static_cast<CuContext>(pointer(stack.back()));
  stack.pop_back();
  return kSuccess;
}

CuResult cuStreamCreate(CuStream* stream, unsigned flags) {
  FAKECUDA_ENTER(kContext);
  if (flags > 1) return call.misuse(kInvalidValue, "got flags " + std::to_string(flags));
  *stream = static_cast<CuStream>(pointer(simulator.new_stream(call.context(), flags == 0)));
  return kSuccess;
}

CuResult cuStreamDestroy_v2(CuStream handle) {
  FAKECUDA_ENTER(kContext);
  if (number(handle) <= 1) return call.misuse(kInvalidHandle, "of the default stream");
  Stream* stream = call.stream(handle);
  if (stream == nullptr) return call.code();
  stream->destroyed = true;
  simulator.retired.insert(number(handle));
  return kSuccess;
}

CuResult cuStreamWaitEvent(CuStream handle, CuEvent event_handle, unsigned flags) {
  FAKECUDA_ENTER(kContext);
  Stream* stream = call.stream(handle);
  if (stream == nullptr) return call.code();
  const Event* event = call.event(event_handle);
  if (event == nullptr) return call.code();
  if (flags != 0) return call.misuse(kInvalidValue, "got flags " + std::to_string(flags));
  if (event->last != nullptr) simulator.wait(*stream, event->last);
  return kSuccess;
}

CuResult cuStreamSynchronize(CuStream handle) {
  FAKECUDA_ENTER(kContext);
  Stream* stream = call.stream(handle);
  if (stream == nullptr) return call.code();
  ++simulator.host_syncs;
  const auto stamp = simulator.record(*stream);
  simulator.run_until(*stamp);
  simulator.synchronize(stamp);
  return simulator.broken() ? simulator.break_code : kSuccess;
}

CuResult cuEventCreate(CuEvent* event, unsigned flags) {
  FAKECUDA_ENTER(kContext);
  if (flags > 3) return call.misuse(kInvalidValue, "got flags " + std::to_string(flags));
  const std::uintptr_t handle = simulator.new_handle();
  simulator.events[handle] = {call.context(), (flags & chunkft::kCuEventDisableTiming) == 0, nullptr};
  *event = static_cast<CuEvent>(pointer(handle));
  return kSuccess;
}

CuResult cuEventDestroy_v2(CuEvent handle) {
  FAKECUDA_ENTER(kContext);
  if (call.event(handle) == nullptr) return call.code();
  simulator.events.erase(number(handle));
  simulator.retired.insert(number(handle));
  return kSuccess;
}

CuResult cuEventRecord(CuEvent event_handle, CuStream handle) {
  FAKECUDA_ENTER(kContext);
  Stream* stream = call.stream(handle);
  if (stream == nullptr) return call.code();
  Event* event = call.event(event_handle);
  if (event == nullptr) return call.code();
  if (event->context != stream->context) {
    return call.misuse(kInvalidHandle, "got an event and a stream of different contexts");
  }
  event->last = simulator.record(*stream);
  return kSuccess;
}

CuResult cuEventQuery(CuEvent handle) {
  FAKECUDA_ENTER(kContext);
  const Event* event = call.event(handle);
  if (event == nullptr) return call.code();
  if (event->last == nullptr) return kSuccess;
  if (!event->last->done) {
    // Polling must come to an end under every policy.
    simulator.run_one();
    return simulator.broken() ? simulator.break_code : kNotReady;
  }
  simulator.synchronize(event->last);
  return kSuccess;
}

CuResult cuEventSynchronize(CuEvent handle) {
  FAKECUDA_ENTER(kContext);
  const Event* event = call.event(handle);
  if (event == nullptr) return call.code();
  ++simulator.host_syncs;
  if (event->last == nullptr) return kSuccess;
  simulator.run_until(*event->last);
  simulator.synchronize(event->last);
  return simulator.broken() ? simulator.break_code : kSuccess;
}

CuResult cuEventElapsedTime(float* milliseconds, CuEvent start_handle, CuEvent end_handle) {
  FAKECUDA_ENTER(kContext);
  const Event* start = call.event(start_handle);
  const Event* end = start == nullptr ? nullptr : call.event(end_handle);
  if (end == nullptr) return call.code();
  if (!start->timing || !end->timing) return call.misuse(kInvalidHandle, "got an event without timing");
  if (start->last == nullptr || end->last == nullptr) {
    return call.misuse(kInvalidHandle, "got an event that was never recorded");
  }
  if (!start->last->done || !end->last->done) return kNotReady;
  *milliseconds = static_cast<float>((end->last->microseconds - start->last->microseconds) / 1000);
  return kSuccess;
}

CuResult cuMemAlloc_v2(CuDevicePtr* address, std::size_t bytes) {
  FAKECUDA_ENTER(kContext);
  if (bytes == 0) return call.misuse(kInvalidValue, "of 0 bytes");
  void* memory = nullptr;
  if (posix_memalign(&memory, 512, bytes) != 0) return kOutOfMemory;
  std::memset(memory, 0xdb, bytes);  // nobody may rely on zeros
  simulator.allocations[number(memory)] = {bytes, static_cast<std::byte*>(memory)};
  *address = number(memory);
  return kSuccess;
}

CuResult cuMemFree_v2(CuDevicePtr address) {
  FAKECUDA_ENTER(kContext);
  auto found = simulator.allocations.find(static_cast<std::uintptr_t>(address));
  if (found == simulator.allocations.end()) return call.misuse(kInvalidValue, "of an address that was not allocated");
  ++simulator.host_syncs;
  // A real cuMemFree waits for the device, but says so nowhere: freeing under a copy that may still run is a race.
  simulator.host_access(pointer(found->first), found->second.bytes, true, "cuMemFree_v2");
  simulator.drain();
  simulator.forget(found->first, found->second.bytes);
  std::free(found->second.owned);
  simulator.allocations.erase(found);
  return kSuccess;
}

CuResult cuMemcpyHtoDAsync_v2(CuDevicePtr dst, const void* src, std::size_t bytes, CuStream stream) {
  FAKECUDA_ENTER(kContext);
  return copy(call, pointer(static_cast<std::uintptr_t>(dst)), src, bytes, stream, true);
}

CuResult cuMemcpyDtoHAsync_v2(void* dst, CuDevicePtr src, std::size_t bytes, CuStream stream) {
  FAKECUDA_ENTER(kContext);
  return copy(call, dst, pointer(static_cast<std::uintptr_t>(src)), bytes, stream, false);
}

CuResult cuMemHostRegister_v2(void* address, std::size_t bytes, unsigned flags) {
  FAKECUDA_ENTER(kContext);
  if (address == nullptr || bytes == 0) return call.misuse(kInvalidValue, "of nothing");
  if (flags > 0xf) return call.misuse(kInvalidValue, "got flags " + std::to_string(flags));
  if (Simulator::locate(simulator.registrations, address, bytes) != Simulator::Place::kOutside) {
    return call.misuse(kAlreadyRegistered, "of memory that is registered");
  }
  if (!simulator.is_mapped(address, bytes)) return call.misuse(kInvalidValue, "of memory that is not mapped");
  std::size_t locked = 0;
  for (const auto& [first, block] : simulator.registrations) locked += block.bytes;
  if (bytes > simulator.lockable || locked > simulator.lockable - bytes) return kOutOfMemory;
  simulator.registrations[number(address)] = {bytes, nullptr};
  return kSuccess;
}

CuResult cuMemHostUnregister(void* address) {
  FAKECUDA_ENTER(kContext);
  auto found = simulator.registrations.find(number(address));
  if (found == simulator.registrations.end()) return call.misuse(kNotRegistered, "of memory that is not registered");
  if (!simulator.is_mapped(address, found->second.bytes)) {
    call.misuse(kSuccess, "of memory that was unmapped while it was registered");
  }
  // Copies under way need the pages to stay where they are.
  simulator.host_access(address, found->second.bytes, true, "cuMemHostUnregister");
  simulator.registrations.erase(found);
  return kSuccess;
}
