// Breaks, in one place at a time, the order that the engine asks for. Random programs over the fake driver must notice
// every time: by a race that the happens-before checker sees, or by a page with the wrong content.
#include <string>

#include "cuda_world.h"

namespace {

using namespace chunkft;
using namespace chunkft::test;

struct Mutant {
  const char* name;
  enum class Kind {
    kNone,
    kWait,    // the waits of one site are left out
    kRecord,  // the records of one site are left out
    kEarly,   // the records of one site come before the copy that they stand for
  } kind = Kind::kNone;
  int which = -1;  // WaitSite or RecordSite
};

constexpr Mutant wait_of(const char* name, WaitSite site) {
  return {name, Mutant::Kind::kWait, static_cast<int>(site)};
}

constexpr Mutant record_of(const char* name, RecordSite site, Mutant::Kind kind = Mutant::Kind::kRecord) {
  return {name, kind, static_cast<int>(site)};
}

constexpr Mutant kMutants[] = {
    wait_of("a load does not wait for the slot", WaitSite::kLoadSlot),
    wait_of("a load does not wait for the page's write-back", WaitSite::kLoadStored),
    wait_of("the caller does not wait for the load", WaitSite::kAcquireLoaded),
    wait_of("the caller does not wait for the page's last user", WaitSite::kAcquireDone),
    wait_of("the caller does not wait for the write-back that reads the slot", WaitSite::kAcquireStored),
    wait_of("the caller takes a slot without waiting for it", WaitSite::kClaimSlot),
    wait_of("a write-back does not wait for the page's last user", WaitSite::kStoreDone),
    wait_of("a write-back does not wait for an earlier load of the page", WaitSite::kStoreLoaded),
    wait_of("a flush does not wait for write-backs", WaitSite::kFlushStored),
    wait_of("a discard does not wait for the page's write-back", WaitSite::kDiscardStored),
    wait_of("a discard does not wait for loads of the page", WaitSite::kDiscardLoaded),
    record_of("loads are not recorded", RecordSite::kLoadLoaded),
    record_of("earlier loads of a claimed page are not recorded", RecordSite::kClaimLoaded),
    record_of("write-backs are not recorded", RecordSite::kStoreStored),
    record_of("the caller's work is not recorded", RecordSite::kReleaseDone),
    record_of("the caller's work on a discarded page is not recorded", RecordSite::kDiscardDone),
    record_of("loads that a discard waits for are not recorded", RecordSite::kDiscardLoads),
    record_of("loads are recorded before the copy", RecordSite::kLoadLoaded, Mutant::Kind::kEarly),
    record_of("write-backs are recorded before the copy", RecordSite::kStoreStored, Mutant::Kind::kEarly),
};

constexpr bool listed(Mutant::Kind kind, int which) {
  for (const Mutant& mutant : kMutants) {
    if (mutant.kind == kind && mutant.which == which) return true;
  }
  return false;
}

// Every wait and record that the engine names has its mutant. Those of a poisoned page, which need a driver that fails,
// have theirs in interleavings_test.cpp. That no two places of the engine share a name is held by test_engine_sites.py.
static_assert([] {
  for (int site = 0; site < kWaitSites; ++site) {
    if (site != static_cast<int>(WaitSite::kDiscardPoisoned) && !listed(Mutant::Kind::kWait, site)) return false;
  }
  for (int site = 0; site < kRecordSites; ++site) {
    if (site == static_cast<int>(RecordSite::kTimes)) continue;
    if (site != static_cast<int>(RecordSite::kDiscardPoisoned) && !listed(Mutant::Kind::kRecord, site)) return false;
  }
  return true;
}());

class MutantBackend final : public Backend {
 public:
  MutantBackend(std::unique_ptr<Backend> inner, const Mutant& mutant, std::size_t* struck)
      : inner_(std::move(inner)), mutant_(mutant), struck_(struck) {}

  const char* name() const override { return inner_->name(); }
  int streams_created() const override { return inner_->streams_created(); }
  Result<Event> create_event(bool timing) override { return inner_->create_event(timing); }
  void destroy_event(Event event) override { inner_->destroy_event(event); }

  Status copy(Stream stream, void* dst, const void* src, std::size_t bytes) override {
    const RecordSite site = stream.lane == Lane::kLoad ? RecordSite::kLoadLoaded : RecordSite::kStoreStored;
    if (!is(Mutant::Kind::kEarly, static_cast<int>(site))) return inner_->copy(stream, dst, src, bytes);
    late_ = {dst, src, bytes};
    return {};
  }
  using Backend::record;
  Status record(Event event, Stream stream, RecordSite site) override {
    if (is(Mutant::Kind::kRecord, static_cast<int>(site))) return strike();
    if (Status status = inner_->record(event, stream, site); !status.ok()) return status;
    if (!is(Mutant::Kind::kEarly, static_cast<int>(site)) || late_.bytes == 0) return {};
    const Copy copy = std::exchange(late_, {});
    ++*struck_;
    return inner_->copy(stream, copy.dst, copy.src, copy.bytes);
  }
  Status wait(Stream stream, Event event, WaitSite site) override {
    return is(Mutant::Kind::kWait, static_cast<int>(site)) ? strike() : inner_->wait(stream, event, site);
  }
  Status synchronize(Event event, WaitSite site) override {
    return is(Mutant::Kind::kWait, static_cast<int>(site)) ? strike() : inner_->synchronize(event, site);
  }
  Result<bool> query(Event event) override { return inner_->query(event); }
  Result<std::int64_t> timestamp(Event event) override { return inner_->timestamp(event); }
  Status register_host(void* address, std::size_t bytes) override { return inner_->register_host(address, bytes); }
  Status unregister_host(void* address) override { return inner_->unregister_host(address); }
  Status check_process() const override { return inner_->check_process(); }

 private:
  struct Copy {
    void* dst = nullptr;
    const void* src = nullptr;
    std::size_t bytes = 0;
  };

  bool is(Mutant::Kind kind, int which) const { return mutant_.kind == kind && mutant_.which == which; }
  Status strike() {
    ++*struck_;
    return {};
  }

  std::unique_ptr<Backend> inner_;
  const Mutant mutant_;
  std::size_t* struck_;
  Copy late_;
};

struct Outcome {
  std::size_t struck = 0;  // how often the order was broken
  std::size_t noticed = 0;
};

Outcome run(const Mutant& mutant, std::uint64_t seed) {
  start_fake(seed);
  Outcome outcome;
  {
    World::Options options;
    options.pages = 2 + seed % 6;
    options.slots = 1 + seed % 4;
    options.wrap = [&](std::unique_ptr<Backend> inner) {
      return std::make_unique<MutantBackend>(std::move(inner), mutant, &outcome.struck);
    };
    World world(options, seed);
    world.random_steps(150);
    world.finish();
    outcome.noticed = world.wrong();
  }
  outcome.noticed += fakecuda_violations();
  return outcome;
}

TEST(every_mutant_is_noticed_and_the_original_is_not) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const Outcome original = run({"the original"}, seed);
    CHECK(original.struck == 0 && original.noticed == 0);
  }
  for (const Mutant& mutant : kMutants) {
    Outcome outcome;
    for (std::uint64_t seed = 0; seed < 1000 && outcome.noticed == 0; ++seed) outcome = run(mutant, seed);
    if (outcome.noticed == 0) test::report(__FILE__, __LINE__, std::string("survived: ") + mutant.name);
    CHECK(outcome.struck > 0);
  }
}

}  // namespace
