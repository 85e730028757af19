"""What alerts ask of the training loop: a checkpoint, an end, or another recipe. The same on every rank."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.errors import ConfigError
from nemo_fp8_recipes.recipes import Recipe

if TYPE_CHECKING:
    from nemo_fp8_recipes.telemetry.alerts.alert import Alert

__all__ = ["AlertActions", "Callback", "load_callback"]

Callback = Callable[[tuple["Alert", ...]], Any]
"""The user's function. What it returns is done: "checkpoint", "stop", a recipe to go on with, or a list of
these; None asks for nothing."""


class AlertActions:
    """Called with the alerts of a step on every rank; the loop looks at it after the step that follows.

    Args:
        callback: the user's, called with the same alerts before anything else happens.
        switches: whether the loop can change its recipe.

    Attributes:
        stop: the alert that asked for the end, if one did.
    """

    def __init__(self, callback: Callback | None = None, *, switches: bool = False) -> None:
        self._callback = callback
        self._switches = switches
        self._checkpoint = False
        self._recipe: Recipe | None = None
        self.stop: Alert | None = None

    def __call__(self, alerts: tuple[Alert, ...]) -> None:
        """Raises:
        ConfigError: the callback returned something that is not to be done.
        """
        if self._callback is not None:
            for asked in _several(self._callback(alerts)):
                self._do(asked, alerts)
        for alert in alerts:
            if alert.action != "warn":
                self._do(alert.action, (alert,))

    def take_checkpoint(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self._checkpoint = self._checkpoint, False
        return asked

    def take_recipe(self) -> Recipe | None:
        """The recipe that was asked for since the last call."""
        asked, self._recipe = self._recipe, None
        return asked

    def _do(self, asked: Any, alerts: tuple[Alert, ...]) -> None:
        if isinstance(asked, Recipe):
            if not self._switches:
                raise ConfigError(
                    f"alerts.callback asks for the recipe {asked.name}, and this training loop cannot change "
                    f"its recipe.",
                    key="alerts.callback",
                    value=asked.name,
                    allowed=["checkpoint", "stop"],
                )
            self._recipe = asked
        elif asked in ("checkpoint", "stop"):
            self._checkpoint = True
            if asked == "stop" and self.stop is None:
                self.stop = alerts[0]
        else:
            raise ConfigError(
                f"alerts.callback returned {asked!r}.",
                key="alerts.callback",
                value=str(asked),
                allowed=["checkpoint", "stop", "a recipe", "a list of these", "nothing"],
                hint="A recipe is what nemo_fp8_recipes.load(NAME) gives.",
            )


def _several(returned: Any) -> Iterable[Any]:
    if returned is None:
        return ()
    return returned if isinstance(returned, (list, tuple)) else (returned,)


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
