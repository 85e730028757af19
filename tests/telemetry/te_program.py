"""A small training program on Transformer Engine's own modules, run in a process that poses as a GPU.

`python -m tests.telemetry.te_program DEVICE RECIPE OUT` trains a few steps with telemetry and, beside it,
takes down what went into each GEMM with plain torch: the tensors before quantisation, caught by hooks. The
tests compare.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

STEPS = 5
LOG_EVERY = 2
MICRO_BATCHES = 2


def main(device: str, recipe_name: str, out: Path) -> None:
    from nemo_fp8_recipes import emulation

    emulation.install(device)
    import torch
    import transformer_engine.pytorch as te
    import transformer_engine_torch as binding

    import nemo_fp8_recipes
    from nemo_fp8_recipes import telemetry
    from tests.telemetry.launches import Launches

    options = {"amax_history_len": 4} if recipe_name == "delayed" else {}
    recipe = nemo_fp8_recipes.load(recipe_name, **options)

    class Model(torch.nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.first = torch.nn.ModuleList(
                te.LayerNormLinear(128, 256, bias=True, params_dtype=torch.bfloat16) for _ in range(blocks)
            )
            self.second = torch.nn.ModuleList(
                te.Linear(256, 128, bias=False, params_dtype=torch.bfloat16) for _ in range(blocks)
            )

        def forward(self, x: Any, first_microbatch: bool) -> Any:
            for index, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
                y = first(x, is_first_microbatch=first_microbatch)
                if index == 0:
                    # Run again in the backward pass: what it quantises must not count twice.
                    x = x + te.checkpoint(second, y, is_first_microbatch=first_microbatch)
                else:
                    x = x + second(y, is_first_microbatch=first_microbatch)
            return x

    taken: dict[tuple[int, str, str], list[Any]] = {}
    step = 0

    def take(name: str, tensor: str, value: Any) -> None:
        taken.setdefault((step, name, tensor), []).append(value.detach().reshape(-1, value.shape[-1]).clone())

    def watch(model: Any) -> None:
        def before(name: str, module: Any, args: Any) -> None:
            if not torch.is_grad_enabled():
                return
            x = args[0].detach()
            if isinstance(module, te.LayerNormLinear):
                x = torch.nn.functional.layer_norm(
                    x.float(), (128,), module.layer_norm_weight.float(), module.layer_norm_bias.float()
                ).to(torch.bfloat16)
            take(name, "input", x)
            take(name, "weight", module.weight)

        def after(name: str, output: Any) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: take(name, "grad_output", gradient))

        for name, module in model.named_modules():
            if isinstance(module, (te.LayerNormLinear, te.Linear)):
                module.register_forward_pre_hook(lambda m, a, name=name: before(name, m, a))
                module.register_forward_hook(lambda m, a, o, name=name: after(name, o))

    def functions() -> list[int]:
        """Identities of everything the seam could replace."""
        return [
            id(value)
            for module in list(sys.modules.values())
            if module is not None and module.__name__.startswith("transformer_engine")
            for value in vars(module).values()
            if callable(value)
        ]

    def train(model: Any, recorder: Any, steps: int, out_counts: dict[int, Any]) -> None:
        nonlocal step
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(1, steps + 1):
            with Launches() as beginning:
                recorder.begin_step(step)
            wrapped = binding.quantize
            for micro_batch in range(MICRO_BATCHES):
                x = torch.randn(2, 64, 128, generator=generator) * (1 + step % 3) * (1 + micro_batch)
                x = x.to(torch.bfloat16).requires_grad_()
                with te.autocast(enabled=True, recipe=recipe.te()):
                    y = model(x, micro_batch == 0)
                (y.float().pow(2).mean() * 2.0**step).backward()
            optimizer.step()
            optimizer.zero_grad()
            with Launches() as ending:
                recorder.end_step(step, {"loss": float(step)})
            if recipe_name != "delayed":  # a delayed history would keep what the evaluation saw
                with torch.no_grad(), te.autocast(enabled=True, recipe=recipe.te()):
                    model(1000 * x, None)
            out_counts[step] = {
                "begin": beginning.names,
                "end": ending.names,
                "wrapped": wrapped is not binding.quantize,
            }

    torch.manual_seed(1)
    model = Model(2)
    watch(model)
    before = functions()
    recorder = telemetry.attach(
        model,
        recipe,
        directory=out / "run",
        log_every=LOG_EVERY,
        stats_every=LOG_EVERY,
        whatif=["second.0/*", "first.1/grad*"],
    )
    counts: dict[int, Any] = {}
    train(model, recorder, STEPS, counts)
    recorder.close()
    restored = functions() == before
    inputs, taken = dict(taken), {}

    launches = {}
    for blocks in (1, 3):
        torch.manual_seed(1)
        te.quantization.FP8GlobalStateManager.reset()
        size: dict[int, Any] = {}
        sized = Model(blocks)
        other = telemetry.attach(
            sized, recipe, directory=out / f"size{blocks}", log_every=1, stats_every=0, sinks=[]
        )
        train(sized, other, 1, size)
        launches[blocks] = size[1]["end"]
        other.close()
    torch.save(
        {"taken": inputs, "counts": counts, "restored": restored, "launches": launches}, out / "taken.pt"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
