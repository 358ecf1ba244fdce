#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace chunkft {

// How much memory this process may still take before the kernel kills somebody for it.
struct MemoryBudget {
  std::size_t limit = 0;      // bytes
  std::size_t available = 0;  // of them, counting page cache as free: the kernel drops it when memory gets short
  std::string source;         // the file that sets the limit
};

inline constexpr const char* kHostMemory = "CHUNKFT_HOST_MEMORY";

// The narrowest of the machine's memory and the limits of the control groups, of version 1 and 2, that this process is
// in. None where the system tells nothing (/proc is not there). `root` goes before every path, for tests.
// Where kHostMemory is set in the environment, its bytes ("128GiB") stand in the place of all these: for machines whose
// memory grows as it is used and that show little of it before. Available is then what this process does not hold yet.
// Source: Linux kernel documentation, admin-guide/cgroup-v2.rst (memory.max, memory.current, memory.stat),
// cgroup-v1/memory.rst, and proc(5) for /proc/self/cgroup and /proc/self/mountinfo.
std::optional<MemoryBudget> memory_budget(const std::string& root = "");

}  // namespace chunkft
