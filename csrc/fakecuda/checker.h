#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

// A happens-before checker over byte ranges: FastTrack-like, with intervals in place of variables.
// Source: Flanagan and Freund, "FastTrack: efficient and precise dynamic race detection", PLDI 2009, section 3.
namespace fakecuda {

using Actor = std::size_t;  // the host is 0; every stream gets a number of its own
inline constexpr Actor kHost = 0;

// A vector clock: for every actor, how many of its steps are known to be over.
class Clock {
 public:
  std::uint64_t at(Actor actor) const { return actor < ticks_.size() ? ticks_[actor] : 0; }
  void tick(Actor actor);
  void join(const Clock& other);

 private:
  std::vector<std::uint64_t> ticks_;
};

// One operation of a stream or of the host, as it appears in reports.
struct Step {
  Actor actor = kHost;
  std::uint64_t tick = 0;
  std::string text;
};

// [first, last) in the one address space that host and device share.
struct Range {
  std::uintptr_t first = 0;
  std::uintptr_t last = 0;
  bool write = false;
};

class Checker {
 public:
  // Notes that `step`, which knows `clock`, touches `range`. Returns one report for every earlier conflicting access
  // that is not known to be over.
  std::vector<std::string> access(const Range& range, const std::shared_ptr<const Step>& step, const Clock& clock);

  // Memory that was given back: what comes there next is other memory.
  void forget(std::uintptr_t first, std::uintptr_t last);

 private:
  struct Cell {
    std::uintptr_t last = 0;
    std::shared_ptr<const Step> writer;                // the last write, if there was one
    std::vector<std::shared_ptr<const Step>> readers;  // since that write, the latest of each actor
  };
  using Cells = std::map<std::uintptr_t, Cell>;  // by first byte; disjoint

  // Splits the cell that holds `at` so that a cell starts there.
  void split(std::uintptr_t at);

  Cells cells_;
};

}  // namespace fakecuda
