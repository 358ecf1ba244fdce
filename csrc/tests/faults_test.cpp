#include <cerrno>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "paged_memory.h"

namespace {

using namespace chunkft;
using chunkft::test::Adaptor;
using chunkft::test::Control;
using chunkft::test::PagedMemory;
using Word = PagedMemory::Word;

constexpr std::size_t kPages = 4, kSlots = 2;

enum class Outage {
  kOneCall,    // the N-th call fails; what failed is tried again at once
  kTillHealed, // all calls from the N-th on fail until the program is through; then everything is tried again
  kForEver,    // and are never healed: the pager is closed as it is
};

// A program that uses every operation, keeps account of every page's newest content, and behaves as a careful user
// would: what can be tried again is, what is poisoned is evicted again, nothing else is assumed.
class Careful {
 public:
  Careful(Scheduler* scheduler, std::size_t trace, long call, Outage outage, const Error& error)
      : outage_(outage), memory_(kPages, kSlots) {
    control.error = error;
    if (outage == Outage::kOneCall) control.fail_once(call);
    if (outage != Outage::kOneCall) control.fail_for_ever(call);
    auto made = Engine::create(memory_.layout().value(),
                               std::make_unique<Adaptor>(std::make_unique<HostBackend>(scheduler), &control),
                               {.trace_events = trace});
    if (made.ok()) {
      engine_ = std::move(made.value());
    } else {
      note(made.error());
    }
    for (std::size_t page = 0; page < kPages; ++page) newest_[page] = PagedMemory::first_version(page);
  }

  void run() {
    if (engine_ == nullptr) return;
    for (int round = 0; round < 2; ++round) {
      attempt([&] { return prefetch(0); });
      use(0, {.keep = false});
      use(1, {.keep = true});
      attempt([&] { return prefetch(2); });
      use(2, {.keep = true});
      use(1, {.write = false, .keep = true});
      use(3, {.load = round != 0, .keep = false});
      attempt([&] { return engine_->write_back(2); }, 2);
      use(2, {.write = false, .keep = true});
      attempt([&] { return engine_->evict(1); }, 1);
      use(1, {.load = false, .write = false, .keep = false});
      attempt([&] { return prefetch(1); });
      attempt([&] { return engine_->discard(1); }, 1);
      use(3, {.keep = true});
      attempt([&] { return engine_->flush(); });
      use(0, {.write = false, .keep = false, .discard = true});
      look();
    }
    if (outage_ == Outage::kTillHealed) control.heal();
    if (outage_ != Outage::kForEver) {
      recover();
      attempt([&] { return engine_->flush(); });
      look();
      program_calls = control.calls;
      control.heal();
      for (std::size_t page = 0; page < kPages; ++page) {
        wrong += memory_.host_is(page, newest_[page]) ? 0 : 1;
        wrong += engine_->state(page).value() == State::kPoisoned ? 1 : 0;
      }
      // Every slot is there still.
      for (std::size_t page = 0; page < kPages; ++page) wrong += engine_->evict(page).ok() ? 0 : 1;
      for (std::size_t page = 0; page < kSlots; ++page) wrong += engine_->prefetch(page).value() ? 0 : 1;
    }
    const Status closed = engine_->close();
    if (outage_ != Outage::kForEver) wrong += closed.ok() ? 0 : 1;
    // Whole, and one of the versions that the page has had.
    for (std::size_t page = 0; page < kPages; ++page) {
      const Word version = memory_.host(page)[0];
      const bool known = version == PagedMemory::first_version(page) || (version > 0 && version <= version_);
      wrong += known && memory_.host_is(page, version) ? 0 : 1;
      // Lost, and nobody said so. (What is acquired, because it could not be released, is known to be lost.)
      if (version != newest_[page] && !held_[page]) wrong += closed.ok() ? 1 : 0;
    }
    engine_.reset();
  }

  Control control;
  long program_calls = 0;  // without those that check the result
  int wrong = 0;
  int errors = 0;

 private:
  struct How {
    bool load = true, write = true, keep = false, discard = false;
  };

  void note(const Error& error) {
    ++errors;
    wrong += error.message().empty() ? 1 : 0;
  }

  Status prefetch(std::size_t page) {
    auto result = engine_->prefetch(page);
    return result.ok() ? Status{} : Status{result.error()};
  }

