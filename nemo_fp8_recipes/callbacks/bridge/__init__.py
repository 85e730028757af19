"""A recipe in Megatron-Bridge: importing this package registers `mixed_precision=nemo_fp8_<recipe>`.

    import nemo_fp8_recipes.callbacks.bridge as fp8_bridge

    cfg.mixed_precision = "nemo_fp8_mxfp8"        # or on Bridge's command line
    pretrain(cfg, forward_step, callbacks=[fp8_bridge.Fp8Callback(directory="runs/mine")])

The name alone injects the recipe, before the model is built. The callback proves on the built model that it
arrived, writes the manifest and logs telemetry.
"""

from __future__ import annotations

import sys

try:
    import megatron.bridge.training.mixed_precision  # noqa: F401  # is Bridge there?
except ImportError as error:
    from nemo_fp8_recipes.targets.bridge import missing

    raise missing(error) from error

from nemo_fp8_recipes.callbacks.bridge.callback import Fp8Callback
from nemo_fp8_recipes.callbacks.bridge.mixed_precision import Fp8MixedPrecision, mixed_precision
from nemo_fp8_recipes.callbacks.bridge.registration import register

__all__ = ["Fp8Callback", "Fp8MixedPrecision", "mixed_precision", "register"]

register(sys.modules[__name__])
