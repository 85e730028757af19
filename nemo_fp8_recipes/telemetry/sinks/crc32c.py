"""CRC-32C (Castagnoli), the checksum of a TensorBoard record, over whole arrays.

The tensorboard package computes it a byte at a time in Python, which for the hundreds of scalars of a logging
step takes longer than everything else that telemetry does in one. A CRC is linear over XOR: what a byte
contributes depends on nothing but its value and the number of bytes after it. So the contributions of all
bytes of a block are looked up and XORed at once, and only the blocks follow one another.
"""

from __future__ import annotations

import functools

import numpy as np

__all__ = ["crc32c", "masked_crc32c"]

_POLYNOMIAL = 0x82F63B78  # reflected
_BLOCK = 256
_ALL_ONES = 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`."""
    if len(data) < _BLOCK:
        return _bytewise(data)
    # Zeros in front of the data change nothing while the register is 0. Its real start, all ones, is XORed
    # into the first four bytes.
    blocks = np.zeros((-(-len(data) // _BLOCK), _BLOCK), dtype=np.uint8)
    flat = blocks.reshape(-1)
    start = flat.size - len(data)
    flat[start:] = np.frombuffer(data, dtype=np.uint8)
    flat[start : start + 4] ^= 0xFF
    contributions = _tables().reshape(-1)[np.arange(_BLOCK) * 256 + blocks]
    first, second, third, fourth = _first_tables()
    register = 0
    for block in np.bitwise_xor.reduce(contributions, axis=1).tolist():
        register = (
            block
            ^ first[register & 0xFF]
            ^ second[register >> 8 & 0xFF]
            ^ third[register >> 16 & 0xFF]
            ^ fourth[register >> 24]
        )
    return int(register ^ _ALL_ONES)


def masked_crc32c(data: bytes) -> int:
    """The CRC-32C as a TFRecord stores it (`tensorflow/core/lib/hash/crc32c.h`): rotated and offset, so that
    the checksum of data that holds checksums is sound.
    """
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & _ALL_ONES


def _bytewise(data: bytes) -> int:
    table = _last_table()
    register = _ALL_ONES
    for byte in data:
        register = register >> 8 ^ table[(register ^ byte) & 0xFF]
    return register ^ _ALL_ONES


@functools.cache
def _tables() -> np.ndarray:
    """uint32 (256, 256): what a byte contributes, by its place in a block and its value."""
    last = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = np.where(last & 1, last >> 1 ^ np.uint32(_POLYNOMIAL), last >> 1)
    tables = np.empty((_BLOCK, 256), dtype=np.uint32)
    tables[-1] = last
    for place in range(_BLOCK - 2, -1, -1):
        after = tables[place + 1]
        tables[place] = after >> 8 ^ last[after & 0xFF]
    return tables


@functools.cache
def _first_tables() -> tuple[list[int], ...]:
    """Where the register goes in: it is XORed into the first four bytes of the next block."""
    return tuple(row.tolist() for row in _tables()[:4])


@functools.cache
def _last_table() -> list[int]:
    table: list[int] = _tables()[-1].tolist()
    return table
