#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace chunkft {

struct Command {
  enum class Kind { kCopy, kWait, kRun };

  Kind kind = Kind::kRun;
  void* dst = nullptr;
  const void* src = nullptr;
  std::size_t bytes = 0;
  class HostStream* other = nullptr;  // kWait: until this stream has passed
  std::uint64_t place = 0;            // this place
  void (*run)(void*, std::uint64_t) = nullptr;
  void* argument = nullptr;
  std::uint64_t number = 0;  // second argument of run
};

// A FIFO of commands and, unless it is stepped by hand, the thread that works it off.
class HostStream {
 public:
  // With a delay seed each copy of a stream with a thread waits before it starts, up to kLongestDelay.
  explicit HostStream(bool threaded, std::uint64_t delay_seed = 0);
  ~HostStream();  // works off what there is, if it has a thread; what is left in a stepped stream is dropped

  // Place of the command in the stream, counted from 1. It may lie there until the next nudge.
  std::uint64_t submit(const Command& command);
  std::uint64_t submitted() const { return submitted_.load(std::memory_order_acquire); }
  bool passed(std::uint64_t place) const { return executed_.load(std::memory_order_acquire) >= place; }
  void nudge() { filled_.notify_one(); }
  void block_until(std::uint64_t place);  // from any other thread

  // By hand, in a stream without a thread.
  bool can_step();
  void step();
  std::uint64_t progress() const { return 2 * executed_.load(std::memory_order_relaxed) + (half_copied_ ? 1 : 0); }

  void stop();  // the thread ends when it has worked off what it has; returns at once
  void join();

 private:
  void work();
  Command head();
  void finish();
  void delay();
  static void execute(const Command& command);

  std::mutex mutex_;
  std::condition_variable filled_;
  std::vector<Command> ring_;  // power-of-two sized; grows only when the host is that far ahead
  std::uint64_t first_ = 0;    // guarded by mutex_, as is the ring
  bool stopping_ = false;
  bool half_copied_ = false;
  std::uint64_t delay_state_;  // 0: no delays; the thread's own
  std::atomic<std::uint64_t> submitted_{0};
  std::atomic<std::uint64_t> executed_{0};
  std::thread thread_;
};

}  // namespace chunkft
