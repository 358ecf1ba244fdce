#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "simulator.h"

namespace fakecuda {

// CUresult values that the fake returns. Source: cuda.h, enum cudaError_enum.
inline constexpr int kSuccess = 0;
inline constexpr int kInvalidValue = 1;
inline constexpr int kOutOfMemory = 2;
inline constexpr int kNotInitialized = 3;
inline constexpr int kInvalidDevice = 101;
inline constexpr int kInvalidContext = 201;
inline constexpr int kInvalidHandle = 400;
inline constexpr int kNotReady = 600;
inline constexpr int kContextIsDestroyed = 709;
inline constexpr int kAlreadyRegistered = 712;
inline constexpr int kNotRegistered = 713;

enum class Needs {
  kNothing,
  kInit,
  kContext,
  kAnyContext,  // the current one, else the first there is
};

// One call into the fake driver: takes the lock, counts, lets time pass, and finds out whether the call may go on.
class Call {
 public:
  Call(const char* function, Needs needs);
  ~Call();

  int code() const { return code_; }  // other than kSuccess: return it and do nothing
  std::uintptr_t context() const { return context_; }
  Simulator& simulator() { return simulator_; }

  // Notes a mistake of the caller; returns `code`.
  int misuse(int code, const std::string& what);
  // Looks a stream or event up; null after having noted the misuse.
  Stream* stream(const void* handle);
  Event* event(const void* handle);
  int missing(const void* handle, const char* kind);

  static std::vector<std::uintptr_t>& context_stack();  // of the calling thread

 private:
  int admit(Needs needs);

  Simulator& simulator_;
  std::lock_guard<std::mutex> lock_;
  const char* function_;
  std::uintptr_t context_ = 0;
  int code_ = kSuccess;
};

inline std::uintptr_t number(const void* handle) { return reinterpret_cast<std::uintptr_t>(handle); }
inline constexpr double kCopyMicroseconds = 5;
inline constexpr double kBytesPerMicrosecond = 25e3;

}  // namespace fakecuda
