#include "memory_budget.h"

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "check.h"
#include "host_arena.h"

namespace {

using chunkft::HostArena;
using chunkft::memory_budget;

// A directory with a /proc and a /sys of our own.
class System {
 public:
  System() {
    char pattern[] = "/tmp/chunkft-budget-XXXXXX";
    root = mkdtemp(pattern);
    write("/proc/meminfo", "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    900 kB\n");
  }
  ~System() { std::filesystem::remove_all(root); }

  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root + path).parent_path());
    std::ofstream(root + path) << text;
  }

  std::string root;
};

TEST(without_groups_the_machine_is_the_limit) {
  System system;
  auto budget = memory_budget(system.root);
  REQUIRE(budget.has_value());
  CHECK(budget->limit == 1000 * 1024 && budget->available == 900 * 1024 && budget->source == "/proc/meminfo");
}

// Sets the variable for a block.
class Stated {
 public:
  explicit Stated(const char* value) { setenv(chunkft::kHostMemory, value, 1); }
  ~Stated() { unsetenv(chunkft::kHostMemory); }
};

TEST(what_the_user_states_stands_in_the_place_of_what_the_system_says) {
  System system;
  system.write("/proc/self/status", "Name:\tx\nVmRSS:\t    1024 kB\n");
  {
    Stated stated("1GiB");
    auto budget = memory_budget(system.root);
    REQUIRE(budget.has_value());
    CHECK(budget->limit == std::size_t{1} << 30);
    CHECK(budget->available == (std::size_t{1} << 30) - (std::size_t{1} << 20));
    CHECK(budget->source == "CHUNKFT_HOST_MEMORY=1GiB");
  }
  for (const char* plain : {"4096", "4KiB"}) {
    Stated stated(plain);
    auto budget = memory_budget(system.root);
    REQUIRE(budget.has_value());
    CHECK(budget->limit == 4096 && budget->available == 0);  // more is held already
  }
  CHECK(memory_budget(system.root)->source == "/proc/meminfo");
}

TEST(what_is_no_number_of_bytes_allows_nothing_and_says_so) {
  System system;
  for (const char* wrong : {"", "much", "-1", "1.5GiB", "1 GiB", "4kb", "99999999999999999999", "9999999TiB"}) {
    Stated stated(wrong);
    auto budget = memory_budget(system.root);
    REQUIRE(budget.has_value());
    CHECK(budget->limit == 0 && budget->available == 0);
    CHECK(budget->source.find("which is no number of bytes such as 128GiB") != std::string::npos);
  }
}

TEST(without_proc_nothing_is_known) {
  CHECK(!memory_budget("/tmp/chunkft-no-such-directory").has_value());
}

TEST(the_limit_of_a_version_2_group_counts_page_cache_as_free) {
  System system;
  system.write("/proc/self/cgroup", "0::/\n");
  system.write("/proc/self/mountinfo", "24 1 0:20 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n");
  system.write("/sys/fs/cgroup/memory.max", "500000\n");
  system.write("/sys/fs/cgroup/memory.current", "300000\n");
  system.write("/sys/fs/cgroup/memory.stat", "anon 150000\nfile 150000\ninactive_file 90000\nactive_file 10000\n");
  auto budget = memory_budget(system.root);
  REQUIRE(budget.has_value());
  CHECK(budget->limit == 500000);
  CHECK(budget->available == 300000);
  CHECK(budget->source == "/sys/fs/cgroup/memory.max");
}

TEST(the_narrowest_group_on_the_way_up_counts) {
  System system;
  system.write("/proc/self/cgroup", "0::/outer/inner\n");
  system.write("/proc/self/mountinfo", "24 1 0:20 / /sys/fs/cgroup rw shared:4 master:1 - cgroup2 cgroup rw\n");
  for (const char* group : {"", "/outer", "/outer/inner"}) {
    const std::string directory = std::string("/sys/fs/cgroup") + group;
    system.write(directory + "/memory.max", group == std::string("/outer") ? "200000\n" : "max\n");
    system.write(directory + "/memory.current", "50000\n");
  }
  auto budget = memory_budget(system.root);
  REQUIRE(budget.has_value());
  CHECK(budget->limit == 200000 && budget->available == 150000);
  CHECK(budget->source == "/sys/fs/cgroup/outer/memory.max");
}

TEST(version_1_groups_are_found_by_controller) {
  System system;
  system.write("/proc/self/cgroup", "5:devices:/a\n4:cpu,memory:/job\n0::/\n");
  system.write("/proc/self/mountinfo",
               "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
               "33 31 0:33 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n"
               "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
  const std::string job = "/sys/fs/cgroup/memory/job/";
  system.write(job + "memory.limit_in_bytes", "400000\n");
  system.write(job + "memory.usage_in_bytes", "100000\n");
  system.write(job + "memory.stat", "inactive_file 7\ntotal_inactive_file 30000\ntotal_active_file 20000\n");
  system.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  system.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "100000\n");
  auto budget = memory_budget(system.root);
  REQUIRE(budget.has_value());
  CHECK(budget->limit == 400000 && budget->available == 350000 && budget->source == job + "memory.limit_in_bytes");
}

// Docker with version 1: the path is the host's, the mount shows the container's own group as its top.
TEST(a_path_from_outside_the_mount_means_its_top) {
  for (const char* mount_root : {"/docker/abc", "/elsewhere"}) {
    System system;
    system.write("/proc/self/cgroup", "4:memory:/docker/abc\n");
    system.write("/proc/self/mountinfo",
                 "35 31 0:32 " + std::string(mount_root) + " /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n");
    system.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "300000\n");
    system.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "310000\n");
    auto budget = memory_budget(system.root);
    REQUIRE(budget.has_value());
    CHECK(budget->limit == 300000 && budget->available == 0);
  }
}

TEST(the_real_system_tells_something_sane) {
#ifdef __linux__
  auto budget = memory_budget();
  REQUIRE(budget.has_value());
  CHECK(budget->available <= budget->limit && budget->limit > (std::size_t{1} << 20));
#endif
}

// An arena that fits the budget exactly, and one that does not by a byte.
class SmallOs final : public chunkft::Os {
 public:
  std::size_t page_size() const override { return chunkft::system_os().page_size(); }
  int map(std::size_t bytes, void** out) override {
    ++maps;
    return chunkft::system_os().map(bytes, out);
  }
  int unmap(void* address, std::size_t bytes) override { return chunkft::system_os().unmap(address, bytes); }
  int advise_huge_pages(void*, std::size_t) override { return 0; }
  std::optional<chunkft::MemoryBudget> memory_budget() const override {
    return chunkft::MemoryBudget{200000, 123456, "/sys/fs/cgroup/memory.max"};
  }
  int maps = 0;
};

TEST(an_arena_over_the_budget_is_refused_with_both_numbers_before_anything_is_taken) {
  SmallOs os;
  auto refused = HostArena::create(123457, {.within_budget = true}, os);
  REQUIRE(!refused.ok());
  CHECK(os.maps == 0);
  CHECK(refused.error().sys_errno == ENOMEM);
  const std::string text = refused.error().message();
  for (const char* part : {"123457 bytes", "123456 bytes", "200000 bytes", "/sys/fs/cgroup/memory.max"}) {
    CHECK(text.find(part) != std::string::npos);
  }
  CHECK(HostArena::create(123456, {.within_budget = true}, os).ok());
  CHECK(HostArena::create(123457, {}, os).ok());
}

}  // namespace
