#pragma once

#include <cstddef>

namespace chunkft::test {

// Calls of operator new, by any thread, since the program began.
std::size_t allocations();

}  // namespace chunkft::test
