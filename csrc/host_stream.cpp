#include "host_stream.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

namespace chunkft {
namespace {

constexpr std::size_t kCapacity = 1024;
constexpr std::size_t kSteppedCapacity = 16;  // tests make these by the thousand
constexpr std::uint64_t kLongestDelay = 2000;  // microseconds

}  // namespace

HostStream::HostStream(bool threaded, std::uint64_t delay_seed)
    : ring_(threaded ? kCapacity : kSteppedCapacity), delay_state_(delay_seed) {
  if (threaded) thread_ = std::thread([this] { work(); });
}

HostStream::~HostStream() {
  stop();
  join();
}

std::uint64_t HostStream::submit(const Command& command) {
  std::lock_guard lock(mutex_);
  const std::uint64_t end = submitted_.load(std::memory_order_relaxed);
  if (end - first_ == ring_.size()) {
    std::vector<Command> larger(ring_.size() * 2);
    for (std::uint64_t i = first_; i != end; ++i) larger[i % larger.size()] = ring_[i % ring_.size()];
    ring_.swap(larger);
  }
  ring_[end % ring_.size()] = command;
  submitted_.store(end + 1, std::memory_order_release);
  return end + 1;
}

void HostStream::block_until(std::uint64_t place) {
  nudge();
  for (std::uint64_t now = executed_.load(std::memory_order_acquire); now < place;
       now = executed_.load(std::memory_order_acquire)) {
    executed_.wait(now, std::memory_order_acquire);
  }
}

Command HostStream::head() {
  std::lock_guard lock(mutex_);
  return ring_[first_ % ring_.size()];
}

void HostStream::finish() {
  std::uint64_t place = 0;
  {
    std::lock_guard lock(mutex_);
    place = ++first_;
  }
  executed_.store(place, std::memory_order_release);
  executed_.notify_all();
}

void HostStream::execute(const Command& command) {
  switch (command.kind) {
    case Command::Kind::kCopy:
      std::memcpy(command.dst, command.src, command.bytes);
      break;
    case Command::Kind::kWait:
      command.other->block_until(command.place);
      break;
    case Command::Kind::kRun:
      command.run(command.argument, command.number);
      break;
  }
}

void HostStream::work() {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      filled_.wait(lock, [this] { return stopping_ || first_ != submitted_.load(std::memory_order_relaxed); });
      if (first_ == submitted_.load(std::memory_order_relaxed)) return;
    }
    const Command command = head();
    if (delay_state_ != 0 && command.kind == Command::Kind::kCopy) delay();
    execute(command);
    finish();
  }
}

void HostStream::delay() {
  // xorshift64: never 0 once it was not.
  delay_state_ ^= delay_state_ << 13;
  delay_state_ ^= delay_state_ >> 7;
  delay_state_ ^= delay_state_ << 17;
  std::this_thread::sleep_for(std::chrono::microseconds(delay_state_ % kLongestDelay));
}

bool HostStream::can_step() {
  if (passed(submitted())) return false;
  const Command command = head();
  return command.kind != Command::Kind::kWait || command.other->passed(command.place);
}

void HostStream::step() {
  const Command command = head();
  const std::size_t half = command.bytes / 2;
  if (command.kind == Command::Kind::kCopy && half != 0) {
    const std::size_t first = half_copied_ ? half : 0;
    const std::size_t bytes = half_copied_ ? command.bytes - half : half;
    std::memcpy(static_cast<std::byte*>(command.dst) + first, static_cast<const std::byte*>(command.src) + first, bytes);
    half_copied_ = !half_copied_;
    if (half_copied_) return;
  } else if (command.kind != Command::Kind::kWait) {
    execute(command);
  }
  finish();
}

void HostStream::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  filled_.notify_one();
}

void HostStream::join() {
  if (thread_.joinable()) thread_.join();
}

}  // namespace chunkft
