#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "status.h"

namespace chunkft {

struct PageSpan {
  std::byte* host = nullptr;
  std::size_t bytes = 0;
};

// Where every page lives on the host and where the slots are on the device. Immutable; owns none of the memory.
// One page is one contiguous range on either side, so that it moves in one copy (invariant 4).
class Layout {
 public:
  // Refuses empty pages, pages larger than a slot, null addresses and ranges that overlap or wrap around.
  static Result<Layout> create(const std::vector<std::size_t>& pages, const std::vector<std::uintptr_t>& host,
                               const std::vector<std::uintptr_t>& slots, std::size_t slot_bytes);

  std::size_t pages() const { return pages_.size(); }
  const PageSpan& page(std::size_t index) const { return pages_[index]; }
  std::size_t slots() const { return slots_.size(); }
  std::byte* slot(std::size_t index) const { return slots_[index]; }
  std::size_t slot_bytes() const { return slot_bytes_; }

 private:
  std::vector<PageSpan> pages_;
  std::vector<std::byte*> slots_;
  std::size_t slot_bytes_ = 0;
};

}  // namespace chunkft
