#!/bin/bash
# Four nodes of eight B200 in an NGC container (pyxis/enroot), MXFP8, one SLURM task a GPU.
# nemo_fp8_recipes is installed in the image, or below the working directory, which is mounted.
set -euo pipefail

nemo-fp8 launch launcher=slurm \
  launcher.account=my-account launcher.partition=b200 launcher.nodes=4 launcher.tasks=gpu \
  launcher.time=08:00:00 launcher.signal_seconds=900 launcher.exclusive=true launcher.cpus_per_task=16 \
  'launcher.container_image="nvcr.io#nvidia/nemo:25.09"' \
  'launcher.container_mounts=["/data:/data:ro"]' \
  '+launcher.environment.NCCL_IB_HCA=mlx5' \
  hardware=b200 fp8_recipe=mxfp8 model=nemotron3_8b parallel.tp=2 parallel.sequence=true \
  training.steps=20000 training.global_batch_size=1024 training.micro_batch_size=1 training.save_every=500 \
  "$@"
