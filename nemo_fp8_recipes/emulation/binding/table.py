"""The document docs/emulated-binding.md, made from `surface.py` by running this module."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_fp8_recipes.emulation.binding import surface
from nemo_fp8_recipes.emulation.binding.introduced import exists
from nemo_fp8_recipes.emulation.binding.releases import RELEASES, tested

__all__ = ["markdown"]

_HEAD = f"""# What the emulated binding provides

Every name that the compiled module `transformer_engine_torch` exports in Transformer Engine {tested()},
made from `surface.py` and `introduced.py` in `nemo_fp8_recipes/emulation/binding/` by
`python -m nemo_fp8_recipes.emulation.binding.table`. *Emulated by* names the file in that directory; "no" is
a release whose binding does not have the name. What is not emulated raises `NotImplementedError` with its
own name when it is called, and so does an option that an emulated function does not have (communication
overlap in a GEMM, say). In what else the releases differ is in `releases.py`, and which enum
members they have in `enums.py`. Other releases are refused.

Not emulated are fused attention and what connects several GPUs (communication overlap, NVSHMEM, expert
parallelism, Newton-Schulz over cuSOLVERMp). The emulated device says that it has cuBLAS 13.6, the oldest with
every GEMM over grouped tensors; `te.ops.GroupedLinear` takes them wherever TE does, and so does
`GroupedLinear(use_grouped_tensor=True)`. TE's Triton kernels are not part of the binding: the padding of
gathered NVFP4 scales, the bias gradients of experts, the permutations by mask and the cross entropy of 2.20
are done in torch, the others do not run. The fused grouped MLP of `te.ops` is a kernel of cuDNN's; TE finds
none here and runs its parts.
"""

_RULE = "|---" * (len(RELEASES) + 2) + "|"


def markdown() -> str:
    """The whole document."""
    lines = [_HEAD, "| release | emulated functions | others |", "|---|---|---|"]
    lines += [
        f"| {release} | {_count(surface.EMULATED, release)} | {_count(surface.NOT_EMULATED, release)} |"
        for release in RELEASES
    ]
    lines += ["", _header("function")]
    for name in sorted({*surface.EMULATED, *surface.NOT_EMULATED}):
        family = surface.EMULATED.get(name)
        lines.append(_row(name, name, f"`{family}.py`" if family else "NotImplementedError"))
    lines += ["", _header("class or submodule")]
    lines += [_row(name, name, "NotImplementedError when made") for name in surface.CLASSES]
    for name, functions in surface.SUBMODULES.items():
        lines += [_row(name, f"{name}.{function}", f"`{by}.py`") for function, by in functions.items()]
    lines += [_row("FP8TensorMeta", "FP8TensorMeta", "yes"), _row("", "the enums", "`enums.py`", code=False)]
    return "\n".join(lines) + "\n"


def _header(what: str) -> str:
    return f"| {what} | {' | '.join(RELEASES)} | emulated by |\n{_RULE}"


def _row(name: str, shown: str, by: str, *, code: bool = True) -> str:
    there = " | ".join("yes" if exists(name, release) else "no" for release in RELEASES)
    return f"| {f'`{shown}`' if code else shown} | {there} | {by} |"


def _count(names: Iterable[str], release: str) -> int:
    return sum(exists(name, release) for name in names)


if __name__ == "__main__":
    print(markdown(), end="")