  // Poisoned pages block slots, and acquired ones that could not be released do.
  void recover() {
    for (std::size_t page = 0; page < kPages; ++page) {
      if (held_[page]) release(page);
      const auto state = engine_->state(page);
      if (!state.ok()) note(state.error());
      if (state.ok() && state.value() == State::kPoisoned) {
        if (Status s = engine_->evict(page); !s.ok()) note(s.error());
      }
    }
  }

  template <typename Operation>
  bool attempt(Operation operation, std::optional<std::size_t> page = std::nullopt) {
    for (int i = 0; i < 3; ++i) {
      if (page && held_[*page]) recover();
      if (page && held_[*page]) return false;
      const Status status = operation();
      if (status.ok()) return true;
      note(status.error());
      const Code code = status.error().code;
      const bool expected = code == control.error.code || code == Code::kPoisoned || code == Code::kBusy;
      wrong += expected && status.error().page < kPages ? 0 : 1;
      recover();
    }
    // With one failing call the third attempt cannot fail.
    wrong += outage_ == Outage::kOneCall ? 1 : 0;
    return false;
  }

  void release(std::size_t page) {
    for (int i = 0; i < 2; ++i) {
      const Status status = engine_->release(page, Stream::caller(0), dirty_[page], keep_[page]);
      if (!status.ok()) note(status.error());
      // Refused: still held. Anything else: let go of, poisoned perhaps.
      const auto state = engine_->state(page);
      if (!state.ok()) note(state.error());
      held_[page] = !state.ok() || state.value() == State::kInUse;
      if (!held_[page]) return;
    }
  }

  void use(std::size_t page, How how) {
    if (!attempt([&] { return acquire(page, how.load); }, page)) return;
    if (how.load && !memory_.slot_is(slot_, page, newest_[page])) ++wrong;
    if (how.write) {
      memory_.fill_slot(slot_, page, ++version_);
      newest_[page] = version_;
    }
    held_[page] = true, dirty_[page] = how.write, keep_[page] = how.keep;
    if (how.discard) {
      const Status status = engine_->discard(page);
      if (status.ok()) held_[page] = false;
      if (!status.ok()) note(status.error());
    }
    if (held_[page]) release(page);
    recover();
  }

  Status acquire(std::size_t page, bool load) {
    auto slot = engine_->acquire(page, Stream::caller(0), load);
    if (!slot.ok()) return slot.error();
    slot_ = slot.value();
    return {};
  }

  // A host copy that may be read has the newest content.
  void look() {
    for (std::size_t page = 0; page < kPages; ++page) {
      const auto canonical = engine_->host_is_canonical(page);
      if (!canonical.ok()) note(canonical.error());
      if (canonical.ok() && canonical.value() && !memory_.host_is(page, newest_[page])) ++wrong;
    }
  }

