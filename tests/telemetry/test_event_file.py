"""The checksum of TensorBoard records, against the one that the tensorboard package computes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow as oracle

from nemo_fp8_recipes.telemetry.sinks.event_file import masked_crc32c


@given(st.binary(max_size=1200))
def test_the_checksum_is_the_one_that_tensorboard_computes(data: bytes) -> None:
    assert masked_crc32c(data) == oracle.masked_crc32c(data)
