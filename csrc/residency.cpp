#include "residency.h"

namespace chunkft {
namespace {

bool on_device(Place place) { return place == Place::kLoading || place == Place::kIdle; }

// What is left on the host when the device copy is forgotten. An older write-back may still run behind stale content
// (saved, acquired again, changed), so that stale turns into writing: invariant 6 holds for the next load too.
HostCopy host_after_discard(HostCopy host) {
  return host == HostCopy::kCanonical ? HostCopy::kCanonical : HostCopy::kWriting;
}

}  // namespace

bool is_acquired(Place place) { return place == Place::kInUse || place == Place::kClaimed; }

std::optional<Residency> next(Residency from, Move move) {
  const auto [place, host] = from;
  switch (move) {
    case Move::kLoad:
      if (place == Place::kHost) return Residency{Place::kLoading, host};
      break;
    case Move::kClaim:
      if (place == Place::kHost) return Residency{Place::kClaimed, host};
      break;
    case Move::kAcquire:
      if (on_device(place)) return Residency{Place::kInUse, host};
      break;
    case Move::kReleaseClean:
      if (place == Place::kInUse) return Residency{Place::kIdle, host};
      // Nobody wrote the claimed slot: its content never was the page's.
      if (place == Place::kClaimed) return Residency{Place::kHost, host};
      break;
    case Move::kReleaseDirty:
      if (is_acquired(place)) return Residency{Place::kIdle, HostCopy::kStale};
      break;
    case Move::kSave:
      if (place == Place::kIdle && host == HostCopy::kStale) return Residency{Place::kIdle, HostCopy::kWriting};
      break;
    case Move::kEvict:
      if (place == Place::kPoisoned) return Residency{Place::kHost, HostCopy::kWriting};
      if (on_device(place)) return Residency{Place::kHost, host == HostCopy::kStale ? HostCopy::kWriting : host};
      break;
    case Move::kStored:
      if (host == HostCopy::kWriting) return Residency{place, HostCopy::kCanonical};
      break;
    case Move::kStoreFailed:
      if (place == Place::kIdle && host == HostCopy::kStale) return Residency{Place::kPoisoned, host};
      break;
    case Move::kDiscard:
      if (place == Place::kPoisoned) return Residency{Place::kHost, HostCopy::kCanonical};
      return Residency{Place::kHost, host_after_discard(host)};
  }
  return std::nullopt;
}

State state_of(Residency residency) {
  switch (residency.place) {
    case Place::kHost:
      return residency.host == HostCopy::kCanonical ? State::kHost : State::kStoring;
    case Place::kLoading:
      return State::kLoading;
    case Place::kIdle:
      if (residency.host == HostCopy::kStale) return State::kDirty;
      return residency.host == HostCopy::kCanonical ? State::kResident : State::kStoring;
    case Place::kInUse:
    case Place::kClaimed:
      return State::kInUse;
    case Place::kPoisoned:
      break;
  }
  return State::kPoisoned;
}

const char* name_of(State state) {
  switch (state) {
    case State::kHost:
      return "HOST";
    case State::kLoading:
      return "LOADING";
    case State::kResident:
      return "RESIDENT";
    case State::kInUse:
      return "IN_USE";
    case State::kDirty:
      return "DIRTY";
    case State::kStoring:
      return "STORING";
    case State::kPoisoned:
      break;
  }
  return "POISONED";
}

bool host_is_canonical(Residency residency) {
  return residency.host == HostCopy::kCanonical && !is_acquired(residency.place) &&
         residency.place != Place::kPoisoned;
}

}  // namespace chunkft
