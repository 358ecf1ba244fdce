#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "adaptors.h"
#include "engine.h"
#include "host_backend.h"

namespace chunkft::test {

// Host pages and device slots in ordinary memory. A page is filled with one word, its version, so that a mixture shows.
class PagedMemory {
 public:
  using Word = std::uint32_t;

  // Page i has (words + i) words; every page starts as version first_version(i).
  PagedMemory(std::size_t pages, std::size_t slots, std::size_t words = 4) : slot_words_(words + pages - 1) {
    for (std::size_t i = 0; i < pages; ++i) host_.emplace_back(words + i, first_version(i));
    for (std::size_t i = 0; i < slots; ++i) slots_.emplace_back(slot_words_, Word{0});
  }

  static Word first_version(std::size_t page) { return static_cast<Word>((page + 1) * 1000000); }

  Result<Layout> layout() const {
    std::vector<std::size_t> bytes;
    std::vector<std::uintptr_t> host, slots;
    for (const auto& page : host_) {
      bytes.push_back(page.size() * sizeof(Word));
      host.push_back(reinterpret_cast<std::uintptr_t>(page.data()));
    }
    for (const auto& slot : slots_) slots.push_back(reinterpret_cast<std::uintptr_t>(slot.data()));
    return Layout::create(bytes, host, slots, slot_words_ * sizeof(Word));
  }

  std::size_t pages() const { return host_.size(); }
  std::size_t bytes(std::size_t page) const { return host_[page].size() * sizeof(Word); }
  std::vector<Word>& host(std::size_t page) { return host_[page]; }

  bool host_is(std::size_t page, Word version) const {
    return std::all_of(host_[page].begin(), host_[page].end(), [&](Word w) { return w == version; });
  }
  bool slot_is(std::size_t slot, std::size_t page, Word version) const {
    const auto first = slots_[slot].begin();
    return std::all_of(first, first + static_cast<std::ptrdiff_t>(host_[page].size()),
                       [&](Word w) { return w == version; });
  }
  void fill_slot(std::size_t slot, std::size_t page, Word version) {
    std::fill_n(slots_[slot].begin(), host_[page].size(), version);
  }
  // All memory as one sequence.
  std::vector<Word> snapshot() const {
    std::vector<Word> all;
    for (const auto& page : host_) all.insert(all.end(), page.begin(), page.end());
    for (const auto& slot : slots_) all.insert(all.end(), slot.begin(), slot.end());
    return all;
  }

 private:
  std::size_t slot_words_;
  std::vector<std::vector<Word>> host_;
  std::vector<std::vector<Word>> slots_;
};

// An engine over a host backend; with a scheduler one that runs only when told to.
struct Rig {
  explicit Rig(std::size_t pages = 3, std::size_t slots = 2, Scheduler* scheduler = nullptr, std::size_t trace = 0,
               std::size_t words = 4)
      : memory(pages, slots, words) {
    auto host = std::make_unique<HostBackend>(scheduler);
    backend = host.get();
    auto made = Engine::create(memory.layout().value(), std::make_unique<Adaptor>(std::move(host), &control),
                               {.trace_events = trace});
    engine = std::move(made.value());
  }

  // Acquires on the calling thread, and says whether the slot holds this version.
  bool sees(std::size_t page, PagedMemory::Word version) {
    slot = engine->acquire(page, thread).value();
    return memory.slot_is(slot, page, version);
  }
  void write(std::size_t page, PagedMemory::Word version) { memory.fill_slot(slot, page, version); }
  State state(std::size_t page) { return engine->state(page).value(); }

  PagedMemory memory;
  Control control;
  HostBackend* backend = nullptr;
  std::unique_ptr<Engine> engine;
  Stream thread = Stream::caller(0);
  std::size_t slot = 0;
};

}  // namespace chunkft::test
