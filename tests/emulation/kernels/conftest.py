"""The compiled kernels under test: as this machine builds them, and in their portable form."""

from __future__ import annotations

import ctypes
import subprocess

import pytest

from nemo_fp8_recipes.emulation.kernels import Library, build, library


@pytest.fixture(scope="session")
def native() -> Library:
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    found = library()
    assert found is not None
    return found


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Without the instructions of this CPU and the code written for them."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    target = tmp_path_factory.mktemp("portable") / "kernels.so"
    flags = ["-O1" if flag == "-O3" else flag for flag in build.FLAGS]
    source = str(build.SOURCE / "kernels.cpp")
    subprocess.run(
        [str(compiler), *flags, "-DNEMO_FP8_PORTABLE", source, "-o", str(target)], check=True, timeout=300
    )
    return Library(ctypes.CDLL(str(target)))


@pytest.fixture(params=["native", "portable"])
def kernels(request: pytest.FixtureRequest) -> Library:
    found: Library = request.getfixturevalue(request.param)
    return found
