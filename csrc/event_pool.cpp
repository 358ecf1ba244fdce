#include "event_pool.h"

#include <utility>

namespace chunkft {

Result<EventPool> EventPool::create(Backend& backend, std::size_t count, bool timing) {
  // The pool comes first, so that a failure half-way destroys what was made by then.
  EventPool pool;
  pool.backend_ = &backend;
  pool.events_.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    auto event = backend.create_event(timing);
    if (!event.ok()) return event.error();
    pool.events_.push_back(event.value());
  }
  return pool;
}

EventPool::EventPool(EventPool&& other) noexcept
    : backend_(other.backend_), events_(std::exchange(other.events_, {})) {}

EventPool& EventPool::operator=(EventPool&& other) noexcept {
  if (this != &other) {
    clear();
    backend_ = other.backend_;
    events_ = std::exchange(other.events_, {});
  }
  return *this;
}

void EventPool::clear() {
  for (Event event : events_) backend_->destroy_event(event);
  events_.clear();
}

}  // namespace chunkft
