#include "engine.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "allocations.h"
#include "check.h"
#include "paged_memory.h"

namespace {

using namespace chunkft;
using chunkft::test::PagedMemory;
using chunkft::test::Rig;
using Word = PagedMemory::Word;

Word first(std::size_t page) { return PagedMemory::first_version(page); }

bool fails_with(const Error& error, Code code, std::size_t page) { return error.code == code && error.page == page; }

TEST(a_page_written_on_the_device_comes_back_and_reaches_the_host) {
  Rig rig;
  CHECK(rig.sees(0, first(0)));
  rig.write(0, 7);
  CHECK(rig.engine->release(0, rig.thread, true, false).ok());
  CHECK(rig.sees(1, first(1)));
  CHECK(rig.engine->release(1, rig.thread, false, false).ok());
  CHECK(rig.sees(0, 7));
  CHECK(rig.engine->release(0, rig.thread, false, false).ok());
  CHECK(rig.engine->flush().ok());
  CHECK(rig.memory.host_is(0, 7));
  CHECK(rig.memory.host_is(1, first(1)));
}

TEST(states_follow_the_operations) {
  SeededScheduler scheduler(1);
  Rig rig(3, 2, &scheduler);
  CHECK(rig.state(0) == State::kHost);
  CHECK(rig.engine->prefetch(0).value());
  CHECK(rig.state(0) == State::kLoading);
  CHECK(rig.engine->acquire(0, rig.thread).ok());
  CHECK(rig.state(0) == State::kInUse);
  CHECK(!rig.engine->host_is_canonical(0).value());
  CHECK(rig.engine->release(0, rig.thread, false, true).ok());
  CHECK(rig.state(0) == State::kResident);
  CHECK(rig.engine->host_is_canonical(0).value());
  CHECK(rig.engine->acquire(0, rig.thread).ok());
  CHECK(rig.engine->release(0, rig.thread, true, true).ok());
  CHECK(rig.state(0) == State::kDirty);
  CHECK(!rig.engine->host_is_canonical(0).value());
  CHECK(rig.engine->write_back(0).ok());
  CHECK(rig.state(0) == State::kStoring);
  while (rig.backend->step()) {
  }
  CHECK(rig.state(0) == State::kResident);
  CHECK(rig.engine->acquire(0, rig.thread).ok());
  CHECK(rig.engine->release(0, rig.thread, true, false).ok());
  CHECK(rig.state(0) == State::kStoring);
  while (rig.backend->step()) {
  }
  CHECK(rig.state(0) == State::kHost);
  CHECK(rig.engine->acquire(0, rig.thread, false).ok());
  CHECK(rig.state(0) == State::kInUse);
  CHECK(rig.engine->release(0, rig.thread, false, true).ok());
  CHECK(rig.state(0) == State::kHost);
}

TEST(a_page_that_is_kept_needs_no_second_load) {
  Rig rig;
  for (int i = 0; i < 5; ++i) {
    CHECK(rig.sees(0, first(0)));
    CHECK(rig.engine->release(0, rig.thread, false, true).ok());
  }
  CHECK(rig.engine->stats().value().loads.copies == 1);
  CHECK(rig.engine->stats().value().loads.bytes == rig.memory.bytes(0));
}

TEST(changes_that_were_kept_survive_a_clean_release) {
  Rig rig;
  CHECK(rig.sees(0, first(0)));
  rig.write(0, 7);
  CHECK(rig.engine->release(0, rig.thread, true, true).ok());
  CHECK(rig.sees(0, 7));
  CHECK(rig.engine->release(0, rig.thread, false, true).ok());
  CHECK(rig.engine->flush().ok());
  CHECK(rig.memory.host_is(0, 7));
  CHECK(rig.state(0) == State::kResident);
}

TEST(pages_leave_their_slots_in_the_order_of_release) {
  Rig rig(4, 3);
  for (std::size_t page : {1, 0, 2}) CHECK(rig.engine->acquire(page, rig.thread).ok());
  for (std::size_t page : {2, 0, 1}) CHECK(rig.engine->release(page, rig.thread, page == 2, true).ok());
  CHECK(rig.engine->prefetch(3).value());
  CHECK(rig.state(2) == State::kStoring || rig.state(2) == State::kHost);
  CHECK(rig.state(0) == State::kResident && rig.state(1) == State::kResident);
}

TEST(prefetch_does_nothing_when_every_slot_is_in_use) {
  Rig rig(4, 2);
  CHECK(rig.engine->prefetch(0).value());
  CHECK(rig.engine->acquire(1, rig.thread).ok());
  CHECK(!rig.engine->prefetch(2).value());
  CHECK(rig.state(2) == State::kHost);
  CHECK(rig.engine->prefetch(0).value() && rig.engine->prefetch(1).value());
  const auto acquired = rig.engine->acquire(2, rig.thread);
  CHECK(!acquired.ok() && fails_with(acquired.error(), Code::kBusy, 2));
  const auto claimed = rig.engine->acquire(2, rig.thread, false);
  CHECK(!claimed.ok() && fails_with(claimed.error(), Code::kBusy, 2));
  CHECK(rig.engine->release(1, rig.thread, false, true).ok());
  CHECK(rig.engine->prefetch(2).value());
  CHECK(rig.engine->stats().value().loads.copies == 3);
}

TEST(a_claimed_page_is_not_loaded_and_counts_once_it_was_written) {
  Rig rig;
  rig.slot = rig.engine->acquire(0, rig.thread, false).value();
  CHECK(rig.engine->release(0, rig.thread, false, true).ok());
  CHECK(rig.sees(0, first(0)));
  CHECK(rig.engine->release(0, rig.thread, false, false).ok());
  CHECK(rig.engine->stats().value().loads.copies == 1);
  rig.slot = rig.engine->acquire(1, rig.thread, false).value();
  rig.write(1, 9);
  CHECK(rig.engine->release(1, rig.thread, true, true).ok());
  CHECK(rig.engine->flush().ok());
  CHECK(rig.memory.host_is(1, 9));
  CHECK(rig.engine->stats().value().loads.copies == 1);
}

TEST(discarding_goes_back_to_the_host_copy) {
  Rig rig;
  CHECK(rig.sees(0, first(0)));
  rig.write(0, 7);
  CHECK(rig.engine->discard(0).ok());
  CHECK(rig.state(0) == State::kHost);
  CHECK(rig.sees(0, first(0)));
  rig.write(0, 8);
  CHECK(rig.engine->release(0, rig.thread, true, true).ok());
  CHECK(rig.engine->discard(0).ok());
  CHECK(rig.engine->flush().ok());
  CHECK(rig.memory.host_is(0, first(0)));
  CHECK(rig.engine->prefetch(0).value());
  CHECK(rig.engine->discard(0).ok());
  CHECK(rig.state(0) == State::kHost);
  CHECK(rig.engine->discard(0).ok());
  // The slots of discarded pages are free again.
  CHECK(rig.engine->prefetch(1).value() && rig.engine->prefetch(2).value());
}

TEST(flush_leaves_acquired_pages_alone_and_writes_the_others) {
  Rig rig;
  CHECK(rig.sees(0, first(0)));
  rig.write(0, 7);
  CHECK(rig.engine->release(0, rig.thread, true, true).ok());
  CHECK(rig.sees(1, first(1)));
  rig.write(1, 8);
  CHECK(rig.engine->flush().ok());
  CHECK(rig.memory.host_is(0, 7) && rig.memory.host_is(1, first(1)));
  CHECK(rig.state(1) == State::kInUse);
  CHECK(rig.engine->release(1, rig.thread, true, true).ok());
  CHECK(rig.engine->close().ok());
  CHECK(rig.memory.host_is(1, 8));
}

TEST(operations_out_of_order_are_refused_and_change_nothing) {
  Rig rig;
  auto refused = [](const Status& status) {
    return !status.ok() && status.error().code == Code::kInvalidArgument && status.error().page == 0;
  };
  CHECK(refused(rig.engine->release(0, rig.thread, true, false)));
  CHECK(rig.engine->evict(0).ok() && rig.engine->write_back(0).ok());
  CHECK(rig.engine->acquire(0, rig.thread).ok());
  const auto twice = rig.engine->acquire(0, rig.thread);
  CHECK(!twice.ok() && twice.error().message() == "Pager.acquire (page 0): the page is IN_USE; release it first");
  CHECK(refused(rig.engine->evict(0)) && refused(rig.engine->write_back(0)));
  CHECK(rig.state(0) == State::kInUse);
  for (std::size_t page : {std::size_t{3}, SIZE_MAX}) {
    const auto outside = rig.engine->prefetch(page);
    CHECK(!outside.ok() && outside.error().code == Code::kInvalidArgument);
    CHECK(!rig.engine->state(page).ok());
  }
  const auto stranger = rig.engine->acquire(1, Stream::caller(12345));
  CHECK(!stranger.ok() && stranger.error().code == Code::kInvalidArgument);
}

TEST(closing_writes_back_waits_and_refuses_what_comes_after) {
  SeededScheduler scheduler(3);
  Rig rig(3, 2, &scheduler);
  CHECK(rig.sees(0, first(0)));
  rig.write(0, 7);
  CHECK(rig.engine->release(0, rig.thread, true, true).ok());
  CHECK(rig.engine->prefetch(1).value());
  CHECK(!rig.engine->closed());
  CHECK(rig.engine->close().ok());
  CHECK(rig.engine->closed() && rig.control.destroyed && rig.control.live_events == 0);
  CHECK(rig.memory.host_is(0, 7));
  auto is_closed = [](const auto& result) { return !result.ok() && result.error().code == Code::kClosed; };
  CHECK(is_closed(rig.engine->prefetch(0)) && is_closed(rig.engine->acquire(0, rig.thread)));
  CHECK(is_closed(rig.engine->release(0, rig.thread, true, true)) && is_closed(rig.engine->flush()));
  CHECK(is_closed(rig.engine->evict(0)) && is_closed(rig.engine->discard(0)) && is_closed(rig.engine->state(0)));
  CHECK(rig.engine->stats().value().stores.copies == 1);
  CHECK(rig.engine->close().ok());
}

TEST(closing_with_copies_in_flight_waits_for_them) {
  constexpr std::size_t kWords = std::size_t{4} << 20;
  Rig rig(4, 3, nullptr, 0, kWords);
  CHECK(rig.sees(0, first(0)));
  rig.write(0, 7);
  CHECK(rig.engine->release(0, rig.thread, true, false).ok());
  for (std::size_t page : {1, 2}) CHECK(rig.engine->prefetch(page).value());
  rig.engine.reset();
  // The memory may go now; under a sanitizer a copy that still ran would show.
  CHECK(rig.control.destroyed && rig.memory.host_is(0, 7));
}

TEST(the_steady_state_allocates_nothing_and_makes_no_events) {
  Rig rig(8, 3, nullptr, 64);
  auto sweep = [&] {
    for (std::size_t page = 0; page < 8; ++page) {
      if (!rig.engine->prefetch((page + 1) % 8).ok()) return false;
      if (!rig.engine->acquire(page, rig.thread, page % 3 != 0).ok()) return false;
      if (!rig.engine->release(page, rig.thread, page % 2 == 0, page % 4 == 0).ok()) return false;
      if (!rig.engine->state(page).ok()) return false;
    }
    return rig.engine->evict(0).ok() && rig.engine->flush().ok();
  };
  CHECK(sweep());
  const std::size_t before = chunkft::test::allocations();
  const Stats first_stats = rig.engine->stats().value();
  for (int i = 0; i < 200; ++i) CHECK(sweep());
  CHECK(chunkft::test::allocations() == before);
  const Stats stats = rig.engine->stats().value();
  CHECK(stats.events_created == first_stats.events_created && stats.streams_created == 2);
  CHECK(stats.acquires > first_stats.acquires);
}

TEST(copies_are_counted_and_timed) {
  constexpr std::size_t kWords = std::size_t{1} << 18;
  Rig rig(3, 2, nullptr, 128, kWords);
  for (int round = 0; round < 2; ++round) {
    for (std::size_t page = 0; page < 3; ++page) {
      CHECK(rig.engine->acquire(page, rig.thread).ok());
      CHECK(rig.engine->release(page, rig.thread, true, false).ok());
    }
  }
  CHECK(rig.engine->flush().ok());
  const Stats stats = rig.engine->stats().value();
  const std::size_t all = 2 * (rig.memory.bytes(0) + rig.memory.bytes(1) + rig.memory.bytes(2));
  CHECK(stats.loads.copies == 6 && stats.loads.bytes == all && stats.stores.copies == 6 && stats.stores.bytes == all);
  CHECK(stats.loads.timed_ns > 0 && stats.stores.timed_ns > 0 && stats.acquires == 6 && stats.waits == 6);
  // Nothing was prefetched: the thread stood still for every load.
  CHECK(stats.host_stall_ns > 0 && stats.exposed_ns > 0);
  std::size_t loads = 0, stores = 0, waits = 0;
  const auto trace = rig.engine->trace();
  for (const TraceRecord& record : trace.value()) {
    loads += record.kind == TraceRecord::Kind::kLoad;
    stores += record.kind == TraceRecord::Kind::kStore;
    waits += record.kind == TraceRecord::Kind::kWait;
    CHECK(record.started <= record.ended && record.submitted <= record.ended);
    CHECK(record.bytes == rig.memory.bytes(record.page) && record.slot < 2);
  }
  CHECK(loads == 6 && waits == 6 && stores == 6);
  CHECK(stats.loads.timed_bytes == all && stats.stores.timed_bytes == all);
}

TEST(the_trace_keeps_the_latest_records) {
  Rig rig(3, 2, nullptr, 4);
  for (int i = 0; i < 50; ++i) {
    CHECK(rig.engine->acquire(0, rig.thread).ok());
    CHECK(rig.engine->release(0, rig.thread, false, false).ok());
  }
  CHECK(rig.engine->trace().value().size() <= 4);
  Rig untimed(3, 2, nullptr, 0);
  CHECK(untimed.engine->acquire(0, untimed.thread).ok());
  CHECK(untimed.engine->trace().value().empty() && untimed.engine->stats().value().loads.copies == 1);
}

TEST(threads_share_an_engine) {
  constexpr std::size_t kPages = 12, kThreads = 4, kRounds = 300;
  Rig rig(kPages, 5, nullptr, 32);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      // Every thread has pages of its own; slots, lanes and telemetry are everybody's.
      for (std::size_t round = 0; round < kRounds; ++round) {
        const std::size_t page = t * 3 + round % 3;
        const Word version = first(page) + static_cast<Word>(round / 3);
        // Only a thread that already holds one may ask for a second slot, or all could wait for each other.
        const auto slot = rig.engine->acquire(page, Stream::caller(0));
        if (!slot.ok() || !rig.memory.slot_is(slot.value(), page, version)) {
          ++wrong;
          return;
        }
        rig.memory.fill_slot(slot.value(), page, version + 1);
        if (!rig.engine->release(page, Stream::caller(0), true, round % 2 == 0).ok()) ++wrong;
        if (round % 16 == 0 && !rig.engine->flush().ok()) ++wrong;
        if (round % 16 == 5 && !rig.engine->stats().ok()) ++wrong;
        if (!rig.engine->state((page + 5) % kPages).ok()) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(rig.engine->close().ok());
  for (std::size_t page = 0; page < kPages; ++page) CHECK(rig.memory.host_is(page, first(page) + kRounds / 3));
}

TEST(a_thread_may_close_while_others_work) {
  for (int round = 0; round < 20; ++round) {
    Rig rig(6, 3, nullptr, 64);
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < 2; ++t) {
      threads.emplace_back([&, t] {
        for (std::size_t i = 0;; ++i) {
          const auto slot = rig.engine->acquire(t, Stream::caller(0));
          if (slot.ok()) {
            if (rig.engine->release(t, Stream::caller(0), i % 2 == 0, i % 3 == 0).ok()) continue;
          } else if (slot.error().code != Code::kClosed) {
            ++wrong;
          }
          return;
        }
      });
    }
    threads.emplace_back([&] {
      while (!rig.engine->closed()) wrong += rig.engine->stats().ok() && rig.engine->trace().ok() ? 0 : 1;
    });
    CHECK(rig.engine->flush().ok());
    CHECK(rig.engine->close().ok());
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0 && rig.control.destroyed);
  }
}

