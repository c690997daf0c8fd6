"""Bisection for the largest number that fits."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], least: int, most: int = 1 << 20) -> int | None:
    """Find the largest number from ``least`` to ``most`` that fits; None if ``least`` does not.

    Args:
        fits: tells whether a number fits; if it does, so do all smaller ones.
        least: smallest number.
        most: largest number; if it is below ``least``, none fits.
    """
    if most < least or not fits(least):
        return None
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
