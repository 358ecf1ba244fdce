#include "host_arena.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace chunkft {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr unsigned kMaxTouchThreads = 16;
// Below this a thread costs more to start than the page faults it takes over.
constexpr std::size_t kTouchBytesPerThread = std::size_t{16} << 20;

std::atomic<std::size_t> live_bytes_counter{0};

// 0 when the sum does not fit.
std::size_t round_up(std::size_t value, std::size_t multiple) {
  const std::size_t missing = (multiple - value % multiple) % multiple;
  return value > std::numeric_limits<std::size_t>::max() - missing ? 0 : value + missing;
}

void touch(std::byte* first, std::byte* last, std::size_t page) {
  for (volatile std::byte* p = first; p < last; p += page) *p = std::byte{0};
}

void touch_parallel(std::byte* data, std::size_t bytes, std::size_t page, unsigned threads) {
  if (threads == 0) threads = std::clamp(std::thread::hardware_concurrency(), 1u, kMaxTouchThreads);
  const std::size_t useful = std::max<std::size_t>(1, bytes / kTouchBytesPerThread);
  const std::size_t parts = std::min<std::size_t>(threads, useful);
  const std::size_t pages = bytes / page;
  auto part_start = [&](std::size_t i) { return data + pages * i / parts * page; };

  std::vector<std::thread> workers;
  workers.reserve(parts);
  std::size_t started = 1;
  for (; started < parts; ++started) {
    try {
      workers.emplace_back(touch, part_start(started), part_start(started + 1), page);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: this one takes the remaining parts
    }
  }
  touch(part_start(0), part_start(1), page);
  touch(part_start(started), part_start(parts), page);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace

Segment::~Segment() {
  // In a forked child the pages are locked for the parent, and the driver must not be called; unmapping is the child's
  // own affair. Elsewhere the driver must not be left with pages that may become other memory: rather keep them.
  if (locker_ != nullptr && locker_->check_process().ok() && !locker_->unregister_host(data_).ok()) return;
  // A mapping that the kernel refuses to remove stays counted, so that the leak shows in live_bytes().
  if (capacity_ != 0 && os_.unmap(data_, capacity_) == 0) live_bytes_counter -= capacity_;
}

void Segment::own(std::byte* data, std::size_t capacity) {
  live_bytes_counter += capacity;
  live_bytes_counter -= capacity_;
  data_ = data;
  capacity_ = capacity;
}

Result<std::shared_ptr<Segment>> Segment::create(std::size_t nbytes, const ArenaOptions& options, Os& os) {
  const std::size_t page = os.page_size();
  const std::size_t capacity = round_up(std::max<std::size_t>(nbytes, 1), page);
  const bool huge = options.huge_pages && capacity >= kHugePage;
  const std::size_t slack = huge ? kHugePage - page : 0;
  if (capacity == 0 || capacity > std::numeric_limits<std::size_t>::max() - slack) {
    return system_error("mmap", nbytes, ENOMEM);
  }

  // The owner comes first, so that every way out of this function gives back what is mapped by then.
  std::shared_ptr<Segment> segment(new Segment(os));
  void* mapped = nullptr;
  if (int err = os.map(capacity + slack, &mapped)) return system_error("mmap", nbytes, err);
  auto* data = static_cast<std::byte*>(mapped);
  segment->own(data, capacity + slack);
  if (huge) {
    // mmap aligns to pages only: take 2 MiB more than needed, then give back what lies before and behind.
    const std::size_t head = (kHugePage - reinterpret_cast<std::uintptr_t>(data) % kHugePage) % kHugePage;
    const std::size_t tail = slack - head;
    if (head != 0) {
      if (int err = os.unmap(data, head)) return system_error("munmap", head, err);
      data += head;
      segment->own(data, capacity + tail);
    }
    if (tail != 0) {
      if (int err = os.unmap(data + capacity, tail)) return system_error("munmap", tail, err);
      segment->own(data, capacity);
    }
    // Advice only: a kernel without transparent huge pages serves small ones. The caller can see which it was.
    segment->huge_pages_ = os.advise_huge_pages(data, capacity) == 0;
  }
  if (options.pretouch) touch_parallel(data, capacity, page, options.threads);
  return segment;
}

Status Segment::page_lock(std::shared_ptr<PageLocker> locker) {
  std::lock_guard lock(lock_mutex_);
  if (locker_ != nullptr) return invalid_argument("HostArena.page_lock", "the arena's memory is page-locked already");
  if (Status status = locker->register_host(data_, capacity_); !status.ok()) return status;
  locker_ = std::move(locker);
  return {};
}

bool Segment::page_locked() const {
  std::lock_guard lock(lock_mutex_);
  return locker_ != nullptr;
}

HostArena::HostArena(std::size_t nbytes, std::shared_ptr<Segment> segment)
    : nbytes_(nbytes),
      capacity_(segment->capacity()),
      huge_pages_(segment->huge_pages()),
      segment_(std::move(segment)) {}

Result<std::shared_ptr<HostArena>> HostArena::create(std::size_t nbytes, const ArenaOptions& options, Os& os) {
  if (options.within_budget) {
    const auto budget = os.memory_budget();
    if (budget && nbytes > budget->available) {
      Error error = system_error("HostArena", nbytes, ENOMEM);
      error.detail = std::to_string(budget->available) + " bytes are available of the limit of " +
                     std::to_string(budget->limit) + " bytes in " + budget->source;
      if (budget->source == "/proc/meminfo") {
        error.detail += std::string("; where memory grows as it is used, ") + kHostMemory + "=128GiB states it";
      }
      return error;
    }
  }
  auto segment = Segment::create(nbytes, options, os);
  if (!segment.ok()) return segment.error();
  return std::shared_ptr<HostArena>(new HostArena(nbytes, std::move(segment.value())));
}

bool HostArena::is_closed() const {
  std::lock_guard lock(mutex_);
  return segment_ == nullptr;
}

Result<ArenaView> HostArena::view(std::size_t offset, std::size_t nbytes) const {
  if (offset > nbytes_ || nbytes > nbytes_ - offset) {
    return invalid_argument("HostArena.view", "offset=" + std::to_string(offset) + " and nbytes=" +
                                                  std::to_string(nbytes) + " must lie within the arena's " +
                                                  std::to_string(nbytes_) + " bytes");
  }
  std::lock_guard lock(mutex_);
  if (segment_ == nullptr) return closed("HostArena.view", "the arena is closed; views can be taken only before close()");
  return ArenaView{segment_, segment_->data() + offset, nbytes};
}

Status HostArena::page_lock(std::shared_ptr<PageLocker> locker) {
  std::shared_ptr<Segment> segment;
  {
    std::lock_guard lock(mutex_);
    segment = segment_;
  }
  if (segment == nullptr) return closed("HostArena.page_lock", "the arena is closed");
  return segment->page_lock(std::move(locker));  // may take seconds: outside the lock
}

bool HostArena::page_locked() const {
  std::lock_guard lock(mutex_);
  return segment_ != nullptr && segment_->page_locked();
}

void HostArena::close() {
  std::shared_ptr<Segment> last;
  {
    std::lock_guard lock(mutex_);
    last.swap(segment_);
  }
  // Unmapping happens here, outside the lock, when no view is left.
}

std::size_t HostArena::live_bytes() { return live_bytes_counter.load(); }

}  // namespace chunkft
