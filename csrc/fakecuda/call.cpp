#include "call.h"

#include <unistd.h>

namespace fakecuda {

std::vector<std::uintptr_t>& Call::context_stack() {
  struct Stack {
    std::uint64_t generation = 0;
    std::vector<std::uintptr_t> contexts;
  };
  thread_local Stack stack;
  const std::uint64_t now = Simulator::get().generation;
  if (stack.generation != now) stack = {now, {}};
  return stack.contexts;
}

Call::Call(const char* function, Needs needs)
    : simulator_(Simulator::get()), lock_(simulator_.mutex), function_(function), code_(admit(needs)) {}

Call::~Call() {
  if (code_ == kSuccess) simulator_.run_some();
}

int Call::admit(Needs needs) {
  ++simulator_.calls[function_];
  if (simulator_.process != 0 && simulator_.process != getpid()) {
    return misuse(kNotInitialized, "called in a forked child");
  }
  auto& failure = simulator_.failure;
  const std::string name = function_;
  const bool meant = failure.function.empty() ? name.starts_with("cu") : failure.function == name;
  if (failure.countdown != 0 && meant) {
    if (failure.countdown > 1) {
      --failure.countdown;
    } else if (!failure.struck || failure.forever) {
      failure.struck = true;
      return failure.code;
    }
  }
  simulator_.pass_time();
  simulator_.run_some();
  if (needs == Needs::kNothing) return kSuccess;
  if (simulator_.process == 0) return misuse(kNotInitialized, "called before cuInit");
  if (simulator_.broken()) return simulator_.break_code;
  if (needs == Needs::kInit) return kSuccess;
  const auto& stack = context_stack();
  if (needs == Needs::kAnyContext && stack.empty() && !simulator_.contexts.empty()) {
    context_ = simulator_.contexts.begin()->first;
    return kSuccess;
  }
  if (stack.empty() || stack.back() == 0) return misuse(kInvalidContext, "called without a current context");
  context_ = stack.back();
  if (simulator_.contexts.count(context_) == 0) {
    return misuse(kContextIsDestroyed, "called in a context that was destroyed");
  }
  return kSuccess;
}

int Call::misuse(int code, const std::string& what) {
  simulator_.report("misuse: " + std::string(function_) + " " + what);
  return code;
}

int Call::missing(const void* handle, const char* kind) {
  const bool was_alive = simulator_.retired.count(number(handle)) != 0;
  return misuse(was_alive && kind == std::string("context") ? kContextIsDestroyed : kInvalidHandle,
                std::string("got a ") + kind + (was_alive ? " that was destroyed" : " that never existed"));
}

Stream* Call::stream(const void* handle) {
  Stream* found = simulator_.find_stream(context_, number(handle));
  if (found == nullptr) code_ = missing(handle, "stream");
  return found;
}

Event* Call::event(const void* handle) {
  auto found = simulator_.events.find(number(handle));
  if (found != simulator_.events.end()) return &found->second;
  code_ = missing(handle, "event");
  return nullptr;
}

}  // namespace fakecuda
