// The engine over the CUDA backend, with every call to the driver failing in turn.
#include <algorithm>
#include <deque>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "cuda_backend.h"
#include "engine.h"
#include "fake.h"

namespace {

using namespace chunkft;
using namespace chunkft::test;
using Word = std::uint32_t;

constexpr std::size_t kPages = 4, kSlots = 2, kWords = 16, kBytes = kWords * sizeof(Word);

// Uses every operation, and after an error does what its message offers: try again, or evict what is poisoned.
class Careful {
 public:
  explicit Careful(std::size_t trace_events) {
    std::vector<std::uintptr_t> host, slots;
    memory_ = reinterpret_cast<Word*>(program_.host(kPages * kBytes));
    for (std::size_t page = 0; page < kPages; ++page) {
      newest_[page] = static_cast<Word>(100 * (page + 1));
      std::fill_n(memory_ + page * kWords, kWords, newest_[page]);
      host.push_back(reinterpret_cast<std::uintptr_t>(memory_ + page * kWords));
    }
    for (std::size_t slot = 0; slot < kSlots; ++slot) {
      slots_[slot] = reinterpret_cast<Word*>(program_.device(kBytes));
      slots.push_back(reinterpret_cast<std::uintptr_t>(slots_[slot]));
    }
    stream_ = program_.stream();
    caller_ = Stream::caller(reinterpret_cast<std::uintptr_t>(stream_));
    layout_ = [=] { return Layout::create(std::vector<std::size_t>(kPages, kBytes), host, slots, kBytes).value(); };
    trace_events_ = trace_events;
    program_.api().cuCtxPopCurrent_v2(&context_);  // as on a thread that never used CUDA: the engine has to push it
  }
  ~Careful() { program_.api().cuCtxPushCurrent_v2(context_); }

  // False: the driver did not let the engine come up, and it left nothing behind.
  bool open() {
    auto backend = CudaBackend::create(0);
    if (!backend.ok()) return note(backend.error()), false;
    auto engine = Engine::create(layout_(), std::move(backend.value()), {trace_events_});
    if (!engine.ok()) return note(engine.error()), false;
    engine_ = std::move(engine.value());
    return true;
  }

  void work() {
    for (int round = 0; round < 2; ++round) {
      attempt([&] { return status(engine_->prefetch(0)); });
      use(0, true, true, false);
      use(1, true, true, true);
      use(2, true, true, true);
      use(1, true, false, true);
      use(3, false, true, false);
      attempt([&] { return engine_->write_back(2); });
      use(2, true, true, false);
      use(3, true, false, false);
      flush();
    }
  }

  bool flush() {
    for (std::size_t page = 0; page < kPages; ++page) settle(page);
    const bool flushed = attempt([&] { return engine_->flush(); });
    if (!flushed || std::any_of(held_, held_ + kPages, [](bool held) { return held; })) return false;
    for (std::size_t page = 0; page < kPages; ++page) {
      const Word* words = memory_ + page * kWords;
      fakecuda_host_read(words, kBytes, "result");
      wrong += !std::all_of(words, words + kWords, [&](Word word) { return word == newest_[page]; });
    }
    return true;
  }

  Status close() { return engine_->close(); }

  int wrong = 0;
  std::set<std::string> failed;  // driver functions that errors named

 private:
  struct Work {
    Careful* program;
    Word* slot;
    Word expected, written;  // 0: nothing to see, nothing to write
  };

  template <typename T>
  static Status status(Result<T> result) {
    return result.ok() ? Status{} : Status{result.error()};
  }

  void note(const Error& error) {
    if (error.code == Code::kDriver) failed.insert(error.op);
    wrong += error.code == Code::kDriver && error.driver_code != kUnknownError;
  }

  bool attempt(const std::function<Status()>& operation) {
    for (int i = 0; i < 3; ++i) {
      const Status done = operation();
      if (done.ok()) return true;
      note(done.error());
    }
    return false;
  }

  std::optional<State> state(std::size_t page) {
    std::optional<State> found;
    attempt([&] {
      auto seen = engine_->state(page);
      if (!seen.ok()) return Status{seen.error()};
      found = seen.value();
      return Status{};
    });
    return found;
  }

  // Brings a page that an error left acquired or poisoned back among the others.
  void settle(std::size_t page) {
    if (held_[page]) release(page, dirty_[page], false);
    if (state(page) == State::kPoisoned) attempt([&] { return engine_->evict(page); });
  }