  Outage outage_;
  PagedMemory memory_;
  std::unique_ptr<Engine> engine_;
  Word newest_[kPages];
  bool held_[kPages] = {}, dirty_[kPages] = {}, keep_[kPages] = {};
  Word version_ = 0;
  std::size_t slot_ = 0;
};

const Error kErrors[] = {
    driver_error("cuMemcpyAsync", 0, 700, "CUDA_ERROR_ILLEGAL_ADDRESS"),
    system_error("madvise", 4096, ENOMEM),
    Error{Code::kIo, "pwrite", {}, 512, ENOSPC},
};

// Every call of a whole program fails in turn.
void sweep(Outage outage, std::size_t trace, bool threads) {
  SeededScheduler calm_order(1);
  Careful calm(threads ? nullptr : &calm_order, trace, -1, Outage::kOneCall, kErrors[0]);
  calm.run();
  CHECK(calm.errors == 0 && calm.wrong == 0);
  const long calls = calm.program_calls;
  CHECK(calls > 100);
  for (const Error& error : kErrors) {
    for (long call = 0; call < calls; ++call) {
      SeededScheduler order(static_cast<std::uint64_t>(call) + 7);
      Careful faulty(threads ? nullptr : &order, trace, call, outage, error);
      faulty.run();
      const bool leaks = faulty.control.live_events != 0 || !faulty.control.destroyed;
      // Only what is measured may fail in silence; how often that is done depends on the order.
      const bool silent = trace == 0 && !threads && (faulty.errors == 0 || faulty.control.failed == 0);
      if (faulty.wrong != 0 || leaks || silent) {
        chunkft::test::report(__FILE__, __LINE__,
                              "call " + std::to_string(call) + " of " + std::to_string(calls) + ", code " +
                                  std::to_string(static_cast<int>(error.code)) + ": " + std::to_string(faulty.wrong) +
                                  " wrong, " + std::to_string(faulty.errors) + " errors, " +
                                  (leaks ? "leaks" : "no leak"));
        return;
      }
    }
    if (threads) return;
  }
}

TEST(any_call_that_fails_once_can_be_tried_again) {
  sweep(Outage::kOneCall, 0, false);
  sweep(Outage::kOneCall, 16, false);
}

TEST(any_outage_that_ends_leaves_nothing_stale) {
  sweep(Outage::kTillHealed, 0, false);
  sweep(Outage::kTillHealed, 16, false);
}

TEST(any_outage_that_lasts_leaves_whole_host_copies_and_no_leak) {
  sweep(Outage::kForEver, 0, false);
  sweep(Outage::kForEver, 16, false);
}

TEST(outages_are_survived_with_copy_threads_too) {
  sweep(Outage::kOneCall, 0, true);
  sweep(Outage::kTillHealed, 16, true);
}

TEST(a_failed_write_back_poisons_the_page_until_it_is_tried_again_or_given_up) {
  for (const bool give_up : {false, true}) {
    for (long step = 0; step < 3; ++step) {  // wait, copy, record
      SeededScheduler order(9);
      chunkft::test::Rig rig(3, 2, &order);
      CHECK(rig.sees(0, PagedMemory::first_version(0)));
      rig.write(0, 7);
      CHECK(rig.engine->release(0, rig.thread, true, true).ok());
      rig.control.fail_once(rig.control.calls + step);
      const Status failed = rig.engine->evict(0);
      CHECK(!failed.ok() && failed.error().code == Code::kDriver && failed.error().page == 0);
      CHECK(rig.state(0) == State::kPoisoned && !rig.engine->host_is_canonical(0).value());
      const auto acquired = rig.engine->acquire(0, rig.thread);
      CHECK(!acquired.ok() && acquired.error().code == Code::kPoisoned);
      CHECK(acquired.error().message().find("CUDA_ERROR_ILLEGAL_ADDRESS") != std::string::npos);
      CHECK(!rig.engine->prefetch(0).ok());
      const Status flushed = rig.engine->flush();
      CHECK(!flushed.ok() && flushed.error().code == Code::kPoisoned && flushed.error().page == 0);
      // The slot is kept; the other one still serves.
      CHECK(rig.sees(1, PagedMemory::first_version(1)));
      CHECK(!rig.engine->prefetch(2).value());
      CHECK(rig.engine->release(1, rig.thread, false, false).ok());
      if (give_up) {
        CHECK(rig.engine->discard(0).ok());
        // Whole either way: the old content, or the new one if the copy was on its way.
        CHECK(rig.memory.host_is(0, step == 2 ? 7 : PagedMemory::first_version(0)));
      } else {
        CHECK(rig.engine->evict(0).ok());
        CHECK(rig.engine->flush().ok());
        CHECK(rig.memory.host_is(0, 7));
      }
      CHECK(rig.engine->prefetch(0).value() && rig.engine->prefetch(2).value());
      CHECK(rig.engine->close().ok());
    }
  }
}

TEST(closing_tells_which_page_was_lost) {
  SeededScheduler order(9);
  chunkft::test::Rig rig(3, 2, &order);
  CHECK(rig.sees(1, PagedMemory::first_version(1)));
  rig.write(1, 7);
  CHECK(rig.engine->release(1, rig.thread, true, true).ok());
  rig.control.fail_for_ever(rig.control.calls);
  const Status closed = rig.engine->close();
  CHECK(!closed.ok() && closed.error().page == 1);
  CHECK(rig.engine->closed() && rig.control.destroyed && rig.control.live_events == 0);
  CHECK(rig.memory.host_is(1, PagedMemory::first_version(1)));
}

}  // namespace
