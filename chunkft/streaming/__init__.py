"""The Python face of the native core: host memory for the optimizer state of chunks that are not active."""

from chunkft.streaming.arena import HostArena

__all__ = ["HostArena"]
