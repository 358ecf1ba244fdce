"""Where the weights of a model live while it is trained: on the device, or in host pages that visit it by blocks."""

from chunkft.weights.guard import streams_in_part
from chunkft.weights.residence import DeviceLeaves, HostLeaves
from chunkft.weights.stream import WeightStream, stream_of
from chunkft.weights.units import Block, PlacedWeight, Table, Units, find_units

__all__ = [
    "Block",
    "DeviceLeaves",
    "HostLeaves",
    "PlacedWeight",
    "Table",
    "Units",
    "WeightStream",
    "find_units",
    "stream_of",
    "streams_in_part",
]
