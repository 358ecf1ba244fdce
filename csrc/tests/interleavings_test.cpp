#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <sstream>
#include <string>
#include <unordered_set>
#include <vector>

#include "check.h"
#include "paged_memory.h"

namespace {

using namespace chunkft;
using chunkft::test::PagedMemory;
using chunkft::test::Rig;
using Word = PagedMemory::Word;

// Goes through all choices, depth first, one run of the program for each path; a state that was met before is not
// entered again, because what can follow depends on nothing but the state.
class Explorer final : public Scheduler {
 public:
  std::function<std::uint64_t()> state;
  std::size_t states() const { return seen_.size(); }

  std::size_t choose(std::size_t count) override {
    if (count == 1) return 0;
    if (depth_ < path_.size()) return path_[depth_++].taken;
    if (pruned_) return 0;
    if (!seen_.insert(state()).second) {
      pruned_ = true;
      return 0;
    }
    path_.push_back({0, count});
    ++depth_;
    return 0;
  }

  bool next_run() {
    depth_ = 0;
    pruned_ = false;
    while (!path_.empty() && ++path_.back().taken == path_.back().count) path_.pop_back();
    return !path_.empty();
  }

 private:
  struct Choice {
    std::size_t taken, count;
  };
  std::vector<Choice> path_;
  std::size_t depth_ = 0;
  bool pruned_ = false;
  std::unordered_set<std::uint64_t> seen_;
};

struct Outcome {
  int wrong = 0;       // uses that saw another version than the newest, host copies that did not have it after flush()
  long dropped = 0;    // waits that a mutant left out
  std::string failed;  // an operation that was refused
};

// One run of a program: words, each a page that is used on stream a or b, or an operation.
//   a0w  acquire page 0, check that its content is the newest, write a new version, release it dirty
//   a0k  the same, but keep it on the device         a0r, a0R  check only: release it clean, or clean and kept
//   a0c, a0C  like w and k without a load and without a check        a0x  like w, but discard instead of releasing
//   p0 prefetch   e0 evict   s0 write back   d0 discard   f flush, then check every host copy
class Run {
 public:
  Run(Scheduler* scheduler, int drop_site) : rig(3, 2, scheduler) {
    rig.control.drop_site = drop_site;
    streams_[0] = Stream::caller(rig.backend->create_stream());
    streams_[1] = Stream::caller(rig.backend->create_stream());
    for (std::size_t page = 0; page < 3; ++page) newest_[page] = written_[page] = PagedMemory::first_version(page);
  }

  void word(const std::string& text) {
    const char op = text[0];
    const std::size_t page = text.size() > 1 ? static_cast<std::size_t>(text[1] - '0') : 0;
    Status status;
    if (op == 'a' || op == 'b') {
      status = use(streams_[op - 'a'], page, text[2]);
    } else if (op == 'p') {
      const auto result = rig.engine->prefetch(page);
      if (!result.ok()) status = result.error();
    } else if (op == 'e') {
      status = rig.engine->evict(page);
    } else if (op == 's') {
      status = rig.engine->write_back(page);
    } else if (op == 'd') {
      status = rig.engine->discard(page);
      newest_[page] = written_[page];
    } else {
      status = rig.engine->flush();
      for (std::size_t i = 0; i < 3; ++i) outcome.wrong += rig.memory.host_is(i, newest_[i]) ? 0 : 1;
    }
    // Nothing was done: prefetched pages have the slots.
    if (!status.ok() && status.error().code == Code::kBusy) return;
    if (!status.ok()) outcome.failed = text + ": " + status.error().message();
  }

  std::uint64_t state() const {
    std::uint64_t hash = static_cast<std::uint64_t>(rig.control.calls);
    hash = (hash ^ rig.backend->progress()) * 0x9e3779b97f4a7c15u;
    for (Word word : rig.memory.snapshot()) hash = (hash ^ word ^ (hash >> 29)) * 0x9e3779b97f4a7c15u;
    return hash ^ static_cast<std::uint64_t>(outcome.wrong);
  }

  Rig rig;
  Outcome outcome;

 private:
  struct Use {
    Run* run;
    std::size_t slot, page;
    Word expected, written;  // 0: not checked, not written
  };

  Status use(Stream stream, std::size_t page, char mode) {
    const bool check = mode != 'c' && mode != 'C';
    const bool write = mode != 'r' && mode != 'R';
    const auto slot = rig.engine->acquire(page, stream, check);
    if (!slot.ok()) return slot.error();
    // A claimed page may still be on the device, with content; it is not looked at either way.
    uses_.push_back({this, slot.value(), page, check ? newest_[page] : 0, write ? ++version_ : 0});
    auto run = [](void* argument) {
      const Use& use = *static_cast<Use*>(argument);
      PagedMemory& memory = use.run->rig.memory;
      if (use.expected != 0 && !memory.slot_is(use.slot, use.page, use.expected)) ++use.run->outcome.wrong;
      if (use.written != 0) memory.fill_slot(use.slot, use.page, use.written);
    };
    if (Status status = rig.backend->launch(stream, run, &uses_.back()); !status.ok()) return status;
    if (mode == 'x') {
      newest_[page] = written_[page];
      return rig.engine->discard(page, stream);
    }
    const bool keep = mode == 'k' || mode == 'R' || mode == 'C';
    if (write) newest_[page] = version_;
    if (write && !keep) written_[page] = version_;
    return rig.engine->release(page, stream, write, keep);
  }

