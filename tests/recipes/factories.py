"""What NeMo's and Megatron-Bridge's precision factories set, read from their sources without importing them.

`python -m tests.recipes.factories DIRECTORY...` reads the packages unpacked in these directories and writes
`factories.json`, the record that tests compare with where the packages are not at hand.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("factories.json")
DIRECTORIES = "NEMO_FP8_PEER_SOURCES"  # environment variable: directories with unpacked packages
REQUIRED = "NEMO_FP8_PEERS_REQUIRED"  # environment variable: set, a package that is missing is a failure
FILES = {
    "nemo_toolkit": "nemo/collections/llm/recipes/precision/mixed_precision.py",
    "megatron-bridge": "megatron/bridge/training/mixed_precision.py",
}
Settings = dict[str, Any]


def read(source: str) -> dict[str, Settings]:
    """Factory name -> the fields that it sets to plain values, those of the factory it starts from included.

    A factory here is a function that returns a call with keywords, or changes what another one returned.
    """
    found: dict[str, Settings] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_mixed"):
            continue
        settings: Settings = {}
        for statement in node.body:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                assert isinstance(value, ast.Call)
                settings.update(found[ast.unparse(value.func)])
            elif isinstance(statement, ast.Assign):
                assert isinstance(statement.targets[0], ast.Attribute)
                settings[statement.targets[0].attr] = ast.literal_eval(value)
            elif isinstance(statement, ast.Return) and isinstance(value, ast.Call):
                settings.update(
                    (keyword.arg, keyword.value.value)
                    for keyword in value.keywords
                    if isinstance(keyword.value, ast.Constant)
                )
        found[node.name] = settings
    return found


def installed(package: str) -> tuple[str, str] | None:
    """Version and source of the factories of an installed or unpacked package; None without it."""
    for directory in filter(None, os.environ.get(DIRECTORIES, "").split(os.pathsep)):
        if (Path(directory) / FILES[package]).is_file():
            (metadata,) = Path(directory).glob(f"{package.replace('-', '_')}-*.dist-info")
            return metadata.stem.split("-")[1], (Path(directory) / FILES[package]).read_text()
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return distribution.version, Path(str(distribution.locate_file(FILES[package]))).read_text()


def record() -> dict[str, Any]:
    """What `factories.json` holds: package -> version, file and factories."""
    loaded: dict[str, Any] = json.loads(RECORD.read_text())
    return loaded


if __name__ == "__main__":
    os.environ[DIRECTORIES] = os.pathsep.join(sys.argv[1:])
    found = {}
    for package, file in FILES.items():
        at_hand = installed(package)
        assert at_hand is not None, f"{package} is neither installed nor in {sys.argv[1:]}"
        found[package] = {"version": at_hand[0], "file": file, "factories": read(at_hand[1])}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
