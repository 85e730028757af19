"""Names of modules: without wrappers, with global layer numbers."""

from __future__ import annotations

from torch import nn

from nemo_fp8_recipes.injection.module_names import named_modules, unwrap


class Layer(nn.Module):
    """A transformer layer as Megatron numbers it: from 1, over all pipeline stages."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number
        self.mlp = nn.Sequential(nn.Linear(2, 2))


class Model(nn.Module):
    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Layer(number) for number in numbers)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def paths(model):
    return [named.path for named in named_modules(model) if isinstance(named.module, nn.Linear)]


def test_wrappers_leave_no_trace():
    model = Model(1)
    assert unwrap(Wrapper(Wrapper(model))) is model
    assert paths(Wrapper(Wrapper(model))) == paths(model) == ["decoder.layers.0.mlp.0"]


def test_layers_of_a_later_pipeline_stage_keep_their_global_number():
    assert paths(Model(5, 6)) == ["decoder.layers.4.mlp.0", "decoder.layers.5.mlp.0"]


def test_virtual_pipeline_chunks_are_one_model():
    chunks = [Wrapper(Model(1)), Wrapper(Model(9))]
    assert paths(chunks) == ["decoder.layers.0.mlp.0", "decoder.layers.8.mlp.0"]


def test_every_module_knows_its_layer():
    layers = {named.path: named.layer for named in named_modules(Model(5))}
    assert layers["decoder.layers.4.mlp.0"] == 4
    assert layers["decoder"] is None


def test_a_shared_module_is_named_once():
    model = Model(1)
    model.decoder.again = model.decoder.layers[0]
    assert len(paths(model)) == 1
