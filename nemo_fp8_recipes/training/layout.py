"""How a job is laid out over its processes, and whether its sizes divide. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.training.schema import ModelConfig, TrainingConfig

__all__ = ["ParallelSizes", "check_layout"]


@dataclass(frozen=True)
class ParallelSizes:
    """Ranks along each dimension; what they leave of the processes is data parallelism."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence: bool = False

    def data_parallel(self, processes: int) -> int:
        """Data-parallel ranks. Raises `ConfigError` when the processes do not divide."""
        model_ranks = self.tp * self.pp * self.cp
        if processes % model_ranks:
            raise ConfigError(
                f"{processes} process(es) do not divide into parallel.tp={self.tp} x parallel.pp={self.pp} "
                f"x parallel.cp={self.cp}.",
                key="parallel",
                value=model_ranks,
                allowed=[f"a multiple of {model_ranks} processes"],
                hint=f"Start it with torchrun --nproc-per-node {model_ranks}.",
            )
        return processes // model_ranks


def check_layout(model: ModelConfig, training: TrainingConfig, sizes: ParallelSizes, processes: int) -> None:
    """Raise `ConfigError`, naming the key, for a model that cannot be trained here or a size that cannot be
    split as the configuration says."""
    if model.hybrid is not None:
        raise ConfigError(
            f"{model.display_name} has Mamba layers, and `nemo-fp8 train` trains dense models.",
            key="model",
            value=model.name,
            hint="`nemo-fp8 doctor` and `nemo-fp8 show` know it; train it with Megatron-Bridge or NeMo.",
        )
    together = training.micro_batch_size * sizes.data_parallel(processes)
    demands = [
        (
            "training.global_batch_size",
            training.global_batch_size,
            "training.micro_batch_size x data-parallel ranks",
            together,
        ),
        ("model.num_layers", model.num_layers, "parallel.pp", sizes.pp),
        ("model.num_attention_heads", model.num_attention_heads, "parallel.tp", sizes.tp),
        ("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.tp", sizes.tp),
        ("model.seq_length", model.seq_length, "parallel.tp", sizes.tp if sizes.sequence else 1),
        ("model.seq_length", model.seq_length, "2 * parallel.cp", 2 * sizes.cp if sizes.cp > 1 else 1),
    ]
    for key, value, divisor_name, divisor in demands:
        if value % divisor:
            raise ConfigError(
                f"{key}={value} does not divide by {divisor_name}={divisor}.",
                key=key,
                value=value,
                allowed=[f"a multiple of {divisor}"],
            )
