#!/bin/bash
# Three recipes by Hydra's own multirun: an array submitted through Hydra's submitit launcher, which waits for its end.
# pip install 'nemo-fp8-recipes[submitit]'. Without that library: compare_recipes.sh.
set -euo pipefail

nemo-fp8 train -m hydra/launcher=submitit_slurm \
  launcher.account=my-account launcher.partition=h100 launcher.time=02:00:00 \
  launcher.exclusive=true launcher.cpus_per_task=96 \
  hardware=h100 fp8_recipe=delayed,tensorwise,blockwise model=nemotron3_4b \
  training.steps=2000 training.global_batch_size=64 training.micro_batch_size=1 training.save_every=500 \
  "$@"
