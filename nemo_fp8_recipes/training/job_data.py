"""The dataset that a job's configuration names, the same on every rank."""

from __future__ import annotations

from nemo_fp8_recipes.training.data import Dataset, Wanted, build_dataset
from nemo_fp8_recipes.training.distributed import same_everywhere, together
from nemo_fp8_recipes.training.invocation import Invocation
from nemo_fp8_recipes.training.settings import Settings

__all__ = ["load_dataset"]


def load_dataset(settings: Settings, invocation: Invocation) -> Dataset:
    """Build it on every rank, and check that all ranks see the same data with the same versions. Collective.

    Raises:
        Fp8Error: the data cannot be read, or ranks differ; on the first rank on which it happened.
        ReportedElsewhereError: on the other ranks then.
    """
    model, training = settings.model, settings.training
    wanted = Wanted(
        train=training.steps * training.global_batch_size,
        held_out=training.eval_batches * training.global_batch_size,
    )
    dataset = together(
        lambda: build_dataset(
            settings.data, seq_length=model.seq_length, vocab_size=model.vocab_size, wanted=wanted
        )
    )
    same_everywhere({"data.fingerprint": dataset.fingerprint, **invocation.versions})
    return dataset
