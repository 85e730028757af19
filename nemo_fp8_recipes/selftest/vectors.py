"""Golden vectors: what a device's kernels made of every case, in a file that any machine can check.

The file is a NumPy archive (`.npz`, no pickles). Entry `about` is JSON in UTF-8 bytes: {"schema_version": 1,
"device", "versions", "cases": [{"recipe", "kind", "dtype", "options"}, …]}. Entry `input/<kind>/<dtype>` is
the input of every such case, 16-bit types as their bits (uint16); entry `<i>/<buffer>` belongs to case number
i: codes and E8M0 or E4M3 scales as uint8, fp32 as fp32, named and laid out as in `expected.py`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_fp8_recipes.errors import ReportError
from nemo_fp8_recipes.selftest.cases import Case

__all__ = ["SCHEMA_VERSION", "Recorded", "read", "write"]

SCHEMA_VERSION = 1
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Recorded = tuple[Case, Tensor, Mapping[str, Tensor]]
"""A case, its input, and the buffers that a device made of it."""


def write(path: Path, recorded: list[Recorded], *, device: str, versions: Mapping[str, str | None]) -> None:
    """Write the file, whole or not at all."""
    about = {
        "schema_version": SCHEMA_VERSION,
        "device": device,
        "versions": dict(versions),
        "cases": [asdict(case) for case, _, _ in recorded],
    }
    arrays = {"about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)}
    for number, (case, x, buffers) in enumerate(recorded):
        arrays[_input_of(case)] = (
            x.numpy() if case.dtype == "fp32" else x.view(torch.int16).numpy().view(np.uint16)
        )
        for name, buffer in buffers.items():
            arrays[f"{number}/{name}"] = buffer.contiguous().numpy()
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ReportError(f"Cannot write {path}: {error.strerror}.", value=str(path)) from error


def _input_of(case: Case) -> str:
    return f"input/{case.kind}/{case.dtype}"


def read(path: Path) -> tuple[dict[str, Any], Iterator[Recorded]]:
    """What the file says about itself, and its cases.

    Raises:
        ReportError: not such a file, or of another schema version.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        about = json.loads(bytes(archive["about"]))
        about.get("schema_version")
    except (OSError, ValueError, LookupError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        # NumPy's own words propose to unpickle it.
        why = (
            error.strerror if isinstance(error, OSError) else None
        ) or "it is no archive that --export wrote"
        raise ReportError(f"{path} is not a file of golden vectors: {why}.", value=str(path)) from error
    if about.get("schema_version") != SCHEMA_VERSION:
        raise ReportError(
            f"{path} is not of schema version {SCHEMA_VERSION}.", value=str(path), allowed=[SCHEMA_VERSION]
        )

    if not about.get("cases"):
        raise ReportError(f"{path} holds no case: there is nothing to compare.", value=str(path))

    def recorded() -> Iterator[Recorded]:
        for number, described in enumerate(about["cases"]):
            case = Case(**described)
            names = [name.split("/", 1)[1] for name in archive.files if name.startswith(f"{number}/")]
            buffers = {name: torch.from_numpy(archive[f"{number}/{name}"]) for name in names}
            bits = archive[_input_of(case)]
            x = torch.from_numpy(bits if case.dtype == "fp32" else bits.view(np.int16)).view(
                _DTYPES[case.dtype]
            )
            yield case, x, buffers

    return about, recorded()