  Stream streams_[2] = {Stream::caller(0), Stream::caller(0)};
  std::deque<Use> uses_;
  Word newest_[3];
  Word written_[3];  // what a discard goes back to, for pages that were not kept since
  Word version_ = 0;
};

std::vector<std::string> words(const std::string& program) {
  std::istringstream in(program);
  std::vector<std::string> all;
  for (std::string word; in >> word;) all.push_back(word);
  return all;
}

// All orders in which the streams can run the program's work. That the host gives its work as early as it can loses no
// order: the engine's decisions do not depend on how far the streams are, only flush() waits for them.
Outcome explore(const std::string& program, int drop_site, std::size_t* states) {
  Explorer explorer;
  Outcome all;
  do {
    Run run(&explorer, drop_site);
    explorer.state = [&run] { return run.state(); };
    for (const std::string& word : words(program)) run.word(word);
    if (run.rig.engine->close().ok() == false) run.outcome.failed = "close";
    all.wrong += run.outcome.wrong;
    all.dropped += run.rig.control.dropped;
    if (!run.outcome.failed.empty()) all.failed = run.outcome.failed;
  } while (explorer.next_run() && !(drop_site >= 0 && all.wrong > 0));
  *states += explorer.states();
  return all;
}

const char* kPrograms[] = {
    "p0 a0w p1 a1w p2 a2w p0 a0w p1 a1w f",  // a sweep, fetched one page ahead
    "a0w a0w a0w f",                         // a page that is wanted again before it is written
    "a0k a1k a2k a0k f",                     // written back only because the slot is needed
    "a0R b0w a0r f",                         // two streams on one page
    "a0k s0 b0k a0r f",                      // changed again while it is being written back
    "a0c a1c a2c b0r f",                     // first use: nothing to load
    "a0w b1c a2C b0r f",                     //
    "a0k s0 e0 b1w b0w f",                   //
    "p0 p1 a0w b1k a2r a1r f",               //
    "a0w a0x b0r a1w f",                     // a failed step
    "p0 d0 b0c p0 d0 a0r f",                 //
    "a0k f b0k a1C f b2w f",                 // flushed in between
    "a0k s0 b0R a0c b1w a2w f",              //
    "b0R e0 a0c f",                          // written anew while an earlier load may still read the host copy
};

TEST(every_order_of_the_streams_shows_every_use_the_newest_content) {
  std::size_t states = 0;
  for (const char* program : kPrograms) {
    const Outcome outcome = explore(program, -1, &states);
    if (outcome.wrong != 0 || !outcome.failed.empty()) {
      chunkft::test::report(__FILE__, __LINE__, std::string(program) + ": " + std::to_string(outcome.wrong) +
                                                    " wrong " + outcome.failed);
    }
  }
  CHECK(states > 300);
}

// A sanitizer costs a factor of ten, and there is but one thread here.
#if defined(__SANITIZE_THREAD__)
constexpr int kLength = 2;
#elif defined(__SANITIZE_ADDRESS__)
constexpr int kLength = 3;
#else
constexpr int kLength = 4;
#endif

// All programs of kLength words, up to the names of the pages, each in all orders.
void explore_programs(const std::string& program, int length, char pages, std::size_t* programs, std::size_t* states) {
  if (length == 0) {
    ++*programs;
    const Outcome outcome = explore(program + "f", -1, states);
    if (outcome.wrong != 0 || !outcome.failed.empty()) {
      chunkft::test::report(__FILE__, __LINE__, program + ": " + std::to_string(outcome.wrong) + " wrong " +
                                                    outcome.failed);
    }
    return;
  }
  for (const char* word : {"a0w", "b0k", "b0R", "a0c", "p0", "e0", "s0"}) {
    for (char page = '0'; page < pages + (pages < '3' ? 1 : 0); ++page) {
      std::string named = word;
      named[1] = page;
      explore_programs(program + named + " ", length - 1, page == pages ? static_cast<char>(pages + 1) : pages, programs,
                       states);
    }
  }
}

TEST(every_short_program_in_every_order_shows_every_use_the_newest_content) {
  std::size_t programs = 0, states = 0;
  explore_programs("", kLength, '0', &programs, &states);
  CHECK(programs > 50 && states > programs);
  if (std::getenv("CHUNKFT_TEST_VERBOSE") != nullptr) std::printf("%zu programs, %zu states\n", programs, states);
}

TEST(leaving_out_any_wait_shows_in_some_order) {
  for (int site = 0; site < kWaitSites; ++site) {
    // The host writes in none of these programs: mutants_test.cpp. The last needs a failing write-back: below.
    if (site == static_cast<int>(WaitSite::kDiscardStored) || site == static_cast<int>(WaitSite::kDiscardLoaded) ||
        site == static_cast<int>(WaitSite::kDiscardPoisoned)) {
      continue;
    }
    bool killed = false;
    std::size_t states = 0;
    for (const char* program : kPrograms) killed = killed || explore(program, site, &states).wrong > 0;
    if (!killed) chunkft::test::report(__FILE__, __LINE__, "no program misses wait site " + std::to_string(site));
  }
}

TEST(a_poisoned_page_is_discarded_behind_what_its_write_back_left_under_way) {
  enum { kNothing, kRecord, kWait };
  for (const int drop : {kNothing, kRecord, kWait}) {
    SeededScheduler scheduler(5);
    Rig rig(3, 2, &scheduler);
    CHECK(rig.sees(0, PagedMemory::first_version(0)));
    rig.write(0, 7);
    CHECK(rig.engine->release(0, rig.thread, true, true).ok());
    // Of wait, copy and record, the record fails: the copy is under way.
    rig.control.fail_once(rig.control.calls + 2);
    CHECK(!rig.engine->write_back(0).ok());
    CHECK(rig.state(0) == State::kPoisoned);
    if (drop == kWait) rig.control.drop_site = static_cast<int>(WaitSite::kDiscardPoisoned);
    if (drop == kRecord) rig.control.drop_record = static_cast<int>(RecordSite::kDiscardPoisoned);
    CHECK(rig.engine->discard(0).ok());
    const auto before = rig.memory.host(0);
    while (rig.backend->step()) {
    }
    CHECK((rig.memory.host(0) == before) == (drop == kNothing));
    CHECK(rig.control.dropped == (drop == kNothing ? 0 : 1));
  }
}

// The copy of a load whose record failed is under way, and nothing stands for it: who takes the slot next without a load
// must have it recorded and wait for it.
TEST(a_slot_with_a_load_that_was_not_recorded_is_claimed_behind_it) {
  for (const bool fail_wait : {false, true}) {
    SeededScheduler scheduler(5);
    Rig rig(3, 1, &scheduler);
    // Of copy and record, the record fails.
    rig.control.fail_once(rig.control.calls + 1);
    CHECK(!rig.engine->prefetch(0).ok());
    rig.control.heal();
    // A claim that fails at the wait, behind the record, leaves the slot as it should be for the next one.
    if (fail_wait) rig.control.fail_once(rig.control.calls + 1);
    if (fail_wait) CHECK(!rig.engine->acquire(1, rig.thread, false).ok());
    rig.control.heal();
    CHECK(rig.engine->acquire(1, rig.thread, false).ok());
    rig.write(1, 7);
    CHECK(rig.engine->release(1, rig.thread, true, true).ok());
    while (rig.backend->step()) {
    }
    CHECK(rig.sees(1, 7));
    CHECK(rig.engine->release(1, rig.thread, false, true).ok());
  }
}

// Longer programs than can be gone through, in random orders, and with the host at any point behind the streams.
TEST(random_programs_in_random_orders_show_every_use_the_newest_content) {
  const char* const kWords[] = {"a0w", "a0k", "a0r", "a0R", "a0c", "a0C", "b0w", "b0k", "b0r", "b0R",
                                "p0",  "p0",  "e0",  "s0",  "f"};
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    SeededScheduler random(seed), order(seed + 1000000);
    Run run(&order, -1);
    std::string program;
    for (int i = 0; i < 60 && run.outcome.failed.empty(); ++i) {
      std::string word = kWords[random.choose(std::size(kWords))];
      if (word.size() > 1) word[1] = static_cast<char>('0' + random.choose(3));
      // Prefetched pages keep their slots until they are used: leave one slot for the others.
      if (word[0] == 'p') {
        bool free = true;
        for (std::size_t page = 0; page < 3; ++page) free = free && run.rig.state(page) != State::kLoading;
        if (!free) continue;
      }
      program += word + " ";
      run.word(word);
      for (std::size_t steps = random.choose(12); steps > 0 && run.rig.backend->step(); --steps) {
      }
    }
    run.word("f");
    CHECK(run.rig.engine->close().ok());
    if (run.outcome.wrong != 0 || !run.outcome.failed.empty()) {
      chunkft::test::report(__FILE__, __LINE__, "seed " + std::to_string(seed) + ": " + program + run.outcome.failed);
    }
  }
}

}  // namespace
