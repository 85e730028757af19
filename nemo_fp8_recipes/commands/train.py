"""`nemo-fp8 train`: a pre-training job, in the reference loop or through NeMo's or Bridge's trainer."""

from __future__ import annotations

import os
import time

from nemo_fp8_recipes import config
from nemo_fp8_recipes.errors import (
    ConfigError,
    EmulationError,
    Fp8Error,
    InjectionError,
    PreflightError,
    RecipeError,
)
from nemo_fp8_recipes.launch import sweep
from nemo_fp8_recipes.training.errors import DivergedError, ReportedElsewhereError
from nemo_fp8_recipes.training.interruption import end_on_ctrl_c
from nemo_fp8_recipes.training.job import run_job

__all__ = ["HELP", "run"]

PATIENCE_SECONDS = 20.0

HELP = """
usage: nemo-fp8 train [group=choice] [group.key=value] ...
       nemo-fp8 train -m [group=choice,choice,…] [group.key=value,value,…] … [hydra.<key>=…]

Pre-train a GPT model with Megatron-Core and Transformer Engine, quantised by the recipe. With no GPU and no
torchrun the device is emulated; anywhere else ask for that with device=emulated.

groups:
  fp8_recipe=bf16|delayed|tensorwise|mxfp8|blockwise|nvfp4   fp8_recipe.<option>=… sets one of its options
  model=nemotron_tiny|nemotron3_4b|nemotron3_8b              model.num_layers, model.hidden_size, …
  data=stdlib_text|mock|megatron_indexed                     data.path, data.blend, data.seed, …
  training.steps=250                                         micro_batch_size, global_batch_size, seed, …
  framework=megatron_core|nemo|bridge                        whose trainer runs the job
  optimizer.lr=2e-3                                          clip_grad, distributed_optimizer, …
  parallel.tp=1 parallel.pp=1 parallel.cp=1                  parallel.sequence=true
  hardware=auto|h100|b200|…                                  the GPU the job is for
  device=auto|native|emulated                                where it runs
  run_dir=PATH                                               default: runs/<recipe>-<time>
  training.resume=auto|RUN_DIR                               go on from its newest checkpoint

examples:
  nemo-fp8 train fp8_recipe=mxfp8
  nemo-fp8 train fp8_recipe=delayed fp8_recipe.amax_history_len=16 model.num_layers=2 training.steps=50
  torchrun --nproc-per-node 8 -m nemo_fp8_recipes train fp8_recipe=blockwise model=nemotron3_8b parallel.tp=2

-m runs a job for each combination of values, as Hydra's multirun: one after the other, or all at once as a
SLURM job array with hydra/launcher=submitit_slurm, which takes its settings from launcher=slurm:
  nemo-fp8 train -m fp8_recipe=delayed,tensorwise,blockwise hydra/launcher=submitit_slurm launcher.time=240

Ctrl-C or SIGTERM ends the step, saves a checkpoint when training.save_every is set, and exits 130 or 143.
"""


def run(arguments: list[str]) -> int:
    """Compose the configuration from `arguments` and run the job."""
    if sweep.asked(arguments):
        return sweep.run(arguments)
    command = ["nemo-fp8", "train", *arguments]
    try:
        with end_on_ctrl_c():
            return run_job(config.compose(arguments), command=command, overrides=arguments)
    except Fp8Error as error:
        if _reported_by_another_rank(error):
            # torchrun ends all processes when the first one exits: let the one that reports come first.
            time.sleep(PATIENCE_SECONDS)
            return error.exit_code
        raise


def _reported_by_another_rank(error: Fp8Error) -> bool:
    """True where printing would repeat what another process of this job prints.

    Configuration and recipe fail alike on all of them; what can fail on one alone is shared by
    `ReportedElsewhereError`.
    """
    if isinstance(error, (ConfigError, RecipeError, PreflightError, EmulationError)):
        return os.environ.get("LOCAL_RANK", "0") != "0"
    if isinstance(error, (InjectionError, DivergedError)):
        return os.environ.get("RANK", "0") != "0"
    return isinstance(error, ReportedElsewhereError)
