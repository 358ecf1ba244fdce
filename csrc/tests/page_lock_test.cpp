#include <cstring>
#include <sys/wait.h>
#include <unistd.h>

#include "cuda_context.h"
#include "fake.h"
#include "host_arena.h"

namespace {

using namespace chunkft;
using namespace chunkft::test;

constexpr std::size_t kMiB = std::size_t{1} << 20;

std::shared_ptr<CudaContext> open_context() { return CudaContext::create(0).value(); }

TEST(a_locked_arena_is_one_registration_that_ends_before_the_mapping) {
  start_fake();
  const std::size_t before = HostArena::live_bytes();
  {
    auto arena = HostArena::create(3 * kMiB + 1);
    REQUIRE(arena.ok());
    CHECK(!arena.value()->page_locked());
    CHECK(arena.value()->page_lock(open_context()).ok());
    CHECK(arena.value()->page_locked());
    CHECK(fakecuda_alive(FAKECUDA_REGISTRATIONS) == 1);
    auto view = arena.value()->view(0, 3 * kMiB + 1);
    REQUIRE(view.ok());
    arena.value()->close();
    CHECK(!arena.value()->page_locked());
    CHECK(fakecuda_alive(FAKECUDA_REGISTRATIONS) == 1);  // the view needs it
  }
  CHECK(clean());  // the fake tells if memory was unmapped under a registration
  CHECK(HostArena::live_bytes() == before);
}

TEST(memory_that_cannot_be_locked_stays_pageable_and_usable) {
  start_fake();
  fakecuda_set_lockable(kMiB);
  {
    auto arena = HostArena::create(2 * kMiB);
    REQUIRE(arena.ok());
    const Status status = arena.value()->page_lock(open_context());
    REQUIRE(!status.ok());
    CHECK(status.error().message() ==
          "cuMemHostRegister_v2 of 2097152 bytes failed: CUDA_ERROR_OUT_OF_MEMORY (CUDA driver error 2): out of memory");
    CHECK(!arena.value()->page_locked());
    auto view = arena.value()->view(0, 2 * kMiB);
    REQUIRE(view.ok());
    std::memset(view.value().data, 1, 2 * kMiB);
    fakecuda_set_lockable(4 * kMiB);
    CHECK(arena.value()->page_lock(open_context()).ok());
  }
  CHECK(clean());
}

TEST(locking_twice_or_after_the_end_is_refused) {
  start_fake();
  {
    auto arena = HostArena::create(100);
    REQUIRE(arena.ok());
    CHECK(arena.value()->page_lock(open_context()).ok());
    const Status twice = arena.value()->page_lock(open_context());
    CHECK(!twice.ok() && twice.error().code == Code::kInvalidArgument);
    arena.value()->close();
    const Status late = arena.value()->page_lock(open_context());
    CHECK(!late.ok() && late.error().code == Code::kClosed);
  }
  CHECK(clean());
}

TEST(memory_that_the_driver_will_not_let_go_of_stays_mapped) {
  start_fake();
  const std::size_t before = HostArena::live_bytes();
  {
    auto arena = HostArena::create(kMiB);
    REQUIRE(arena.ok());
    CHECK(arena.value()->page_lock(open_context()).ok());
    fakecuda_fail("cuMemHostUnregister", 1, kUnknownError, 1);
  }
  CHECK(HostArena::live_bytes() == before + kMiB);
  CHECK(fakecuda_alive(FAKECUDA_REGISTRATIONS) == 1);
  fakecuda_reset(0);
}

TEST(each_failing_driver_call_leaves_the_arena_whole) {
  for (int code : {kOutOfMemory, kUnknownError}) {
    for (std::uint64_t nth = 1;; ++nth) {
      start_fake(nth);
      const std::size_t before = HostArena::live_bytes();
      bool locked = false, struck = false;
      {
        auto arena = HostArena::create(kMiB);
        REQUIRE(arena.ok());
        fakecuda_fail(nullptr, nth, code, 0);
        if (auto context = CudaContext::create(0); context.ok()) {
          locked = arena.value()->page_lock(std::move(context.value())).ok();
        }
        CHECK(locked == arena.value()->page_locked());
      }
      struck = fakecuda_failed() != 0;
      fakecuda_fail(nullptr, 0, 0, 0);
      CHECK(HostArena::live_bytes() == before);
      CHECK(clean());
      if (!struck) {
        CHECK(locked && nth > 10);
        break;
      }
    }
  }
}

TEST(a_forked_child_unmaps_without_calling_the_driver) {
  start_fake();
  {
    auto arena = HostArena::create(kMiB);
    REQUIRE(arena.ok());
    CHECK(arena.value()->page_lock(open_context()).ok());
    fakecuda_reset_counters();
    const pid_t child = fork();
    if (child == 0) {
      const std::size_t before = HostArena::live_bytes();
      arena.value().reset();
      _exit(HostArena::live_bytes() == before - kMiB && fakecuda_calls(nullptr) == 0 ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  CHECK(clean());
}

}  // namespace
