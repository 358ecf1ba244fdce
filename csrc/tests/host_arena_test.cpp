#include "host_arena.h"

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "check.h"

namespace {

using chunkft::ArenaOptions;
using chunkft::Code;
using chunkft::HostArena;
using chunkft::Os;
using chunkft::system_os;

constexpr std::size_t kMiB = std::size_t{1} << 20;

// The real system, with two changes: it keeps account of what is mapped, and one call may be told to fail.
class FaultyOs final : public Os {
 public:
  explicit FaultyOs(int failing_call = -1) : failing_call_(failing_call) {}

  std::size_t page_size() const override { return system_os().page_size(); }

  int map(std::size_t bytes, void** out) override {
    if (fails()) return ENOMEM;
    if (int err = system_os().map(bytes, out)) return err;
    mapped += bytes;
    return 0;
  }

  int unmap(void* address, std::size_t bytes) override {
    if (fails()) return EINVAL;
    if (int err = system_os().unmap(address, bytes)) return err;
    mapped -= bytes;
    return 0;
  }

  int advise_huge_pages(void* address, std::size_t bytes) override {
    if (fails()) return EINVAL;
    return system_os().advise_huge_pages(address, bytes);
  }

  std::optional<chunkft::MemoryBudget> memory_budget() const override { return budget; }

  std::size_t mapped = 0;
  int calls = 0;
  std::optional<chunkft::MemoryBudget> budget;

 private:
  bool fails() { return calls++ == failing_call_; }

