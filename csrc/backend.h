#pragma once

#include <cstddef>
#include <cstdint>

#include "status.h"

namespace chunkft {

// The order of all copies to the device, of all copies from it, and of the caller's own work.
enum class Lane { kLoad, kStore, kCaller };

struct Stream {
  Lane lane;
  std::uintptr_t handle = 0;  // the caller's stream (CUDA: a CUstream); 0 on the backend's own two lanes

  static Stream load() { return {Lane::kLoad}; }
  static Stream store() { return {Lane::kStore}; }
  static Stream caller(std::uintptr_t handle) { return {Lane::kCaller, handle}; }
};

// Made and understood by one backend. 0 is no event.
using Event = std::uintptr_t;

// Why the engine waits: one name for each edge of the order that keeps pages whole. Backends ignore it; tests drop the
// waits of one site at a time and expect to see damage.
enum class WaitSite {
  kLoadSlot,       // load into a slot <- the slot's last user or write-back
  kLoadStored,     // load of a page <- the write-back of the same page
  kAcquireLoaded,  // caller <- load
  kAcquireDone,    // caller <- the page's previous user, perhaps on another stream
  kAcquireStored,  // caller, who may write <- the write-back that still reads the slot
  kClaimSlot,      // caller, who writes without a load <- the slot's last user or write-back
  kStoreDone,      // write-back <- the page's last user
  kStoreLoaded,    // write-back of a page that was claimed <- an earlier load of the same page, into another slot
  kFlushStored,    // host <- write-back
  kDiscardStored,    // host, who may write <- the page's write-back
  kDiscardLoaded,    // host, who may write <- loads that still read the page on the host
  kDiscardPoisoned,  // host, who may write <- what a failed write-back left under way
};
inline constexpr int kWaitSites = 12;

// What the engine records an event behind, by the same rule: one name for each place.
enum class RecordSite {
  kTimes,            // times of copies: no order hangs on them
  kLoadLoaded,       // a load
  kClaimLoaded,      // earlier loads, of a page that is claimed without one
  kStoreStored,      // a write-back
  kReleaseDone,      // the caller's work
  kDiscardDone,      // the caller's work on a page that is discarded while it is acquired
  kDiscardLoads,     // loads that still read the page on the host
  kDiscardPoisoned,  // what a failed write-back left under way
};
inline constexpr int kRecordSites = 8;

// Streams, events and copies of one device. The contract is that of CUDA streams:
// - Work on one stream runs in the order of the calls; work on different streams in any order but for wait().
// - record(event, stream) stands for all work given to the stream so far, and replaces what the event stood for before.
//   wait(stream, event) makes later work on the stream wait for what the event stands for *at the time of the call*:
//   recording the event again does not move waits that are already made. A never recorded event counts as done.
// - copy(), record() and wait() return without waiting for the device. (The exception: stream 0 of the host backend is
//   the calling thread itself.)
// - A call that fails has given nothing to the stream.
// - No call allocates or creates events or streams, except create_event() and register_host().
// - All members may be called from any thread.
// - The destructor waits for all copies: after it nothing reads or writes host or device memory. Events are destroyed
//   before it. In a forked child it touches neither threads nor driver.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* name() const = 0;     // "host", "cuda"
  virtual int streams_created() const = 0;  // by this backend since its construction

  // timing: timestamp() may be asked later; other events are cheaper.
  virtual Result<Event> create_event(bool timing) = 0;
  virtual void destroy_event(Event event) = 0;

  // Host to device on kLoad, device to host on kStore.
  virtual Status copy(Stream stream, void* dst, const void* src, std::size_t bytes) = 0;
  virtual Status record(Event event, Stream stream, RecordSite site) = 0;
  Status record(Event event, Stream stream) { return record(event, stream, RecordSite::kTimes); }
  virtual Status wait(Stream stream, Event event, WaitSite site) = 0;

  virtual Result<bool> query(Event event) = 0;                      // done by now?
  virtual Status synchronize(Event event, WaitSite site) = 0;       // blocks the calling thread until it is

  // When the latest record of a timing event was reached, in nanoseconds of std::chrono::steady_clock: true to some
  // microseconds between streams and to one microsecond between two events of one stream, however long the process
  // runs. Only for events that query() says are done.
  virtual Result<std::int64_t> timestamp(Event event) = 0;

  // Page-locks host memory, so that copies run at full speed and beside the host. The host backend has nothing to do.
  virtual Status register_host(void* address, std::size_t bytes) = 0;
  virtual Status unregister_host(void* address) = 0;

  // kForked in any process but the one that made the backend. The one call that is always safe there.
  virtual Status check_process() const = 0;
};

}  // namespace chunkft
