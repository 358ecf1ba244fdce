"""The Python face of the native core: host memory that optimizer state lives in while its chunk is not active."""

from chunkft.streaming.arena import HostArena

__all__ = ["HostArena"]
