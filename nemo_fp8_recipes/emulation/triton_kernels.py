"""What Transformer Engine's Triton kernels compute, in torch: those that its modules need.

Follows `common/triton/pad.py` and `common/triton/grouped_dbias_dscales.py` of Transformer Engine; those of
`permutation.py` are in `mask_permutation`, those of the loss in `cross_entropy`. The other Triton kernels do
not run on the emulated device.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nemo_fp8_recipes.emulation import cross_entropy, mask_permutation
from nemo_fp8_recipes.emulation.import_hook import after_import
from nemo_fp8_recipes.emulation.ledger import PatchLedger

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["apply"]

_PACKAGE = "transformer_engine.pytorch.triton"


def apply(ledger: PatchLedger) -> None:
    """Put them in place when their modules are imported."""
    after_import(
        ledger,
        f"{_PACKAGE}.pad",
        _setting("pad_columnwise_scale_inv", _pad_columnwise_scale_inv),
        "NVFP4 tensors gathered over ranks are padded by a Triton kernel",
    )
    after_import(
        ledger,
        f"{_PACKAGE}.grouped_dbias_dscales",
        _setting("_grouped_dbias_kernel", _GroupedBiasGradient()),
        "bias gradients of all experts are summed by a Triton kernel",
    )
    after_import(
        ledger,
        f"{_PACKAGE}.permutation",
        mask_permutation.replace_kernels,
        "tokens are moved to their experts by Triton kernels",
    )
    after_import(
        ledger,
        f"{_PACKAGE}.cross_entropy",
        cross_entropy.replace_kernels,
        "the loss and its gradient are computed by Triton kernels",
    )


def _setting(name: str, value: object) -> Callable[[types.ModuleType], None]:
    return lambda module: setattr(module, name, value)


def _pad_columnwise_scale_inv(inp: Tensor) -> Tensor:
    """In place of the kernel of this name: zeros up to 128 rows and 4 columns."""
    from torch.nn.functional import pad

    rows, columns = inp.shape
    return pad(inp, (0, -columns % 4, 0, -rows % 128))


class _GroupedBiasGradient:
    """In place of the kernel `_grouped_dbias_kernel`, which is launched as `kernel[grid](…)`."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._run

    @staticmethod
    def _run(
        dy: Tensor,
        dbias: Tensor,
        offsets: Tensor,
        scales: Tensor,
        bias: Tensor,
        dscales: Tensor,
        hidden: int,
        *,
        HAS_SCALES: bool,
        **_tuning: Any,
    ) -> None:
        """Add to `dbias` [experts, hidden] the sum of each expert's rows of `dy` [rows, hidden], and with
        scales to `dscales` [rows] each row's product with the bias of its expert; all sums in fp32.

        Args:
            dy: output gradient.
            dbias: fp32.
            offsets: int64 [experts + 1], the rows at which experts begin.
            scales: fp32 [rows], a factor of each row's part in `dbias`.
            bias: [experts, hidden].
            dscales: fp32.
            hidden: columns.
            HAS_SCALES: whether `scales`, `bias` and `dscales` are meant.
            _tuning: of the kernel's grid and loops; has no meaning here.
        """
        import torch

        starts = offsets.tolist()
        for expert, (start, end) in enumerate(itertools.pairwise(starts)):
            rows = dy.detach()[start:end].to(torch.float32)
            if HAS_SCALES:
                own = bias.detach().view(-1, hidden)[expert].to(torch.float32)
                dscales[start:end].add_((rows * own).sum(dim=1))
                rows = rows * scales.detach()[start:end, None]
            dbias[expert].add_(rows.sum(dim=0))
