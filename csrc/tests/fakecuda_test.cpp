// The fake driver itself: that it forgives nothing which the tests over it rely on being caught.
#include <cstring>
#include <set>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fake.h"

namespace {

using namespace chunkft;
using namespace chunkft::test;

CuDevicePtr at(const std::byte* device) { return reinterpret_cast<CuDevicePtr>(device); }

TEST(streams_run_in_order_and_late_under_every_policy) {
  for (int policy : {FAKECUDA_RANDOM, FAKECUDA_LAZY, FAKECUDA_EAGER}) {
    start_fake(5);
    fakecuda_policy(policy);
    {
      Program p;
      CuStream s = p.stream();
      std::byte* device = p.device(64);
      std::byte* host = p.host(128);
      std::memset(host, 1, 64);
      p.api().cuMemcpyHtoDAsync_v2(at(device), host, 64, s);
      launch(s, "add one", {reads(device, 64), writes(device, 64)},
             [](void* memory) { *static_cast<unsigned char*>(memory) += 1; }, device);
      p.api().cuMemcpyDtoHAsync_v2(host + 64, at(device), 64, s);
      if (policy == FAKECUDA_LAZY) CHECK(host[64] == std::byte{0});
      if (policy == FAKECUDA_EAGER) CHECK(host[64] == std::byte{2});
      CHECK(p.api().cuStreamSynchronize(s) == 0);
      fakecuda_host_read(host + 64, 64, "read");
      CHECK(host[64] == std::byte{2} && host[65] == std::byte{1} && host[127] == std::byte{1});
    }
    CHECK(clean());
  }
}

TEST(a_seed_fixes_the_order_and_seeds_differ) {
  auto order = [](std::uint64_t seed) {
    start_fake(seed);
    fakecuda_policy(FAKECUDA_LAZY);
    std::string text;
    Program p;
    std::byte* device = p.device(8);
    struct Note {
      std::string* text;
      char letter;
    } notes[] = {{&text, 'a'}, {&text, 'b'}, {&text, 'c'}, {&text, 'd'}};
    std::vector<CuStream> streams;
    for (Note& note : notes) {
      streams.push_back(p.stream());
      launch(streams.back(), "note", {reads(device, 8)},
             [](void* n) { *static_cast<Note*>(n)->text += static_cast<Note*>(n)->letter; }, &note);
    }
    for (CuStream each : streams) p.api().cuStreamSynchronize(each);
    return text;
  };
  std::set<std::string> seen;
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    CHECK(order(seed) == order(seed));
    seen.insert(order(seed));
  }
  CHECK(seen.size() > 5);
  CHECK(clean());
}

// Two streams, with and without the wait that orders them.
TEST(a_missing_wait_between_streams_is_a_race_named_from_both_sides) {
  for (bool with_wait : {true, false}) {
    start_fake(1);
    {
      Program p;
      CuStream a = p.stream(), b = p.stream();
      CuEvent event = nullptr;
      p.api().cuEventCreate(&event, kCuEventDisableTiming);
      std::byte* device = p.device(64);
      std::byte* host = p.host(64);
      p.api().cuMemcpyHtoDAsync_v2(at(device), host, 64, a);
      p.api().cuEventRecord(event, a);
      if (with_wait) p.api().cuStreamWaitEvent(b, event, 0);
      launch(b, "forward", {reads(device + 60, 4)});
      p.api().cuEventDestroy_v2(event);
      for (CuStream s : {a, b}) p.api().cuStreamSynchronize(s);
    }
    CHECK((fakecuda_violations() == 0) == with_wait);
    if (!with_wait) {
      CHECK(fakecuda_violations() == 1);
      CHECK(violated("race"));
      CHECK(violated("kernel \"forward\""));
      CHECK(violated("copy to the device of 64 bytes"));
    }
  }
}

