#include "os.h"

#include <cerrno>
#include <sys/mman.h>
#include <unistd.h>

namespace chunkft {
namespace {

class SystemOs final : public Os {
 public:
  std::size_t page_size() const override { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

  int map(std::size_t bytes, void** out) override {
    void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) return errno;
    *out = address;
    return 0;
  }

  int unmap(void* address, std::size_t bytes) override { return munmap(address, bytes) == 0 ? 0 : errno; }

  int advise_huge_pages([[maybe_unused]] void* address, [[maybe_unused]] std::size_t bytes) override {
#ifdef MADV_HUGEPAGE
    return madvise(address, bytes, MADV_HUGEPAGE) == 0 ? 0 : errno;
#else
    return ENOTSUP;
#endif
  }

  std::optional<MemoryBudget> memory_budget() const override { return chunkft::memory_budget(); }
};

}  // namespace

Os& system_os() {
  // Never destroyed: arenas held by Python may outlive static destructors at exit.
  static SystemOs* os = new SystemOs;
  return *os;
}

}  // namespace chunkft
