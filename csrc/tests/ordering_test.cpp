// The engine over the CUDA backend over the fake driver: who waits for whom, and who never waits at all.
#include <cstring>

#include "cuda_world.h"

namespace {

using namespace chunkft;
using namespace chunkft::test;

TEST(random_programs_race_nowhere_and_see_every_version) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    start_fake(seed);
    fakecuda_policy(seed % 3 == 0 ? FAKECUDA_LAZY : FAKECUDA_RANDOM);
    std::size_t wrong = 0;
    {
      World::Options options;
      options.pages = 2 + seed % 6;
      options.slots = 1 + seed % 4;
      options.trace_events = seed % 2 ? 64 : 0;
      World world(options, seed);
      world.random_steps(150);
      world.finish();
      wrong = world.wrong();
    }
    CHECK(wrong == 0);
    if (!clean() || wrong != 0) {
      std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
      return test::report(__FILE__, __LINE__, "a random program failed");
    }
  }
}

TEST(the_host_may_write_a_page_that_was_flushed_and_discarded) {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    start_fake(seed);
    std::size_t wrong = 0;
    {
      World world({}, seed);
      for (std::size_t page : {0, 1, 0}) {
        world.prefetch(page);
        if (seed % 2) {
          world.acquire(page, 0, true);
          world.release(page, 0, false, true);
        }
        world.flush();
        world.discard(page);
        world.write_host(page);
        world.acquire(page, 1, true);
        world.release(page, 1, true, false);
      }
      world.finish();
      wrong = world.wrong();
    }
    CHECK(wrong == 0);
    if (!clean()) return test::report(__FILE__, __LINE__, "the host writes while the device reads");
  }
}

// A whole sweep as the optimizers run it: one page resident for an interval, the next prefetched, written back behind.
TEST(a_steady_sweep_makes_no_host_wait_and_creates_nothing) {
  for (std::size_t trace : {std::size_t{0}, std::size_t{4096}}) {
    start_fake(trace);
    {
      World::Options options;
      options.pages = 8;
      options.slots = 2;
      options.trace_events = trace;
      World world(options);
      auto sweep = [&] {
        for (std::size_t page = 0; page < world.pages(); ++page) {
          world.acquire(page, 2, true);
          for (int step = 0; step < 3; ++step) {
            world.release(page, 2, true, true);
            world.acquire(page, 2, true);
          }
          world.prefetch((page + 1) % world.pages());
          world.release(page, 2, true, false);
        }
      };
      sweep();
      fakecuda_reset_counters();
      sweep();
      CHECK(fakecuda_host_syncs() == 0);
      for (const char* name : {"cuStreamSynchronize", "cuEventSynchronize", "cuStreamCreate", "cuStreamDestroy_v2",
                               "cuEventCreate", "cuEventDestroy_v2", "cuMemAlloc_v2", "cuMemHostRegister_v2"}) {
        CHECK(fakecuda_calls(name) == 0);
      }
      CHECK(fakecuda_calls("cuMemcpyHtoDAsync_v2") == world.pages());
      CHECK(fakecuda_calls("cuMemcpyDtoHAsync_v2") == world.pages());
      if (trace == 0) {
        // A page and interval: load, write-back, and for each of the four uses a wait and a record.
        CHECK(fakecuda_calls("cuEventQuery") == 0);
        CHECK(fakecuda_calls("cuEventRecord") == world.pages() * (2 + 4));
        CHECK(fakecuda_calls("cuStreamWaitEvent") == world.pages() * (3 + 4));
      }
      CHECK(world.wrong() == 0);
      world.finish();
    }
    CHECK(clean());
  }
}

}  // namespace
