"""The Megatron-Core pre-training job that `nemo-fp8 train` runs, on GPUs and on the emulated device.

Read `job.py` first (what happens before torch), then `session.py` (what happens after) and `trainer.py` (a
step).
"""
