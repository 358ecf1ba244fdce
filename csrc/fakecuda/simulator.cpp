#include "simulator.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <sys/mman.h>
#include <unistd.h>

#include "fakecuda.h"

namespace fakecuda {

Simulator& Simulator::get() {
  // Never destroyed: Python objects may call the driver after static destructors have run.
  static Simulator* simulator = [] {
    auto* made = new Simulator;
    made->reset(0);
    if (const char* settings = std::getenv("CHUNKFT_FAKECUDA")) made->configure(settings);
    return made;
  }();
  return *simulator;
}

void Simulator::reset(std::uint64_t seed) {
  for (auto& [address, block] : allocations) std::free(block.owned);
  for (auto* blocks : {&allocations, &declared, &registrations}) blocks->clear();
  contexts.clear();
  streams.clear();
  events.clear();
  retired.clear();
  ++generation;
  policy = FAKECUDA_RANDOM;
  device_count = 1;
  pageable_allowed = false;
  lockable = SIZE_MAX;
  calls.clear();
  host_syncs = 0;
  violations.clear();
  failure = {};
  break_after.reset();
  break_code = 0;
  checker_ = {};
  host_clock_ = {};
  host_microseconds_ = 0;
  next_actor_ = kHost + 1;
  steps_ = 0;
  random_.seed(seed);
}

void Simulator::configure(const std::string& settings) {
  std::istringstream parts(settings);
  for (std::string part; std::getline(parts, part, ',');) {
    const std::size_t equals = part.find('=');
    const std::string key = part.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : part.substr(equals + 1);
    if (key == "seed") {
      random_.seed(std::strtoull(value.c_str(), nullptr, 10));
    } else if (key == "policy" && (value == "random" || value == "lazy" || value == "eager")) {
      policy = value == "random" ? FAKECUDA_RANDOM : value == "lazy" ? FAKECUDA_LAZY : FAKECUDA_EAGER;
    } else if (key == "pageable") {
      pageable_allowed = value != "0";
    } else if (key == "devices") {
      device_count = std::atoi(value.c_str());
    } else if (key == "lockable") {
      lockable = std::strtoull(value.c_str(), nullptr, 10);
    } else {
      report("CHUNKFT_FAKECUDA: unknown setting \"" + part + "\"");
    }
  }
}

bool Simulator::ready(const Stream& stream) {
  return !stream.queue.empty() && (stream.queue.front().needs == nullptr || stream.queue.front().needs->done);
}

void Simulator::run_front(Stream& stream) {
  const Operation operation = std::move(stream.queue.front());
  stream.queue.pop_front();
  if (operation.effect && !broken()) {
    operation.effect();
    if (break_after) --*break_after;
  }
  if (operation.completes) operation.completes->done = true;
}

bool Simulator::run_one() {
  std::vector<Stream*> candidates;
  for (auto& [handle, stream] : streams) {
    if (ready(stream)) candidates.push_back(&stream);
  }
  if (candidates.empty()) return false;
  run_front(*candidates[random_() % candidates.size()]);
  return true;
}

void Simulator::run_some() {
  if (policy == FAKECUDA_LAZY) return;
  while (policy == FAKECUDA_EAGER || random_() % 2 == 0) {
    if (!run_one()) return;
  }
}

void Simulator::run_until(const Stamp& stamp) {
  while (!stamp.done && run_one()) {
  }
}

void Simulator::drain() {
  while (run_one()) {
  }
}

std::size_t Simulator::pending() const {
  std::size_t count = 0;
  for (const auto& [handle, stream] : streams) count += stream.queue.size();
  return count;
}

std::uintptr_t Simulator::new_stream(std::uintptr_t context, bool blocking) {
  const std::uintptr_t handle = new_handle();
  Stream& stream = streams[handle];
  stream.context = context;
  stream.blocking = blocking;
  stream.actor = next_actor_++;
  return handle;
}

Stream* Simulator::find_stream(std::uintptr_t context, std::uintptr_t handle) {
  // CU_STREAM_LEGACY (1) is another name of the default stream. A context handle serves as its key: it is no stream's.
  if (handle <= 1) {
    auto [found, made] = streams.try_emplace(context);
    if (made) {
      found->second.context = context;
      found->second.actor = next_actor_++;
    }
    return &found->second;
  }
  auto found = streams.find(handle);
  if (found == streams.end() || found->second.destroyed || contexts.count(handle) != 0) return nullptr;
  return &found->second;
}

std::shared_ptr<Step> Simulator::new_step(Actor actor, Clock& clock, const std::string& what) {
  clock.tick(actor);
  auto step = std::make_shared<Step>();
  step->actor = actor;
  step->tick = clock.at(actor);
  step->text = "#" + std::to_string(++steps_) + " " + what +
               (actor == kHost ? " of the host" : " on stream " + std::to_string(actor));
  return step;
}

void Simulator::check(const std::vector<Range>& ranges, const std::shared_ptr<Step>& step, const Clock& clock) {
  for (const Range& range : ranges) {
    for (std::string& text : checker_.access(range, step, clock)) report(std::move(text));
  }
}

void Simulator::order_with_default_stream(std::uintptr_t handle, Stream& stream) {
  const bool is_default = contexts.count(handle) != 0;
  if (!is_default && !stream.blocking) return;
  for (auto& [other_handle, other] : streams) {
    const bool other_is_default = contexts.count(other_handle) != 0;
    const bool implicit = is_default ? other.blocking && !other.destroyed : other_is_default;
    if (implicit && &other != &stream && other.context == stream.context) wait(stream, record(other));
  }
}

void Simulator::submit(std::uintptr_t handle, Stream& stream, const std::string& what,
                       const std::vector<Range>& ranges, double microseconds, std::function<void()> effect) {
  order_with_default_stream(handle <= 1 ? stream.context : handle, stream);
  stream.clock.join(host_clock_);
  auto step = new_step(stream.actor, stream.clock, what);
  check(ranges, step, stream.clock);
  stream.microseconds = std::max(stream.microseconds, host_microseconds_) + microseconds;
  stream.queue.push_back({std::move(effect), nullptr, nullptr});
}

std::shared_ptr<Stamp> Simulator::record(Stream& stream) {
  stream.clock.join(host_clock_);
  auto stamp = std::make_shared<Stamp>();
  stamp->clock = stream.clock;
  stamp->microseconds = stream.microseconds = std::max(stream.microseconds, host_microseconds_);
  stream.queue.push_back({nullptr, stamp, nullptr});
  return stamp;
}

void Simulator::wait(Stream& stream, const std::shared_ptr<const Stamp>& stamp) {
  stream.clock.join(stamp->clock);
  stream.microseconds = std::max(stream.microseconds, stamp->microseconds);
  stream.queue.push_back({nullptr, nullptr, stamp});
}

void Simulator::synchronize(const std::shared_ptr<const Stamp>& stamp) {
  host_clock_.join(stamp->clock);
  host_microseconds_ = std::max(host_microseconds_, stamp->microseconds);
}

Simulator::Place Simulator::locate(const Blocks& blocks, const void* address, std::size_t bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  auto next = blocks.upper_bound(first);
  if (next != blocks.begin()) {
    const auto& [start, block] = *std::prev(next);
    if (first - start <= block.bytes && bytes <= block.bytes - (first - start)) return Place::kInside;
    if (first - start < block.bytes) return Place::kPartly;
  }
  return next != blocks.end() && next->first - first < bytes ? Place::kPartly : Place::kOutside;
}

Simulator::Place Simulator::on_device(const void* address, std::size_t bytes) const {
  const Place place = locate(allocations, address, bytes);
  return place == Place::kOutside ? locate(declared, address, bytes) : place;
}

void Simulator::host_access(const void* address, std::size_t bytes, bool write, const std::string& what) {
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  auto step = new_step(kHost, host_clock_, what);
  check({{first, first + bytes, write}}, step, host_clock_);
}

bool Simulator::is_mapped([[maybe_unused]] void* address, [[maybe_unused]] std::size_t bytes) {
#ifdef __linux__
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<std::uintptr_t>(address) / page * page;
  const std::size_t span = reinterpret_cast<std::uintptr_t>(address) + bytes - first;
  std::vector<unsigned char> resident((span + page - 1) / page);
  return mincore(reinterpret_cast<void*>(first), span, resident.data()) == 0;
#else
  return true;  // mincore elsewhere does not tell mapped from unmapped
#endif
}

void Simulator::release_context(std::uintptr_t handle) {
  drain();
  const auto of_context = [&](const auto& entry) {
    if (entry.second.context != handle) return false;
    retired.insert(entry.first);
    return true;
  };
  streams.erase(handle);  // the default stream
  std::erase_if(streams, [](const auto& entry) { return entry.second.destroyed; });
  const std::size_t lost_streams = std::erase_if(streams, of_context);
  const std::size_t lost_events = std::erase_if(events, of_context);
  if (lost_streams + lost_events != 0) {
    report("leak: a context was destroyed with " + std::to_string(lost_streams) + " streams and " +
           std::to_string(lost_events) + " events");
  }
  contexts.erase(handle);
  retired.insert(handle);
}

}  // namespace fakecuda
