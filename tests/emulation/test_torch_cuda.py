"""torch as code written for CUDA sees it, and torch's own machinery, which must go on working."""

from __future__ import annotations

import copy
import io
import pickle
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import run_emulated

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(2, device="cuda"),
        lambda: torch.zeros(2, device="cuda:0"),
        lambda: torch.ones(2, device=torch.device("cuda", 0)),
        lambda: torch.full((2,), 1.0, device=torch.cuda.current_device()),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: torch.arange(3, device="cuda"),
        lambda: torch.randn(2, device="cuda", pin_memory=False),
        lambda: torch.empty(2, pin_memory=True),
        lambda: torch.zeros_like(torch.ones(2), device="cuda"),
        lambda: torch.ones(2).new_empty(3, device="cuda"),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.ones(2).to(0),
        lambda: torch.ones(2).cuda(0),
        lambda: torch.ones(2, device=0),
        lambda: torch.ones(2, device=torch.device(0)),
        lambda: torch.ones(2).to(torch.device(0)),
        lambda: torch.nn.Linear(2, 2).to(device=0).weight,
        lambda: torch.nn.Linear(2, 2).cuda(0).weight,
        lambda: torch.nn.Linear(2, 2, device=0).weight,
        lambda: torch.ones(2).to(device="cuda", dtype=torch.bfloat16),
        lambda: torch.ones(2).cuda().pin_memory(),
        lambda: torch.nn.Linear(2, 2, device="cuda").weight,
        lambda: torch.nn.Linear(2, 2).cuda().weight,
        lambda: torch.nn.Linear(2, 2).to("cuda:0").weight,
        lambda: torch.nn.Linear(2, 2).to(torch.cuda.current_device()).weight,
        lambda: torch.nn.Linear(2, 2, device="meta").to_empty(device="cuda").weight,
        lambda: torch.nn.Embedding(3, 2).cuda()(torch.tensor([1], device="cuda")),
    ],
)
def test_a_tensor_asked_for_on_the_device_is_there(make: Any) -> None:
    tensor = make()
    assert tensor.is_cuda
    assert not tensor.is_cpu  # TE takes other ways for tensors of a CPU
    assert tensor.device.type == "cpu"
    tensor + tensor  # and can be computed with


def test_default_devices_make_host_tensors() -> None:
    with torch.device("cuda"):
        assert torch.ones(2).device.type == "cpu"
    torch.set_default_device("cuda")
    try:
        assert torch.ones(2).device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_an_index_is_a_device() -> None:
    for device in (torch.device(0), torch.device(device=0), torch.device(torch.cuda.current_device())):
        assert device == torch.device("cuda", 0)
        assert (device.type, device.index) == ("cuda", 0)
    with torch.device(0), torch.cuda.device(0):
        assert torch.ones(2).device.type == "cpu"
    torch.set_default_device(torch.device(0))
    try:
        assert torch.ones(2).device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_what_takes_the_place_of_the_device_type_is_that_type() -> None:
    device = torch.device("cpu")
    real = type(device)
    assert isinstance(device, torch.device)
    assert not isinstance("cpu", torch.device)
    assert isinstance(device, (str, torch.device))
    assert torch.device == real
    assert real == torch.device
    assert {real: 1}[torch.device] == 1
    assert issubclass(real, torch.device)
    assert copy.deepcopy(device) == pickle.loads(pickle.dumps(device)) == device
    assert pickle.loads(pickle.dumps(torch.device)) is torch.device
    assert torch.device.type is real.type  # its descriptors
    with pytest.raises(RuntimeError, match="Expected one of cpu, cuda"):
        torch.device("gpu")
    buffer = io.BytesIO()
    torch.save({"device": device}, buffer)
    buffer.seek(0)
    assert torch.load(buffer) == {"device": device}


