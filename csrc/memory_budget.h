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

// The narrowest of the machine's memory and the limits of the control groups, of version 1 and 2, that this process is
// in. None where the system tells nothing (/proc is not there). `root` goes before every path, for tests.
// Source: Linux kernel documentation, admin-guide/cgroup-v2.rst (memory.max, memory.current, memory.stat),
// cgroup-v1/memory.rst, and proc(5) for /proc/self/cgroup and /proc/self/mountinfo.
std::optional<MemoryBudget> memory_budget(const std::string& root = "");

}  // namespace chunkft
