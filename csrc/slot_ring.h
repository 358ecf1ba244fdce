#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "backend.h"

namespace chunkft {

// One device slot. `last` is the event behind which all work given so far on this slot's memory is done: whoever uses
// the slot next waits for it first and leaves an event of its own (invariant 2: nothing reuses a slot but behind it).
struct Slot {
  enum class Use { kFree, kBusy, kIdle };

  std::byte* data = nullptr;
  Event loaded = 0;  // recorded on the load lane
  Event done = 0;    // recorded on the caller's stream at release
  Event last = 0;    // one of these two, or the `stored` of a page that was written back from here; 0: never used
  Stream caller = Stream::caller(0);  // that acquired it last
  bool unrecorded_load = false;  // a load may be under way that no event stands for, because recording it failed
  Use use = Use::kFree;
  std::uint64_t stamp = 0;        // when it became free or idle
  std::size_t page = SIZE_MAX;    // while busy or idle
};

// The slots in the order in which they fell free or idle. Not locked: the engine's mutex guards it.
class SlotRing {
 public:
  explicit SlotRing(std::size_t count) : slots_(count) {}

  std::size_t size() const { return slots_.size(); }
  Slot& operator[](std::size_t index) { return slots_[index]; }

  // The slot that fell free first: its write-back is the likeliest to be done.
  std::optional<std::size_t> oldest_free() const { return oldest(Slot::Use::kFree, [](const Slot&) { return true; }); }

  // The slot whose page was released first, of those that `allowed` admits. There are few slots, so a scan it is.
  template <typename Allowed>
  std::optional<std::size_t> oldest_idle(Allowed allowed) const {
    return oldest(Slot::Use::kIdle, allowed);
  }

  void set_free(std::size_t index) { set(index, Slot::Use::kFree, SIZE_MAX); }
  void set_idle(std::size_t index) { set(index, Slot::Use::kIdle, slots_[index].page); }
  void set_busy(std::size_t index, std::size_t page) { set(index, Slot::Use::kBusy, page); }

 private:
  template <typename Allowed>
  std::optional<std::size_t> oldest(Slot::Use use, Allowed allowed) const {
    std::optional<std::size_t> found;
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].use != use || (found && slots_[*found].stamp <= slots_[i].stamp)) continue;
      if (allowed(slots_[i])) found = i;
    }
    return found;
  }

  void set(std::size_t index, Slot::Use use, std::size_t page) {
    slots_[index].use = use;
    slots_[index].page = page;
    slots_[index].stamp = ++clock_;
  }

  std::vector<Slot> slots_;
  std::uint64_t clock_ = 0;
};

}  // namespace chunkft
