#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "event_pool.h"

namespace chunkft {

struct TraceRecord {
  enum class Kind { kLoad, kStore, kWait };

  Kind kind = Kind::kLoad;
  std::size_t page = 0;
  std::size_t slot = 0;
  std::size_t bytes = 0;
  // Nanoseconds of std::chrono::steady_clock. Start and end are those of the device.
  std::int64_t submitted = 0;
  std::int64_t started = 0;
  std::int64_t ended = 0;
};

struct Transfers {
  std::uint64_t copies = 0;
  std::uint64_t bytes = 0;
  // Of these, the ones that were timed and seen done. bytes / ns is the bandwidth in GB/s.
  std::uint64_t timed_bytes = 0;
  std::uint64_t timed_ns = 0;
};

struct Stats {
  Transfers loads;
  Transfers stores;
  std::uint64_t acquires = 0;
  std::uint64_t waits = 0;          // of these, the ones that had to wait for a load, perhaps for no time
  std::uint64_t exposed_ns = 0;     // for how long the caller's streams stood still for loads (timed waits only)
  std::uint64_t host_stall_ns = 0;  // for how long acquire() held up the calling thread for loads
  std::uint64_t untimed = 0;        // operations that no probe was free for: the host was that far ahead
  std::uint64_t events_created = 0;
  std::uint64_t streams_created = 0;
};

// Counts what the engine does, and times it on the device without making anybody wait: pairs of events around a copy or
// a wait are read when their turn comes again. A failing probe costs its record, never the operation.
class Telemetry {
 public:
  // trace_events: how many records are kept; 0 times nothing.
  static Result<std::unique_ptr<Telemetry>> create(Backend& backend, std::size_t trace_events);

  class Probe;
  // Null when nothing is timed or no probe is free. Every probe that was begun is ended.
  Probe* begin(TraceRecord::Kind kind, std::size_t page, std::size_t slot, std::size_t bytes, Stream stream);
  void end(Probe* probe, Stream stream, bool worked);

  void count(TraceRecord::Kind kind, std::size_t bytes);
  void count_acquire(bool waited, std::int64_t stall_ns);

  Stats stats();                     // reads the probes that are done first
  std::vector<TraceRecord> trace();  // oldest first
  std::size_t events() const { return events_.size(); }
  void forget() { events_.forget(); }

  static std::int64_t now_ns();

 private:
  Telemetry(Backend& backend, std::size_t trace_events, std::size_t probes, EventPool events);
  void harvest_all();
  bool harvest(Probe& probe);
  void keep(const TraceRecord& record);

  Backend& backend_;
  EventPool events_;
  std::vector<Probe> probes_;
  std::atomic<std::size_t> cursor_{0};
  std::mutex mutex_;  // guards what follows
  std::vector<TraceRecord> ring_;
  const std::size_t capacity_;
  std::uint64_t recorded_ = 0;
  Stats stats_;
};

// Free -> kFilling (its operation is being submitted) -> kPending (waits to be read) -> kReading -> Free.
class Telemetry::Probe {
 public:
  enum class Phase { kFree, kFilling, kPending, kReading };

  std::atomic<Phase> phase{Phase::kFree};
  Event start = 0;
  Event stop = 0;
  TraceRecord record;

  bool move(Phase from, Phase to) { return phase.compare_exchange_strong(from, to, std::memory_order_acq_rel); }
};

}  // namespace chunkft
