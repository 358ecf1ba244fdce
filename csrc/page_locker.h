#pragma once

#include <cstddef>

#include "status.h"

namespace chunkft {

// Whoever can page-lock host memory for a device.
class PageLocker {
 public:
  virtual ~PageLocker() = default;

  virtual Status register_host(void* address, std::size_t bytes) = 0;
  virtual Status unregister_host(void* address) = 0;
  // Not ok in a forked child, where neither of the above may be called.
  virtual Status check_process() const = 0;
};

}  // namespace chunkft
