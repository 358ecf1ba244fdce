#pragma once

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_context.h"
#include "fakecuda.h"

namespace chunkft::test {

inline constexpr int kInvalidValue = 1;
inline constexpr int kOutOfMemory = 2;
inline constexpr int kEccUncorrectable = 214;
inline constexpr int kUnknownError = 999;

// Makes the fake driver the one that the core loads, fresh for every test.
inline void start_fake(std::uint64_t seed = 0) {
  setenv("CHUNKFT_LIBCUDA", CHUNKFT_FAKECUDA, 1);
  fakecuda_reset(seed);
}

inline std::string violations() {
  std::string all;
  for (std::size_t i = 0; i < fakecuda_violations(); ++i) all += std::string(fakecuda_violation(i)) + "\n";
  return all;
}

inline bool violated(const char* text) { return violations().find(text) != std::string::npos; }

// Everything that a test opened is closed, and the fake driver has nothing to complain about.
inline bool clean() {
  bool ok = fakecuda_violations() == 0;
  std::printf("%s", violations().c_str());
  constexpr const char* kKinds[] = {"contexts", "streams", "events", "allocations", "registrations", "pushed contexts"};
  for (int kind = FAKECUDA_CONTEXTS; kind <= FAKECUDA_PUSHED_CONTEXTS; ++kind) {
    if (const std::size_t left = fakecuda_alive(kind)) {
      std::printf("%zu %s left\n", left, kKinds[kind]);
      ok = false;
    }
  }
  return ok;
}

// What a program beside the core holds: the context made current on this thread, streams, device and host memory.
class Program {
 public:
  explicit Program(int device = 0) : context_(CudaContext::create(device).value()), guard_(*context_) {}
  ~Program() {
    for (CuStream each : streams_) api().cuStreamSynchronize(each);
    for (void* memory : registered_) api().cuMemHostUnregister(memory);
    for (CuStream each : streams_) api().cuStreamDestroy_v2(each);
    for (CuDevicePtr memory : allocated_) api().cuMemFree_v2(memory);
  }

  const DriverApi& api() const { return context_->api(); }

  CuStream stream(bool blocking = false) {
    CuStream made = nullptr;
    api().cuStreamCreate(&made, blocking ? 0 : kCuStreamNonBlocking);
    streams_.push_back(made);
    return made;
  }

  std::byte* device(std::size_t bytes) {
    CuDevicePtr made = 0;
    api().cuMemAlloc_v2(&made, bytes);
    allocated_.push_back(made);
    return reinterpret_cast<std::byte*>(made);
  }

  // Page-locked.
  std::byte* host(std::size_t bytes) {
    memory_.emplace_back(bytes);
    api().cuMemHostRegister_v2(memory_.back().data(), bytes, kCuMemHostRegisterPortable);
    registered_.push_back(memory_.back().data());
    return memory_.back().data();
  }

 private:
  std::shared_ptr<CudaContext> context_;
  CudaContext::Guard guard_;
  std::vector<std::vector<std::byte>> memory_;
  std::vector<void*> registered_;
  std::vector<CuStream> streams_;
  std::vector<CuDevicePtr> allocated_;
};

inline fakecuda_range reads(const void* address, std::size_t bytes) { return {address, bytes, 0}; }
inline fakecuda_range writes(const void* address, std::size_t bytes) { return {address, bytes, 1}; }

inline int launch(CuStream stream, const char* name, std::initializer_list<fakecuda_range> ranges,
                  void (*body)(void*) = nullptr, void* argument = nullptr, double microseconds = 10) {
  return fakecuda_launch(stream, name, ranges.begin(), ranges.size(), body, argument, microseconds);
}

}  // namespace chunkft::test
