#include "engine.h"

#include <unistd.h>

#include "engine_errors.h"

namespace chunkft {
namespace {

Error no_slot(const char* op, std::size_t page, std::size_t slots) {
  return at_page(Code::kBusy, op, page,
                 "all " + std::to_string(slots) +
                     " slots hold pages that are acquired, prefetched or poisoned; release or evict one first");
}

}  // namespace

Result<std::unique_ptr<Engine>> Engine::create(Layout layout, std::shared_ptr<Backend> backend,
                                               const EngineOptions& options) {
  // One event a page, because any number of write-backs can be under way; two a slot.
  auto events = EventPool::create(*backend, layout.pages() + 2 * layout.slots(), false);
  if (!events.ok()) return events.error();
  auto telemetry = Telemetry::create(*backend, options.trace_events);
  if (!telemetry.ok()) return telemetry.error();
  return std::unique_ptr<Engine>(new Engine(std::move(layout), std::move(backend), std::move(events.value()),
                                            std::move(telemetry.value())));
}

Engine::Engine(Layout layout, std::shared_ptr<Backend> backend, EventPool events, std::unique_ptr<Telemetry> telemetry)
    : layout_(std::move(layout)),
      process_(getpid()),
      backend_name_(backend->name()),
      backend_(std::move(backend)),
      events_(std::move(events)),
      telemetry_(std::move(telemetry)),
      pages_(layout_.pages()),
      ring_(layout_.slots()) {
  std::size_t next_event = 0;
  for (Page& page : pages_) page.stored = events_[next_event++];
  for (std::size_t i = 0; i < ring_.size(); ++i) {
    ring_[i].data = layout_.slot(i);
    ring_[i].loaded = events_[next_event++];
    ring_[i].done = events_[next_event++];
    ring_.set_free(i);
  }
}

Engine::~Engine() { static_cast<void>(close()); }

bool Engine::forked() const { return getpid() != process_; }

// Before the mutex: in a forked child it may be locked by a thread that exists in the parent only (invariant 9).
Status Engine::check_process(const char* op) const {
  if (!forked()) return {};
  return Error{Code::kForked, op,
               "the pager belongs to process " + std::to_string(process_) + " and this is its child " +
                   std::to_string(getpid()) + "; make a new pager in the child"};
}

Result<Engine::Turn> Engine::enter(const char* op, std::size_t page, bool closing) {
  if (Status status = check_process(op); !status.ok()) return status.error();
  if (page >= layout_.pages()) {
    return invalid_argument(op, "page must be from 0 to " + std::to_string(layout_.pages() - 1) + ", got " +
                                    std::to_string(page));
  }
  std::unique_lock lock(mutex_);
  ++waiting_;
  changed_.wait(lock, [&] { return !pages_[page].taken || (life_ != Life::kOpen && !closing); });
  --waiting_;
  if (life_ != Life::kOpen && !closing) return chunkft::closed(op, "the pager is closed");
  pages_[page].taken = true;
  ++active_;
  return Turn(this, page);
}

void Engine::leave(std::size_t page) {
  bool wake = false;
  {
    std::lock_guard lock(mutex_);
    if (page != kNoPage) pages_[page].taken = false;
    --active_;
    wake = waiting_ > 0;
  }
  if (wake) changed_.notify_all();
}

Status Engine::allow(const char* op, std::size_t page, Move move) const {
  const Residency residency = pages_[page].residency;
  if (residency.place == Place::kPoisoned && move != Move::kEvict && move != Move::kDiscard) {
    return at_page(Code::kPoisoned, op, page, pages_[page].why);
  }
  if (next(residency, move)) return {};
  const char* hint = is_acquired(residency.place) ? "release it first" : "acquire it first";
  return at_page(Code::kInvalidArgument, op, page,
                 std::string("the page is ") + name_of(state_of(residency)) + "; " + hint);
}

void Engine::apply(std::size_t page, Move move) {
  if (const auto to = next(pages_[page].residency, move)) pages_[page].residency = *to;
}

// A free slot, or that of the page that was released first. False when there is none.
Result<bool> Engine::take_slot(const char* op, std::size_t page, std::size_t* slot) {
  for (;;) {
    std::unique_lock lock(mutex_);
    if (const auto free = ring_.oldest_free()) {
      ring_.set_busy(*free, page);
      *slot = *free;
      return true;
    }
    const auto idle = ring_.oldest_idle([&](const Slot& s) { return !pages_[s.page].taken; });
    if (!idle) {
      if (!ring_.oldest_idle([](const Slot&) { return true; })) return false;
      // Another thread has its turn with every idle page. It waits for no slot itself, so this ends.
      ++waiting_;
      changed_.wait(lock);
      --waiting_;
      continue;
    }
    const std::size_t victim = ring_[*idle].page;
    pages_[victim].taken = true;
    ++active_;
    lock.unlock();
    const Turn turn(this, victim);
    if (Status status = give_up(op, victim); !status.ok()) return status.error();
  }
}

// The page leaves its slot by this move.
void Engine::free_slot(std::size_t page, Move move) {
  std::lock_guard lock(mutex_);
  apply(page, move);
  ring_.set_free(std::exchange(pages_[page].slot, SIZE_MAX));
  pages_[page].store_behind_loads = false;
  pages_[page].why.clear();
}

Status Engine::submit_load(std::size_t page, std::size_t index) {
  Slot& slot = ring_[index];
  const PageSpan& span = layout_.page(page);
  if (slot.last != 0) {
    if (Status s = backend_->wait(Stream::load(), slot.last, WaitSite::kLoadSlot); !s.ok()) return s;
  }
  if (pages_[page].residency.host == HostCopy::kWriting) {
    // Invariant 6. The slot that the page was written back from may have another page by now: it has an event of its own.
    if (Status s = backend_->wait(Stream::load(), pages_[page].stored, WaitSite::kLoadStored); !s.ok()) return s;
  }
  auto* probe = telemetry_->begin(TraceRecord::Kind::kLoad, page, index, span.bytes, Stream::load());
  slot.unrecorded_load = true;
  pages_[page].host_read = true;
  Status status = backend_->copy(Stream::load(), slot.data, span.host, span.bytes);
  telemetry_->end(probe, Stream::load(), status.ok());
  if (status.ok()) status = backend_->record(slot.loaded, Stream::load(), RecordSite::kLoadLoaded);
  if (!status.ok()) return status;
  slot.unrecorded_load = false;
  slot.last = slot.loaded;
  telemetry_->count(TraceRecord::Kind::kLoad, span.bytes);
  return {};
}

// False when there is no slot. A load that cannot be started leaves the page where it was (invariant 7).
Result<bool> Engine::load(const char* op, std::size_t page) {
  std::size_t slot = 0;
  auto taken = take_slot(op, page, &slot);
  if (!taken.ok() || !taken.value()) return taken;
  const Status status = submit_load(page, slot);
  std::lock_guard lock(mutex_);
  if (!status.ok()) {
    ring_.set_free(slot);
    return about(status.error(), page, std::string(op) + " may be tried again");
  }
  apply(page, Move::kLoad);
  pages_[page].slot = slot;
  return true;
}

Result<bool> Engine::prefetch(std::size_t page) {
  static constexpr const char* kOp = "Pager.prefetch";
  const auto turn = enter(kOp, page);
  if (!turn.ok()) return turn.error();
  if (pages_[page].residency.place == Place::kPoisoned) {
    return at_page(Code::kPoisoned, kOp, page, pages_[page].why);
  }
  if (pages_[page].residency.place != Place::kHost) return true;
  return load(kOp, page);
}

Result<std::size_t> Engine::claim(std::size_t page, Stream caller) {
  static constexpr const char* kOp = "Pager.acquire";
  std::size_t index = 0;
  auto taken = take_slot(kOp, page, &index);
  if (!taken.ok()) return taken.error();
  if (!taken.value()) return no_slot(kOp, page, ring_.size());
  Slot& slot = ring_[index];
  const bool host_read = pages_[page].host_read;
  Status status;
  if (host_read || slot.unrecorded_load) {
    status = backend_->record(slot.loaded, Stream::load(), RecordSite::kClaimLoaded);
  }
  if (status.ok() && slot.unrecorded_load) {
    slot.unrecorded_load = false;
    slot.last = slot.loaded;
  }
  if (status.ok() && slot.last != 0) status = backend_->wait(caller, slot.last, WaitSite::kClaimSlot);
  std::lock_guard lock(mutex_);
  if (!status.ok()) {
    ring_.set_free(index);
    return about(status.error(), page, std::string(kOp) + " may be tried again");
  }
  apply(page, Move::kClaim);
  pages_[page].slot = index;
  pages_[page].store_behind_loads = host_read;
  return index;
}

Result<std::size_t> Engine::acquire(std::size_t page, Stream caller, bool load_page) {
  static constexpr const char* kOp = "Pager.acquire";
  const auto turn = enter(kOp, page);
  if (!turn.ok()) return turn.error();
  const bool on_host = pages_[page].residency.place == Place::kHost;
  if (Status s = allow(kOp, page, on_host ? Move::kLoad : Move::kAcquire); !s.ok()) return s.error();
  if (on_host && !load_page) {
    auto slot = claim(page, caller);
    if (slot.ok()) telemetry_->count_acquire(false, 0);
    if (slot.ok()) ring_[slot.value()].caller = caller;
    return slot;
  }
  if (on_host) {
    auto loaded = load(kOp, page);
    if (!loaded.ok()) return loaded.error();
    if (!loaded.value()) return no_slot(kOp, page, ring_.size());
  }
  const std::size_t index = pages_[page].slot;
  Slot& slot = ring_[index];
  const bool loading = slot.last == slot.loaded;
  const WaitSite site = loading                   ? WaitSite::kAcquireLoaded
                        : slot.last == slot.done ? WaitSite::kAcquireDone
                                                 : WaitSite::kAcquireStored;
  auto* probe =
      loading ? telemetry_->begin(TraceRecord::Kind::kWait, page, index, layout_.page(page).bytes, caller) : nullptr;
  const std::int64_t before = Telemetry::now_ns();
  const Status status = backend_->wait(caller, slot.last, site);
  const std::int64_t after = Telemetry::now_ns();
  telemetry_->end(probe, caller, status.ok());
  if (!status.ok()) return about(status.error(), page, "Pager.acquire may be tried again");
  telemetry_->count_acquire(loading, loading ? after - before : 0);
  slot.caller = caller;
  std::lock_guard lock(mutex_);
  apply(page, Move::kAcquire);
  ring_.set_busy(index, page);
  return index;
}

Status Engine::release(std::size_t page, Stream caller, bool dirty, bool keep) {
  static constexpr const char* kOp = "Pager.release";
  const auto turn = enter(kOp, page);
  if (!turn.ok()) return turn.error();
  const Move move = dirty ? Move::kReleaseDirty : Move::kReleaseClean;
  if (Status s = allow(kOp, page, move); !s.ok()) return s;
  const std::size_t index = pages_[page].slot;
  Slot& slot = ring_[index];
  // Without this record nobody could tell when the slot is free again: the page stays acquired.
  if (Status s = backend_->record(slot.done, caller, RecordSite::kReleaseDone); !s.ok()) {
    return about(s.error(), page, "the page is still IN_USE; Pager.release may be tried again");
  }
  slot.last = slot.done;
  if (pages_[page].residency.place == Place::kClaimed && !dirty) {
    free_slot(page, move);
    return {};
  }
  {
    std::lock_guard lock(mutex_);
    apply(page, move);
    ring_.set_idle(index);
  }
  return keep ? Status{} : give_up(kOp, page);
}

}  // namespace chunkft
