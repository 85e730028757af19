"""What alerts ask of the training loop: a checkpoint, or an end. The same on every rank."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from nemo_fp8_recipes.errors import ConfigError

if TYPE_CHECKING:
    from nemo_fp8_recipes.telemetry.alerts.alert import Alert

__all__ = ["AlertActions", "load_callback"]

Callback = Callable[[tuple["Alert", ...]], None]


class AlertActions:
    """Called with the alerts of a step on every rank; the loop looks at it after the step that follows.

    Args:
        callback: the user's, called with the same alerts before anything else happens.

    Attributes:
        stop: the alert that asked for the end, if one did.
    """

    def __init__(self, callback: Callback | None = None) -> None:
        self._callback = callback
        self._checkpoint = False
        self.stop: Alert | None = None

    def __call__(self, alerts: tuple[Alert, ...]) -> None:
        if self._callback is not None:
            self._callback(alerts)
        for alert in alerts:
            self._checkpoint |= alert.action in ("checkpoint", "stop")
            if alert.action == "stop" and self.stop is None:
                self.stop = alert

    def take_checkpoint(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self._checkpoint = self._checkpoint, False
        return asked


def load_callback(path: str | None) -> Callback | None:
    """The function that `alerts.callback` names, "package.module:function".

    Raises:
        ConfigError: it cannot be imported, or is no function.
    """
    if path is None:
        return None
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"alerts.callback={path} cannot be imported: {error}.",
            key="alerts.callback",
            value=path,
            hint="Write package.module:function; the module must be on PYTHONPATH.",
        ) from error
    if not callable(found):
        raise ConfigError(f"alerts.callback={path} is no function.", key="alerts.callback", value=path)
    callback: Callback = found
    return callback
