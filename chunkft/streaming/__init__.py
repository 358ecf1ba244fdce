"""The Python face of the native core: host memory for optimizer state, and the pager that moves it."""

from chunkft.streaming.arena import HostArena, cuda_info, memory_budget
from chunkft.streaming.files import CorruptPageError
from chunkft.streaming.homes import file_tier_nbytes
from chunkft.streaming.pager import Pager
from chunkft.streaming.pinning import host_memory
from chunkft.streaming.place import place_of
from chunkft.streaming.stats import PagerStats

__all__ = [
    "CorruptPageError",
    "HostArena",
    "Pager",
    "PagerStats",
    "cuda_info",
    "file_tier_nbytes",
    "host_memory",
    "memory_budget",
    "place_of",
]
