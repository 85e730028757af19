"""What the probes hand over: numbers on the device, and what each of them is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nemo_fp8_recipes.injection.operands import format_of
from nemo_fp8_recipes.telemetry.linears import Operand

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["COUNT", "SHARED_BY", "WEIGHED", "Combine", "Probe", "Reading", "ReadingSpec", "element_format"]

Combine = Literal["max", "min", "mean", "rms", "parts"]


SHARED_BY = "shared_by"
"""Reading of which ranks share the operand's "parts" readings: a number that they have in common; no
statistic itself.
"""

COUNT = "scale_inv_count"
"""Reading of how many blocks `WEIGHED` describe on each rank; no statistic itself."""

WEIGHED = ("scale_inv_mean", "scale_inv_rms")
"""Readings of which a rank with more blocks has more to say."""


class ReadingSpec(NamedTuple):
    """What one reading is, and how ranks combine it. Travels between ranks once, so it holds plain data.

    Attributes:
        module, tensor: the operand.
        name: of the raw reading; `derive` makes statistics of it.
        recipe: canonical recipe name.
        format: element format, "e4m3", "e5m2" or "e2m1".
        combine: over ranks; "max" and "min" let NaN win, "mean" and "rms" (root of the mean square) are over
            the ranks that have the operand, those of `WEIGHED` weighed with the `COUNT` of each; "parts" is
            the sum over the ranks that share the operand (`SHARED_BY`), and the largest of such sums.
        length: numbers in the reading; 1, or the length of a window.
        power_of_two: block and tensorwise scales are rounded to powers of two.
        whatif: the tensor was not quantised like this: it is what this recipe would have done to it.
    """

    module: str
    tensor: str
    name: str
    recipe: str
    format: str
    combine: Combine
    length: int = 1
    power_of_two: bool = False
    whatif: bool = False


class Reading(NamedTuple):
    """What a probe found in this step on this rank.

    Attributes:
        specs: what the numbers are, in order.
        values: fp32 (sum of the specs' lengths,), on the model's device.
    """

    specs: tuple[ReadingSpec, ...]
    values: Tensor


class Probe:
    """Reads one family of recipes during a logging step. The methods are documented no-ops."""

    def begin(self) -> None:
        """A logging step starts: forget the last one."""

    def quantised(self, operand: Operand, quantizer: Any, tensor: Any) -> bool:
        """`quantizer` made the quantised `tensor` for `operand`. Launches nothing, copies nothing: keeps
        references to the scales, which Transformer Engine will not write again in this step.

        Returns:
            Whether there was something to keep.
        """
        del operand, quantizer, tensor  # for those that read tensors
        return False

    def settle(self) -> None:
        """Read what was handed over so far: it is about to be written again."""

    def end(self) -> Reading | None:
        """The step is over: all values of all modules, in a number of kernels that does not depend on how
        many modules there are. None when there was nothing.
        """
        return None


def element_format(quantizer: Any) -> str:
    """ "e4m3", "e5m2" or "e2m1" of a Transformer Engine quantizer."""
    return format_of(quantizer.dtype)
