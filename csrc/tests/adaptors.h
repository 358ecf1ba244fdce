#pragma once

#include <atomic>
#include <limits>
#include <memory>
#include <utility>

#include "backend.h"

namespace chunkft::test {

// What a test decides and learns about the backend that an engine uses. Outlives both.
struct Control {
  // Calls number fail_from <= n < fail_until fail with `error`; calls are counted from 0, those of construction included.
  long fail_from = -1;
  long fail_until = -1;
  Error error = driver_error("cuSomething", 0, 700, "CUDA_ERROR_ILLEGAL_ADDRESS");
  int drop_site = -1;    // wait() and synchronize() of this WaitSite do nothing
  int drop_record = -1;  // record() of this RecordSite does nothing

  std::atomic<long> calls{0};
  std::atomic<long> failed{0};
  std::atomic<long> dropped{0};
  int live_events = 0;
  bool destroyed = false;

  void fail_once(long call) { fail_from = call, fail_until = call + 1; }
  void fail_for_ever(long call) { fail_from = call, fail_until = std::numeric_limits<long>::max(); }
  void heal() { fail_from = fail_until = -1; }
};

// Any backend, with calls that can be told to fail and waits that can be left out. One thread at a time.
class Adaptor final : public Backend {
 public:
  Adaptor(std::unique_ptr<Backend> inner, Control* control) : inner_(std::move(inner)), control_(control) {}
  ~Adaptor() override {
    inner_.reset();
    control_->destroyed = true;
  }

  const char* name() const override { return inner_->name(); }
  int streams_created() const override { return inner_->streams_created(); }

  Result<Event> create_event(bool timing) override {
    if (fails()) return control_->error;
    auto event = inner_->create_event(timing);
    if (event.ok()) ++control_->live_events;
    return event;
  }
  void destroy_event(Event event) override {
    --control_->live_events;
    inner_->destroy_event(event);
  }
  Status copy(Stream stream, void* dst, const void* src, std::size_t bytes) override {
    if (fails()) return control_->error;
    return inner_->copy(stream, dst, src, bytes);
  }
  using Backend::record;
  Status record(Event event, Stream stream, RecordSite site) override {
    if (fails()) return control_->error;
    if (static_cast<int>(site) == control_->drop_record) {
      ++control_->dropped;
      return {};
    }
    return inner_->record(event, stream, site);
  }
  Status wait(Stream stream, Event event, WaitSite site) override {
    if (fails()) return control_->error;
    if (drops(site)) return {};
    return inner_->wait(stream, event, site);
  }
  Result<bool> query(Event event) override {
    if (fails()) return control_->error;
    return inner_->query(event);
  }
  Status synchronize(Event event, WaitSite site) override {
    if (fails()) return control_->error;
    if (drops(site)) return {};
    return inner_->synchronize(event, site);
  }
  Result<std::int64_t> timestamp(Event event) override {
    if (fails()) return control_->error;
    return inner_->timestamp(event);
  }
  Status register_host(void* address, std::size_t bytes) override { return inner_->register_host(address, bytes); }
  Status unregister_host(void* address) override { return inner_->unregister_host(address); }
  Status check_process() const override { return inner_->check_process(); }

 private:
  bool fails() {
    const long call = control_->calls++;
    if (call < control_->fail_from || call >= control_->fail_until) return false;
    ++control_->failed;
    return true;
  }
  bool drops(WaitSite site) {
    if (static_cast<int>(site) != control_->drop_site) return false;
    ++control_->dropped;
    return true;
  }

  std::unique_ptr<Backend> inner_;
  Control* control_;
};

}  // namespace chunkft::test
