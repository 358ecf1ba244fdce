#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>

#include "backend.h"
#include "cuda_context.h"

namespace chunkft {

// The Backend contract over the CUDA driver API: two non-blocking streams of its own for copies, the caller's streams
// by handle, and a third stream that only tells the time.
//
// Time: cuEventElapsedTime gives a float of milliseconds since another event, too coarse after some seconds. So the time
// stream, which is always idle, records an anchor every kAnchorPeriod, and an event is measured from the anchor that
// was the latest when it was recorded.
class CudaBackend final : public Backend {
 public:
  static constexpr std::int64_t kAnchorPeriod = 4'000'000'000;  // ns; a float then resolves 0.5 us

  static Result<std::unique_ptr<CudaBackend>> create(int device, std::int64_t anchor_period = kAnchorPeriod);
  ~CudaBackend() override;

  const char* name() const override { return "cuda"; }
  int streams_created() const override { return 3; }

  Result<Event> create_event(bool timing) override;
  void destroy_event(Event event) override;

  Status copy(Stream stream, void* dst, const void* src, std::size_t bytes) override;
  using Backend::record;
  Status record(Event event, Stream stream, RecordSite site) override;
  Status wait(Stream stream, Event event, WaitSite site) override;
  Result<bool> query(Event event) override;
  Status synchronize(Event event, WaitSite site) override;
  Result<std::int64_t> timestamp(Event event) override;

  Status register_host(void* address, std::size_t bytes) override { return context_->register_host(address, bytes); }
  Status unregister_host(void* address) override { return context_->unregister_host(address); }
  Status check_process() const override { return context_->check_process(); }

 private:
  struct Entry {
    CuEvent event = nullptr;
    bool timing = false;
    std::atomic<unsigned> anchor{0};  // number of the latest anchor when the event was recorded
  };
  struct Anchor {
    CuEvent event = nullptr;
    std::int64_t nanoseconds = 0;  // of steady_clock, when it was recorded
  };
  static constexpr unsigned kAnchors = 16;  // a reader may be about this many periods late

  CudaBackend(std::shared_ptr<CudaContext> context, std::int64_t anchor_period)
      : context_(std::move(context)), anchor_period_(anchor_period) {}
  Status open();
  CuStream handle(Stream stream) const;
  CuResult drop_anchor(unsigned number);
  void drop_anchor_if_due();

  const std::shared_ptr<CudaContext> context_;
  const std::int64_t anchor_period_;
  CuStream load_ = nullptr;
  CuStream store_ = nullptr;
  CuStream time_ = nullptr;
  std::mutex anchor_mutex_;
  std::array<Anchor, kAnchors> anchors_;       // number n is at n % kAnchors
  std::atomic<unsigned> latest_anchor_{0};     // written under anchor_mutex_
  std::atomic<std::int64_t> anchor_due_{0};
};

}  // namespace chunkft
