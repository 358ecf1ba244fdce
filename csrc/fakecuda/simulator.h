#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <sys/types.h>
#include <vector>

#include "checker.h"

namespace fakecuda {

// One recording of an event: what a wait captures.
struct Stamp {
  bool done = false;
  Clock clock;
  double microseconds = 0;
};

struct Operation {
  std::function<void()> effect;        // null for a wait
  std::shared_ptr<Stamp> completes;    // a record
  std::shared_ptr<const Stamp> needs;  // a wait
};

struct Context {
  int device = 0;
  int retained = 0;
};

struct Stream {
  std::uintptr_t context = 0;
  Actor actor = kHost;
  bool blocking = false;  // takes part in the implicit order with the legacy default stream
  bool destroyed = false;  // work that was given before still runs
  Clock clock;
  double microseconds = 0;
  std::deque<Operation> queue;
};

struct Event {
  std::uintptr_t context = 0;
  bool timing = false;
  std::shared_ptr<Stamp> last;  // null until recorded
};

struct Block {
  std::size_t bytes = 0;
  std::byte* owned = nullptr;  // of an allocation; null for a declared or registered range
};
using Blocks = std::map<std::uintptr_t, Block>;  // by first byte

// The whole state of the fake driver. Every member is used under `mutex`.
class Simulator {
 public:
  static Simulator& get();

  void reset(std::uint64_t seed);
  void configure(const std::string& settings);  // the text of $CHUNKFT_FAKECUDA

  // Scheduling.
  void pass_time() { host_microseconds_ += 1; }
  void run_some();                         // of what is ready, as the policy has it
  bool run_one();                          // one ready operation of a random stream; false if there is none
  void run_until(const Stamp& stamp);      // there are no cycles, so this always ends
  void drain();
  std::size_t pending() const;

  // Streams. `stream` 0 of a context is its legacy default stream.
  Stream* find_stream(std::uintptr_t context, std::uintptr_t handle);
  std::uintptr_t new_stream(std::uintptr_t context, bool blocking);
  void submit(std::uintptr_t handle, Stream& stream, const std::string& what, const std::vector<Range>& ranges,
              double microseconds, std::function<void()> effect);
  std::shared_ptr<Stamp> record(Stream& stream);
  void wait(Stream& stream, const std::shared_ptr<const Stamp>& stamp);
  void synchronize(const std::shared_ptr<const Stamp>& stamp);  // the host has learned that the stamp is done

  // Memory.
  enum class Place { kInside, kOutside, kPartly };
  static Place locate(const Blocks& blocks, const void* address, std::size_t bytes);
  Place on_device(const void* address, std::size_t bytes) const;
  void host_access(const void* address, std::size_t bytes, bool write, const std::string& what);
  void forget(std::uintptr_t first, std::size_t bytes) { checker_.forget(first, first + bytes); }
  static bool is_mapped(void* address, std::size_t bytes);
  void release_context(std::uintptr_t handle);

  void report(std::string text) { violations.push_back(std::move(text)); }

  std::mutex mutex;
  pid_t process = 0;  // that called cuInit; 0 before
  int policy = 0;
  int device_count = 1;
  bool pageable_allowed = false;
  std::size_t lockable = SIZE_MAX;

  std::map<std::uintptr_t, Context> contexts;
  std::map<std::uintptr_t, Stream> streams;
  std::map<std::uintptr_t, Event> events;
  Blocks allocations, declared, registrations;
  std::set<std::uintptr_t> retired;  // handles that were alive once
  std::uint64_t generation = 0;      // number of the last reset: context stacks of threads from before it are void

  // Handles are never given out twice, so that a use after the end is always seen as one.
  std::uintptr_t new_handle() { return next_handle += 64; }

  std::map<std::string, std::uint64_t> calls;
  std::uint64_t host_syncs = 0;
  std::vector<std::string> violations;

  struct Failure {
    std::string function;  // empty: any
    std::uint64_t countdown = 0;
    int code = 0;
    bool forever = false;
    bool struck = false;
  } failure;
  std::optional<std::uint64_t> break_after;
  int break_code = 0;
  bool broken() const { return break_after == std::uint64_t{0}; }

 private:
  void order_with_default_stream(std::uintptr_t handle, Stream& stream);
  void run_front(Stream& stream);
  static bool ready(const Stream& stream);
  std::shared_ptr<Step> new_step(Actor actor, Clock& clock, const std::string& what);
  void check(const std::vector<Range>& ranges, const std::shared_ptr<Step>& step, const Clock& clock);

  Checker checker_;
  Clock host_clock_;
  double host_microseconds_ = 0;
  Actor next_actor_ = kHost + 1;
  std::uint64_t steps_ = 0;
  std::uintptr_t next_handle = 0xfa4e0000;
  std::mt19937_64 random_;
};

}  // namespace fakecuda
