#!/bin/bash
# The same short training with three recipes: one array, two of its jobs at a time, a run directory each.
set -euo pipefail

nemo-fp8 launch -m launcher=slurm \
  launcher.account=my-account launcher.partition=h100 launcher.time=02:00:00 \
  launcher.exclusive=true launcher.cpus_per_task=96 launcher.array_parallel=2 \
  hardware=h100 fp8_recipe=delayed,tensorwise,blockwise model=nemotron3_4b \
  training.steps=2000 training.global_batch_size=64 training.micro_batch_size=1 training.save_every=500 \
  "$@"
