"""The writers that Megatron-LM's training loop keeps in global variables: TensorBoard and W&B.

Megatron makes them on the last rank only (`megatron/training/global_vars.py`). Megatron-Bridge has them in
its global state instead: give `state.tensorboard_logger` and `state.wandb_logger` as sinks.
"""

from __future__ import annotations

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.telemetry.series import StepValues
from nemo_fp8_recipes.telemetry.sinks.base import Sink
from nemo_fp8_recipes.telemetry.sinks.guard import GuardedSink

__all__ = ["MegatronSink"]


class MegatronSink(Sink):
    """Hands the values to the writers that Megatron has when the first ones come. Each is guarded on its
    own.
    """

    name = "megatron"

    def __init__(self) -> None:
        self._writers: list[Sink] | None = None

    def values(self, values: StepValues) -> None:
        if self._writers is None:
            self._writers = [GuardedSink(writer) for writer in _global_writers()]
        for writer in self._writers:
            writer.values(values)

    def flush(self) -> None:
        for writer in self._writers or ():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers or ():
            writer.close()


def _global_writers() -> list[Sink]:
    """The sinks of Megatron's writers on this rank.

    Raises:
        ConfigError: there are none here, or this is no job of Megatron-LM's training loop.
    """
    from nemo_fp8_recipes.telemetry.sinks import adopt

    try:
        from megatron.training import global_vars
    except ImportError as error:
        raise ConfigError(
            f"telemetry.sinks has megatron, and megatron.training cannot be imported: {error}.",
            key="telemetry.sinks",
            value="megatron",
        ) from error
    found = [global_vars.get_tensorboard_writer(), global_vars.get_wandb_writer()]
    writers = [adopt(writer) for writer in found if writer is not None]
    if not writers:
        raise ConfigError(
            "telemetry.sinks has megatron, and Megatron has no writer on this rank.",
            key="telemetry.sinks",
            value="megatron",
            hint="It makes them on the last rank, with --tensorboard-dir or --wandb-project: let that rank "
            "write (attach(is_writer=rank == world_size - 1)).",
        )
    return writers
