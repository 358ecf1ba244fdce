#include "cuda_backend.h"

#include <chrono>
#include <cstring>
#include <set>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

#include "fake.h"

namespace {

using namespace chunkft;
using namespace chunkft::test;

constexpr WaitSite kSite = WaitSite::kAcquireLoaded;  // any: the backend does not care

TEST(opening_and_closing_leaves_nothing_behind) {
  start_fake();
  {
    auto backend = CudaBackend::create(0);
    REQUIRE(backend.ok());
    CHECK(backend.value()->name() == std::string("cuda"));
    CHECK(backend.value()->streams_created() == static_cast<int>(fakecuda_alive(FAKECUDA_STREAMS)));
    CHECK(fakecuda_alive(FAKECUDA_CONTEXTS) == 1);
    CHECK(fakecuda_alive(FAKECUDA_PUSHED_CONTEXTS) == 0);
  }
  CHECK(clean());
}

TEST(a_device_that_is_not_there_is_refused_by_number) {
  start_fake();
  fakecuda_set_devices(2);
  for (int device : {-1, 2, 1000}) {
    auto backend = CudaBackend::create(device);
    REQUIRE(!backend.ok());
    CHECK(backend.error().code == Code::kInvalidArgument);
    CHECK(backend.error().message().find("the 2 CUDA devices, got " + std::to_string(device)) != std::string::npos);
  }
  CHECK(CudaBackend::create(1).ok());
  CHECK(clean());
}

TEST(the_callers_current_context_stays_current) {
  start_fake();
  fakecuda_set_devices(2);
  {
    const DriverApi& api = *DriverApi::shared().value();
    CuContext other = nullptr, current = nullptr;
    CHECK(api.cuDevicePrimaryCtxRetain(&other, 1) == 0 && api.cuCtxPushCurrent_v2(other) == 0);
    {
      auto backend = CudaBackend::create(0);
      REQUIRE(backend.ok());
      auto event = backend.value()->create_event(false);
      REQUIRE(event.ok());
      CHECK(backend.value()->record(event.value(), Stream::load()).ok());
      CHECK(api.cuCtxGetCurrent(&current) == 0 && current == other);
      backend.value()->destroy_event(event.value());
    }
    CHECK(api.cuCtxPopCurrent_v2(&current) == 0 && current == other);
    CHECK(api.cuDevicePrimaryCtxRelease_v2(1) == 0);
  }
  CHECK(clean());
}

// A page goes to the device, is changed there by the caller, and comes back.
Status round_trip(CudaBackend& backend, CuStream compute, std::byte* device, std::byte* host, std::size_t bytes,
                  Event loaded, Event used, Event stored) {
  const Stream caller = Stream::caller(reinterpret_cast<std::uintptr_t>(compute));
  if (Status s = backend.copy(Stream::load(), device, host, bytes); !s.ok()) return s;
  if (Status s = backend.record(loaded, Stream::load()); !s.ok()) return s;
  if (Status s = backend.wait(caller, loaded, kSite); !s.ok()) return s;
  launch(compute, "add one", {reads(device, bytes), writes(device, bytes)},
         [](void* memory) { *static_cast<unsigned char*>(memory) += 1; }, device);
  if (Status s = backend.record(used, caller); !s.ok()) return s;
  if (Status s = backend.wait(Stream::store(), used, kSite); !s.ok()) return s;
  if (Status s = backend.copy(Stream::store(), host, device, bytes); !s.ok()) return s;
  return backend.record(stored, Stream::store());
}

TEST(copies_records_and_waits_order_the_lanes_and_the_caller) {
  for (int policy : {FAKECUDA_RANDOM, FAKECUDA_LAZY, FAKECUDA_EAGER}) {
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      start_fake(seed);
      fakecuda_policy(policy);
      {
        Program p;
        auto created = CudaBackend::create(0);
        REQUIRE(created.ok());
        CudaBackend& backend = *created.value();
        std::byte* device = p.device(1000);
        std::byte* host = p.host(1000);
        for (CuStream compute : {p.stream(), CuStream{nullptr}}) {
          Event events[3] = {};
          for (Event& event : events) event = backend.create_event(false).value();
          host[0] = std::byte{41};
          fakecuda_reset_counters();
          CHECK(round_trip(backend, compute, device, host, 1000, events[0], events[1], events[2]).ok());
          CHECK(fakecuda_host_syncs() == 0);
          CHECK(backend.synchronize(events[2], kSite).ok());
          fakecuda_host_read(host, 1000, "result");
          CHECK(host[0] == std::byte{42});
          auto done = backend.query(events[2]);
          CHECK(done.ok() && done.value());
          for (Event event : events) backend.destroy_event(event);
        }
      }
      CHECK(clean());
    }
  }
}

