#pragma once

#include <cstddef>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace chunkft {

enum class Code {
  kInvalidArgument,  // the caller's value is outside what is allowed
  kClosed,           // the object was closed before the call
  kSystem,           // the operating system refused; `sys_errno` says why
  kDriver,           // the CUDA driver refused; `driver_code` and `driver_name` say why
  kPoisoned,         // a page's newest content could not be written back
  kBusy,             // every slot is in use
  kForked,           // called in a child of the process that the object belongs to
  kIo,               // a file could not be read or written; `sys_errno` says why
  kCorrupt,          // stored bytes are not what was written
};

inline constexpr std::size_t kNoPage = std::numeric_limits<std::size_t>::max();

struct Error {
  Code code;
  std::string op;         // what was being done: "mmap", "HostArena.view"
  std::string detail;     // argument, value and what is allowed; may be empty for system, file and driver errors
  std::size_t bytes = 0;  // size of the request that failed
  int sys_errno = 0;
  std::size_t page = kNoPage;  // of a pager, where one is concerned
  int driver_code = 0;         // CUresult
  std::string driver_name{};   // "CUDA_ERROR_OUT_OF_MEMORY"; empty when there is no driver to ask

  std::string message() const {
    std::string text = op;
    if (page != kNoPage) text += " (page " + std::to_string(page) + ")";
    if (code == Code::kSystem || code == Code::kIo) {
      text += " of " + std::to_string(bytes) + " bytes failed: " + std::strerror(sys_errno) + " (errno " +
              std::to_string(sys_errno) + ")";
    } else if (code == Code::kDriver && !driver_name.empty()) {
      if (bytes != 0) text += " of " + std::to_string(bytes) + " bytes";
      text += " failed: " + driver_name + " (CUDA driver error " + std::to_string(driver_code) + ")";
    }
    if (!detail.empty()) text += ": " + detail;
    return text;
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

inline Error driver_error(std::string op, std::size_t bytes, int driver_code, std::string driver_name) {
  Error error{Code::kDriver, std::move(op), {}, bytes};
  error.driver_code = driver_code;
  error.driver_name = std::move(driver_name);
  return error;
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
  const T& value() const { return std::get<0>(state_); }
  const Error& error() const { return std::get<1>(state_); }

 private:
  std::variant<T, Error> state_;
};

// A Result without a value: `return {};` is success.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Error error) : error_(std::move(error)) {}

  bool ok() const { return !error_.has_value(); }
  const Error& error() const { return *error_; }

 private:
  std::optional<Error> error_;
};

}  // namespace chunkft
