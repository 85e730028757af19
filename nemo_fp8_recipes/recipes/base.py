"""What every recipe has in common."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nemo_fp8_recipes import typed
from nemo_fp8_recipes.errors import RecipeError
from nemo_fp8_recipes.recipes.options import OperandPlan, TensorName, option

if TYPE_CHECKING:
    from transformer_engine.common.recipe import Recipe as TransformerEngineRecipe

__all__ = ["SCHEMA_VERSION", "BackwardOverride", "Fp8FormatName", "QuantizedRecipe", "Recipe"]

SCHEMA_VERSION = 1
KEY = "fp8_recipe"

Fp8FormatName = Literal["e4m3", "hybrid"]
BackwardOverride = Literal["high_precision", "dequantized"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as plain data; `te()` and `megatron()` turn it into what the consumers want.

    Class attributes:
        name: canonical name, the value of `fp8_recipe=`.
        precision: "bf16", "fp8" or "fp4".
        te_class: name of the class in `transformer_engine.common.recipe`, None for bf16.
        since: first Transformer Engine version that has this class.
    """

    name: ClassVar[str]
    precision: ClassVar[Literal["bf16", "fp8", "fp4"]]
    te_class: ClassVar[str | None] = None
    since: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        hints = typed.hints(type(self))
        for field in dataclasses.fields(self):
            key = f"{KEY}.{field.name}"
            value = typed.coerce(
                getattr(self, field.name), hints[field.name], key, RecipeError, base=field.default
            )
            object.__setattr__(self, field.name, value)
            reason = field.metadata.get("ignored")
            if reason and value != field.default:
                raise self.refuse(field.name, f"would change nothing: {reason}", allowed=[field.default])

    def refuse(
        self, key: str, reason: str, *, allowed: list[Any] | None = None, hint: str | None = None
    ) -> RecipeError:
        """The error for option `key`: `fp8_recipe.<key>=<value> <reason>`."""
        value = getattr(self, key)
        return RecipeError(
            f"{KEY}.{key}={typed.spelled(value)} {reason}.",
            key=f"{KEY}.{key}",
            value=value,
            allowed=[typed.spelled(item) for item in allowed] if allowed else None,
            hint=hint,
        )

    def operands(self) -> dict[TensorName, OperandPlan]:
        """How each operand of a linear layer is stored; one left out stays in high precision."""
        raise NotImplementedError

    def te(self) -> TransformerEngineRecipe | None:
        """The `transformer_engine.common.recipe` object with every option in effect; None for bf16."""
        from nemo_fp8_recipes.targets import transformer_engine

        return transformer_engine.build(self)

    def megatron(self) -> dict[str, Any]:
        """The fields of Megatron-Core's `TransformerConfig` that name this recipe."""
        from nemo_fp8_recipes.targets import megatron_core

        return megatron_core.fields(self)

    def to_dict(self) -> dict[str, Any]:
        """A mapping that YAML and JSON can hold and `recipes.load` takes back (docs/schemas/recipe.md)."""
        return {"schema_version": SCHEMA_VERSION, "name": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class QuantizedRecipe(Recipe):
    """A recipe that quantises: formats, precision of attention and backward, and what Megatron decides."""

    fp8_format: Fp8FormatName = option("e4m3")
    fp8_dpa: bool = option(False, megatron="fp8_dot_product_attention")
    fp8_mha: bool = option(False, megatron="fp8_multi_head_attention")
    backward_override: BackwardOverride | None = option(None, since="2.15")
    num_layers_at_start_in_bf16: int = option(0, te=False, megatron="num_layers_at_start_in_bf16")
    num_layers_at_end_in_bf16: int = option(0, te=False, megatron="num_layers_at_end_in_bf16")
    fp8_param: bool = option(False, te=False, megatron="fp8_param")
    tp_only_amax_red: bool = option(False, te=False, megatron="tp_only_amax_red")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if getattr(self, key) < 0:
                raise self.refuse(key, "is out of range", allowed=[">= 0"])
        if self.fp8_mha and not self.fp8_dpa:
            raise self.refuse(
                "fp8_mha",
                "keeps attention's inputs and outputs in FP8, so it needs fp8_dpa=true",
                hint="Set fp8_recipe.fp8_dpa=true too.",
            )

    @property
    def layers_in_bf16(self) -> int:
        """Transformer layers, first and last together, that stay in BF16."""
        return self.num_layers_at_start_in_bf16 + self.num_layers_at_end_in_bf16

    @property
    def forward_format(self) -> Literal["e4m3"]:
        """Format of input and weight: hybrid is E4M3 forward."""
        return "e4m3"

    @property
    def backward_format(self) -> Literal["e4m3", "e5m2"]:
        """Format of grad_output: hybrid is E5M2 backward."""
        return "e5m2" if self.fp8_format == "hybrid" else "e4m3"

    def _without_backward(self, plans: dict[TensorName, OperandPlan]) -> dict[TensorName, OperandPlan]:
        """With `backward_override` the backward GEMMs run in high precision: grad_output is not quantised."""
        if self.backward_override is not None:
            del plans["grad_output"]
        return plans
