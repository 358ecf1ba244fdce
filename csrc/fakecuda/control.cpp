#include "call.h"
#include "fakecuda.h"

using namespace fakecuda;

namespace {

struct Locked {
  Simulator& simulator = Simulator::get();
  std::lock_guard<std::mutex> lock{simulator.mutex};
  Simulator* operator->() { return &simulator; }
};

}  // namespace

void fakecuda_reset(uint64_t seed) { Locked()->reset(seed); }

void fakecuda_policy(int policy) { Locked()->policy = policy; }

void fakecuda_set_devices(int count) { Locked()->device_count = count; }

void fakecuda_allow_pageable(int allowed) { Locked()->pageable_allowed = allowed != 0; }

void fakecuda_set_lockable(size_t bytes) { Locked()->lockable = bytes; }

void fakecuda_declare_device(void* address, size_t bytes) { Locked()->declared[number(address)] = {bytes, nullptr}; }

void fakecuda_undeclare_device(void* address) {
  Locked simulator;
  auto found = simulator->declared.find(number(address));
  if (found == simulator->declared.end()) {
    simulator->report("misuse: fakecuda_undeclare_device of memory that was not declared");
    return;
  }
  simulator->host_access(address, found->second.bytes, true, "fakecuda_undeclare_device");
  simulator->forget(found->first, found->second.bytes);
  simulator->declared.erase(found);
}

int fakecuda_launch(CUstream_st* handle, const char* name, const fakecuda_range* ranges, size_t count,
                    void (*body)(void*), void* argument, double microseconds) {
  Call call("fakecuda_launch", Needs::kAnyContext);
  if (call.code() != kSuccess) return call.code();
  Stream* stream = call.stream(handle);
  if (stream == nullptr) return call.code();
  std::vector<Range> touched;
  for (size_t i = 0; i < count; ++i) {
    if (call.simulator().on_device(ranges[i].address, ranges[i].bytes) != Simulator::Place::kInside) {
      return call.misuse(kInvalidValue, "of \"" + std::string(name) + "\" on memory that is not on the device");
    }
    const std::uintptr_t first = number(ranges[i].address);
    touched.push_back({first, first + ranges[i].bytes, ranges[i].write != 0});
  }
  std::function<void()> effect = [] {};
  if (body != nullptr) effect = [body, argument] { body(argument); };
  call.simulator().submit(number(handle), *stream, "kernel \"" + std::string(name) + "\"", touched, microseconds,
                          std::move(effect));
  return kSuccess;
}

void fakecuda_host_read(const void* address, size_t bytes, const char* name) {
  Locked()->host_access(address, bytes, false, name);
}

void fakecuda_host_write(const void* address, size_t bytes, const char* name) {
  Locked()->host_access(address, bytes, true, name);
}

void fakecuda_drain(void) { Locked()->drain(); }

void fakecuda_fail(const char* function, uint64_t nth, int code, int forever) {
  Locked()->failure = {function == nullptr ? "" : function, nth, code, forever != 0, false};
}

void fakecuda_break_after(uint64_t operations, int code) {
  Locked simulator;
  simulator->break_after = operations;
  simulator->break_code = code;
}

int fakecuda_failed(void) { return Locked()->failure.struck; }

uint64_t fakecuda_calls(const char* function) {
  Locked simulator;
  uint64_t sum = 0;
  for (const auto& [name, count] : simulator->calls) {
    if (function == nullptr ? name.rfind("cu", 0) == 0 : name == function) sum += count;
  }
  return sum;
}

uint64_t fakecuda_host_syncs(void) { return Locked()->host_syncs; }

void fakecuda_reset_counters(void) {
  Locked simulator;
  simulator->calls.clear();
  simulator->host_syncs = 0;
}

size_t fakecuda_alive(int what) {
  Locked simulator;
  switch (what) {
    case FAKECUDA_CONTEXTS:
      return simulator->contexts.size();
    case FAKECUDA_STREAMS: {
      size_t count = 0;  // default streams are nobody's to destroy
      for (const auto& [handle, stream] : simulator->streams) {
        count += !stream.destroyed && simulator->contexts.count(handle) == 0;
      }
      return count;
    }
    case FAKECUDA_EVENTS:
      return simulator->events.size();
    case FAKECUDA_ALLOCATIONS:
      return simulator->allocations.size();
    case FAKECUDA_REGISTRATIONS:
      return simulator->registrations.size();
    case FAKECUDA_PUSHED_CONTEXTS:
      return Call::context_stack().size();
    case FAKECUDA_PENDING_OPERATIONS:
      return simulator->pending();
    default:
      simulator->report("misuse: fakecuda_alive of " + std::to_string(what));
      return 0;
  }
}

size_t fakecuda_violations(void) { return Locked()->violations.size(); }

const char* fakecuda_violation(size_t index) {
  Locked simulator;
  return index < simulator->violations.size() ? simulator->violations[index].c_str() : "";
}

void fakecuda_forget_violations(void) { Locked()->violations.clear(); }
