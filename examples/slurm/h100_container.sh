#!/bin/bash
# One node of eight H100 in an NGC container (pyxis/enroot), per-tensor current scaling, on token files of your own.
# nemo_fp8_recipes is installed in the image, or below the working directory, which is mounted.
set -euo pipefail

nemo-fp8 launch launcher=slurm \
  launcher.account=my-account launcher.partition=h100 \
  launcher.time=04:00:00 launcher.signal_seconds=600 launcher.exclusive=true launcher.cpus_per_task=96 \
  'launcher.container_image=/images/nemo.sqsh' \
  'launcher.container_mounts=["/data:/data:ro"]' \
  hardware=h100 fp8_recipe=tensorwise model=nemotron3_8b parallel.tp=2 parallel.sequence=true \
  data=megatron_indexed 'data.blend=[0.7,/data/wiki,0.3,/data/code]' \
  training.steps=20000 training.global_batch_size=256 training.micro_batch_size=1 training.save_every=500 \
  "$@"