def test_custom_operators_and_scripts_take_a_device() -> None:
    @torch.library.custom_op("nemo_fp8_recipes_tests::on", mutates_args=())
    def on(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return x.to(device).clone()

    @torch.jit.script
    def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return x.to(device)

    assert on(torch.ones(2), torch.device("cpu")).tolist() == [1.0, 1.0]
    assert moved(torch.ones(2), torch.device("cpu")).tolist() == [1.0, 1.0]


def test_custom_operators_for_the_device_run() -> None:
    """Transformer Engine's key-value cache is made of such operators since 2.20."""

    @torch.library.custom_op("nemo_fp8_recipes_tests::doubled", mutates_args=(), device_types="cuda")
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @torch.library.custom_op("nemo_fp8_recipes_tests::tripled", mutates_args=(), device_types="cpu")
    def tripled(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the host's")

    @tripled.register_kernel("cuda")
    def tripled_there(x: torch.Tensor) -> torch.Tensor:
        return 3 * x

    @torch.library.register_kernel("nemo_fp8_recipes_tests::doubled", ["cuda", "xpu"])
    def doubled_again(x: torch.Tensor) -> torch.Tensor:
        return 4 * x

    x = torch.ones(2, device="cuda")
    assert doubled(x).tolist() == [4.0, 4.0]
    assert tripled(x).tolist() == [3.0, 3.0]


def test_a_checkpoint_s_storages_are_sent_to_the_device_by_a_function() -> None:
    buffer = io.BytesIO()
    torch.save(torch.ones(2), buffer)
    for where in (0, torch.device(0), lambda storage, _location: storage.cuda(0)):
        buffer.seek(0)
        assert torch.load(buffer, map_location=where).tolist() == [1.0, 1.0]


def test_meta_tensors_are_not_on_the_device() -> None:
    assert not torch.empty(2, device="meta").is_cuda


def test_the_old_type_names_are_those_of_the_device() -> None:
    tensor = torch.ones(2, dtype=torch.bfloat16)
    assert tensor.type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type("torch.cuda.FloatTensor").dtype == torch.float32
    assert torch.ones(2, device="meta").type() != "torch.cuda.FloatTensor"


def test_queries_answer_for_the_posing_device() -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.current_device() == 0
    assert torch.device("cuda", torch.cuda.current_device()) == torch.device("cuda:0")
    assert torch.cuda.get_device_capability() == (10, 0)
    assert "B200" in torch.cuda.get_device_name(0)
    assert torch.cuda.get_device_properties("cuda").multi_processor_count == 148
    free, total = torch.cuda.mem_get_info()
    assert total == 180 * 2**30
    assert 0 < free <= total  # what the host can give
    assert torch.cuda.memory_allocated() == 0


def test_streams_and_events_are_in_order() -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(side), torch.cuda.device(0):
        value = torch.ones(2).sum()
    end.record()
    torch.cuda.synchronize()
    assert end.query()
    assert start.elapsed_time(end) >= 0
    assert value == 2
    with pytest.raises(RuntimeError, match="recorded"):
        torch.cuda.Event().elapsed_time(end)


def test_the_device_state_decides_the_numbers() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.randn(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.randn(4, device="cuda"), first)
    torch.cuda.default_generators[torch.cuda.current_device()].set_state(state)
    assert torch.equal(torch.randn(4, device="cuda"), first)


def test_autocast_for_the_device_computes_in_its_dtype() -> None:
    a = torch.randn(4, 4)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        assert torch.get_autocast_dtype("cuda") == torch.bfloat16
        with torch.autocast("cuda", enabled=False):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
    assert (a @ a).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cuda")


def test_autocast_to_float32_raises_what_is_smaller() -> None:
    """Which CUDA's autocast takes, and the host's refuses."""
    a = torch.randn(4, 4, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cuda", dtype=torch.float32):
            assert (a @ a).dtype == torch.float32
            assert torch.get_autocast_dtype("cuda") == torch.float32
    assert (a @ a).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_restores_the_device_s_autocast(reentrant: bool, dtype: torch.dtype) -> None:
    seen = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), (x @ x).dtype))
        return x * x

    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    with torch.autocast("cuda", dtype=dtype):
        x = torch.randn(4, 4, dtype=other, requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    y.sum().backward()
    assert seen == [(True, dtype, dtype)] * 2


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}])
def test_torchs_optimizer_computes_what_it_does_without_the_device(options: dict[str, bool]) -> None:
    """Adam's first step moves every weight by the learning rate against the sign of its gradient."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    weight.grad = torch.tensor([0.5, -3.0])
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    assert weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
    torch.optim.Adam([weight], lr=0.1, **options).step()
    assert torch.allclose(weight, torch.tensor([0.9, -1.9]), atol=1e-5)


def test_activation_checkpointing_restores_the_random_state() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5))
    x = torch.randn(4, 8, requires_grad=True)
    torch.manual_seed(3)
    layer(x).sum().backward()
    plain, x.grad = x.grad, None
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert plain is not None
    assert x.grad is not None
    assert torch.equal(x.grad, plain)


def test_saving_and_loading_for_the_device(tmp_path: Path) -> None:
    path = tmp_path / "tensor.pt"
    torch.save({"x": torch.arange(3, device="cuda")}, path)
    for location in (None, "cuda", "cpu", torch.device("cuda", 0)):
        assert torch.load(path, map_location=location, weights_only=True)["x"].tolist() == [0, 1, 2]


def test_data_loading_with_pinned_memory() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(torch.utils.data.DataLoader(data, batch_size=2, pin_memory=True))
    assert [batch[0].tolist() for batch in batches] == [[0, 1], [2, 3]]


def test_the_accelerator_is_none_whatever_torch_was_built_with() -> None:
    """A torch built with CUDA would ask a driver that is not there."""
    assert torch.accelerator.current_accelerator() is None
    assert not torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 0


def test_waiting_for_the_accelerator_is_waiting_for_the_device() -> None:
    """FSDP2 waits by its stream, and programs that want to be independent of the kind of device do."""
    torch.accelerator.synchronize()
    torch.accelerator.set_stream(torch.cuda.Stream())
    assert torch.accelerator.current_stream() == torch.cuda.current_stream()
    torch.accelerator.current_stream().wait_event(torch.cuda.Event())
    assert torch.cuda.Stream.priority_range() == (0, -1)


def test_profiling_is_switched_and_marked() -> None:
    with torch.cuda.profiler.profile(), torch.cuda.nvtx.range("step"):
        torch.cuda.nvtx.range_end(torch.cuda.nvtx.range_start("inner"))
    torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())
    torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStop())
    with pytest.raises(RuntimeError):
        torch.cuda.check_error(2)


def test_the_mode_that_warns_of_synchronisation_is_kept() -> None:
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.cuda.set_sync_debug_mode("warn")
    assert torch.cuda.get_sync_debug_mode() == 1
    torch.cuda.set_sync_debug_mode(0)
    assert torch.cuda.get_sync_debug_mode() == 0
    with pytest.raises(RuntimeError, match="'loud'"):
        torch.cuda.set_sync_debug_mode("loud")


def test_the_history_of_memory_is_empty(tmp_path: Path) -> None:
    torch.cuda.memory._record_memory_history(max_entries=100)
    torch.cuda.memory._dump_snapshot(str(tmp_path / "snapshot.pickle"))
    torch.cuda.memory._record_memory_history(enabled=None)
    assert pickle.loads((tmp_path / "snapshot.pickle").read_bytes())["segments"] == []
    assert torch.cuda.memory_snapshot() == []
    torch.cuda.reset_peak_host_memory_stats()
    assert torch.cuda.get_per_process_memory_fraction() == 1.0
    assert torch.cuda.memory.get_allocator_backend() == "native"


def test_cudnn_is_as_old_for_torch_as_for_transformer_engine() -> None:
    import transformer_engine.pytorch as te

    version = torch.backends.cudnn.version()
    assert version is not None
    assert te.get_cudnn_version() == (version // 10000, version // 100 % 100, version % 100)


def test_a_cuda_graph_is_refused_in_words_of_ours() -> None:
    with pytest.raises(RuntimeError, match="CUDAGraph cannot be made: the device is emulated"):
        torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="pool of CUDA graphs cannot be made: the device is emulated"):
        torch.cuda.graph_pool_handle()


def test_torch_compile_stays_usable() -> None:
    """Up to the backend that would need a C++ compiler."""

    def double(x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(x.shape, device="cuda") * x

    x = torch.randn(3, requires_grad=True)
    y = torch.compile(double, backend="aot_eager", fullgraph=True)(x)
    y.sum().backward()
    assert torch.equal(y, 2 * x)
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]


def test_torch_is_told_the_truth_about_its_tensors() -> None:
    """`is_cuda` read in torch's own modules: a CUDA branch there would call kernels that do not exist."""
    from torch.nn.utils.rnn import pack_padded_sequence

    packed = pack_padded_sequence(torch.ones(2, 3, 1), torch.tensor([3, 1]), batch_first=True)
    assert not packed.is_cuda


