"""Small NeMo 2 jobs: NeMo's own Nemotron config, model, data module, optimizer, strategy and trainer.

Import it only where the emulated device is in place. What is said to the trainer is what a user's script
says: one GPU, the precision plugin, the callback.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from lightning.pytorch.loggers import Logger
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.collections.llm.gpt.model.nemotron import Nemotron3Config4B, NemotronModel
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from nemo_fp8_recipes.callbacks.nemo import Fp8RecipeCallback, precision_plugin

LAYERS, LINEARS = 4, 4  # linear layers of a transformer layer: qkv, proj, fc1, fc2
STEPS = 4
TP = 1


class Bytes:
    """What NeMo asks of a tokenizer."""

    vocab_size = 256
    eod = bos_id = pad_id = 0
    eos_id = unk_id = 1
    unique_identifiers: ClassVar[dict[str, Any]] = {}


class Losses(pl.Callback):
    """The loss of every step, and the recipe object in force inside Megatron's FP8 context."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.te_recipes: list[Any] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def note(_module: Any, _inputs: Any) -> None:
            if FP8GlobalStateManager.is_fp8_enabled():
                self.te_recipes.append(FP8GlobalStateManager.get_fp8_recipe())

        for name, module in trainer.strategy.megatron_parallel.named_modules():
            if name.endswith("layers.1.mlp.linear_fc1"):
                module.register_forward_pre_hook(note)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))


class Written(Logger):
    """A logger of the user's that keeps what it is given."""

    name, version = "written", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class NodeLostError(Exception):
    """What ends a job that is interrupted."""


class LoseNode(pl.Callback):
    """Ends the job after a step, before anything more is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise NodeLostError


class Data(llm.MockDataModule):
    """NeMo's mock data, which goes on after a checkpoint where it was, as NeMo's other data modules do."""

    def state_dict(self) -> dict[str, Any]:
        sampler = self.data_sampler
        return {
            "consumed": sampler.compute_consumed_samples(self.trainer.global_step - sampler.init_global_step)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.data_sampler.init_consumed_samples = state_dict["consumed"]
        self.data_sampler.prev_consumed_samples = state_dict["consumed"]


@dataclass
class Job:
    """A trainer with everything that `fit` or `llm.train` takes."""

    run_dir: Path
    callbacks: list[Any]
    plugin: Any
    steps: int = STEPS
    tp: int = 1
    interrupted_after: int | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    trainer_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seen = Losses()
        self.model = NemotronModel(
            Nemotron3Config4B(
                num_layers=LAYERS,
                hidden_size=128,
                ffn_hidden_size=256,
                num_attention_heads=4,
                num_query_groups=2,
                kv_channels=32,
                seq_length=64,
                **self.model_options,
            ),
            tokenizer=Bytes(),
        )
        self.data = Data(
            seq_length=64,
            micro_batch_size=2,
            global_batch_size=4,
            num_train_samples=400,
            num_val_samples=20,
            num_test_samples=20,
            num_workers=0,
            tokenizer=Bytes(),
        )
        self.optim = nl.MegatronOptimizerModule(
            config=OptimizerConfig(
                optimizer="adam", lr=1e-3, bf16=True, use_distributed_optimizer=False, clip_grad=1.0
            )
        )
        self.trainer = nl.Trainer(
            accelerator="gpu",
            devices=self.tp,
            num_nodes=1,
            strategy=nl.MegatronStrategy(tensor_model_parallel_size=self.tp, ckpt_async_save=False),
            plugins=self.plugin,
            callbacks=[
                *self.callbacks,
                self.seen,
                *([LoseNode(self.interrupted_after)] if self.interrupted_after else ()),
            ],
            max_steps=self.steps,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            log_every_n_steps=1,
            **{"logger": False, "enable_checkpointing": False, **self.trainer_options},
        )

    def fit(self) -> list[float]:
        """`trainer.fit`; the losses."""
        self.optim.connect(self.model)
        self.trainer.fit(self.model, self.data)
        return self.seen.losses

    def train(self, log_dir: Path, *, every: int | None = None, resume: bool = False) -> list[float]:
        """`llm.train`, with NeMo's logger, checkpoints and resume; the losses."""
        checkpoints = nl.ModelCheckpoint(
            every_n_train_steps=every, save_last=True, monitor=None, save_top_k=-1
        )
        llm.train(
            model=self.model,
            data=self.data,
            trainer=self.trainer,
            log=nl.NeMoLogger(
                log_dir=str(log_dir),
                name="t",
                use_datetime_version=False,
                ckpt=checkpoints if every else None,
            ),
            resume=nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True) if resume else None,
            optim=self.optim,
        )
        return self.seen.losses


def job(recipe: str, run_dir: Path, *, options: dict[str, Any] | None = None, **kwargs: Any) -> Job:
    """A job with the plugin and the callback of a recipe."""
    callback = Fp8RecipeCallback(recipe, options=options, run_dir=run_dir, log_every=1)
    plugin = precision_plugin(callback.recipe)
    return Job(run_dir, callbacks=[callback], plugin=plugin, **kwargs)


def clean() -> None:
    """What a trainer leaves in the process goes: process groups, Megatron's globals, amax buffers."""
    import torch.distributed as dist
    from megatron.core import num_microbatches_calculator, parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    FP8GlobalStateManager.reset()
    torch.manual_seed(1)
