"""`hardware=auto`: what a driver says, asked through NVML and through nvidia-smi, both stood in for."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from nemo_fp8_recipes import preflight
from nemo_fp8_recipes.cli import main
from nemo_fp8_recipes.errors import PreflightError
from nemo_fp8_recipes.preflight import driver
from nemo_fp8_recipes.preflight.driver import Gpu

NVML = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
static const struct { const char *name; int major, minor; unsigned long long memory; } gpus[] = {GPUS};
static int open_sessions = 0;
int nvmlInit_v2(void) { open_sessions++; return STATUS; }
int nvmlShutdown(void) { open_sessions--; return 0; }
int sessions(void) { return open_sessions; }
const char *nvmlErrorString(int status) { return status == 9 ? "Driver Not Loaded" : "Unknown Error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = sizeof gpus / sizeof *gpus; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)&gpus[index]; return 0; }
int nvmlDeviceGetName(void *gpu, char *name, unsigned length) {
    strncpy(name, *(const char **)gpu, length);
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *gpu, int *major, int *minor) {
    *major = ((const int *)((const char **)gpu + 1))[0];
    *minor = ((const int *)((const char **)gpu + 1))[1];
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *gpu, memory *found) {
    found->total = *(const unsigned long long *)((const char **)gpu + 2);
    return found->total ? 0 : 3;
}
"""
H100 = '{"NVIDIA H100 80GB HBM3", 9, 0, 85520809984ULL}'
SPARK = '{"NVIDIA GB10", 12, 1, 0}'


@pytest.fixture
def nvml(tmp_path, monkeypatch):
    """Build a libnvidia-ml that lists these GPUs, and answers the first call with `status`."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")

    def build(*gpus: str, status: int = 0) -> str:
        source = tmp_path / "nvml.c"
        source.write_text(NVML.replace("GPUS", ", ".join(gpus)).replace("STATUS", str(status)))
        library = tmp_path / f"libnvidia-ml-{len(gpus)}-{status}.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        monkeypatch.setattr(driver, "LIBRARY", str(library))
        return str(library)

    return build


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """An nvidia-smi, first in PATH, that runs these lines of shell; NVML is not there."""

    def write(*lines: str) -> None:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
        monkeypatch.setattr(driver, "LIBRARY", str(tmp_path / "no-such-library.so"))

    return write


@pytest.fixture(autouse=True)
def nothing_hidden(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_nvml(nvml):
    assert driver.found(nvml(H100, SPARK)) == [
        Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80),
        Gpu("NVIDIA GB10", (12, 1), None),
    ]


def test_a_driver_that_is_not_loaded_is_an_error(nvml):
    with pytest.raises(PreflightError, match="NVML error 9, Driver Not Loaded"):
        driver.found(nvml(H100, status=9))


def test_nvidia_smi(nvidia_smi):
    nvidia_smi('echo "$@" > "$0.asked"; echo "NVIDIA B200, 10.0, 183359"; echo "NVIDIA GB10, 12.1, [N/A]"')
    assert driver.found() == [Gpu("NVIDIA B200", (10, 0), 179), Gpu("NVIDIA GB10", (12, 1), None)]
    asked = Path(shutil.which("nvidia-smi") + ".asked").read_text()
    assert asked.split() == ["--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["echo Failed to initialize NVML >&2; exit 9"], "fails on this machine: Failed to initialize NVML"),
        (["echo what is this"], "cannot be read: 'what is this'"),
    ],
)
def test_a_broken_nvidia_smi_is_an_error(nvidia_smi, lines, said):
    nvidia_smi(*lines)
    with pytest.raises(PreflightError, match=said):
        driver.found()


def test_hidden_gpus_are_not_there(nvml, monkeypatch):
    library = nvml(H100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert driver.found(library) == []


def test_doctor_judges_the_gpu_it_finds(nvml, capsys):
    nvml(H100)
    assert main(["doctor", "fp8_recipe=mxfp8", "device=native", "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert [finding["code"] for finding in said["findings"]] == ["FP8-HW-001"]
    assert "NVIDIA H100 80GB HBM3 has 9.0" in said["findings"][0]["message"]
    # without device= too: a machine with a GPU does not emulate by itself
    assert main(["doctor", "fp8_recipe=mxfp8", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["emulated"] is False


def test_different_gpus_in_one_machine(nvml):
    nvml(H100, SPARK)
    with pytest.raises(PreflightError, match="different GPUs: NVIDIA GB10, NVIDIA H100 80GB HBM3"):
        preflight.hardware_here()


def test_a_machine_without_a_driver(nvidia_smi, monkeypatch, tmp_path):
    nvidia_smi("exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver.found() == []
    assert preflight.hardware_here() is None
