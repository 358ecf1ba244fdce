#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <utility>
#include <variant>

namespace chunkft {

enum class Code {
  kInvalidArgument,  // the caller's value is outside what is allowed
  kClosed,           // the object was closed before the call
  kSystem,           // the operating system refused; `sys_errno` says why
};

struct Error {
  Code code;
  std::string op;         // what was being done: "mmap", "HostArena.view"
  std::string detail;     // argument, value and what is allowed; empty for system errors
  std::size_t bytes = 0;  // size of the request that failed
  int sys_errno = 0;

  std::string message() const {
    if (code == Code::kSystem) {
      return op + " of " + std::to_string(bytes) + " bytes failed: " + std::strerror(sys_errno) + " (errno " +
             std::to_string(sys_errno) + ")";
    }
    return op + ": " + detail;
  }
};

inline Error invalid_argument(std::string op, std::string detail) {
  return {Code::kInvalidArgument, std::move(op), std::move(detail)};
}

inline Error closed(std::string op, std::string detail) {
  return {Code::kClosed, std::move(op), std::move(detail)};
}

inline Error system_error(std::string op, std::size_t bytes, int sys_errno) {
  return {Code::kSystem, std::move(op), {}, bytes, sys_errno};
}

// A value or the reason why there is none. The core never throws on its own account; bindings turn an Error into a
// Python exception at the edge.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  bool ok() const { return state_.index() == 0; }
  T& value() { return std::get<0>(state_); }
  const Error& error() const { return std::get<1>(state_); }

 private:
  std::variant<T, Error> state_;
};

}  // namespace chunkft
