#pragma once

#include <cstddef>
#include <optional>

#include "memory_budget.h"

namespace chunkft {

// The calls that an arena makes to the operating system. A seam, so that tests can let the N-th call fail.
// Those that return an int return 0 or an errno value.
class Os {
 public:
  virtual ~Os() = default;

  virtual std::size_t page_size() const = 0;
  virtual int map(std::size_t bytes, void** out) = 0;  // private, zero-filled, readable and writable
  virtual int unmap(void* address, std::size_t bytes) = 0;
  virtual int advise_huge_pages(void* address, std::size_t bytes) = 0;
  virtual std::optional<MemoryBudget> memory_budget() const = 0;
};

Os& system_os();

}  // namespace chunkft
