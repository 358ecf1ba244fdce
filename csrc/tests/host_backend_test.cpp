#include "host_backend.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "event_pool.h"
#include "paged_memory.h"
#include "slot_ring.h"

namespace {

using namespace chunkft;

constexpr WaitSite kSite = WaitSite::kAcquireLoaded;

// Blocks a stream until it is opened, so that a test decides when its work goes on.
struct Gate {
  std::atomic<bool> open{false};
  static void pass(void* self) { static_cast<Gate*>(self)->open.wait(false); }
  void release() {
    open = true;
    open.notify_all();
  }
};

TEST(copies_that_are_delayed_come_late_and_whole) {
  // Of 20 copies that are late by up to two milliseconds each, some is not there at once.
  HostBackend backend(nullptr, 7);
  std::vector<std::uint8_t> source(64), target(64);
  const Event event = backend.create_event(false).value();
  int late = 0;
  for (std::uint8_t round = 1; round <= 20; ++round) {
    source.assign(source.size(), round);
    CHECK(backend.copy(Stream::load(), target.data(), source.data(), source.size()).ok());
    CHECK(backend.record(event, Stream::load(), RecordSite::kLoadLoaded).ok());
    late += backend.query(event).value() ? 0 : 1;
    CHECK(backend.synchronize(event, kSite).ok());
    CHECK(target == source);
  }
  CHECK(late > 0);
}

TEST(work_on_one_stream_runs_in_order) {
  HostBackend backend;
  const Stream stream = Stream::caller(backend.create_stream());
  struct Step {
    std::vector<int>* order;
    int number;
  };
  std::vector<int> order;
  std::vector<Step> steps;
  // More than the FIFO holds at first: it grows while it is behind.
  constexpr int kSteps = 5000;
  for (int i = 0; i < kSteps; ++i) steps.push_back({&order, i});
  auto run = [](void* arg) {
    auto* s = static_cast<Step*>(arg);
    s->order->push_back(s->number);
  };
  const Event event = backend.create_event(false).value();
  // It grows at a time when its content goes around its end.
  constexpr int kBefore = 700;
  for (int i = 0; i < kBefore; ++i) CHECK(backend.launch(stream, run, &steps[static_cast<std::size_t>(i)]).ok());
  CHECK(backend.record(event, stream).ok() && backend.synchronize(event, kSite).ok());
  Gate gate;
  CHECK(backend.launch(stream, &Gate::pass, &gate).ok());
  for (int i = kBefore; i < kSteps; ++i) CHECK(backend.launch(stream, run, &steps[static_cast<std::size_t>(i)]).ok());
  CHECK(backend.record(event, stream).ok());
  CHECK(!backend.query(event).value());
  gate.release();
  CHECK(backend.synchronize(event, kSite).ok());
  CHECK(backend.query(event).value());
  REQUIRE(order.size() == kSteps);
  for (int i = 0; i < kSteps; ++i) CHECK(order[static_cast<std::size_t>(i)] == i);
  backend.destroy_event(event);
}

TEST(a_wait_holds_back_later_work_and_nothing_else) {
  HostBackend backend;
  const Stream a = Stream::caller(backend.create_stream());
  const Stream b = Stream::caller(backend.create_stream());
  Gate gate;
  int value = 1, seen = 0, free_seen = 0;
  const Event a_done = backend.create_event(false).value(), b_done = backend.create_event(false).value();
  const Event load_done = backend.create_event(true).value();
  CHECK(backend.launch(a, &Gate::pass, &gate).ok());
  const int two = 2;
  CHECK(backend.copy(a, &value, &two, sizeof(int)).ok());
  CHECK(backend.record(a_done, a).ok());
  CHECK(backend.wait(b, a_done, kSite).ok());
  CHECK(backend.copy(b, &seen, &value, sizeof(int)).ok());
  CHECK(backend.record(b_done, b).ok());
  CHECK(backend.copy(Stream::load(), &free_seen, &two, sizeof(int)).ok());
  CHECK(backend.record(load_done, Stream::load()).ok());
  CHECK(backend.synchronize(load_done, kSite).ok());
  CHECK(free_seen == 2 && !backend.query(b_done).value());
  gate.release();
  CHECK(backend.wait(Stream::caller(0), b_done, kSite).ok());
  CHECK(seen == 2);
  for (Event event : {a_done, b_done, load_done}) backend.destroy_event(event);
}

TEST(recording_an_event_again_does_not_move_a_wait) {
  HostBackend backend;
  const Stream a = Stream::caller(backend.create_stream());
  const Stream b = Stream::caller(backend.create_stream());
  const Event early = backend.create_event(false).value(), done = backend.create_event(false).value();
  Gate first, second;
  CHECK(backend.launch(a, &Gate::pass, &first).ok());
  CHECK(backend.record(early, a).ok());
  CHECK(backend.wait(b, early, kSite).ok());
  CHECK(backend.record(done, b).ok());
  CHECK(backend.launch(a, &Gate::pass, &second).ok());
  CHECK(backend.record(early, a).ok());
  first.release();
  // Would block for ever if the wait had moved behind the second gate.
  CHECK(backend.synchronize(done, kSite).ok());
  CHECK(!backend.query(early).value());
  second.release();
  CHECK(backend.synchronize(early, kSite).ok());
  backend.destroy_event(early);
  backend.destroy_event(done);
}

TEST(an_event_that_was_never_recorded_is_done) {
  HostBackend backend;
  const Event event = backend.create_event(true).value();
  CHECK(backend.query(event).value());
  CHECK(backend.synchronize(event, kSite).ok());
  CHECK(backend.wait(Stream::load(), event, kSite).ok());
  backend.destroy_event(event);
}

// Neither a wait nor a time stamp wakes a thread; asking for what lies behind it must.
TEST(an_event_behind_nothing_but_a_wait_or_a_stamp_is_reached) {
  HostBackend backend;
  const Event stamp = backend.create_event(true).value();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // the thread sleeps by now
  CHECK(backend.record(stamp, Stream::load()).ok());
  while (!backend.query(stamp).value()) std::this_thread::yield();
  backend.destroy_event(stamp);
  const Stream a = Stream::caller(backend.create_stream());
  const Stream b = Stream::caller(backend.create_stream());
  const Event first = backend.create_event(false).value(), second = backend.create_event(false).value();
  Gate gate;
  CHECK(backend.launch(a, &Gate::pass, &gate).ok());
  CHECK(backend.record(first, a).ok() && backend.wait(b, first, kSite).ok() && backend.record(second, b).ok());
  gate.release();
  while (!backend.query(second).value()) std::this_thread::yield();
  backend.destroy_event(first);
  backend.destroy_event(second);
}

TEST(timing_events_tell_when_they_were_reached) {
  HostBackend backend;
  const Event start = backend.create_event(true).value(), stop = backend.create_event(true).value();
  const Event untimed = backend.create_event(false).value();
  auto now = [] { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); };
  const std::int64_t before = now();
  CHECK(backend.record(start, Stream::load()).ok());
  auto pause = [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(5)); };
  CHECK(backend.launch(Stream::load(), pause, nullptr).ok());
  CHECK(backend.record(stop, Stream::load()).ok());
  CHECK(!backend.timestamp(stop).ok());
  CHECK(backend.synchronize(stop, kSite).ok());
  const std::int64_t elapsed = backend.timestamp(stop).value() - backend.timestamp(start).value();
  CHECK(elapsed >= 5'000'000 && backend.timestamp(start).value() >= before && backend.timestamp(stop).value() <= now());
  CHECK(backend.record(stop, Stream::caller(0)).ok() && backend.timestamp(stop).value() <= now());
  CHECK(!backend.timestamp(untimed).ok());
  for (Event event : {start, stop, untimed}) backend.destroy_event(event);
  CHECK(backend.live_events() == 0);
}

