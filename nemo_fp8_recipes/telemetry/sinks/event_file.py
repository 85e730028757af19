"""A TensorBoard event file: records of serialised `Event` messages, in the TFRecord format.

    uint64 length | uint32 masked CRC-32C of it | data | uint32 masked CRC-32C of the data     little-endian

The tensorboard package's `EventFileWriter` writes the same, but takes the checksum a byte at a time in
Python, on a thread that the training shares its interpreter with.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any, BinaryIO

from nemo_fp8_recipes.telemetry.sinks.crc32c import masked_crc32c

__all__ = ["EventFile"]

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
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = struct.pack("<I", masked_crc32c(length)), struct.pack("<I", masked_crc32c(data))
        self._file.write(b"".join((length, checksums[0], data, checksums[1])))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