def test_gradient_scaling() -> None:
    scaler = torch.amp.GradScaler("cuda")
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0, 0]


def test_moving_to_the_device_gives_the_tensor_itself() -> None:
    x = torch.zeros(3)
    for device in ("cuda", "cuda:0", 0, torch.device("cuda", 0)):
        assert x.to(device) is x
        assert x.to(device=device, non_blocking=True) is x
    assert x.to("cuda", torch.float64).dtype == torch.float64
    assert x.to("cuda", copy=True) is not x
    assert x.to(torch.float16).dtype == torch.float16


def test_normal_takes_the_device() -> None:
    assert torch.normal(mean=0.0, std=1.0, size=(2, 3), device="cuda").is_cuda


def test_generators_of_the_device() -> None:
    drawn = []
    for generator in (torch.Generator("cuda"), torch.Generator(device="cuda:0"), torch.Generator()):
        generator.manual_seed(1)
        assert isinstance(generator, torch.Generator)
        drawn.append(torch.randn(4, device="cuda", generator=generator))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert isinstance(torch.default_generator, torch.Generator)
    assert not isinstance(3, torch.Generator)


def test_an_nvfp4_tensor_can_be_dequantized_by_an_operation(emulated: object) -> None:
    from transformer_engine.pytorch import NVFP4Quantizer

    x = torch.randn(64, 64, dtype=torch.bfloat16)
    quantized = NVFP4Quantizer()(x)
    assert quantized.to(torch.float64).dtype == torch.float64
    assert torch.equal(quantized.clone().dequantize(), quantized.dequantize())


