#include "checker.h"

#include <algorithm>
#include <cstdio>

namespace fakecuda {
namespace {

std::string describe(const Range& range, const Step& step, const char* did, const Step& earlier) {
  char where[64];
  std::snprintf(where, sizeof where, "[%#llx, %#llx)", static_cast<unsigned long long>(range.first),
                static_cast<unsigned long long>(range.last));
  return "race on " + std::string(where) + ": " + step.text + (range.write ? " writes" : " reads") +
         " without waiting for " + earlier.text + ", which " + did;
}

}  // namespace

void Clock::tick(Actor actor) {
  if (actor >= ticks_.size()) ticks_.resize(actor + 1);
  ++ticks_[actor];
}

void Clock::join(const Clock& other) {
  if (other.ticks_.size() > ticks_.size()) ticks_.resize(other.ticks_.size());
  for (std::size_t i = 0; i < other.ticks_.size(); ++i) ticks_[i] = std::max(ticks_[i], other.ticks_[i]);
}

void Checker::split(std::uintptr_t at) {
  auto next = cells_.upper_bound(at);
  if (next == cells_.begin()) return;
  auto cell = std::prev(next);
  if (cell->first == at || cell->second.last <= at) return;
  Cell rest = cell->second;
  cell->second.last = at;
  cells_.emplace_hint(next, at, std::move(rest));
}

void Checker::forget(std::uintptr_t first, std::uintptr_t last) {
  split(first);
  split(last);
  cells_.erase(cells_.lower_bound(first), cells_.lower_bound(last));
}

std::vector<std::string> Checker::access(const Range& range, const std::shared_ptr<const Step>& step,
                                         const Clock& clock) {
  std::vector<std::string> reports;
  if (range.first >= range.last) return reports;
  // A pair of steps is reported once, however many cells it meets in.
  std::vector<const Step*> reported;
  auto require_over = [&](const std::shared_ptr<const Step>& earlier, const char* did) {
    if (earlier == step || clock.at(earlier->actor) >= earlier->tick) return;
    if (std::find(reported.begin(), reported.end(), earlier.get()) != reported.end()) return;
    reported.push_back(earlier.get());
    reports.push_back(describe(range, *step, did, *earlier));
  };

  split(range.first);
  split(range.last);
  std::uintptr_t at = range.first;
  while (at < range.last) {
    auto cell = cells_.lower_bound(at);
    if (cell == cells_.end() || cell->first > at) {  // bytes that nobody touched yet
      const std::uintptr_t end = cell == cells_.end() ? range.last : std::min(range.last, cell->first);
      cell = cells_.emplace_hint(cell, at, Cell{end, nullptr, {}});
    }
    Cell& c = cell->second;
    if (c.writer) require_over(c.writer, "writes it");
    if (range.write) {
      for (const auto& reader : c.readers) require_over(reader, "reads it");
      c.writer = step;
      c.readers.clear();
    } else {
      std::erase_if(c.readers, [&](const auto& reader) { return reader->actor == step->actor; });
      c.readers.push_back(step);
    }
    at = c.last;
  }
  return reports;
}

}  // namespace fakecuda
