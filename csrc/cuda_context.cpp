#include "cuda_context.h"

#include <string>
#include <unistd.h>

namespace chunkft {

CudaContext::CudaContext(const DriverApi& api, int ordinal) : api_(api), ordinal_(ordinal), process_(getpid()) {}

Result<std::shared_ptr<CudaContext>> CudaContext::create(int device) {
  auto shared = DriverApi::shared();
  if (!shared.ok()) return shared.error();
  const DriverApi& api = *shared.value();
  int count = 0;
  if (CuResult result = api.cuDeviceGetCount(&count)) return api.error(result, "cuDeviceGetCount");
  if (device < 0 || device >= count) {
    return invalid_argument("CudaContext", "device must be the index of one of the " + std::to_string(count) +
                                               " CUDA devices, got " + std::to_string(device));
  }
  std::shared_ptr<CudaContext> made(new CudaContext(api, device));
  if (CuResult result = api.cuDeviceGet(&made->device_, device)) return api.error(result, "cuDeviceGet");
  if (CuResult result = api.cuDevicePrimaryCtxRetain(&made->context_, made->device_)) {
    made->context_ = nullptr;
    return api.error(result, "cuDevicePrimaryCtxRetain");
  }
  return made;
}

CudaContext::~CudaContext() {
  if (context_ == nullptr || forked()) return;
  give_back([&] { return api_.cuDevicePrimaryCtxRelease_v2(device_); });
}

bool CudaContext::forked() const { return getpid() != process_; }

Status CudaContext::check_process() const {
  if (!forked()) return {};
  return Error{Code::kForked, "CUDA device " + std::to_string(ordinal_),
               "process " + std::to_string(getpid()) + " was forked from process " + std::to_string(process_) +
                   ", which opened the device; CUDA works only there (start workers with \"spawn\")"};
}

namespace {

// A context that could not be taken off this thread's stack again. The call inside had succeeded, so that it is for the
// next one on this thread to take it off or to fail.
thread_local CuContext left_on_stack = nullptr;

}  // namespace

CudaContext::Guard::Guard(CudaContext& context) : context_(context) {
  status_ = context.check_process();
  if (!status_.ok()) return;
  const DriverApi& api = context.api_;
  CuContext current = nullptr;
  status_ = api.check(api.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
  if (!status_.ok()) return;
  if (left_on_stack != nullptr && current == left_on_stack) {
    status_ = api.check(api.cuCtxPopCurrent_v2(&current), "cuCtxPopCurrent_v2");
    if (!status_.ok()) return;
    left_on_stack = nullptr;
    status_ = api.check(api.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
    if (!status_.ok()) return;
  }
  left_on_stack = nullptr;  // else somebody took it off, or put another one on top
  if (current == context.context_) return;
  status_ = api.check(api.cuCtxPushCurrent_v2(context.context_), "cuCtxPushCurrent_v2");
  pushed_ = status_.ok();
}

CudaContext::Guard::~Guard() {
  if (!pushed_) return;
  CuContext popped = nullptr;
  const CuResult result = give_back([&] { return context_.api_.cuCtxPopCurrent_v2(&popped); });
  if (result != kCudaSuccess) left_on_stack = context_.context_;
}

Status CudaContext::register_host(void* address, std::size_t bytes) {
  Guard guard(*this);
  if (!guard.status().ok()) return guard.status();
  return api_.check(api_.cuMemHostRegister_v2(address, bytes, kCuMemHostRegisterPortable), "cuMemHostRegister_v2",
                    bytes);
}

Status CudaContext::unregister_host(void* address) {
  return enter_to_give_back(*this, "cuMemHostUnregister", [&](const DriverApi& api) {
    return give_back([&] { return api.cuMemHostUnregister(address); });
  });
}

}  // namespace chunkft
