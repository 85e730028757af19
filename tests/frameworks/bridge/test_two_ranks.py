"""Two processes through Bridge: tensor parallelism, with its loggers on the last rank; pipeline stages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_fp8_recipes.report import run as report
from nemo_fp8_recipes.telemetry import store
from tests.support.processes import environment, run_ranks

CODE = """
from pathlib import Path
import torch.distributed as dist
from nemo_fp8_recipes.callbacks.bridge import Fp8Callback
from tests.frameworks.bridge.jobs import job, run

dist.init_process_group("gloo")  # once: every job of this process joins it
found = {}
for name in ("bf16", "delayed", "mxfp8"):
    callback = Fp8Callback(Path("run") / name, log_every=1)
    config = job(f"nemo_fp8_{name}", steps=3, tp=2)
    config.logger.tensorboard_dir = f"board/{name}"
    seen = run(config, callback)
    found[name] = {
        "losses": seen.losses,
        "gemms": sorted({(g.layout, g.a.format, g.b.format) for g in seen.gemms[-1] if g.quantized}),
        "quantized": sum(g.quantized for g in seen.gemms[-1]),
        "amax": {path: history.tolist() for path, (history, _) in seen.last_state.items()},
    }
result(found)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    tmp_path = tmp_path_factory.mktemp("ranks")
    return tmp_path, run_ranks(CODE, ranks=2, device="b200", tmp_path=tmp_path, timeout=400)


def test_both_ranks_quantise_every_gemm_and_share_one_amax(ranks: tuple[Path, list[dict]]) -> None:
    from tests.frameworks.bridge.jobs import MODULES

    first, second = ranks[1]
    for name, grad in (("delayed", "e5m2"), ("mxfp8", "e4m3")):
        for rank in (first, second):
            assert rank[name]["quantized"] == 3 * len(MODULES)
            assert rank[name]["gemms"] == [["NN", "e4m3", grad], ["NT", "e4m3", grad], ["TN", "e4m3", "e4m3"]]
        assert first[name]["losses"] == second[name]["losses"]
        assert first[name]["losses"] != first["bf16"]["losses"]
        assert first[name]["losses"] == pytest.approx(first["bf16"]["losses"], rel=0.02)
    assert set(first["delayed"]["amax"]) == set(MODULES)
    assert first["delayed"]["amax"] == second["delayed"]["amax"]  # reduced over the ranks
    assert first["bf16"]["quantized"] == 0


def test_manifest_store_and_bridges_own_logger_have_every_module(ranks: tuple[Path, list[dict]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tests.frameworks.bridge.jobs import MODULES

    directory = ranks[0]
    for name in ("delayed", "mxfp8"):
        table = store.read(directory / "run" / name).to_pylist()
        assert {row["module"] for row in table} == set(MODULES)
        manifest = json.loads((directory / "run" / name / "manifest.json").read_text())
        assert {row["module"] for row in manifest["rows"] if row["quantized"]} == set(MODULES)
        events = EventAccumulator(str(directory / "board" / name))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        assert {tag.split("/")[1] for tag in tags if tag.startswith("fp8/")} == set(MODULES)
        logged = {
            (row["step"], f"fp8/{row['module']}/{row['tensor']}/{row['stat']}"): row["value"]
            for row in table
            if row["value"] is not None
        }
        for tag in (tag for tag in tags if tag.startswith("fp8/")):
            for event in events.Scalars(tag):
                assert event.value == pytest.approx(logged[event.step, tag], rel=1e-6)


def test_pipeline_stages_are_one_run(tmp_path: Path) -> None:
    job = ["train", "device=emulated", "fp8_recipe=delayed", "data=mock", "training.steps=3"]
    job += ["model.num_layers=4", "training.eval_batches=1", "telemetry.log_every=1", "parallel.pp=2"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "nemo_fp8_recipes"]
    for framework in ("bridge", "megatron_core"):
        arguments = [*torchrun, *job, f"framework={framework}", f"run_dir={tmp_path / framework}"]
        done = subprocess.run(
            [sys.executable, *arguments], env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ours, theirs = report.load(tmp_path / "megatron_core"), report.load(tmp_path / "bridge")
    assert theirs.manifest.quantized() == ours.manifest.quantized()
    assert len(theirs.manifest.quantized()) == 4 * 4
    assert [loss for _, loss in theirs.losses] == pytest.approx([loss for _, loss in ours.losses], rel=2e-3)
    tables = [store.read(tmp_path / name, last_step=1).to_pylist() for name in ("megatron_core", "bridge")]
    assert tables[0] == tables[1]