TEST(order_is_transitive_over_streams_events_and_the_host) {
  start_fake(2);
  {
    Program p;
    CuStream a = p.stream(), b = p.stream(), c = p.stream();
    CuEvent first = nullptr, second = nullptr;
    for (CuEvent* event : {&first, &second}) p.api().cuEventCreate(event, 0);
    std::byte* device = p.device(100);
    launch(a, "write", {writes(device, 100)});
    p.api().cuEventRecord(first, a);
    p.api().cuStreamWaitEvent(b, first, 0);
    p.api().cuEventRecord(second, b);
    p.api().cuStreamWaitEvent(c, second, 0);
    launch(c, "after two waits", {writes(device, 100)});
    p.api().cuStreamSynchronize(c);
    launch(a, "after the host's wait", {writes(device, 100)});
    while (p.api().cuEventQuery(first) != 0) {
    }
    launch(b, "not after that launch", {reads(device, 1)});
    for (CuEvent event : {first, second}) p.api().cuEventDestroy_v2(event);
    for (CuStream s : {a, b, c}) p.api().cuStreamSynchronize(s);
  }
  CHECK(fakecuda_violations() == 1);
  CHECK(violated("not after that launch") && violated("after the host's wait"));
}

TEST(a_wait_captures_the_record_that_there_was) {
  start_fake(3);
  {
    Program p;
    CuStream a = p.stream(), b = p.stream();
    CuEvent event = nullptr;
    p.api().cuEventCreate(&event, 0);
    std::byte* device = p.device(2);
    p.api().cuStreamWaitEvent(b, event, 0);  // never recorded: no wait
    CHECK(p.api().cuEventQuery(event) == 0);
    launch(a, "one", {writes(device, 1)});
    p.api().cuEventRecord(event, a);
    p.api().cuStreamWaitEvent(b, event, 0);
    launch(a, "two", {writes(device + 1, 1)});
    p.api().cuEventRecord(event, a);
    launch(b, "sees one", {reads(device, 1)});
    CHECK(fakecuda_violations() == 0);
    launch(b, "sees two", {reads(device + 1, 1)});
    CHECK(fakecuda_violations() == 1);
    p.api().cuEventDestroy_v2(event);
    for (CuStream s : {a, b}) p.api().cuStreamSynchronize(s);
  }
}

TEST(readers_share_and_writers_do_not) {
  start_fake(4);
  {
    Program p;
    CuStream a = p.stream(), b = p.stream();
    std::byte* device = p.device(96);
    launch(a, "reader 1", {reads(device, 64)});
    launch(b, "reader 2", {reads(device + 32, 64)});
    CHECK(fakecuda_violations() == 0);
    launch(b, "writer of what 2 read", {writes(device + 64, 32)});
    CHECK(fakecuda_violations() == 0);
    launch(b, "writer of what 1 read", {writes(device + 63, 1)});
    CHECK(fakecuda_violations() == 1);
    for (CuStream s : {a, b}) p.api().cuStreamSynchronize(s);
  }
}

TEST(the_host_must_wait_before_it_touches_memory_of_copies) {
  start_fake(6);
  {
    Program p;
    CuStream s = p.stream();
    std::byte* device = p.device(64);
    std::byte* host = p.host(64);
    launch(s, "init", {writes(device, 64)});
    p.api().cuMemcpyDtoHAsync_v2(host, at(device), 64, s);
    fakecuda_drain();  // has happened by now, but nobody who could know it has waited
    fakecuda_host_read(host, 1, "too early");
    CHECK(fakecuda_violations() == 1 && violated("too early of the host reads"));
    p.api().cuStreamSynchronize(s);
    fakecuda_host_read(host, 1, "in time");
    CHECK(fakecuda_violations() == 1);
    p.api().cuMemcpyHtoDAsync_v2(at(device), host, 64, s);
    fakecuda_host_read(host, 64, "both read");
    CHECK(fakecuda_violations() == 1);
    fakecuda_host_write(host, 64, "overwritten under the copy");
    CHECK(fakecuda_violations() == 2 && violated("overwritten under the copy of the host writes"));
    p.api().cuStreamSynchronize(s);
  }
}

TEST(the_default_stream_is_ordered_with_blocking_streams_only) {
  for (bool blocking : {true, false}) {
    start_fake(7);
    {
      Program p;
      CuStream s = p.stream(blocking);
      std::byte* device = p.device(8);
      launch(s, "a", {writes(device, 8)});
      launch(nullptr, "b", {writes(device, 8)});
      launch(s, "c", {writes(device, 8)});
      p.api().cuStreamSynchronize(s);
      p.api().cuStreamSynchronize(nullptr);
    }
    CHECK(fakecuda_violations() == (blocking ? 0 : 2));
  }
}