@pytest.mark.parametrize("recipe", ["DelayedScaling", "Float8CurrentScaling"])
def test_what_writes_checkpoints_finds_quantised_weights_on_the_host(recipe: str) -> None:
    """TE's tensors ask their data, and Megatron's writer asks the tensor (`assert tensor.is_cpu`)."""
    import transformer_engine.common.recipe as recipes
    import transformer_engine.pytorch as te

    with te.fp8_model_init(enabled=True, recipe=getattr(recipes, recipe)()):
        weight = te.Linear(32, 32).weight
    writer = types.ModuleType("megatron.core.dist_checkpointing.strategies.writer")
    exec("def asks(tensor):\n    return tensor.is_cpu", vars(writer))  # a function of that module
    assert writer.asks(weight)
    assert not weight.is_cpu


@pytest.mark.parametrize(("on_this_node", "count"), [("1", 1), ("4", 4)])
def test_a_node_has_a_device_for_every_process_that_torchrun_started(on_this_node: str, count: int) -> None:
    seen = run_emulated(
        "import torch\nresult([torch.cuda.device_count(), torch.cuda.current_device()])",
        env={"LOCAL_WORLD_SIZE": on_this_node},
    )
    assert seen == [count, 0]  # of its own it has one


def test_the_profiler_sees_the_hosts_activity(capfd: pytest.CaptureFixture[str]) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with (
        pytest.warns(UserWarning, match="The device is emulated: of its activity the profiler sees"),
        torch.profiler.profile(activities=kinds) as profile,
    ):
        torch.ones(4, device="cuda").exp()
    assert "aten::exp" in {event.key for event in profile.key_averages()}
    assert "Failed to record CUDA event" not in capfd.readouterr().err
