"""Sizes of memory and speeds of links as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_rate", "parse_size", "written"]

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: int | str, name: str) -> int:
    """Bytes of a size: an integer, or a number with one of B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (of
    1024), in any case.

    Args:
        value: the size.
        name: of the argument, for messages.

    Raises:
        TypeError: if it is neither an integer nor a string.
        ValueError: if it is not a size, or not at least one byte.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(
            f"{name}={value!r} is not a size; needs an integer in bytes, or a string such as '24GiB'"
        )
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"{name}={value!r} is not allowed; needs at least 1 byte")
        return value
    match = SIZE.fullmatch(value)
    unit = None if match is None else UNITS.get(match[2].upper())
    if match is None or unit is None:
        raise ValueError(
            f"{name}={value!r} is not a size; needs a number with a unit of B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, "
            "such as '24GiB'"
        )
    nbytes = int(float(match[1]) * unit)
    if nbytes < 1:
        raise ValueError(f"{name}={value!r} is not allowed; needs at least 1 byte")
    return nbytes


def parse_rate(value: float | str, name: str) -> float:
    """Bytes a second of a speed: a number in GB/s, or a string such as ``"25GB/s"``.

    Raises:
        TypeError: if it is neither a number nor a string.
        ValueError: if it is not a speed above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(
            f"{name}={value!r} is not a speed; needs a number in GB/s, or a string such as '25GB/s'"
        )
    if isinstance(value, str):
        number = value.strip()
        if number.lower().endswith("/s"):
            return float(parse_size(number[:-2], name))
        try:
            value = float(number)
        except ValueError:
            raise ValueError(
                f"{name}={value!r} is not a speed; needs a number in GB/s, or a string such as '25GB/s'"
            ) from None
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} is not allowed; needs a finite number above 0, in GB/s")
    return value * 1e9


def written(nbytes: float) -> str:
    """A size for a sentence: 1.2 GiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"
