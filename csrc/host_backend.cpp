#include "host_backend.h"

#include <unistd.h>

#include <chrono>
#include <string>
#include <system_error>

#include "host_stream.h"

namespace chunkft {
namespace {

constexpr std::size_t kOwnStreams = 2;

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

// What an event stands for: everything up to a place in a stream. The place is copied by whoever waits, so that
// recording the event again does not move a wait.
struct HostBackend::Mark {
  HostStream* stream = nullptr;  // null: nothing
  std::uint64_t place = 0;
};

struct HostBackend::HostEvent {
  bool timing = false;
  std::mutex mutex;  // guards what follows
  Mark mark;
  std::uint64_t records = 0;  // tells a late time stamp of an earlier record from that of the latest
  std::int64_t at = 0;

  static void stamp(void* event, std::uint64_t record) {
    auto* self = static_cast<HostEvent*>(event);
    const std::int64_t now = now_ns();
    std::lock_guard lock(self->mutex);
    if (self->records == record) self->at = now;
  }

  Mark read() {
    std::lock_guard lock(mutex);
    return mark;
  }

  static HostEvent* of(Event event) { return reinterpret_cast<HostEvent*>(event); }
};

std::size_t SeededScheduler::choose(std::size_t count) {
  // splitmix64: one multiplication and shift chain a number, and any seed will do.
  std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<std::size_t>((z ^ (z >> 31)) % count);
}

HostBackend::HostBackend(Scheduler* scheduler, std::uint64_t delay_seed)
    : scheduler_(scheduler), delay_seed_(delay_seed), process_(getpid()) {
  for (std::size_t i = 0; i < kOwnStreams; ++i) create_stream();
}

HostBackend::~HostBackend() {
  if (getpid() != process_) {
    // Locks and threads are as the parent had them at the time of the fork: nothing here can be taken down.
    for (auto& stream : streams_) static_cast<void>(stream.release());
    for (auto& event : events_) static_cast<void>(event.release());
    return;
  }
  if (scheduler_ != nullptr) {
    while (step()) {
    }
  }
  // One step for all of them before the next: until the last has ended, each may wait for any other.
  for (auto& stream : streams_) stream->stop();
  for (auto& stream : streams_) stream->join();
}

Result<std::unique_ptr<HostBackend>> HostBackend::create(std::uint64_t delay_seed) {
  try {
    return std::make_unique<HostBackend>(nullptr, delay_seed);
  } catch (const std::system_error& error) {
    return Error{Code::kSystem, "starting a copy thread", {}, 0, error.code().value()};
  }
}

int HostBackend::streams_created() const {
  std::lock_guard lock(mutex_);
  return static_cast<int>(streams_.size());
}

std::uintptr_t HostBackend::create_stream() {
  std::lock_guard lock(mutex_);
  const std::uint64_t seed = delay_seed_ == 0 ? 0 : delay_seed_ + streams_.size();
  auto stream = std::make_unique<HostStream>(scheduler_ == nullptr, seed);
  const auto handle = reinterpret_cast<std::uintptr_t>(stream.get());
  streams_.push_back(std::move(stream));
  return handle;
}

Result<Event> HostBackend::create_event(bool timing) {
  std::lock_guard lock(mutex_);
  if (spare_.empty()) {
    events_.push_back(std::make_unique<HostEvent>());
    spare_.push_back(events_.back().get());
  }
  HostEvent* event = spare_.back();
  spare_.pop_back();
  event->timing = timing;
  ++live_events_;
  return reinterpret_cast<Event>(event);
}

void HostBackend::destroy_event(Event event) {
  HostEvent* self = HostEvent::of(event);
  {
    std::lock_guard lock(self->mutex);
    self->mark = {};
  }
  std::lock_guard lock(mutex_);
  spare_.push_back(self);
  --live_events_;
}

Result<HostStream*> HostBackend::find(Stream stream) const {
  std::lock_guard lock(mutex_);
  if (stream.lane == Lane::kLoad) return streams_[0].get();
  if (stream.lane == Lane::kStore) return streams_[1].get();
  if (stream.handle == 0) return static_cast<HostStream*>(nullptr);
  for (std::size_t i = kOwnStreams; i < streams_.size(); ++i) {
    if (reinterpret_cast<std::uintptr_t>(streams_[i].get()) == stream.handle) return streams_[i].get();
  }
  return invalid_argument("host backend", "stream must be 0, the calling thread, or a stream of this backend, got " +
                                              std::to_string(stream.handle));
}

bool HostBackend::reached(const Mark& mark) { return mark.stream == nullptr || mark.stream->passed(mark.place); }

Status HostBackend::block_until(const Mark& mark) {
  if (mark.stream == nullptr) return {};
  if (scheduler_ == nullptr) {
    mark.stream->block_until(mark.place);
    return {};
  }
  while (!reached(mark)) {
    if (!step()) return invalid_argument("host backend", "the streams wait for each other: nothing can run");
  }
  return {};
}

Status HostBackend::copy(Stream stream, void* dst, const void* src, std::size_t bytes) {
  auto target = find(stream);
  if (!target.ok()) return target.error();
  Command command{.kind = Command::Kind::kCopy, .dst = dst, .src = src, .bytes = bytes};
  if (target.value() != nullptr) {
    target.value()->submit(command);
  } else {
    std::copy_n(static_cast<const std::byte*>(src), bytes, static_cast<std::byte*>(dst));
  }
  return {};
}

Status HostBackend::record(Event event, Stream stream, RecordSite) {
  auto target = find(stream);
  if (!target.ok()) return target.error();
  HostStream* on = target.value();
  HostEvent* self = HostEvent::of(event);
  std::uint64_t record = 0;
  {
    std::lock_guard lock(self->mutex);
    record = ++self->records;
    if (on == nullptr) {
      self->mark = {};
      self->at = now_ns();
    } else if (!self->timing) {
      self->mark = {on, on->submitted()};
    }
  }
  if (on != nullptr && self->timing) {
    const Command stamp{.kind = Command::Kind::kRun, .run = &HostEvent::stamp, .argument = self, .number = record};
    const std::uint64_t place = on->submit(stamp);
    std::lock_guard lock(self->mutex);
    self->mark = {on, place};
  } else if (on != nullptr) {
    on->nudge();
  }
  return {};
}

Status HostBackend::wait(Stream stream, Event event, WaitSite) {
  auto target = find(stream);
  if (!target.ok()) return target.error();
  const Mark mark = HostEvent::of(event)->read();
  if (reached(mark)) return {};
  if (target.value() == nullptr) return block_until(mark);
  target.value()->submit({.kind = Command::Kind::kWait, .other = mark.stream, .place = mark.place});
  return {};
}

Result<bool> HostBackend::query(Event event) {
  const Mark mark = HostEvent::of(event)->read();
  if (reached(mark)) return true;
  mark.stream->nudge();
  return false;
}

Status HostBackend::synchronize(Event event, WaitSite) { return block_until(HostEvent::of(event)->read()); }

Result<std::int64_t> HostBackend::timestamp(Event event) {
  HostEvent* self = HostEvent::of(event);
  if (!self->timing) return invalid_argument("host backend", "timestamp() is for events made with timing=true");
  std::lock_guard lock(self->mutex);
  if (!reached(self->mark)) return invalid_argument("host backend", "timestamp() is for events that are done");
  return self->at;
}

Status HostBackend::check_process() const {
  if (getpid() == process_) return {};
  return Error{Code::kForked, "host backend",
               "made by process " + std::to_string(process_) + ", called in its child " + std::to_string(getpid()) +
                   ": a fork copies no threads; make a new one in the child"};
}

Status HostBackend::launch(Stream stream, void (*run)(void*), void* argument) {
  auto target = find(stream);
  if (!target.ok()) return target.error();
  if (target.value() == nullptr) {
    run(argument);
    return {};
  }
  // A function pointer is one word: it travels as the number.
  target.value()->submit({.kind = Command::Kind::kRun,
                          .run = [](void* arg, std::uint64_t code) { reinterpret_cast<void (*)(void*)>(code)(arg); },
                          .argument = argument,
                          .number = reinterpret_cast<std::uintptr_t>(run)});
  target.value()->nudge();
  return {};
}

std::size_t HostBackend::ready() const {
  std::size_t count = 0;
  for (auto& stream : streams_) count += stream->can_step() ? 1 : 0;
  return count;
}

std::uint64_t HostBackend::progress() const {
  std::uint64_t hash = 0;
  for (auto& stream : streams_) hash = (hash ^ stream->progress()) * 0x100000001b3u;
  return hash;
}

bool HostBackend::step() {
  const std::size_t count = ready();
  if (count == 0) return false;
  std::size_t skip = scheduler_->choose(count);
  for (auto& stream : streams_) {
    if (!stream->can_step()) continue;
    if (skip-- == 0) {
      stream->step();
      return true;
    }
  }
  return false;
}

}  // namespace chunkft
