#pragma once

#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "adaptors.h"
#include "cuda_backend.h"
#include "engine.h"
#include "fake.h"

namespace chunkft::test {

// An engine over the CUDA backend over the fake driver, used at random by a program with three streams of its own, and a
// model of what each page must contain. Whatever goes wrong is counted, not checked: mutants want it to go wrong.
class World {
 public:
  using Word = std::uint32_t;

  struct Options {
    std::size_t pages = 5;
    std::size_t slots = 3;
    std::size_t trace_events = 0;
    std::function<std::unique_ptr<Backend>(std::unique_ptr<Backend>)> wrap;  // a mutant
  };

  explicit World(const Options& options, std::uint64_t seed = 0)
      : program_(std::make_unique<Program>()), slots_(options.slots), random_(seed), pages_(options.pages) {
    std::vector<std::size_t> bytes;
    std::vector<std::uintptr_t> host, slots;
    std::byte* memory = program_->host(options.pages * kStride);
    for (std::size_t i = 0; i < options.pages; ++i) {
      Page& page = pages_[i];
      page.words = 5 + 3 * i;
      page.host = reinterpret_cast<Word*>(memory + i * kStride);
      page.host_version = page.version = static_cast<Word>(1000 * (i + 1));
      std::fill_n(page.host, page.words, page.version);
      bytes.push_back(page.words * sizeof(Word));
      host.push_back(reinterpret_cast<std::uintptr_t>(page.host));
    }
    for (std::size_t i = 0; i < options.slots; ++i) {
      slot_.push_back(reinterpret_cast<Word*>(program_->device(bytes.back())));
      slots.push_back(reinterpret_cast<std::uintptr_t>(slot_.back()));
    }
    streams_ = {program_->stream(), program_->stream(), nullptr};
    program_->api().cuEventCreate(&handover_, kCuEventDisableTiming);

    auto backend = CudaBackend::create(0);
    if (!backend.ok()) {
      error_ = backend.error();
      return;
    }
    std::unique_ptr<Backend> wrapped = std::move(backend.value());
    if (options.wrap) wrapped = options.wrap(std::move(wrapped));
    auto engine = Engine::create(Layout::create(bytes, host, slots, bytes.back()).value(), std::move(wrapped),
                                 {options.trace_events});
    if (engine.ok()) {
      engine_ = std::move(engine.value());
    } else {
      error_ = engine.error();
    }
  }

  ~World() {
    engine_.reset();
    program_->api().cuEventDestroy_v2(handover_);
    for (CuStream stream : streams_) program_->api().cuStreamSynchronize(stream);
  }

  Engine& engine() { return *engine_; }
  const std::optional<Error>& error() const { return error_; }  // why there is no engine
  Program& program() { return *program_; }
  std::size_t wrong() const { return wrong_; }  // results and values that differ from the model
  CuStream stream(std::size_t i) const { return streams_[i]; }
  std::size_t pages() const { return pages_.size(); }
  bool acquired(std::size_t page) const { return pages_[page].where == Where::kAcquired; }

  void random_steps(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) random_step();
  }

  void random_step() {
    const std::size_t page = pick(pages_.size());
    switch (pick(24)) {
      case 0:
        return write_back(page);
      case 1:
        return evict(page);
      case 2:
        discard(page);
        return pick(2) == 0 ? write_host(page) : void();
      case 3:
        return pick(3) == 0 ? flush() : prefetch(page);
      default:
        break;
    }
    switch (pick(3)) {
      case 0:
        return prefetch(page);
      case 1:
        return acquire(page, pick(3), pick(4) != 0);
      default:
        return release(page, pick(3), pick(2) == 0, pick(2) == 0);
    }
  }

  void prefetch(std::size_t i) {
    auto started = engine_->prefetch(i);
    expect(started.ok());
    if (!started.ok()) return;
    Page& page = pages_[i];
    if (page.where != Where::kHost) return expect(started.value());
    const bool fits = take_slot();
    expect(started.value() == fits);
    if (fits) page.where = Where::kLoading, page.version = page.host_version;
  }

  void acquire(std::size_t i, std::size_t stream, bool load) {
    Page& page = pages_[i];
    auto slot = engine_->acquire(i, caller(stream), load);
    if (page.where == Where::kAcquired) return expect(!slot.ok() && slot.error().code == Code::kInvalidArgument);
    page.defined = true;
    if (page.where == Where::kHost) {
      if (!take_slot()) return expect(!slot.ok() && slot.error().code == Code::kBusy);
      page.version = page.host_version;
      page.defined = load;
    }
    expect(slot.ok());
    if (!slot.ok()) return;
    idle_.erase(std::remove(idle_.begin(), idle_.end(), i), idle_.end());
    page.where = Where::kAcquired;
    page.slot = slot.value();
    page.stream = stream;
    if (page.defined) kernel(i, false);
  }

