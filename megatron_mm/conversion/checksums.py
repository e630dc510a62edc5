"""The CRC-32 of two concatenated byte strings, from the CRC-32 of each.

A CRC is linear: appending n zero bytes to a string multiplies its checksum by a bit matrix, which is the n-th power of the matrix for one
zero byte. Powers are computed by squaring, so any length takes at most 64 products of matrices and a few of a matrix and a checksum.
"""

from __future__ import annotations

from functools import cache

_POLYNOMIAL = 0xEDB88320
Matrix = tuple[int, ...]
"""32 columns: the image of each bit of a checksum."""


def combine(first: int, second: int, second_length: int) -> int:
    """CRC-32 of a byte string with the checksum `first`, followed by one of `second_length` bytes with the checksum `second`."""
    power = 0
    while second_length:
        if second_length & 1:
            first = _times(_zero_bytes(power), first)
        second_length >>= 1
        power += 1
    return first ^ second


@cache
def _zero_bytes(power: int) -> Matrix:
    """Matrix that appends 2^power zero bytes to a checksum."""
    if power:
        half = _zero_bytes(power - 1)
        return tuple(_times(half, column) for column in half)
    matrix: Matrix = (_POLYNOMIAL, *(1 << bit for bit in range(31)))  # one zero bit
    for _ in range(3):
        matrix = tuple(_times(matrix, column) for column in matrix)
    return matrix


def _times(matrix: Matrix, vector: int) -> int:
    result, column = 0, 0
    while vector:
        if vector & 1:
            result ^= matrix[column]
        vector >>= 1
        column += 1
    return result
