"""The compiled kernels under test: as this machine builds them, and in their other forms."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from nemo_fp8_recipes.emulation.kernels import Library, build, library


@pytest.fixture(scope="session")
def native() -> Library:
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    found = library()
    assert found is not None
    return found


def built(target: Path, *flags: str) -> Library:
    """The kernels as other flags build them."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    build.compile_units(compiler, flags, target)
    return Library(ctypes.CDLL(str(target)))


QUICKLY = tuple("-O1" if flag == "-O3" else flag for flag in build.FLAGS)
"""For forms whose speed nobody waits for."""


@pytest.fixture(scope="session")
def avx2(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """What a CPU without AVX-512 runs, where this one has it."""
    if "avx512bw" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX-512: the native kernels do without")
    target = tmp_path_factory.mktemp("avx2") / "kernels.so"
    return built(target, *build.FLAGS, build.NATIVE, "-DNEMO_FP8_NO_AVX512")


@pytest.fixture(scope="session")
def without_vbmi(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """What a CPU whose AVX-512 has no byte permutations runs, where this one's has."""
    if "avx512vbmi" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX512_VBMI: the native kernels do without")
    target = tmp_path_factory.mktemp("without_vbmi") / "kernels.so"
    return built(target, *QUICKLY, build.NATIVE, "-mno-avx512vbmi", "-mno-avx512vbmi2")


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Without the instructions of this CPU and the code written for them."""
    target = tmp_path_factory.mktemp("portable") / "kernels.so"
    return built(target, *QUICKLY, "-DNEMO_FP8_PORTABLE")


@pytest.fixture(params=["native", "avx2", "portable"])
def kernels(request: pytest.FixtureRequest) -> Library:
    found: Library = request.getfixturevalue(request.param)
    return found
