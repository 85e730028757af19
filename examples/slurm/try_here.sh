#!/bin/bash
# No GPU needed: two nodes of two emulated GPUs each, to see submission, resuming and logs work on your SLURM.
# Emulation is about numbers, not speed.
set -euo pipefail

nemo-fp8 launch launcher=slurm launcher.nodes=2 launcher.nproc_per_node=2 launcher.time=00:30:00 \
  device=emulated hardware=h100 fp8_recipe=tensorwise \
  training.steps=50 training.global_batch_size=8 training.micro_batch_size=1 training.save_every=10 \
  "$@"