  void release(std::size_t page, bool dirty, bool keep) {
    held_[page] = !attempt([&] {
      Status done = engine_->release(page, caller_, dirty, keep);
      if (done.ok()) return done;
      // The release has happened if it is the write-back that failed.
      const auto now = state(page);
      if (now && *now != State::kInUse) {
        note(done.error());
        return Status{};
      }
      return done;
    });
    dirty_[page] = dirty;
    if (!held_[page] && state(page) == State::kPoisoned) attempt([&] { return engine_->evict(page); });
  }

  void use(std::size_t page, bool load, bool write, bool keep) {
    for (std::size_t other = 0; other < kPages; ++other) settle(other);
    if (held_[page]) return;
    std::size_t slot = 0;
    const bool acquired = attempt([&] {
      auto got = engine_->acquire(page, caller_, load);
      if (got.ok()) slot = got.value();
      return status(std::move(got));
    });
    if (!acquired) return;
    Work& work = works_.emplace_back(Work{this, slots_[slot], load ? newest_[page] : 0, write ? ++version_ : 0});
    if (write) newest_[page] = work.written;
    launch(
        stream_, "use", {write ? writes(work.slot, kBytes) : reads(work.slot, kBytes)},
        [](void* argument) {
          const auto& w = *static_cast<Work*>(argument);
          const bool seen = std::all_of(w.slot, w.slot + kWords, [&](Word word) { return word == w.expected; });
          w.program->wrong += w.expected != 0 && !seen;
          if (w.written != 0) std::fill_n(w.slot, kWords, w.written);
        },
        &work);
    release(page, write, keep);
  }

  Program program_;
  CuContext context_ = nullptr;
  Word* memory_ = nullptr;
  Word* slots_[kSlots] = {};
  Word newest_[kPages] = {};
  bool held_[kPages] = {}, dirty_[kPages] = {};  // acquired, because it could not be released
  CuStream stream_ = nullptr;
  Stream caller_ = Stream::caller(0);
  std::function<Layout()> layout_;
  std::size_t trace_events_ = 0;
  std::deque<Work> works_;  // stable addresses: kernels run late
  Word version_ = 1000;
  std::unique_ptr<Engine> engine_;
};

void sweep(bool forever, std::size_t trace_events) {
  std::set<std::string> failed;
  for (std::uint64_t nth = 1;; ++nth) {
    start_fake(nth);
    bool struck = false, opened = false;
    int wrong = 0;
    {
      Careful careful(trace_events);
      fakecuda_fail(nullptr, nth, kUnknownError, forever);
      opened = careful.open();
      if (opened) careful.work();
      struck = fakecuda_failed() != 0;
      // What was down is up again: everything that was written must still be there, and reach the host.
      fakecuda_fail(nullptr, 0, 0, 0);
      if (opened) {
        CHECK(careful.flush());
        CHECK(careful.close().ok());
      } else {
        CHECK(struck);
      }
      wrong = careful.wrong;
      failed.merge(careful.failed);
    }
    // What a driver that is down when the engine fails to come up does not take back stays its own.
    const bool whole = forever && !opened ? !violated("race") && !violated("misuse") : clean();
    if (!whole || wrong != 0) {
      return test::report(__FILE__, __LINE__, "call " + std::to_string(nth) + ": " + violations());
    }
    if (!struck) {
      CHECK(nth > 150);
      break;
    }
  }
  for (const char* name : {"cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuEventRecord", "cuStreamWaitEvent",
                           "cuEventSynchronize", "cuEventQuery", "cuCtxPushCurrent_v2", "cuEventCreate"}) {
    if (failed.count(name) == 0) test::report(__FILE__, __LINE__, std::string("never failed: ") + name);
  }
}

TEST(a_driver_call_that_fails_once_loses_and_leaks_nothing) {
  sweep(false, 0);
  sweep(false, 16);
}

TEST(a_driver_that_is_down_for_a_while_loses_nothing) {
  sweep(true, 0);
  sweep(true, 16);
}

// Copies that were accepted come to nothing. The host must not be told that its copy is up to date.
TEST(a_device_that_dies_never_leaves_stale_pages_behind_a_flush_that_succeeds) {
  bool survived = false;
  for (std::uint64_t operations = 0; !survived && operations < 200; ++operations) {
    start_fake(operations);
    {
      Careful careful(0);
      REQUIRE(careful.open());
      fakecuda_break_after(operations, kUnknownError);
      careful.work();
      survived = careful.flush();
      CHECK(careful.close().ok() == survived);
      CHECK(careful.wrong == 0);
      fakecuda_reset(0);
    }
  }
  CHECK(survived);
}

}  // namespace