TEST(a_late_stamp_does_not_reach_an_event_that_was_recorded_again) {
  SeededScheduler scheduler(1);
  HostBackend backend(&scheduler);
  const Event event = backend.create_event(true).value();
  CHECK(backend.record(event, Stream::load()).ok());
  CHECK(backend.record(event, Stream::caller(0)).ok());
  const std::int64_t at = backend.timestamp(event).value();
  while (backend.step()) {
  }
  CHECK(backend.timestamp(event).value() == at);
  // Nor one that was destroyed and made anew.
  CHECK(backend.record(event, Stream::load()).ok());
  backend.destroy_event(event);
  const Event again = backend.create_event(true).value();
  CHECK(again == event);
  CHECK(backend.record(again, Stream::caller(0)).ok());
  const std::int64_t later = backend.timestamp(again).value();
  while (backend.step()) {
  }
  CHECK(backend.timestamp(again).value() == later);
  backend.destroy_event(again);
}

TEST(the_destructor_works_off_what_was_submitted) {
  constexpr std::size_t kWords = 1 << 20;
  std::vector<int> from(kWords, 3), to(kWords, 0);
  {
    HostBackend backend;
    const Event event = backend.create_event(false).value();
    CHECK(backend.copy(Stream::load(), to.data(), from.data(), kWords * sizeof(int)).ok());
    CHECK(backend.record(event, Stream::load()).ok() && backend.wait(Stream::store(), event, kSite).ok());
    CHECK(backend.copy(Stream::store(), from.data() + 1, to.data(), (kWords - 1) * sizeof(int)).ok());
    backend.destroy_event(event);
  }
  CHECK(to[kWords - 1] == 3 && from[kWords - 1] == 3);
}

