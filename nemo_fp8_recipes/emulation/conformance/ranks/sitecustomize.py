"""Python imports this at its start where this folder is on PYTHONPATH: ranks of a test pose as the device."""

import os

if "LOCAL_RANK" in os.environ and "NEMO_FP8_RANKS_POSE_AS" in os.environ:
    from nemo_fp8_recipes.emulation import install

    install(os.environ["NEMO_FP8_RANKS_POSE_AS"])
