#pragma once

#include <optional>

namespace chunkft {

// Where a page is, as users see it.
enum class State { kHost, kLoading, kResident, kInUse, kDirty, kStoring, kPoisoned };

// What the engine knows of a page's two copies. kWriting says that a write-back was given to the store lane and that the
// host has not yet seen it done; it can lie behind any place, because a page may be wanted again before it is written.
enum class Place {
  kHost,      // not on the device
  kLoading,   // a load was started; nobody has acquired the page since
  kIdle,      // on the device, released
  kInUse,     // on the device, acquired
  kClaimed,   // acquired without a load: the slot's content is undefined until the caller writes it
  kPoisoned,  // a write-back could not be started; the newest content is still in the slot
};
enum class HostCopy {
  kCanonical,  // the newest content
  kStale,      // the device has newer content
  kWriting,    // about to be the newest content; must not be read yet
};

struct Residency {
  Place place = Place::kHost;
  HostCopy host = HostCopy::kCanonical;
  bool operator==(const Residency&) const = default;
};

enum class Move {
  kLoad,
  kClaim,
  kAcquire,
  kReleaseClean,
  kReleaseDirty,
  kSave,         // a write-back was started, the device copy stays
  kEvict,        // the device copy is given up, behind a write-back where there is something to write
  kStored,       // the host has seen the write-back done
  kStoreFailed,  // a write-back could not be started
  kDiscard,      // the device copy is given up, whatever is in it
};

// The state after a move, or nothing when the move is not allowed in this state. Pure: the whole of the page logic that
// can be decided without knowing slots and streams.
std::optional<Residency> next(Residency from, Move move);

bool is_acquired(Place place);
State state_of(Residency residency);
const char* name_of(State state);  // "HOST", "LOADING", ...

// Whether the host copy may be read: invariant 1 of the streaming core.
bool host_is_canonical(Residency residency);

}  // namespace chunkft
