#pragma once

#include <cstddef>
#include <vector>

#include "backend.h"

namespace chunkft {

// A fixed set of events: made together, destroyed together. Nothing creates an event after construction.
class EventPool {
 public:
  static Result<EventPool> create(Backend& backend, std::size_t count, bool timing);

  EventPool() = default;
  ~EventPool() { clear(); }
  EventPool(EventPool&& other) noexcept;
  EventPool& operator=(EventPool&& other) noexcept;

  std::size_t size() const { return events_.size(); }
  Event operator[](std::size_t index) const { return events_[index]; }
  void clear();
  void forget() { events_.clear(); }  // in a forked child: leaves the events alone

 private:
  Backend* backend_ = nullptr;
  std::vector<Event> events_;
};

}  // namespace chunkft
