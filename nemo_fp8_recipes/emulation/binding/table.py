"""The document docs/emulated-binding.md, made from `surface.py` by running this module."""

from __future__ import annotations

from nemo_fp8_recipes.emulation.binding import surface

__all__ = ["markdown"]

_HEAD = f"""# What the emulated binding provides

Every name that Transformer Engine {surface.SUPPORTED_TE}'s compiled module `transformer_engine_torch`
exports, made from `nemo_fp8_recipes/emulation/binding/surface.py` by
`python -m nemo_fp8_recipes.emulation.binding.table`. *Emulated by* names the file in that directory. What is
not emulated raises `NotImplementedError` with its own name when it is called, and so does an option that an
emulated function does not have (communication overlap in a GEMM, say).
"""


def markdown() -> str:
    """The whole document."""
    lines = [
        _HEAD,
        f"{len(surface.EMULATED)} functions are emulated, {len(surface.NOT_EMULATED)} are not.",
        "",
    ]
    lines += ["| function | emulated by |", "|---|---|"]
    names = sorted({*surface.EMULATED, *surface.NOT_EMULATED})
    for name in names:
        family = surface.EMULATED.get(name)
        lines.append(f"| `{name}` | {f'`{family}.py`' if family else 'NotImplementedError'} |")
    lines += ["", "| class or submodule | emulated |", "|---|---|"]
    lines += [f"| `{name}` | NotImplementedError when made |" for name in surface.CLASSES]
    for name, functions in surface.NOT_EMULATED_SUBMODULES.items():
        lines += [f"| `{name}.{function}` | NotImplementedError |" for function in sorted(functions)]
    lines += ["| `FP8TensorMeta` | yes |", "| the enums | yes, in `enums.py` |"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
