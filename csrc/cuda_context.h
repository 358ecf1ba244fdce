#pragma once

#include <memory>
#include <sys/types.h>

#include "driver_api.h"
#include "page_locker.h"
#include "status.h"

namespace chunkft {

// A hold on the primary context of one device, which torch uses as well, and the place where host memory is
// page-locked. All members may be called from any thread.
class CudaContext final : public PageLocker {
 public:
  static Result<std::shared_ptr<CudaContext>> create(int device);
  ~CudaContext() override;
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  // Makes the context current on this thread for as long as the object lives, and leaves the thread as it was.
  class Guard {
   public:
    explicit Guard(CudaContext& context);
    ~Guard();
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

    const Status& status() const { return status_; }  // not ok: the context is not current

   private:
    CudaContext& context_;
    bool pushed_ = false;
    Status status_;
  };

  const DriverApi& api() const { return api_; }
  bool forked() const;

  Status register_host(void* address, std::size_t bytes) override;
  Status unregister_host(void* address) override;
  Status check_process() const override;

 private:
  CudaContext(const DriverApi& api, int ordinal);

  const DriverApi& api_;
  const int ordinal_;
  const pid_t process_;
  CuDevice device_ = 0;
  CuContext context_ = nullptr;  // null until retained
};

// Calls that give something back may return the late error of an earlier asynchronous one instead of doing their work
// (CUDA Driver API, "Note that this function may also return error codes from previous, asynchronous launches").
// A second call tells the two apart; a driver that is shutting down has nothing left to give back.
template <typename GiveBack>
CuResult give_back(GiveBack&& call) {
  const CuResult result = call();
  return result == kCudaSuccess || result == kCudaDeinitialized ? kCudaSuccess : call();
}

// Runs `body(api)`, which calls `function`, inside the context; with a second attempt at entering it, for the same
// reason.
template <typename Body>
Status enter_to_give_back(CudaContext& context, const char* function, Body&& body) {
  Status entered;
  for (int attempt = 0; attempt < 2; ++attempt) {
    CudaContext::Guard guard(context);
    entered = guard.status();
    if (entered.ok()) return context.api().check(body(context.api()), function);
  }
  return entered;
}

}  // namespace chunkft
