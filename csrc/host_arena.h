#pragma once

#include <cstddef>
#include <memory>
#include <mutex>

#include "os.h"
#include "page_locker.h"
#include "status.h"

namespace chunkft {

struct ArenaOptions {
  bool huge_pages = true;  // from 2 MiB up: start on a 2 MiB boundary and ask for transparent huge pages
  bool pretouch = false;   // commit every page now, in parallel, instead of on first use
  unsigned threads = 0;    // for pretouch; 0 takes one a core, 16 at most
  // Refuse, before anything is taken, what this process cannot commit without the kernel killing somebody for it.
  bool within_budget = false;
};

// One mapping. The destructor, which runs when the arena and the last view have let go of it, unlocks and unmaps it.
class Segment {
 public:
  static Result<std::shared_ptr<Segment>> create(std::size_t nbytes, const ArenaOptions& options, Os& os);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  std::byte* data() const { return data_; }
  std::size_t capacity() const { return capacity_; }
  bool huge_pages() const { return huge_pages_; }  // whether the kernel took the advice

  Status page_lock(std::shared_ptr<PageLocker> locker);
  bool page_locked() const;

 private:
  explicit Segment(Os& os) : os_(os) {}
  void own(std::byte* data, std::size_t capacity);

  Os& os_;
  std::byte* data_ = nullptr;
  std::size_t capacity_ = 0;
  bool huge_pages_ = false;
  mutable std::mutex lock_mutex_;
  std::shared_ptr<PageLocker> locker_;  // guarded by lock_mutex_; null while the memory is pageable
};

// A range of an arena that keeps the memory alive by itself.
struct ArenaView {
  std::shared_ptr<Segment> segment;
  std::byte* data = nullptr;  // never null, also for zero bytes
  std::size_t nbytes = 0;
};

// Zero-filled, page-aligned host memory of an exact size: rounded up to whole pages (one at least), to nothing else.
// All members may be called from any thread.
class HostArena {
 public:
  static Result<std::shared_ptr<HostArena>> create(std::size_t nbytes, const ArenaOptions& options = {},
                                                   Os& os = system_os());

  std::size_t nbytes() const { return nbytes_; }
  std::size_t capacity() const { return capacity_; }
  bool huge_pages() const { return huge_pages_; }
  bool is_closed() const;

  // Refuses a range outside [0, nbytes()], and any range once the arena is closed.
  Result<ArenaView> view(std::size_t offset, std::size_t nbytes) const;

  // Page-locks the whole mapping until it is unmapped (invariant 10: it is unlocked before). Refuses memory that is
  // locked already; after any other error the memory is pageable, as it was, and the error says why.
  Status page_lock(std::shared_ptr<PageLocker> locker);
  bool page_locked() const;  // false once closed, also if views keep the memory locked

  // Gives up the arena's own hold on the memory; views keep theirs. Closing twice does nothing.
  void close();

  // Bytes of all mappings that exist now in this process.
  static std::size_t live_bytes();

 private:
  HostArena(std::size_t nbytes, std::shared_ptr<Segment> segment);

  const std::size_t nbytes_;
  const std::size_t capacity_;
  const bool huge_pages_;
  mutable std::mutex mutex_;
  std::shared_ptr<Segment> segment_;  // guarded by mutex_; null once closed
};

}  // namespace chunkft