  int failing_call_;
};

TEST(capacity_is_the_size_rounded_to_a_page_and_no_more) {
  const std::size_t page = system_os().page_size();
  for (std::size_t nbytes : {std::size_t{0}, std::size_t{1}, page - 1, page, page + 1, 3 * kMiB + 1, 5 * kMiB}) {
    FaultyOs os;
    auto arena = HostArena::create(nbytes, {}, os);
    REQUIRE(arena.ok());
    const std::size_t pages = nbytes == 0 ? 1 : (nbytes + page - 1) / page;
    CHECK(arena.value()->nbytes() == nbytes);
    CHECK(arena.value()->capacity() == pages * page);
    CHECK(os.mapped == pages * page);
  }
}

TEST(memory_is_zero_aligned_and_writable_to_the_last_byte) {
  for (bool pretouch : {false, true}) {
    for (std::size_t nbytes : {std::size_t{1}, std::size_t{12345}, 3 * kMiB + 17, 70 * kMiB + 3}) {
      auto arena = HostArena::create(nbytes, {.pretouch = pretouch, .threads = 3});
      REQUIRE(arena.ok());
      auto view = arena.value()->view(0, nbytes);
      REQUIRE(view.ok());
      std::byte* data = view.value().data;
      const std::size_t alignment = nbytes >= 2 * kMiB ? 2 * kMiB : system_os().page_size();
      CHECK(reinterpret_cast<std::uintptr_t>(data) % alignment == 0);
      std::size_t nonzero = 0;
      for (std::size_t i = 0; i < nbytes; i += 61) nonzero += data[i] != std::byte{0};
      nonzero += data[nbytes - 1] != std::byte{0};
      CHECK(nonzero == 0);
      data[0] = data[nbytes - 1] = std::byte{7};
      CHECK(data[nbytes - 1] == std::byte{7});
    }
  }
}

TEST(huge_page_alignment_can_be_declined) {
  FaultyOs os;
  auto arena = HostArena::create(4 * kMiB, {.huge_pages = false}, os);
  REQUIRE(arena.ok());
  CHECK(!arena.value()->huge_pages());
  CHECK(os.calls == 1);
}

TEST(views_outlive_the_arena_and_free_the_memory_last) {
  const std::size_t before = HostArena::live_bytes();
  auto arena = HostArena::create(3 * kMiB);
  REQUIRE(arena.ok());
  CHECK(HostArena::live_bytes() == before + 3 * kMiB);
  {
    auto view = arena.value()->view(100, 50);
    REQUIRE(view.ok());
    arena.value()->close();
    arena.value().reset();
    CHECK(HostArena::live_bytes() == before + 3 * kMiB);
    view.value().data[49] = std::byte{1};
    CHECK(view.value().data[49] == std::byte{1});
  }
  CHECK(HostArena::live_bytes() == before);
}

TEST(view_refuses_ranges_outside_the_size) {
  auto arena = HostArena::create(100);
  REQUIRE(arena.ok());
  const std::size_t max = std::numeric_limits<std::size_t>::max();
  const std::pair<std::size_t, std::size_t> bad[] = {{0, 101}, {101, 0}, {100, 1}, {1, max}, {max, 1}, {max, max}};
  for (auto [offset, nbytes] : bad) {
    auto view = arena.value()->view(offset, nbytes);
    REQUIRE(!view.ok());
    CHECK(view.error().code == Code::kInvalidArgument);
    const std::string text = view.error().message();
    CHECK(text.find("offset=" + std::to_string(offset)) != std::string::npos);
    CHECK(text.find("nbytes=" + std::to_string(nbytes)) != std::string::npos);
    CHECK(text.find("100 bytes") != std::string::npos);
  }
  CHECK(arena.value()->view(100, 0).ok());
  CHECK(arena.value()->view(0, 100).ok());
}

TEST(closing_twice_is_harmless_and_a_closed_arena_refuses_views) {
  const std::size_t before = HostArena::live_bytes();
  auto arena = HostArena::create(10);
  REQUIRE(arena.ok());
  arena.value()->close();
  arena.value()->close();
  CHECK(arena.value()->is_closed());
  CHECK(HostArena::live_bytes() == before);
  auto view = arena.value()->view(0, 0);
  REQUIRE(!view.ok());
  CHECK(view.error().code == Code::kClosed);
}

TEST(sizes_that_cannot_be_had_are_errors_with_operation_bytes_and_errno) {
  const std::size_t max = std::numeric_limits<std::size_t>::max();
  for (std::size_t nbytes : {max, max - 4096, max / 2}) {
    auto arena = HostArena::create(nbytes);
    REQUIRE(!arena.ok());
    CHECK(arena.error().code == Code::kSystem);
    CHECK(arena.error().op == "mmap");
    CHECK(arena.error().bytes == nbytes);
    CHECK(arena.error().sys_errno == ENOMEM);
    CHECK(arena.error().message().find(std::to_string(nbytes)) != std::string::npos);
  }
}

// Lets each call of an arena's life fail in turn. Whatever was reported as an error must have left nothing mapped,
// unless it was the very unmapping that failed, and that must show in live_bytes.
TEST(no_failing_system_call_leaks_silently) {
  for (int failing = 0;; ++failing) {
    const std::size_t before = HostArena::live_bytes();
    FaultyOs os(failing);
    {
      auto arena = HostArena::create(5 * kMiB + 1, {}, os);
      if (!arena.ok()) {
        CHECK(arena.error().code == Code::kSystem);
        CHECK(os.mapped == 0);
        CHECK(HostArena::live_bytes() == before);
      } else {
        CHECK(os.mapped == arena.value()->capacity());
      }
    }
    if (os.calls <= failing) {  // the failing call lies beyond the last one: the sweep is complete
      CHECK(os.mapped == 0);
      CHECK(failing >= 4);
      break;
    }
    CHECK(os.mapped == HostArena::live_bytes() - before);
  }
}

TEST(advice_that_the_kernel_refuses_is_reported_not_fatal) {
  for (int failing = 0; failing < 8; ++failing) {
    FaultyOs probe(failing);
    auto arena = HostArena::create(4 * kMiB, {}, probe);
    if (!arena.ok() || arena.value()->huge_pages()) continue;
    auto view = arena.value()->view(0, 4 * kMiB);
    REQUIRE(view.ok());
    view.value().data[4 * kMiB - 1] = std::byte{3};
    return;
  }
  CHECK(!"no failing call left an arena with small pages");
}

TEST(views_and_close_may_race) {
  const std::size_t before = HostArena::live_bytes();
  for (int round = 0; round < 50; ++round) {
    auto created = HostArena::create(kMiB);
    REQUIRE(created.ok());
    auto arena = created.value();
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < 50; ++i) {
          auto view = arena->view(static_cast<std::size_t>(t) * 1000, 8);
          if (view.ok()) {
            view.value().data[i % 8] = std::byte{1};
          } else if (view.error().code != Code::kClosed) {
            ++wrong;
          }
        }
      });
    }
    arena->close();
    for (auto& thread : threads) thread.join();
    CHECK(wrong == 0);
  }
  CHECK(HostArena::live_bytes() == before);
}

}  // namespace
