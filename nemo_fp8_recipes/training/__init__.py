"""The reference Megatron-Core pre-training job: what `nemo-fp8 train` runs, on GPUs and on the emulated device.

Read `job.py` first (the order of things before torch), then `session.py` (after it) and `trainer.py` (a step).
"""
