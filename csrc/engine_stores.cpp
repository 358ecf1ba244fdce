#include "engine.h"
#include "engine_errors.h"

namespace chunkft {

Status Engine::submit_store(std::size_t page) {
  const std::size_t index = pages_[page].slot;
  Slot& slot = ring_[index];
  const PageSpan& span = layout_.page(page);
  if (Status s = backend_->wait(Stream::store(), slot.last, WaitSite::kStoreDone); !s.ok()) return s;
  if (pages_[page].store_behind_loads) {
    if (Status s = backend_->wait(Stream::store(), slot.loaded, WaitSite::kStoreLoaded); !s.ok()) return s;
  }
  auto* probe = telemetry_->begin(TraceRecord::Kind::kStore, page, index, span.bytes, Stream::store());
  Status status = backend_->copy(Stream::store(), span.host, slot.data, span.bytes);
  telemetry_->end(probe, Stream::store(), status.ok());
  if (status.ok()) status = backend_->record(pages_[page].stored, Stream::store(), RecordSite::kStoreStored);
  if (!status.ok()) return status;
  slot.last = pages_[page].stored;
  pages_[page].host_read = false;
  pages_[page].store_behind_loads = false;
  telemetry_->count(TraceRecord::Kind::kStore, span.bytes);
  return {};
}

// Invariant 7: a write-back that cannot be started keeps the slot, which holds the only copy of the newest content.
Status Engine::store_or_poison(const char* op, std::size_t page) {
  Status status = submit_store(page);
  if (status.ok()) return status;
  Error error = about(status.error(), page,
                      "the page is POISONED: its newest content is still on the device; evict it to try again, or "
                      "discard it to go back to the content on the host");
  std::lock_guard lock(mutex_);
  apply(page, Move::kStoreFailed);
  ring_.set_busy(pages_[page].slot, page);
  pages_[page].why = "writing it back failed in " + std::string(op) + ": " + error.message();
  return error;
}

Status Engine::give_up(const char* op, std::size_t page) {
  if (pages_[page].residency.host == HostCopy::kStale) {
    if (Status s = store_or_poison(op, page); !s.ok()) return s;
  }
  free_slot(page, Move::kEvict);
  return {};
}

Status Engine::write_back(std::size_t page) {
  static constexpr const char* kOp = "Pager.write_back";
  const auto turn = enter(kOp, page);
  if (!turn.ok()) return turn.error();
  const Residency residency = pages_[page].residency;
  if (residency.host != HostCopy::kStale && !is_acquired(residency.place)) return {};
  if (Status s = allow(kOp, page, Move::kSave); !s.ok()) return s;
  if (Status s = store_or_poison(kOp, page); !s.ok()) return s;
  std::lock_guard lock(mutex_);
  apply(page, Move::kSave);
  return {};
}

Status Engine::evict(std::size_t page) {
  static constexpr const char* kOp = "Pager.evict";
  const auto turn = enter(kOp, page);
  if (!turn.ok()) return turn.error();
  if (pages_[page].residency.place == Place::kHost) return {};
  if (Status s = allow(kOp, page, Move::kEvict); !s.ok()) return s;
  return give_up(kOp, page);
}

// Whoever discards may write into the host copy next: no copy may read it, or write it, by then.
Status Engine::settle_host(std::size_t page) {
  Page& entry = pages_[page];
  if (entry.residency.place == Place::kPoisoned) return {};  // its write-back is waited for below
  if (entry.residency.host == HostCopy::kWriting) {
    if (Status s = backend_->synchronize(entry.stored, WaitSite::kDiscardStored); !s.ok()) return s;
  }
  if (!entry.host_read) return {};
  // What the event stood for is over by now: it may stand for the loads.
  if (Status s = backend_->record(entry.stored, Stream::load(), RecordSite::kDiscardLoads); !s.ok()) return s;
  if (Status s = backend_->synchronize(entry.stored, WaitSite::kDiscardLoaded); !s.ok()) return s;
  entry.host_read = false;
  return {};
}

Status Engine::discard(std::size_t page, std::optional<Stream> caller) {
  static constexpr const char* kOp = "Pager.discard";
  const auto turn = enter(kOp, page);
  if (!turn.ok()) return turn.error();
  const Place place = pages_[page].residency.place;
  if (Status s = settle_host(page); !s.ok()) return about(s.error(), page, "Pager.discard may be tried again");
  if (place == Place::kHost) return {};
  Slot& slot = ring_[pages_[page].slot];
  if (place == Place::kPoisoned) {
    // The failed write-back may have got as far as a copy that still reads the slot and writes to the host.
    const Event stored = pages_[page].stored;
    Status status = backend_->record(stored, Stream::store(), RecordSite::kDiscardPoisoned);
    if (status.ok()) status = backend_->synchronize(stored, WaitSite::kDiscardPoisoned);
    if (!status.ok()) return about(status.error(), page, "the page is still POISONED; Pager.discard may be tried again");
  } else if (is_acquired(place)) {
    const Stream last = caller.value_or(slot.caller);
    if (Status s = backend_->record(slot.done, last, RecordSite::kDiscardDone); !s.ok()) {
      return about(s.error(), page, "the page is still IN_USE; Pager.discard may be tried again");
    }
    slot.last = slot.done;
  }
  free_slot(page, Move::kDiscard);
  return {};
}

// Starts every write-back before it waits for the first, so that they run back to back. Goes on after an error: one page
// that cannot be written must not keep the others from the host. The first error is the one that is told.
Status Engine::flush_pages(const char* op, bool closing) {
  Status first;
  auto note = [&first](Status status) {
    if (first.ok() && !status.ok()) first = std::move(status);
  };
  for (std::size_t page = 0; page < pages_.size(); ++page) {
    const auto turn = enter(op, page, closing);
    if (!turn.ok()) return turn.error();
    const Residency residency = pages_[page].residency;
    if (residency.place == Place::kPoisoned) note(at_page(Code::kPoisoned, op, page, pages_[page].why));
    if (residency != Residency{Place::kIdle, HostCopy::kStale}) continue;
    Status stored = store_or_poison(op, page);
    if (stored.ok()) {
      std::lock_guard lock(mutex_);
      apply(page, Move::kSave);
    }
    note(std::move(stored));
  }
  for (std::size_t page = 0; page < pages_.size(); ++page) {
    const auto turn = enter(op, page, closing);
    if (!turn.ok()) return turn.error();
    if (pages_[page].residency.host != HostCopy::kWriting) continue;
    const Status done = backend_->synchronize(pages_[page].stored, WaitSite::kFlushStored);
    if (!done.ok()) {
      note(about(done.error(), page, "the page is still STORING; " + std::string(op) + " may be tried again"));
      continue;
    }
    std::lock_guard lock(mutex_);
    apply(page, Move::kStored);
  }
  return first;
}

Status Engine::flush() { return flush_pages("Pager.flush", false); }

// Where a page is, after a look at its write-back. Not while another thread is at it: then it is where it was.
Result<Residency> Engine::observe(std::size_t page) {
  static constexpr const char* kOp = "Pager.state";
  if (Status status = check_process(kOp); !status.ok()) return status.error();
  if (page >= layout_.pages()) {
    return invalid_argument(kOp, "page must be from 0 to " + std::to_string(layout_.pages() - 1) + ", got " +
                                     std::to_string(page));
  }
  {
    std::lock_guard lock(mutex_);
    if (life_ != Life::kOpen) return chunkft::closed(kOp, "the pager is closed");
    const Residency residency = pages_[page].residency;
    if (pages_[page].taken || residency.host != HostCopy::kWriting) return residency;
    pages_[page].taken = true;
    ++active_;
  }
  const Turn turn(this, page);
  const auto done = backend_->query(pages_[page].stored);
  if (!done.ok()) return about(done.error(), page, "its write-back cannot be followed; the page is still STORING");
  std::lock_guard lock(mutex_);
  if (done.value()) apply(page, Move::kStored);
  return pages_[page].residency;
}

Result<State> Engine::state(std::size_t page) {
  const auto residency = observe(page);
  if (!residency.ok()) return residency.error();
  return state_of(residency.value());
}

Result<bool> Engine::host_is_canonical(std::size_t page) {
  const auto residency = observe(page);
  if (!residency.ok()) return residency.error();
  return chunkft::host_is_canonical(residency.value());
}

Status Engine::close() {
  static constexpr const char* kOp = "Pager.close";
  if (Status status = check_process(kOp); !status.ok()) return status;
  {
    std::unique_lock lock(mutex_);
    ++waiting_;
    if (life_ != Life::kOpen) {
      changed_.wait(lock, [this] { return life_ == Life::kClosed; });
      --waiting_;
      return {};
    }
    life_ = Life::kClosing;
    changed_.notify_all();
    changed_.wait(lock, [this] { return active_ == 0; });
    --waiting_;
  }
  Status status = flush_pages(kOp, true);
  // Behind this line no copy runs: the backend's destructor waits for all of them, those of failed operations included.
  // Its events go first, and the last of what they have to tell before them.
  const Stats stats = current_stats();
  auto trace = telemetry_->trace();
  telemetry_.reset();
  events_.clear();
  backend_.reset();
  {
    std::lock_guard lock(mutex_);
    last_stats_ = stats;
    last_trace_ = std::move(trace);
    life_ = Life::kClosed;
  }
  changed_.notify_all();
  return status;
}

bool Engine::closed() const {
  if (forked()) return false;
  std::lock_guard lock(mutex_);
  return life_ == Life::kClosed;
}

// Reads the telemetry with the engine held open, or else what it last had to tell.
template <typename T, typename Read>
Result<T> Engine::read_telemetry(const char* op, const T& last, Read read) {
  if (Status status = check_process(op); !status.ok()) return status.error();
  {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.wait(lock, [this] { return life_ != Life::kClosing; });
    --waiting_;
    if (life_ == Life::kClosed) return last;
    ++active_;
  }
  const Turn turn(this, kNoPage);
  return read();
}

Stats Engine::current_stats() {
  Stats stats = telemetry_->stats();
  stats.events_created = events_.size() + telemetry_->events();
  stats.streams_created = static_cast<std::uint64_t>(backend_->streams_created());
  return stats;
}

Result<Stats> Engine::stats() {
  return read_telemetry("Pager.stats", last_stats_, [this] { return current_stats(); });
}

Result<std::vector<TraceRecord>> Engine::trace() {
  return read_telemetry("Pager.trace", last_trace_, [this] { return telemetry_->trace(); });
}

}  // namespace chunkft
