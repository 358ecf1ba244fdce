#pragma once

#include <string>
#include <utility>

#include "status.h"

namespace chunkft {

// A backend's error, with the page and what it means for the page.
inline Error about(Error error, std::size_t page, std::string detail) {
  error.page = page;
  error.detail = error.detail.empty() ? std::move(detail) : error.detail + "; " + detail;
  return error;
}

inline Error at_page(Code code, const char* op, std::size_t page, std::string detail) {
  Error error{code, op, std::move(detail)};
  error.page = page;
  return error;
}

}  // namespace chunkft