TEST(misuse_is_refused_and_reported) {
  start_fake(8);
  {
    Program p;
    CuStream s = p.stream();
    std::byte* device = p.device(64);
    std::byte* host = p.host(64);
    std::byte other[64] = {};
    auto refused = [](int result, int code, const char* text) {
      const bool ok = result == code && fakecuda_violations() == 1 && violated(text);
      if (!ok) std::printf("got %d:\n%s", result, violations().c_str());
      fakecuda_forget_violations();
      return ok;
    };
    const DriverApi& api = p.api();
    CHECK(refused(api.cuMemcpyHtoDAsync_v2(at(device + 1), host, 64, s), 1, "not inside one device allocation"));
    CHECK(refused(api.cuMemcpyHtoDAsync_v2(at(host), host, 64, s), 1, "not inside one device allocation"));
    CHECK(refused(api.cuMemcpyHtoDAsync_v2(at(device), device, 64, s), 1, "device memory as host memory"));
    CHECK(refused(api.cuMemcpyHtoDAsync_v2(at(device), host + 1, 64, s), 1, "partly outside of registered"));
    CHECK(refused(api.cuMemcpyDtoHAsync_v2(other, at(device), 64, s), 1, "outside of registered"));
    CHECK(refused(api.cuMemHostRegister_v2(host + 8, 8, 0), 712, "is registered"));
    CHECK(refused(api.cuMemHostUnregister(host + 8), 713, "not registered"));
    CHECK(refused(api.cuMemFree_v2(at(device + 8)), 1, "not allocated"));
    CHECK(refused(launch(s, "k", {writes(other, 1)}), 1, "not on the device"));
    CHECK(refused(api.cuStreamSynchronize(reinterpret_cast<CuStream>(other)), 400, "stream that never existed"));
    CHECK(refused(api.cuEventQuery(reinterpret_cast<CuEvent>(other)), 400, "event that never existed"));
    CuEvent event = nullptr;
    CHECK(api.cuEventCreate(&event, kCuEventDisableTiming) == 0);
    CHECK(api.cuEventRecord(event, s) == 0);
    float ms = 0;
    CHECK(refused(api.cuEventElapsedTime(&ms, event, event), 400, "without timing"));
    CHECK(api.cuEventDestroy_v2(event) == 0);
    CHECK(refused(api.cuEventDestroy_v2(event), 400, "event that was destroyed"));
    CuStream gone = nullptr;
    CHECK(api.cuStreamCreate(&gone, 1) == 0 && api.cuStreamDestroy_v2(gone) == 0);
    CHECK(refused(launch(gone, "k", {}), 400, "stream that was destroyed"));

    // The pages of a copy under way must stay where they are.
    std::byte* locked = static_cast<std::byte*>(std::malloc(64));
    CHECK(api.cuMemHostRegister_v2(locked, 64, 1) == 0);
    CHECK(api.cuMemcpyHtoDAsync_v2(at(device), locked, 64, s) == 0);
    CHECK(refused(api.cuMemHostUnregister(locked), 0, "cuMemHostUnregister of the host writes"));
    CHECK(api.cuStreamSynchronize(s) == 0);
    std::free(locked);
  }
  CHECK(clean());
}

TEST(unmapping_registered_memory_is_noticed) {
  start_fake(9);
  {
    Program p;
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(p.api().cuMemHostRegister_v2(memory, page, 1) == 0);
    munmap(memory, page);
    p.api().cuMemHostUnregister(memory);
  }
  CHECK(violated("unmapped while it was registered"));
}