TEST(the_lanes_are_not_ordered_with_the_default_stream) {
  start_fake();
  {
    Program p;
    auto backend = CudaBackend::create(0);
    REQUIRE(backend.ok());
    std::byte* device = p.device(8);
    std::byte* host = p.host(8);
    CHECK(backend.value()->copy(Stream::load(), device, host, 8).ok());
    launch(nullptr, "no wait", {reads(device, 8)});
    CHECK(violated("race"));
    p.api().cuStreamSynchronize(nullptr);
  }
}

TEST(a_callers_stream_takes_no_copies) {
  start_fake();
  {
    auto backend = CudaBackend::create(0);
    REQUIRE(backend.ok());
    const Status status = backend.value()->copy(Stream::caller(0), nullptr, nullptr, 8);
    REQUIRE(!status.ok());
    CHECK(status.error().code == Code::kInvalidArgument);
  }
  CHECK(clean());
}

TEST(query_tells_pending_from_done_and_unrecorded_counts_as_done) {
  start_fake();
  fakecuda_policy(FAKECUDA_LAZY);
  {
    Program p;
    auto backend = CudaBackend::create(0);
    REQUIRE(backend.ok());
    auto event = backend.value()->create_event(false);
    REQUIRE(event.ok());
    auto done = backend.value()->query(event.value());
    CHECK(done.ok() && done.value());
    std::byte* device = p.device(8);
    std::byte* host = p.host(8);
    CHECK(backend.value()->copy(Stream::load(), device, host, 8).ok());
    CHECK(backend.value()->record(event.value(), Stream::load()).ok());
    done = backend.value()->query(event.value());
    CHECK(done.ok() && !done.value());
    while (!backend.value()->query(event.value()).value()) {
    }
    backend.value()->destroy_event(event.value());
    backend.value()->destroy_event(0);
  }
  CHECK(clean());
}

TEST(the_destructor_waits_for_all_copies) {
  start_fake();
  fakecuda_policy(FAKECUDA_LAZY);
  {
    Program p;
    std::byte* device = p.device(8);
    std::byte* host = p.host(8);
    {
      auto backend = CudaBackend::create(0);
      REQUIRE(backend.ok());
      CHECK(backend.value()->copy(Stream::load(), device, host, 4).ok());
      CHECK(backend.value()->copy(Stream::store(), host + 4, device + 4, 4).ok());
    }
    fakecuda_host_write(host, 8, "after the end");
    CHECK(fakecuda_alive(FAKECUDA_PENDING_OPERATIONS) == 0);
  }
  CHECK(clean());
}

