"""Where the weights of a model live while it is trained: on the device, or in host pages that visit it block by block."""

from chunkft.weights.units import Block, PlacedWeight, Table, Units, find_units

__all__ = ["Block", "PlacedWeight", "Table", "Units", "find_units"]
