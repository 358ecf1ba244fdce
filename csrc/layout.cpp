#include "layout.h"

#include <algorithm>
#include <limits>
#include <string>

namespace chunkft {
namespace {

struct Range {
  std::uintptr_t first;
  std::size_t bytes;
  std::string name;
};

Error refuse(std::string detail) { return invalid_argument("Pager", std::move(detail)); }

}  // namespace

Result<Layout> Layout::create(const std::vector<std::size_t>& pages, const std::vector<std::uintptr_t>& host,
                              const std::vector<std::uintptr_t>& slots, std::size_t slot_bytes) {
  if (pages.empty()) return refuse("pages must name at least one page, got none");
  if (slots.empty()) return refuse("slots must name at least one slot, got none");
  if (host.size() != pages.size()) {
    return refuse("host must give one address for each of the " + std::to_string(pages.size()) + " pages, got " +
                  std::to_string(host.size()));
  }
  Layout layout;
  layout.slot_bytes_ = slot_bytes;
  std::vector<Range> ranges;
  ranges.reserve(pages.size() + slots.size());
  for (std::size_t i = 0; i < pages.size(); ++i) {
    if (pages[i] == 0 || pages[i] > slot_bytes) {
      return refuse("pages[" + std::to_string(i) + "] must be from 1 to slot_bytes=" + std::to_string(slot_bytes) +
                    " bytes, got " + std::to_string(pages[i]));
    }
    layout.pages_.push_back({reinterpret_cast<std::byte*>(host[i]), pages[i]});
    ranges.push_back({host[i], pages[i], "host[" + std::to_string(i) + "]"});
  }
  for (std::size_t i = 0; i < slots.size(); ++i) {
    layout.slots_.push_back(reinterpret_cast<std::byte*>(slots[i]));
    ranges.push_back({slots[i], slot_bytes, "slots[" + std::to_string(i) + "]"});
  }
  for (const Range& range : ranges) {
    if (range.first == 0 || range.bytes > std::numeric_limits<std::uintptr_t>::max() - range.first) {
      return refuse(range.name + " must be the address of " + std::to_string(range.bytes) + " bytes of memory, got " +
                    std::to_string(range.first));
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.first < b.first; });
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i - 1].first + ranges[i - 1].bytes > ranges[i].first) {
      return refuse(ranges[i].name + " must not overlap " + ranges[i - 1].name + ": " +
                    std::to_string(ranges[i].first) + " lies less than " + std::to_string(ranges[i - 1].bytes) +
                    " bytes behind " + std::to_string(ranges[i - 1].first));
    }
  }
  return layout;
}

}  // namespace chunkft
