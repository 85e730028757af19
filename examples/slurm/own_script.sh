#!/bin/bash
# A script of your own on two nodes, with the recipe's environment variables set on each.
# It finds its run directory in NEMO_FP8_RUN_DIR, and 1 in NEMO_FP8_RESUME when it shall go on.
set -euo pipefail

nemo-fp8 launch launcher=slurm \
  launcher.account=my-account launcher.partition=h100 launcher.nodes=2 launcher.time=04:00:00 \
  launcher.exclusive=true launcher.cpus_per_task=96 \
  hardware=h100 fp8_recipe=tensorwise "$@" \
  -- pretrain.py --layers 32
