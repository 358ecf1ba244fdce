#include "telemetry.h"

#include <algorithm>
#include <chrono>

namespace chunkft {
namespace {

// Enough for the copies and waits of some tens of pages ahead of the device.
constexpr std::size_t kMostProbes = 256;

std::uint64_t elapsed(std::int64_t from, std::int64_t to) {
  return to > from ? static_cast<std::uint64_t>(to - from) : 0;
}

}  // namespace

std::int64_t Telemetry::now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Result<std::unique_ptr<Telemetry>> Telemetry::create(Backend& backend, std::size_t trace_events) {
  const std::size_t probes = std::min(trace_events, kMostProbes);
  auto events = EventPool::create(backend, 2 * probes, true);
  if (!events.ok()) return events.error();
  return std::unique_ptr<Telemetry>(new Telemetry(backend, trace_events, probes, std::move(events.value())));
}

Telemetry::Telemetry(Backend& backend, std::size_t trace_events, std::size_t probes, EventPool events)
    : backend_(backend), events_(std::move(events)), probes_(probes), capacity_(trace_events) {
  for (std::size_t i = 0; i < probes; ++i) {
    probes_[i].start = events_[2 * i];
    probes_[i].stop = events_[2 * i + 1];
  }
  ring_.resize(capacity_);
}

Telemetry::Probe* Telemetry::begin(TraceRecord::Kind kind, std::size_t page, std::size_t slot, std::size_t bytes,
                                   Stream stream) {
  if (probes_.empty()) return nullptr;
  using Phase = Probe::Phase;
  Probe& probe = probes_[cursor_.fetch_add(1, std::memory_order_relaxed) % probes_.size()];
  if (probe.move(Phase::kPending, Phase::kReading)) {
    probe.phase.store(harvest(probe) ? Phase::kFree : Phase::kPending, std::memory_order_release);
  }
  if (probe.move(Phase::kFree, Phase::kFilling)) {
    probe.record = {kind, page, slot, bytes, now_ns(), 0, 0};
    if (backend_.record(probe.start, stream).ok()) return &probe;
    probe.phase.store(Phase::kFree, std::memory_order_release);
  }
  std::lock_guard lock(mutex_);
  ++stats_.untimed;
  return nullptr;
}

void Telemetry::end(Probe* probe, Stream stream, bool worked) {
  if (probe == nullptr) return;
  const bool timed = worked && backend_.record(probe->stop, stream).ok();
  probe->phase.store(timed ? Probe::Phase::kPending : Probe::Phase::kFree, std::memory_order_release);
}

// True when the probe is free again.
bool Telemetry::harvest(Probe& probe) {
  const auto done = backend_.query(probe.stop);
  if (!done.ok()) return true;
  if (!done.value()) return false;
  auto started = backend_.timestamp(probe.start);
  auto ended = backend_.timestamp(probe.stop);
  if (!started.ok() || !ended.ok()) return true;
  probe.record.started = started.value();
  probe.record.ended = ended.value();
  keep(probe.record);
  return true;
}

void Telemetry::keep(const TraceRecord& record) {
  const std::uint64_t ns = elapsed(record.started, record.ended);
  std::lock_guard lock(mutex_);
  ring_[recorded_++ % capacity_] = record;
  if (record.kind == TraceRecord::Kind::kWait) {
    stats_.exposed_ns += ns;
    return;
  }
  Transfers& transfers = record.kind == TraceRecord::Kind::kLoad ? stats_.loads : stats_.stores;
  transfers.timed_bytes += record.bytes;
  transfers.timed_ns += ns;
}

void Telemetry::harvest_all() {
  // From the oldest on, so that the trace is in order.
  using Phase = Probe::Phase;
  const std::size_t first = cursor_.load(std::memory_order_relaxed);
  for (std::size_t i = 0; i < probes_.size(); ++i) {
    Probe& probe = probes_[(first + i) % probes_.size()];
    if (!probe.move(Phase::kPending, Phase::kReading)) continue;
    probe.phase.store(harvest(probe) ? Phase::kFree : Phase::kPending, std::memory_order_release);
  }
}

void Telemetry::count(TraceRecord::Kind kind, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  Transfers& transfers = kind == TraceRecord::Kind::kLoad ? stats_.loads : stats_.stores;
  ++transfers.copies;
  transfers.bytes += bytes;
}

void Telemetry::count_acquire(bool waited, std::int64_t stall_ns) {
  std::lock_guard lock(mutex_);
  ++stats_.acquires;
  stats_.waits += waited ? 1 : 0;
  stats_.host_stall_ns += elapsed(0, stall_ns);
}

Stats Telemetry::stats() {
  harvest_all();
  std::lock_guard lock(mutex_);
  return stats_;
}

std::vector<TraceRecord> Telemetry::trace() {
  harvest_all();
  std::lock_guard lock(mutex_);
  std::vector<TraceRecord> records;
  const std::uint64_t kept = std::min<std::uint64_t>(recorded_, capacity_);
  records.reserve(kept);
  for (std::uint64_t i = recorded_ - kept; i != recorded_; ++i) records.push_back(ring_[i % capacity_]);
  return records;
}

}  // namespace chunkft
