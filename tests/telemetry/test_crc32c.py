"""The checksum of TensorBoard records, against the one that the tensorboard package computes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow as oracle

from nemo_fp8_recipes.telemetry.sinks.crc32c import crc32c, masked_crc32c


def test_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4, and every catalogue of CRCs
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"") == 0


@given(st.binary(max_size=1200), st.integers(min_value=0, max_value=3))
def test_as_tensorboard_computes_it(data: bytes, repeated: int) -> None:
    data *= 1 + repeated
    assert masked_crc32c(data) == oracle.masked_crc32c(data)
