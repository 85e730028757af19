"""Every way in which Transformer Engine quantises, run in a process that poses as a GPU.

`python -m tests.stages.telemetry.source_program DEVICE RECIPE OUT` trains two steps of two micro-batches with
telemetry, an evaluation pass between them, and takes down beside it what each operand was made of: by hooks
of plain torch, and, for what an activation computes inside Transformer Engine, from the arguments of its
function.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

STEPS = 2
MICRO_BATCHES = 2
SPLITS = (128, 0, 256)
"""Tokens of each expert; the second gets none."""


def main(device: str, recipe_name: str, out: Path) -> None:
    from nemo_fp8_recipes import emulation

    emulation.install(device)
    import torch
    import transformer_engine.pytorch as te
    import transformer_engine_torch as binding

    import nemo_fp8_recipes
    from nemo_fp8_recipes import telemetry

    recipe = nemo_fp8_recipes.load(
        recipe_name, **({"amax_history_len": 4} if recipe_name == "delayed" else {})
    )
    taken: dict[tuple[int, str, str], list[Any]] = {}
    called: set[str] = set()
    step = 0

    def take(name: str, tensor: str, value: Any) -> None:
        if value.numel():
            rows = value.detach().reshape(-1, value.shape[-1]).clone()
            taken.setdefault((step, name, tensor), []).append(rows)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"params_dtype": torch.bfloat16}
            self.recomputed = te.Linear(128, 128, bias=True, **options)
            self.mlp = te.LayerNormMLP(128, 256, activation="gelu", bias=True, **options)
            self.experts = te.GroupedLinear(len(SPLITS), 128, 128, bias=False, **options)
            with te.quantized_model_init(
                enabled=True, recipe=recipe.te(), preserve_high_precision_init_val=True
            ):
                self.primary = te.Linear(128, 128, bias=False, **options)
            # As Megatron's optimizer does: an fp32 copy that the parameter is written from.
            parameter = self.primary.weight
            parameter.main_param = parameter.get_high_precision_init_val().float()

        def forward(self, x: Any, first: bool | None) -> Any:
            x = te.checkpoint(self.recomputed, x, is_first_microbatch=first)
            x = self.mlp(x, is_first_microbatch=first)
            x = self.experts(x, list(SPLITS), is_first_microbatch=first)
            return self.primary(x, is_first_microbatch=first)

    torch.manual_seed(3)
    model = Model()

    def watched(name: str) -> Any:
        original = getattr(binding, name)

        fused: list[int] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            # Telemetry runs a function that quantises once more, without its quantizer: that is no new cast.
            again = bool(fused) and fused.pop() == args[0].data_ptr() and args[-1] is None
            if name.endswith("gelu") and args[-1] is not None:
                fused.append(args[0].data_ptr())
            # Neither what the backward pass computes again of the forward one nor an evaluation counts.
            forward = name == "gelu" and model.training and torch._C._current_graph_task_id() == -1
            if forward and not again:
                x = args[0].detach().float()
                take("mlp.gemm1", "input", torch.nn.functional.gelu(x, approximate="tanh").bfloat16())
            if name in ("dgelu", "dbias_dgelu") and not again:
                x = args[1].detach().float().requires_grad_()
                with torch.enable_grad():
                    y = torch.nn.functional.gelu(x, approximate="tanh")
                (gradient,) = torch.autograd.grad(y, x, args[0].detach().float())
                take("mlp.gemm0", "grad_output", gradient.bfloat16())
            return original(*args, **kwargs)

        return call

    for name in ("gelu", "dgelu", "dbias_dgelu", "bgrad_quantize", "split_quantize", "quantize"):
        setattr(binding, name, watched(name))

    def watch() -> None:
        def before(name: str, module: Any, args: Any) -> None:
            if not (torch.is_grad_enabled() and module.training):
                return
            if name == "experts":
                for expert, part in enumerate(args[0].detach().split(SPLITS)):
                    take(f"experts.gemm{expert}", "input", part)
                    take(f"experts.gemm{expert}", "weight", getattr(module, f"weight{expert}"))
                return
            if name == "mlp":
                normed = torch.nn.functional.layer_norm(
                    args[0].detach().float(),
                    (128,),
                    module.layer_norm_weight.float(),
                    module.layer_norm_bias.float(),
                )
                take("mlp.gemm0", "input", normed.bfloat16())
                take("mlp.gemm0", "weight", module.fc1_weight)
                take("mlp.gemm1", "weight", module.fc2_weight)
                return
            take(name, "input", args[0])
            take(name, "weight", module.weight.main_param if name == "primary" else module.weight)

        def after(name: str, module: Any, output: Any) -> None:
            if not (output.requires_grad and module.training):
                return

            def backward(gradient: Any) -> None:
                if name == "experts":
                    for expert, part in enumerate(gradient.split(SPLITS)):
                        take(f"experts.gemm{expert}", "grad_output", part)
                else:
                    take("mlp.gemm1" if name == "mlp" else name, "grad_output", gradient)

            output.register_hook(backward)

        for name, module in model.named_children():
            module.register_forward_pre_hook(lambda m, a, name=name: before(name, m, a))
            module.register_forward_hook(lambda m, a, o, name=name: after(name, m, o))

    watch()
    recorder = telemetry.attach(
        model, recipe, directory=out / "run", log_every=1, stats_every=1, sinks=["parquet"]
    )
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not model.primary.weight], lr=1e-5)
    for step in range(1, STEPS + 1):
        recorder.begin_step(step)
        for micro_batch in range(MICRO_BATCHES):
            x = torch.randn(sum(SPLITS), 128, generator=generator) * (1 + micro_batch) * step
            x = x.to(torch.bfloat16).requires_grad_()
            with te.autocast(enabled=True, recipe=recipe.te()):
                y = model(x, micro_batch == 0)
            (y.float().pow(2).sum() * 8.0**step).backward()
            if micro_batch == 0 and recipe_name != "delayed":  # a delayed history would keep what it saw
                # An evaluation in the middle of the step: a thousand times as large, and not to be counted.
                model.eval()
                with torch.no_grad(), te.autocast(enabled=True, recipe=recipe.te()):
                    model(1000 * x, None)
                model.train()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            parameter = model.primary.weight
            parameter.main_param.sub_(0.01 * parameter.grad.float().sign())
            parameter.copy_(parameter.main_param)
            parameter.grad = None
        recorder.end_step(step)
    recorder.close()
    torch.save({"taken": taken, "called": sorted(called)}, out / "taken.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