TEST(times_lie_on_the_steady_clock_and_measure_copies_exactly) {
  auto now = [] { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); };
  // With a period of 1 ns every record drops an anchor: more than the ring holds.
  for (std::int64_t period : {CudaBackend::kAnchorPeriod, std::int64_t{1}}) {
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
      start_fake(seed);
      {
        Program p;
        const std::int64_t before = now();
        auto created = CudaBackend::create(0, period);
        REQUIRE(created.ok());
        CudaBackend& backend = *created.value();
        std::byte* device = p.device(250'000);
        std::byte* host = p.host(250'000);
        Event start = backend.create_event(true).value();
        Event end = backend.create_event(true).value();
        fakecuda_reset_counters();
        for (int i = 0; i < 40; ++i) {
          CHECK(backend.record(start, Stream::load()).ok());
          CHECK(backend.copy(Stream::load(), device, host, 250'000).ok());
          CHECK(backend.record(end, Stream::load()).ok());
          while (!backend.query(end).value()) {
          }
          auto first = backend.timestamp(start);
          auto last = backend.timestamp(end);
          REQUIRE(first.ok() && last.ok());
          if (period == 1) continue;
          CHECK(last.value() - first.value() >= 15'000 && last.value() - first.value() < 40'000);
          CHECK(first.value() > before);
        }
        CHECK(fakecuda_host_syncs() == 0);
        CHECK((fakecuda_calls("cuEventRecord") > 80) == (period == 1));
        CHECK(fakecuda_calls("cuEventCreate") == 0);
        auto plain = backend.create_event(false);
        const auto refused = backend.timestamp(plain.value());
        CHECK(!refused.ok() && refused.error().code == Code::kInvalidArgument);
        for (Event event : {start, end, plain.value()}) backend.destroy_event(event);
      }
      CHECK(clean());
    }
  }
}

TEST(an_anchor_that_cannot_be_recorded_costs_precision_only) {
  start_fake();
  {
    Program p;
    auto backend = CudaBackend::create(0, 1);
    REQUIRE(backend.ok());
    Event event = backend.value()->create_event(true).value();
    for (int i = 0; i < 40; ++i) {
      fakecuda_fail("cuEventRecord", 1, kUnknownError, 0);  // the anchor's, which comes first
      CHECK(backend.value()->record(event, Stream::load()).ok());
      CHECK(fakecuda_failed());
      CHECK(backend.value()->synchronize(event, kSite).ok());
      CHECK(backend.value()->timestamp(event).ok());
    }
    backend.value()->destroy_event(event);
  }
  CHECK(clean());
}

TEST(registration_is_for_every_context_and_its_failure_is_the_callers_to_judge) {
  start_fake();
  fakecuda_set_lockable(4096);
  {
    auto backend = CudaBackend::create(0);
    REQUIRE(backend.ok());
    std::vector<std::byte> memory(8192);
    const Status too_much = backend.value()->register_host(memory.data(), 8192);
    REQUIRE(!too_much.ok());
    CHECK(too_much.error().code == Code::kDriver);
    CHECK(too_much.error().message().find("cuMemHostRegister_v2 of 8192 bytes failed: CUDA_ERROR_OUT_OF_MEMORY") == 0);
    CHECK(backend.value()->register_host(memory.data(), 4096).ok());
    CHECK(fakecuda_alive(FAKECUDA_REGISTRATIONS) == 1);
    CHECK(backend.value()->unregister_host(memory.data()).ok());
  }
  CHECK(clean());
}

TEST(a_forked_child_gets_errors_and_makes_no_driver_call) {
  start_fake();
  {
    auto backend = CudaBackend::create(0);
    REQUIRE(backend.ok());
    auto event = backend.value()->create_event(true);
    REQUIRE(event.ok());
    fakecuda_reset_counters();
    const pid_t child = fork();
    if (child == 0) {
      auto is_forked = [](const Status& s) { return !s.ok() && s.error().code == Code::kForked; };
      CudaBackend& b = *backend.value();
      std::byte memory[8];
      bool ok = is_forked(b.check_process()) && is_forked(b.copy(Stream::load(), memory, memory, 8)) &&
                is_forked(b.record(event.value(), Stream::load())) && is_forked(b.register_host(memory, 8)) &&
                is_forked(b.wait(Stream::load(), event.value(), kSite)) && is_forked(b.unregister_host(memory)) &&
                is_forked(b.synchronize(event.value(), kSite)) && !b.query(event.value()).ok() &&
                !b.timestamp(event.value()).ok() && !b.create_event(false).ok();
      b.destroy_event(event.value());
      backend.value().reset();
      ok = ok && fakecuda_calls(nullptr) == 0;
      _exit(ok ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(backend.value()->check_process().ok());
    backend.value()->destroy_event(event.value());
  }
  CHECK(clean());
}

// Opens, works, closes. Returns the first error.
Status whole_life(std::byte* device, std::byte* host, CuStream compute) {
  auto created = CudaBackend::create(0);
  if (!created.ok()) return created.error();
  CudaBackend& backend = *created.value();
  Status status = backend.register_host(host, 64);
  const bool registered = status.ok();
  Event events[3] = {};
  for (Event& event : events) {
    if (!status.ok()) break;
    auto made = backend.create_event(true);
    if (made.ok()) {
      event = made.value();
    } else {
      status = made.error();
    }
  }
  if (status.ok()) status = round_trip(backend, compute, device, host, 64, events[0], events[1], events[2]);
  if (status.ok()) status = backend.synchronize(events[2], kSite);
  if (status.ok()) {
    auto done = backend.query(events[2]);
    if (!done.ok()) status = done.error();
  }
  if (status.ok()) {
    auto time = backend.timestamp(events[2]);
    if (!time.ok()) status = time.error();
  }
  for (Event event : events) backend.destroy_event(event);
  if (!status.ok()) {  // copies may be under way
    created.value().reset();
    auto again = CudaContext::create(0);
    if (registered) CHECK(again.ok() && again.value()->unregister_host(host).ok());
    return status;
  }
  return backend.unregister_host(host);
}

TEST(every_failing_driver_call_is_an_error_and_leaks_nothing) {
  for (int code : {kOutOfMemory, kEccUncorrectable, kUnknownError}) {
    std::set<std::string> named;
    for (std::uint64_t nth = 1;; ++nth) {
      start_fake(nth);
      bool struck = false;
      {
        Program p;
        std::byte* device = p.device(64);
        std::vector<std::byte> host(64);
        CuStream compute = p.stream();
        CuContext current = nullptr;
        p.api().cuCtxPopCurrent_v2(&current);  // so that each call has to make it current by itself
        fakecuda_fail(nullptr, nth, code, 0);
        const Status status = whole_life(device, host.data(), compute);
        struck = fakecuda_failed() != 0;
        fakecuda_fail(nullptr, 0, 0, 0);
        p.api().cuCtxPushCurrent_v2(current);
        if (!status.ok()) {
          CHECK(status.error().code == Code::kDriver && status.error().driver_code == code);
          named.insert(status.error().op);
        }
      }
      CHECK(clean());
      if (!struck) {
        CHECK(nth > 60);
        break;
      }
    }
    // Errors of what gives something back are met by a second attempt.
    CHECK(named.count("cuMemcpyHtoDAsync_v2") && named.count("cuMemcpyDtoHAsync_v2") && named.count("cuEventRecord"));
    CHECK(named.count("cuStreamWaitEvent") && named.count("cuStreamCreate") && named.count("cuEventCreate"));
    CHECK(named.count("cuEventSynchronize") && named.count("cuEventQuery") && named.count("cuEventElapsedTime"));
    CHECK(named.count("cuCtxGetCurrent") && named.count("cuCtxPushCurrent_v2") && named.count("cuMemHostRegister_v2"));
    CHECK(named.count("cuDevicePrimaryCtxRetain") && named.count("cuDeviceGet") && named.count("cuDeviceGetCount"));
    CHECK(!named.count("cuStreamDestroy_v2") && !named.count("cuCtxPopCurrent_v2"));
  }
}

TEST(a_driver_that_fails_for_ever_gives_errors_and_never_hangs) {
  for (std::uint64_t nth = 1;; ++nth) {
    start_fake(nth);
    auto shared = DriverApi::shared();
    REQUIRE(shared.ok());
    std::vector<std::byte> host(64);
    fakecuda_fail(nullptr, nth, kUnknownError, 1);
    Status status;
    {
      auto backend = CudaBackend::create(0);
      status = backend.ok() ? Status{} : Status{backend.error()};
      if (backend.ok()) {
        auto event = backend.value()->create_event(false);
        if (event.ok()) {
          status = backend.value()->record(event.value(), Stream::load());
          backend.value()->destroy_event(event.value());
        } else {
          status = event.error();
        }
      }
    }
    if (!fakecuda_failed()) {
      CHECK(status.ok());
      CHECK(clean());
      break;
    }
    CHECK(fakecuda_violations() == 0);
  }
  fakecuda_reset(0);
}

TEST(a_context_that_cannot_be_popped_fails_the_next_call_of_the_thread_and_is_popped_later) {
  start_fake();
  {
    auto backend = CudaBackend::create(0);
    REQUIRE(backend.ok());
    fakecuda_fail("cuCtxPopCurrent_v2", 1, kUnknownError, 1);
    auto event = backend.value()->create_event(false);
    REQUIRE(event.ok());  // the event was made: it must not be lost
    CHECK(fakecuda_alive(FAKECUDA_PUSHED_CONTEXTS) == 1);
    const Status status = backend.value()->record(event.value(), Stream::load());
    CHECK(!status.ok() && status.error().op == "cuCtxPopCurrent_v2");
    fakecuda_fail(nullptr, 0, 0, 0);
    std::thread([&] { CHECK(backend.value()->record(event.value(), Stream::load()).ok()); }).join();
    CHECK(backend.value()->record(event.value(), Stream::load()).ok());
    CHECK(fakecuda_alive(FAKECUDA_PUSHED_CONTEXTS) == 0);
    backend.value()->destroy_event(event.value());
  }
  CHECK(clean());
}

TEST(threads_share_a_backend) {
  start_fake();
  {
    auto created = CudaBackend::create(0, 1000);
    REQUIRE(created.ok());
    CudaBackend& backend = *created.value();
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        Event event = backend.create_event(true).value();
        for (int i = 0; i < 200; ++i) {
          wrong += !backend.record(event, i % 2 ? Stream::load() : Stream::store()).ok();
          wrong += !backend.synchronize(event, kSite).ok();
          wrong += !backend.timestamp(event).ok();
        }
        backend.destroy_event(event);
        wrong += fakecuda_alive(FAKECUDA_PUSHED_CONTEXTS) != 0;
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
  }
  CHECK(clean());
}

}  // namespace
