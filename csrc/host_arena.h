#pragma once

#include <cstddef>
#include <memory>
#include <mutex>

#include "os.h"
#include "status.h"

namespace chunkft {

struct ArenaOptions {
  bool huge_pages = true;  // from 2 MiB up: start on a 2 MiB boundary and ask for transparent huge pages
  bool pretouch = false;   // commit every page now, in parallel, instead of on first use
  unsigned threads = 0;    // for pretouch; 0 takes one a core, 16 at most
};

// One mapping. Unmapped by the destructor, which runs when the arena and the last view have let go of it.
class Segment {
 public:
  static Result<std::shared_ptr<Segment>> create(std::size_t nbytes, const ArenaOptions& options, Os& os);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  std::byte* data() const { return data_; }
  std::size_t capacity() const { return capacity_; }
  bool huge_pages() const { return huge_pages_; }  // whether the kernel took the advice

 private:
  explicit Segment(Os& os) : os_(os) {}
  void own(std::byte* data, std::size_t capacity);

  Os& os_;
  std::byte* data_ = nullptr;
  std::size_t capacity_ = 0;
  bool huge_pages_ = false;
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
