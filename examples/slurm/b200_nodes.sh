#!/bin/bash
# Two nodes of eight B200 without containers: environment modules and a virtual environment, a torchrun on each node.
set -euo pipefail

nemo-fp8 launch launcher=slurm \
  launcher.account=my-account launcher.partition=b200 launcher.nodes=2 \
  launcher.time=08:00:00 launcher.signal_seconds=900 launcher.exclusive=true launcher.cpus_per_task=128 \
  'launcher.modules=[cuda/12.8,nccl]' \
  'launcher.pre_commands=["source $HOME/venv/bin/activate"]' \
  launcher.python=python3 \
  '+launcher.environment.NCCL_IB_HCA=mlx5' \
  hardware=b200 fp8_recipe=nvfp4 model=nemotron3_8b parallel.tp=2 parallel.sequence=true \
  training.steps=20000 training.global_batch_size=512 training.micro_batch_size=1 training.save_every=500 \
  "$@"
