"""The typed shape of the group `alerts`. Imports neither torch nor NumPy.

Limits and messages are in `conf/alerts/*.yaml`; `default_alerts` reads them where Hydra does not.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Literal

from nemo_fp8_recipes.errors import ConfigError

__all__ = ["FIELDS", "AlertsConfig", "GrowthRule", "LimitRule", "Rule", "ThresholdRule", "default_alerts"]

Action = Literal["warn", "checkpoint", "stop"]

FIELDS = ("module", "tensor", "recipe", "format", "step", "value", "limit", "others", "window", "advice")
"""What a message may contain in braces: the operand that shows it most, its recipe and element format, the
step, the number compared and its limit, how many more operands, the length of the window, and what to do
under this recipe."""

DEFAULT_ADVICE = "default"


@dataclass(kw_only=True)
class Rule:
    """What every rule has, and all that one without a limit has."""

    message: str
    """What is shown; says what to do. May contain `FIELDS` in braces."""
    enabled: bool = True
    action: Action = "warn"
    """warn: show it; checkpoint: and save one after the step; stop: and end the job after the step."""
    advice: dict[str, str] = field(default_factory=dict)
    """What {advice} is in the message: by recipe that quantised the tensor, `default` for the others."""


@dataclass(kw_only=True)
class ThresholdRule(Rule):
    limit: float
    """The rule is violated above it."""


@dataclass(kw_only=True)
class GrowthRule(ThresholdRule):
    window: int = 10
    """Logging steps that are looked at."""
    steadiness: float = 0.9
    """Least coefficient of determination (r squared) of log2(amax) over the step."""


@dataclass
class LimitRule:
    """A rule of the user's own: one statistic above or below a number."""

    stat: str
    """Name of the statistic, as in docs/schemas/telemetry.md."""
    message: str
    module: str = "*"
    """Glob of module paths."""
    tensor: Literal["any", "input", "weight", "grad_output"] = "any"
    above: float | None = None
    below: float | None = None
    enabled: bool = True
    action: Action = "warn"
    advice: dict[str, str] = field(default_factory=dict)


@dataclass
class AlertsConfig:
    """Which conditions are reported, from what limit on, and what follows."""

    name: str
    saturation: ThresholdRule
    history_frozen: Rule
    non_finite: Rule
    scale_limit: Rule
    underflow: ThresholdRule
    amax_growth: GrowthRule
    ranks_disagree: ThresholdRule
    enabled: bool = True
    """False: no rule is evaluated."""
    callback: str | None = None
    """`package.module:function`, called with the alerts of a step on every rank; what it returns is done:
    "checkpoint", "stop", a recipe to go on with, or a list of these."""
    quiet: int = 10
    """Logging steps, of those that have the rule's statistics, in which a tensor must keep the rule before it
    is reported for it again."""
    custom: dict[str, LimitRule] = field(default_factory=dict)
    """Rules of the user's own, by name."""

    def __post_init__(self) -> None:
        if self.quiet < 1:
            raise _out_of_range("quiet", self.quiet, ">= 1")
        if self.amax_growth.window < 3:
            raise _out_of_range("amax_growth.window", self.amax_growth.window, ">= 3")
        if self.amax_growth.limit <= 1:
            raise _out_of_range("amax_growth.limit", self.amax_growth.limit, "> 1")
        if not 0 <= self.amax_growth.steadiness <= 1:
            raise _out_of_range("amax_growth.steadiness", self.amax_growth.steadiness, "0 to 1")
        for name, rule in self.rules().items():
            _check_message(name, rule.message)
            _check_advice(name, rule.advice)
        for name, limit in self.custom.items():
            if name in BUILT_IN:
                raise ConfigError(
                    f"alerts.custom.{name} has the name of a rule that is there already.",
                    key=f"alerts.custom.{name}",
                    value=name,
                    hint=f"Set alerts.{name} itself, or choose another name.",
                )
            if (limit.above is None) == (limit.below is None):
                raise ConfigError(
                    f"alerts.custom.{name} needs a limit: one of above and below.",
                    key=f"alerts.custom.{name}",
                    allowed=["above: NUMBER", "below: NUMBER"],
                )

    def rules(self) -> dict[str, Rule | LimitRule]:
        """Every rule by name, the user's own last."""
        return {**{name: getattr(self, name) for name in BUILT_IN}, **self.custom}

    @property
    def acts(self) -> bool:
        """Whether a rule asks for more than being shown, which every rank has to hear of."""
        return self.enabled and (
            self.callback is not None
            or any(rule.enabled and rule.action != "warn" for rule in self.rules().values())
        )


def default_alerts() -> AlertsConfig:
    """`conf/alerts/default.yaml`."""
    from omegaconf import OmegaConf

    from nemo_fp8_recipes import typed
    from nemo_fp8_recipes.config.paths import conf_dir

    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "alerts" / "default.yaml"))
    assert isinstance(values, dict)
    return typed.read(AlertsConfig, {str(k): v for k, v in values.items()}, key="alerts", error=ConfigError)


BUILT_IN = (
    "saturation",
    "history_frozen",
    "non_finite",
    "scale_limit",
    "underflow",
    "amax_growth",
    "ranks_disagree",
)


def _check_message(name: str, message: str) -> None:
    key = f"alerts.{name}.message" if name in BUILT_IN else f"alerts.custom.{name}.message"
    try:
        used = {field for _, field, _, _ in string.Formatter().parse(message) if field is not None}
    except ValueError as error:
        raise ConfigError(f"{key} cannot be formatted: {error}.", key=key, value=message) from error
    for unknown in sorted(used - set(FIELDS)):
        raise ConfigError(
            f"{key} contains {{{unknown}}}, which there is not.", key=key, value=unknown, allowed=FIELDS
        )
    try:
        message.format(**{**dict.fromkeys(FIELDS, ""), "step": 1})
    except (ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"{key} cannot be formatted: {error}.",
            key=key,
            value=message,
            hint="Fields are text that is formatted already: write {value}, not {value:.2f}.",
        ) from error


def _check_advice(name: str, advice: dict[str, str]) -> None:
    from nemo_fp8_recipes.recipes import names

    allowed = [*names(), DEFAULT_ADVICE]
    for recipe in advice:
        if recipe not in allowed:
            key = f"alerts.{'' if name in BUILT_IN else 'custom.'}{name}.advice.{recipe}"
            raise ConfigError(f"{key} is for no recipe.", key=key, value=recipe, allowed=allowed)


def _out_of_range(name: str, value: object, allowed: str) -> ConfigError:
    key = f"alerts.{name}"
    return ConfigError(f"{key}={value} is out of range.", key=key, value=value, allowed=[allowed])
