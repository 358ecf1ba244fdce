#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "backend.h"

namespace chunkft {

// Picks what runs next when a host backend has no threads.
class Scheduler {
 public:
  virtual ~Scheduler() = default;
  // One of the `count` streams that have something to run; count >= 1.
  virtual std::size_t choose(std::size_t count) = 0;
};

class SeededScheduler final : public Scheduler {
 public:
  explicit SeededScheduler(std::uint64_t seed) : state_(seed) {}
  std::size_t choose(std::size_t count) override;

 private:
  std::uint64_t state_;
};

class HostStream;

// The contract of backend.h on the CPU. A stream is a thread with a FIFO, an event is a place in a FIFO. Stream 0 of the
// caller is the calling thread itself: wait() blocks it, record() stands for nothing that is still to come.
//
// Waking a thread costs more than all else here: a stream starts on its work when an event without timing is recorded
// behind it, or when somebody asks for any event or waits for it, and not before.
//
// With a scheduler there are no threads: work stays in the FIFOs until step() is called or the host waits, runs one
// command at a time in the order that the scheduler chooses, and a copy takes two steps, so that whatever runs between
// them can damage it. For tests of the order of streams, from one thread.
class HostBackend final : public Backend {
 public:
  // create() where the threads may not be had, the constructor where that need not be handled.
  // A delay seed that is not 0 lets every copy start late, by a time that follows from the seed.
  static Result<std::unique_ptr<HostBackend>> create(std::uint64_t delay_seed = 0);
  explicit HostBackend(Scheduler* scheduler = nullptr, std::uint64_t delay_seed = 0);
  ~HostBackend() override;

  const char* name() const override { return "host"; }
  int streams_created() const override;

  Result<Event> create_event(bool timing) override;
  void destroy_event(Event event) override;

  Status copy(Stream stream, void* dst, const void* src, std::size_t bytes) override;
  using Backend::record;
  Status record(Event event, Stream stream, RecordSite site) override;
  Status wait(Stream stream, Event event, WaitSite site) override;
  Result<bool> query(Event event) override;
  Status synchronize(Event event, WaitSite site) override;
  Result<std::int64_t> timestamp(Event event) override;

  Status register_host(void*, std::size_t) override { return {}; }
  Status unregister_host(void*) override { return {}; }
  Status check_process() const override;

  // A further caller's stream; its handle is for Stream::caller().
  std::uintptr_t create_stream();

  // The stream calls run(argument) when its turn comes: what a kernel would be.
  Status launch(Stream stream, void (*run)(void*), void* argument);

  // Runs one command, false when nothing can run. Only with a scheduler.
  bool step();

  std::size_t ready() const;  // streams with something that can run; only with a scheduler
  // How far every stream has come, as one number that differs whenever that does, but for hash collisions.
  std::uint64_t progress() const;
  int live_events() const { return live_events_; }

 private:
  struct HostEvent;
  struct Mark;

  Result<HostStream*> find(Stream stream) const;  // null for the calling thread
  Status block_until(const Mark& mark);
  static bool reached(const Mark& mark);

  Scheduler* const scheduler_;
  const std::uint64_t delay_seed_;
  const int process_;
  mutable std::mutex mutex_;  // guards the two vectors
  std::vector<std::unique_ptr<HostStream>> streams_;  // load, store, then the caller's
  std::vector<std::unique_ptr<HostEvent>> events_;    // all that ever were; freed with the backend
  std::vector<HostEvent*> spare_;
  std::atomic<int> live_events_{0};
};

}  // namespace chunkft