TEST(a_forked_child_is_refused) {
  Rig rig;
  CHECK(rig.engine->prefetch(0).value());
  const pid_t child = fork();
  if (child == 0) {
    auto is_forked = [](const auto& result) { return !result.ok() && result.error().code == Code::kForked; };
    const bool all = rig.engine->forked() && is_forked(rig.engine->prefetch(1)) && is_forked(rig.engine->flush()) &&
                     is_forked(rig.engine->state(0)) && is_forked(rig.engine->acquire(0, rig.thread)) &&
                     is_forked(rig.engine->close()) && is_forked(rig.engine->stats()) &&
                     !rig.backend->check_process().ok();
    static_cast<void>(rig.engine.release());
    _exit(all ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(rig.sees(0, first(0)));
}

TEST(layouts_that_overlap_or_do_not_fit_are_refused) {
  auto refused = [](std::vector<std::size_t> pages, std::vector<std::uintptr_t> host, std::vector<std::uintptr_t> slots,
                    std::size_t slot_bytes, const char* names) {
    const auto layout = Layout::create(pages, host, slots, slot_bytes);
    return !layout.ok() && layout.error().code == Code::kInvalidArgument &&
           layout.error().message().find(names) != std::string::npos;
  };
  CHECK(Layout::create({8, 8}, {4096, 4104}, {8192, 8200}, 8).ok());
  CHECK(refused({}, {}, {8192}, 8, "pages"));
  CHECK(refused({8}, {4096}, {}, 8, "slots"));
  CHECK(refused({8, 8}, {4096}, {8192}, 8, "host"));
  CHECK(refused({0}, {4096}, {8192}, 8, "pages[0]"));
  CHECK(refused({8, 9}, {4096, 4200}, {8192}, 8, "pages[1]"));
  CHECK(refused({8}, {0}, {8192}, 8, "host[0]"));
  CHECK(refused({8}, {UINTPTR_MAX - 3}, {8192}, 8, "host[0]"));
  CHECK(refused({8, 8}, {4096, 4103}, {8192}, 8, "host[1] must not overlap host[0]"));
  CHECK(refused({8}, {4096}, {8192, 8199}, 8, "slots[1]"));
  CHECK(refused({8}, {8199}, {8192}, 8, "host[0] must not overlap slots[0]"));
}

}  // namespace
