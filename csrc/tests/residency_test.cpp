#include "residency.h"

#include <string>
#include <vector>

#include "check.h"

namespace {

using namespace chunkft;

constexpr Place kPlaces[] = {Place::kHost,  Place::kLoading, Place::kIdle,
                             Place::kInUse, Place::kClaimed, Place::kPoisoned};
constexpr HostCopy kCopies[] = {HostCopy::kCanonical, HostCopy::kStale, HostCopy::kWriting};
constexpr Move kMoves[] = {Move::kLoad, Move::kClaim, Move::kAcquire, Move::kReleaseClean, Move::kReleaseDirty,
                           Move::kSave, Move::kEvict, Move::kStored,  Move::kStoreFailed,  Move::kDiscard};

constexpr Residency at(Place place, HostCopy host = HostCopy::kCanonical) { return {place, host}; }
constexpr HostCopy C = HostCopy::kCanonical, S = HostCopy::kStale, W = HostCopy::kWriting;
constexpr Place kHost = Place::kHost, kLoading = Place::kLoading, kIdle = Place::kIdle, kInUse = Place::kInUse,
                kClaimed = Place::kClaimed, kPoisoned = Place::kPoisoned;

struct Edge {
  Residency from;
  Move move;
  Residency to;
};

// Every state that can be reached, every move that is allowed in it. All others must be refused.
const std::vector<Edge> kEdges = {
    {at(kHost, C), Move::kLoad, at(kLoading, C)},
    {at(kHost, C), Move::kClaim, at(kClaimed, C)},
    {at(kHost, C), Move::kDiscard, at(kHost, C)},
    {at(kHost, W), Move::kLoad, at(kLoading, W)},
    {at(kHost, W), Move::kClaim, at(kClaimed, W)},
    {at(kHost, W), Move::kStored, at(kHost, C)},
    {at(kHost, W), Move::kDiscard, at(kHost, W)},
    {at(kLoading, C), Move::kAcquire, at(kInUse, C)},
    {at(kLoading, C), Move::kEvict, at(kHost, C)},
    {at(kLoading, C), Move::kDiscard, at(kHost, C)},
    {at(kLoading, W), Move::kAcquire, at(kInUse, W)},
    {at(kLoading, W), Move::kEvict, at(kHost, W)},
    {at(kLoading, W), Move::kStored, at(kLoading, C)},
    {at(kLoading, W), Move::kDiscard, at(kHost, W)},
    {at(kIdle, C), Move::kAcquire, at(kInUse, C)},
    {at(kIdle, C), Move::kEvict, at(kHost, C)},
    {at(kIdle, C), Move::kDiscard, at(kHost, C)},
    {at(kIdle, S), Move::kAcquire, at(kInUse, S)},
    {at(kIdle, S), Move::kSave, at(kIdle, W)},
    {at(kIdle, S), Move::kEvict, at(kHost, W)},
    {at(kIdle, S), Move::kStoreFailed, at(kPoisoned, S)},
    {at(kIdle, S), Move::kDiscard, at(kHost, W)},
    {at(kIdle, W), Move::kAcquire, at(kInUse, W)},
    {at(kIdle, W), Move::kEvict, at(kHost, W)},
    {at(kIdle, W), Move::kStored, at(kIdle, C)},
    {at(kIdle, W), Move::kDiscard, at(kHost, W)},
    {at(kInUse, C), Move::kReleaseClean, at(kIdle, C)},
    {at(kInUse, C), Move::kReleaseDirty, at(kIdle, S)},
    {at(kInUse, C), Move::kDiscard, at(kHost, C)},
    // Changed before, not changed this time: still changed.
    {at(kInUse, S), Move::kReleaseClean, at(kIdle, S)},
    {at(kInUse, S), Move::kReleaseDirty, at(kIdle, S)},
    {at(kInUse, S), Move::kDiscard, at(kHost, W)},
    {at(kInUse, W), Move::kReleaseClean, at(kIdle, W)},
    {at(kInUse, W), Move::kReleaseDirty, at(kIdle, S)},
    {at(kInUse, W), Move::kStored, at(kInUse, C)},
    {at(kInUse, W), Move::kDiscard, at(kHost, W)},
    // What was never loaded and never written must not pass for the page.
    {at(kClaimed, C), Move::kReleaseClean, at(kHost, C)},
    {at(kClaimed, C), Move::kReleaseDirty, at(kIdle, S)},
    {at(kClaimed, C), Move::kDiscard, at(kHost, C)},
    {at(kClaimed, W), Move::kReleaseClean, at(kHost, W)},
    {at(kClaimed, W), Move::kReleaseDirty, at(kIdle, S)},
    {at(kClaimed, W), Move::kStored, at(kClaimed, C)},
    {at(kClaimed, W), Move::kDiscard, at(kHost, W)},
    {at(kPoisoned, S), Move::kEvict, at(kHost, W)},
    {at(kPoisoned, S), Move::kDiscard, at(kHost, C)},
};

std::string text(Residency r, Move move) {
  return "place " + std::to_string(static_cast<int>(r.place)) + " host " + std::to_string(static_cast<int>(r.host)) +
         " move " + std::to_string(static_cast<int>(move));
}

bool contains(const std::vector<Residency>& states, Residency state) {
  for (Residency r : states) {
    if (r == state) return true;
  }
  return false;
}

std::vector<Residency> reachable(Residency start) {
  std::vector<Residency> states{start};
  for (std::size_t i = 0; i < states.size(); ++i) {
    for (Move move : kMoves) {
      const auto to = next(states[i], move);
      if (to && !contains(states, *to)) states.push_back(*to);
    }
  }
  return states;
}

TEST(every_move_in_every_reachable_state_does_what_the_table_says) {
  for (Residency from : reachable(at(kHost))) {
    for (Move move : kMoves) {
      const Edge* edge = nullptr;
      for (const Edge& e : kEdges) {
        if (e.from == from && e.move == move) edge = &e;
      }
      const auto to = next(from, move);
      if (to.has_value() != (edge != nullptr) || (edge != nullptr && *to != edge->to)) {
        chunkft::test::report(__FILE__, __LINE__, text(from, move));
      }
    }
  }
}

TEST(the_table_reaches_the_same_states_as_the_function) {
  const auto states = reachable(at(kHost));
  CHECK(states.size() == 13);
  for (const Edge& edge : kEdges) CHECK(contains(states, edge.from) && contains(states, edge.to));
}

// Whatever place and host copy are given, reachable or not, a move ends in a reachable state or is refused.
TEST(moves_from_unreachable_states_never_claim_that_a_poisoned_page_is_readable) {
  for (Place place : kPlaces) {
    for (HostCopy host : kCopies) {
      for (Move move : kMoves) {
        const auto to = next(at(place, host), move);
        if (!to) continue;
        CHECK(to->place != kPoisoned || !host_is_canonical(*to));
      }
    }
  }
}

TEST(every_state_leads_back_to_the_host) {
  for (Residency from : reachable(at(kHost))) CHECK(contains(reachable(from), at(kHost, C)));
}

// Follows, beside the residency, who has the newest content, as the moves mean it.
TEST(the_host_copy_is_canonical_only_when_it_has_the_newest_content) {
  struct World {
    Residency residency;
    bool host_newest = true;  // nobody else has newer content, and no write to it is under way
    bool operator==(const World&) const = default;
  };
  std::vector<World> worlds{{}};
  for (std::size_t i = 0; i < worlds.size(); ++i) {
    for (Move move : kMoves) {
      const auto to = next(worlds[i].residency, move);
      if (!to) continue;
      World world{*to, worlds[i].host_newest};
      if (move == Move::kReleaseDirty) world.host_newest = false;
      if (move == Move::kStored) world.host_newest = true;
      // Of a poisoned page the engine first waits for the store lane; of others the host copy wins when no write is left.
      if (move == Move::kDiscard && worlds[i].residency.host == S && to->host == C) world.host_newest = true;
      CHECK(!host_is_canonical(world.residency) || world.host_newest);
      bool seen = false;
      for (const World& other : worlds) seen = seen || other == world;
      if (!seen) worlds.push_back(world);
    }
  }
  CHECK(worlds.size() == 13);
}

TEST(users_see_seven_states) {
  CHECK(state_of(at(kHost, C)) == State::kHost);
  CHECK(state_of(at(kHost, W)) == State::kStoring);
  CHECK(state_of(at(kLoading, C)) == State::kLoading);
  CHECK(state_of(at(kLoading, W)) == State::kLoading);
  CHECK(state_of(at(kIdle, C)) == State::kResident);
  CHECK(state_of(at(kIdle, S)) == State::kDirty);
  CHECK(state_of(at(kIdle, W)) == State::kStoring);
  for (HostCopy host : kCopies) CHECK(state_of(at(kInUse, host)) == State::kInUse);
  CHECK(state_of(at(kClaimed, C)) == State::kInUse);
  CHECK(state_of(at(kPoisoned, S)) == State::kPoisoned);
  const State all[] = {State::kHost,  State::kLoading, State::kResident, State::kInUse,
                       State::kDirty, State::kStoring, State::kPoisoned};
  const char* names[] = {"HOST", "LOADING", "RESIDENT", "IN_USE", "DIRTY", "STORING", "POISONED"};
  for (int i = 0; i < 7; ++i) CHECK(std::string(name_of(all[i])) == names[i]);
}

TEST(the_host_copy_may_not_be_read_while_a_page_is_in_use_dirty_storing_or_poisoned) {
  for (Residency r : reachable(at(kHost))) {
    const State state = state_of(r);
    if (state == State::kInUse || state == State::kDirty || state == State::kStoring || state == State::kPoisoned) {
      CHECK(!host_is_canonical(r));
    }
  }
}

}  // namespace
