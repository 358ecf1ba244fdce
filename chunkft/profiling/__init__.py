"""Profiles of training steps: times, copies, chunks and memory; what made the peak, and what would lower it."""

from chunkft.profiling.ledger import Block, Ledger
from chunkft.profiling.result import Holder, Peak, Profile
from chunkft.profiling.savings import Saving
from chunkft.profiling.session import profile
from chunkft.profiling.timeline import Phase, Timeline

__all__ = ["Block", "Holder", "Ledger", "Peak", "Phase", "Profile", "Saving", "Timeline", "profile"]
