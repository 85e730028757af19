#!/bin/bash
# One node of eight H100: 8B parameters, blockwise FP8, tensor parallel over two GPUs.
# Goes back into the queue 10 minutes before its time limit and goes on from its checkpoint.
set -euo pipefail

nemo-fp8 launch launcher=slurm \
  launcher.account=my-account launcher.partition=h100 launcher.constraint=h100 \
  launcher.time=04:00:00 launcher.signal_seconds=600 \
  launcher.exclusive=true launcher.cpus_per_task=96 \
  'launcher.modules=[cuda/12.8,nccl]' \
  'launcher.pre_commands=["source $HOME/venv/bin/activate"]' \
  hardware=h100 fp8_recipe=blockwise model=nemotron3_8b parallel.tp=2 parallel.sequence=true \
  training.steps=20000 training.global_batch_size=256 training.micro_batch_size=1 training.save_every=500 \
  "$@"