TEST(without_threads_nothing_runs_until_the_host_waits) {
  SeededScheduler scheduler(1);
  HostBackend backend(&scheduler);
  const int from = 3;
  int to = 0;
  CHECK(backend.copy(Stream::load(), &to, &from, sizeof(int)).ok());
  const Event event = backend.create_event(false).value();
  CHECK(backend.record(event, Stream::load()).ok());
  CHECK(to == 0 && !backend.query(event).value() && backend.ready() == 1);
  CHECK(backend.step());
  CHECK(to != 0 || !backend.query(event).value());  // half of it
  CHECK(backend.synchronize(event, kSite).ok());
  CHECK(to == 3 && !backend.step() && backend.ready() == 0);
  backend.destroy_event(event);
}

TEST(the_same_seed_gives_the_same_order) {
  auto order = [](std::uint64_t seed) {
    SeededScheduler scheduler(seed);
    HostBackend backend(&scheduler);
    struct Step {
      std::vector<int>* order;
      int stream;
    };
    std::vector<int> ran;
    Step steps[3];
    for (int s = 0; s < 3; ++s) {
      steps[s] = {&ran, s};
      const Stream stream = Stream::caller(backend.create_stream());
      auto run = [](void* arg) { static_cast<Step*>(arg)->order->push_back(static_cast<Step*>(arg)->stream); };
      for (int i = 0; i < 8; ++i) CHECK(backend.launch(stream, run, &steps[s]).ok());
    }
    while (backend.step()) {
    }
    return ran;
  };
  CHECK(order(1) == order(1) && order(1).size() == 24);
  CHECK(order(1) != order(2));
}

TEST(streams_that_do_not_exist_are_refused) {
  HostBackend backend;
  int word = 0;
  const Status status = backend.copy(Stream::caller(99), &word, &word, sizeof(int));
  CHECK(!status.ok() && status.error().code == Code::kInvalidArgument);
  CHECK(status.error().message().find("99") != std::string::npos);
}

TEST(a_forked_child_may_drop_the_backend) {
  auto backend = std::make_unique<HostBackend>();
  CHECK(backend->check_process().ok());
  const pid_t child = fork();
  if (child == 0) {
    const bool told = !backend->check_process().ok() && backend->check_process().error().code == Code::kForked;
    backend.reset();
    _exit(told ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(a_pool_that_cannot_be_filled_gives_its_events_back) {
  for (long call = 0; call < 5; ++call) {
    chunkft::test::Control control;
    control.fail_once(call);
    SeededScheduler scheduler(1);
    chunkft::test::Adaptor backend(std::make_unique<HostBackend>(&scheduler), &control);
    CHECK(!EventPool::create(backend, 5, false).ok());
    CHECK(control.live_events == 0);
    control.heal();
    auto pool = EventPool::create(backend, 5, true);
    CHECK(pool.ok() && pool.value().size() == 5 && control.live_events == 5);
    EventPool moved = std::move(pool.value());
    CHECK(moved.size() == 5 && control.live_events == 5);
    moved = EventPool();
    CHECK(control.live_events == 0);
  }
}

TEST(slots_come_back_in_the_order_in_which_they_fell_free_or_idle) {
  SlotRing ring(3);
  for (std::size_t i : {2, 0, 1}) ring.set_free(i);
  CHECK(ring.oldest_free() == 2);
  ring.set_busy(2, 7);
  CHECK(ring.oldest_free() == 0 && ring[2].page == 7);
  ring.set_busy(0, 8);
  ring.set_busy(1, 9);
  CHECK(!ring.oldest_free());
  auto any = [](const Slot&) { return true; };
  CHECK(!ring.oldest_idle(any));
  ring.set_idle(1);
  ring.set_idle(0);
  CHECK(ring.oldest_idle(any) == 1 && ring[1].page == 9);
  CHECK(ring.oldest_idle([](const Slot& slot) { return slot.page != 9; }) == 0);
}

}  // namespace
