#pragma once

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "event_pool.h"
#include "layout.h"
#include "residency.h"
#include "slot_ring.h"
#include "telemetry.h"

namespace chunkft {

struct EngineOptions {
  std::size_t trace_events = 4096;  // copies and waits whose times are kept; 0: nothing is timed
};

// A write-back cache of pages: their home is host memory, and a few slots of device memory hold those in use. Reads and
// writes of a slot are ordered on the caller's streams; the host never waits for the device but in flush(), close() and
// discard() of a poisoned page.
//
// Threads may share an engine. Each operation has its page to itself; operations on other pages go on meanwhile. The
// mutex guards bookkeeping only: no call to the backend is made under it (invariant 3), and nothing is allocated and no
// event or stream created after construction, unless an error has to be told.
class Engine {
 public:
  static Result<std::unique_ptr<Engine>> create(Layout layout, std::shared_ptr<Backend> backend,
                                                const EngineOptions& options = {});
  // close(), without a way to tell what could not be written back. Must not run in a forked child: leak the engine there.
  ~Engine();

  // Starts to load a page, unless it is on the device. False, with nothing done, when every slot is in use: acquired, or
  // prefetched and not acquired since.
  Result<bool> prefetch(std::size_t page);

  // The slot that holds the page for work given to `caller` from now on. With load=false a page that is not on the
  // device is not read: the slot's content is undefined until the caller writes it.
  Result<std::size_t> acquire(std::size_t page, Stream caller, bool load = true);

  // The caller's work so far on `caller` is the last that uses the slot. dirty: it changed the page. keep: the page stays
  // on the device until its slot is needed (the page released first goes first); without, its write-back starts at once.
  Status release(std::size_t page, Stream caller, bool dirty, bool keep);

  // Starts to write back a page that was changed; the device copy stays and may be acquired again at once.
  Status write_back(std::size_t page);

  // Gives up the slot of a page that is not acquired, behind a write-back where the page was changed. On a poisoned page
  // it tries the failed write-back again.
  Status evict(std::size_t page);

  // Forgets the device copy of a page and what was changed in it: the host copy is the page. `caller`, where the page
  // may still be in use, defaults to the stream that acquired it.
  Status discard(std::size_t page, std::optional<Stream> caller = std::nullopt);

  // Writes back all changed pages and waits until the host copies can be read. Pages that are acquired are left out.
  Status flush();

  Result<State> state(std::size_t page);
  // Whether the host copy may be read now (invariant 1).
  Result<bool> host_is_canonical(std::size_t page);

  // Writes back what was changed, waits until no copy runs, and lets go of events, streams and memory (invariant 8: the
  // slots may be freed afterwards). Acquired pages are discarded. Always ends closed; the error is that of the first
  // page whose newest content could not be written. Closing twice does nothing.
  Status close();
  bool closed() const;

  // Also once closed: what there was to tell then.
  Result<Stats> stats();
  Result<std::vector<TraceRecord>> trace();

  const Layout& layout() const { return layout_; }
  const char* backend_name() const { return backend_name_; }
  bool forked() const;  // whether this process is a child of the one that made the engine

 private:
  struct Page {
    Residency residency;
    std::size_t slot = SIZE_MAX;
    Event stored = 0;    // recorded on the store lane
    bool taken = false;  // an operation has the page to itself
    // A load may be reading the host copy, and no write-back is ordered behind it yet. A write-back from the slot that
    // was loaded is, by the slot's events; one from another slot, claimed since, has to wait for `loaded` of that slot.
    bool host_read = false;
    bool store_behind_loads = false;
    std::string why;     // of a poisoned page
  };

  // An operation's hold on its page (kNoPage: on the engine alone).
  class Turn {
   public:
    Turn(Engine* engine, std::size_t page) : engine_(engine), page_(page) {}
    Turn(Turn&& other) noexcept : engine_(std::exchange(other.engine_, nullptr)), page_(other.page_) {}
    Turn& operator=(Turn&&) = delete;
    ~Turn() {
      if (engine_ != nullptr) engine_->leave(page_);
    }

   private:
    Engine* engine_;
    std::size_t page_;
  };

  Engine(Layout layout, std::shared_ptr<Backend> backend, EventPool events, std::unique_ptr<Telemetry> telemetry);

  Status check_process(const char* op) const;
  Result<Turn> enter(const char* op, std::size_t page, bool closing = false);
  void leave(std::size_t page);
  Status allow(const char* op, std::size_t page, Move move) const;
  void apply(std::size_t page, Move move);

  Result<bool> take_slot(const char* op, std::size_t page, std::size_t* slot);
  void free_slot(std::size_t page, Move move);
  Result<bool> load(const char* op, std::size_t page);
  Result<std::size_t> claim(std::size_t page, Stream caller);
  Status submit_load(std::size_t page, std::size_t slot);
  Status submit_store(std::size_t page);
  Status store_or_poison(const char* op, std::size_t page);
  Status give_up(const char* op, std::size_t page);
  Status settle_host(std::size_t page);
  Status flush_pages(const char* op, bool closing);
  Result<Residency> observe(std::size_t page);
  Stats current_stats();
  template <typename T, typename Read>
  Result<T> read_telemetry(const char* op, const T& last, Read read);

  const Layout layout_;
  const int process_;
  const char* const backend_name_;
  std::shared_ptr<Backend> backend_;
  EventPool events_;
  std::unique_ptr<Telemetry> telemetry_;

  mutable std::mutex mutex_;  // guards what follows; a page's fields are written only by the operation that has its turn
  std::condition_variable changed_;
  std::vector<Page> pages_;
  SlotRing ring_;
  int active_ = 0;   // operations under way
  int waiting_ = 0;  // threads in changed_
  enum class Life { kOpen, kClosing, kClosed } life_ = Life::kOpen;
  Stats last_stats_;  // once closed
  std::vector<TraceRecord> last_trace_;
};

}  // namespace chunkft