  void release(std::size_t i, std::size_t stream, bool dirty, bool keep) {
    Page& page = pages_[i];
    if (page.where != Where::kAcquired) {
      const Status status = engine_->release(i, caller(stream), dirty, keep);
      return expect(!status.ok() && status.error().code == Code::kInvalidArgument);
    }
    if (dirty) kernel(i, true);
    if (stream != page.stream) {  // the program's own duty: the stream that releases has waited for the one that worked
      program_->api().cuEventRecord(handover_, streams_[page.stream]);
      program_->api().cuStreamWaitEvent(streams_[stream], handover_, 0);
    }
    expect(engine_->release(i, caller(stream), dirty, keep).ok());
    if (!page.defined) {  // claimed and not written: the page is what it was
      page.version = page.host_version;
      return leave(i);
    }
    page.dirty = page.dirty || dirty;
    page.where = Where::kIdle;
    idle_.push_back(i);
    if (!keep) give_up(i);
  }

  void write_back(std::size_t i) {
    const Status status = engine_->write_back(i);
    expect(status.ok() == (pages_[i].where != Where::kAcquired));
    if (status.ok()) store(i);
  }

  void evict(std::size_t i) {
    const Status status = engine_->evict(i);
    expect(status.ok() == (pages_[i].where != Where::kAcquired));
    if (status.ok() && pages_[i].where != Where::kHost) give_up(i);
  }

  void discard(std::size_t i) {
    expect(engine_->discard(i).ok());
    Page& page = pages_[i];
    page.version = page.host_version;
    page.dirty = false;
    if (page.where != Where::kHost) leave(i);
  }

  void flush() {
    expect(engine_->flush().ok());
    for (std::size_t i = 0; i < pages_.size(); ++i) {
      if (pages_[i].where == Where::kAcquired) continue;
      store(i);
      read_host(i);
    }
  }

  // The host copy must be the page now.
  void read_host(std::size_t i) {
    const Page& page = pages_[i];
    fakecuda_host_read(page.host, page.words * sizeof(Word), "read");
    expect(std::all_of(page.host, page.host + page.words, [&](Word w) { return w == page.host_version; }));
  }

  // Writes into the host copy of a page that was flushed and discarded.
  void write_host(std::size_t i) {
    Page& page = pages_[i];
    page.version = page.host_version = ++last_version_;
    fakecuda_host_write(page.host, page.words * sizeof(Word), "write");
    std::fill_n(page.host, page.words, page.version);
  }

  // Ends all that is under way and looks at every page.
  void finish() {
    for (std::size_t i = 0; i < pages_.size(); ++i) {
      if (acquired(i)) release(i, pages_[i].stream, true, true);
    }
    flush();
    expect(engine_->close().ok());
  }

 private:
  enum class Where { kHost, kLoading, kIdle, kAcquired };
  struct Page {
    std::size_t words = 0;
    Word* host = nullptr;
    Where where = Where::kHost;
    Word host_version = 0;  // in the host copy, once the write-backs that were started are done
    Word version = 0;       // on the device
    bool dirty = false;
    bool defined = false;   // while acquired: the slot has content
    std::size_t slot = 0;
    std::size_t stream = 0;
  };
  struct Work {
    World* world;
    Word* slot;
    std::size_t words;
    std::optional<Word> expected, written;
  };
  static constexpr std::size_t kStride = 256;

  Stream caller(std::size_t stream) const {
    return Stream::caller(reinterpret_cast<std::uintptr_t>(streams_[stream]));
  }
  std::size_t pick(std::size_t below) { return random_() % below; }
  void expect(bool as_modelled) { wrong_ += !as_modelled; }

  // What the program does with an acquired page: look at every word, and perhaps write a new version.
  void kernel(std::size_t i, bool write) {
    Page& page = pages_[i];
    Work& work = works_.emplace_back(Work{this, slot_[page.slot], page.words, std::nullopt, std::nullopt});
    if (page.defined) work.expected = page.version;
    if (write) work.written = page.version = ++last_version_;
    page.defined = page.defined || write;
    const std::size_t bytes = page.words * sizeof(Word);
    launch(
        streams_[page.stream], "use", {write ? writes(work.slot, bytes) : reads(work.slot, bytes)},
        [](void* argument) {
          auto& w = *static_cast<Work*>(argument);
          if (w.expected) {
            w.world->expect(std::all_of(w.slot, w.slot + w.words, [&](Word word) { return word == *w.expected; }));
          }
          if (w.written) std::fill_n(w.slot, w.words, *w.written);
        },
        &work);
  }

  bool take_slot() {
    if (used_ < slots_) return ++used_, true;
    if (idle_.empty()) return false;
    give_up(idle_.front());
    return ++used_, true;
  }
  void store(std::size_t i) {
    if (pages_[i].dirty) pages_[i].host_version = pages_[i].version;
    pages_[i].dirty = false;
  }
  void give_up(std::size_t i) {
    store(i);
    leave(i);
  }
  void leave(std::size_t i) {
    pages_[i].where = Where::kHost;
    idle_.erase(std::remove(idle_.begin(), idle_.end(), i), idle_.end());
    --used_;
  }

  std::unique_ptr<Program> program_;
  std::size_t slots_;
  std::mt19937_64 random_;
  std::vector<Page> pages_;
  std::vector<Word*> slot_;
  std::vector<CuStream> streams_;
  CuEvent handover_ = nullptr;
  std::unique_ptr<Engine> engine_;
  std::optional<Error> error_;
  std::deque<Work> works_;  // stable addresses: kernels run late
  std::vector<std::size_t> idle_;  // in the order of release
  std::size_t used_ = 0;
  std::size_t wrong_ = 0;
  Word last_version_ = 1'000'000;
};

}  // namespace chunkft::test
