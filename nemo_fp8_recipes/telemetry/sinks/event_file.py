"""A TensorBoard event file: records of serialised `Event` messages, in the TFRecord format.

    uint64 length | uint32 masked CRC-32C of it | data | uint32 masked CRC-32C of the data     little-endian

The tensorboard package's `EventFileWriter` writes the same, but takes the checksum a byte at a time in
Python, on a thread that the training shares its interpreter with: for the hundreds of scalars of a logging
step that is longer than everything else that telemetry does in one.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

__all__ = ["EventFile", "masked_crc32c", "record"]

_numbers = itertools.count()


class EventFile:
    """A new event file in `directory`, which is made where it is not there."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto import event_pb2

        directory.mkdir(parents=True, exist_ok=True)
        parts = (f"{int(time.time()):010d}", socket.gethostname(), str(os.getpid()), str(next(_numbers)))
        self.path = directory / f"events.out.tfevents.{'.'.join(parts)}"
        self._file: BinaryIO = self.path.open("xb")
        self.add(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def add(self, event: Any) -> None:
        """Append an `Event`; `flush` makes it readable by others."""
        self.add_serialized(event.SerializeToString())

    def add_serialized(self, data: bytes) -> None:
        """Append a serialised `Event`."""
        self._file.write(record(data))

    def write(self, records: bytes) -> None:
        """Append what `record` made, one or several."""
        self._file.write(records)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def record(data: bytes) -> bytes:
    """A serialised `Event` as it stands in the file."""
    length = struct.pack("<Q", len(data))
    checksums = struct.pack("<I", masked_crc32c(length)), struct.pack("<I", masked_crc32c(data))
    return b"".join((length, checksums[0], data, checksums[1]))


def masked_crc32c(data: bytes) -> int:
    """The CRC-32C as a TFRecord stores it (`tensorflow/core/lib/hash/crc32c.h`): rotated and offset, so that
    the checksum of data that holds checksums is sound.
    """
    crc = int(google_crc32c.value(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