TEST(a_call_without_a_context_or_from_a_forked_child_is_misuse) {
  start_fake(10);
  const DriverApi& api = *DriverApi::shared().value();
  CuStream s = nullptr;
  CHECK(api.cuStreamCreate(&s, 0) == 201);
  CHECK(violated("without a current context"));
  const pid_t child = fork();
  if (child == 0) _exit(api.cuStreamCreate(&s, 0) == 3 && violated("forked child") ? 0 : 1);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(a_context_destroyed_with_live_objects_is_a_leak) {
  start_fake(11);
  const DriverApi& api = *DriverApi::shared().value();
  CuContext context = nullptr;
  CuStream s = nullptr;
  CuEvent event = nullptr;
  CHECK(api.cuDevicePrimaryCtxRetain(&context, 0) == 0 && api.cuCtxPushCurrent_v2(context) == 0);
  CHECK(api.cuStreamCreate(&s, 0) == 0 && api.cuEventCreate(&event, 0) == 0);
  CHECK(api.cuDevicePrimaryCtxRelease_v2(0) == 0);
  CHECK(violated("1 streams and 1 events"));
  CHECK(api.cuStreamSynchronize(s) == 709);
  CHECK(api.cuCtxPopCurrent_v2(nullptr) == 0);
}

TEST(failures_strike_the_call_that_was_named_once_or_for_ever) {
  start_fake(12);
  {
    Program p;
    CuEvent event = nullptr;
    fakecuda_reset_counters();
    fakecuda_fail("cuEventCreate", 2, 2, 0);
    CHECK(p.api().cuEventCreate(&event, 0) == 0 && !fakecuda_failed());
    p.api().cuEventDestroy_v2(event);
    CHECK(p.api().cuEventCreate(&event, 0) == 2 && fakecuda_failed());
    CHECK(p.api().cuEventCreate(&event, 0) == 0);
    CHECK(fakecuda_calls("cuEventCreate") == 3 && fakecuda_calls(nullptr) == 4);
    fakecuda_fail(nullptr, 2, 719, 1);
    CHECK(p.api().cuEventQuery(event) == 0);
    CHECK(p.api().cuEventQuery(event) == 719 && p.api().cuEventRecord(event, nullptr) == 719);
    fakecuda_fail(nullptr, 0, 0, 0);
    CHECK(p.api().cuEventDestroy_v2(event) == 0);
  }
  CHECK(clean());
}

TEST(a_broken_device_drops_work_and_fails_every_call) {
  start_fake(13);
  fakecuda_policy(FAKECUDA_LAZY);
  {
    Program p;
    CuStream s = p.stream();
    std::byte* device = p.device(2);
    std::byte* host = p.host(2);
    host[0] = host[1] = std::byte{1};
    fakecuda_break_after(1, kEccUncorrectable);
    for (int i : {0, 1}) CHECK(p.api().cuMemcpyHtoDAsync_v2(at(device + i), host + i, 1, s) == 0);
    CHECK(p.api().cuStreamSynchronize(s) == kEccUncorrectable);
    CHECK(device[0] == std::byte{1} && device[1] == std::byte{0xdb});
    CHECK(p.api().cuMemcpyHtoDAsync_v2(at(device), host, 1, s) == kEccUncorrectable);
    fakecuda_reset(0);
  }
}

TEST(host_waits_are_counted_and_time_is_simulated) {
  start_fake(14);
  {
    Program p;
    CuStream s = p.stream();
    std::byte* device = p.device(2'500'000);
    std::byte* host = p.host(2'500'000);
    CuEvent start = nullptr, end = nullptr;
    for (CuEvent* event : {&start, &end}) p.api().cuEventCreate(event, 0);
    p.api().cuEventRecord(start, s);
    p.api().cuMemcpyHtoDAsync_v2(at(device), host, 2'500'000, s);
    p.api().cuEventRecord(end, s);
    CHECK(fakecuda_host_syncs() == 0);
    p.api().cuEventSynchronize(end);
    CHECK(fakecuda_host_syncs() == 1);
    float ms = 0;
    CHECK(p.api().cuEventElapsedTime(&ms, start, end) == 0);
    CHECK(ms > 0.104f && ms < 0.108f);  // 100 us of bytes, 5 us of copy, 1 us between two calls
    for (CuEvent event : {start, end}) p.api().cuEventDestroy_v2(event);
  }
  CHECK(clean());
}

TEST(pageable_copies_are_async_for_the_checker_and_waits_for_the_counter) {
  start_fake(15);
  fakecuda_allow_pageable(1);
  {
    Program p;
    CuStream s = p.stream();
    std::byte* device = p.device(8);
    std::byte host[8] = {};
    CHECK(p.api().cuMemcpyHtoDAsync_v2(at(device), host, 8, s) == 0);
    CHECK(fakecuda_host_syncs() == 1);
    fakecuda_host_write(host, 8, "reused at once");
    CHECK(violated("reused at once"));
    p.api().cuStreamSynchronize(s);
  }
}

TEST(lockable_memory_can_run_out) {
  start_fake(16);
  fakecuda_set_lockable(100);
  {
    Program p;
    std::byte memory[128] = {};
    p.host(60);
    CHECK(p.api().cuMemHostRegister_v2(memory, 41, 1) == kOutOfMemory);
    CHECK(p.api().cuMemHostRegister_v2(memory, 40, 1) == 0);
    CHECK(p.api().cuMemHostUnregister(memory) == 0);
  }
  CHECK(clean());
}

}  // namespace
