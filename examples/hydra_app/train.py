"""A Hydra application of its own that takes `fp8_recipe=…` because nemo_fp8_recipes is installed.

python examples/hydra_app/train.py fp8_recipe=mxfp8
python examples/hydra_app/train.py fp8_recipe=nemotron_h fp8_recipe.amax_epsilon=1e-6
python examples/hydra_app/train.py --cfg job fp8_recipe=blockwise       # what it composes to
"""

import hydra
from omegaconf import DictConfig

import nemo_fp8_recipes as fp8


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    recipe = fp8.load(config.fp8_recipe if "fp8_recipe" in config else "bf16")
    job = fp8.start(recipe, device=config.device)  # before torch and Transformer Engine

    import torch
    import transformer_engine.pytorch as te

    torch.manual_seed(1234)
    options = {"params_dtype": torch.bfloat16, "device": "cuda"}
    model = torch.nn.Sequential(
        te.LayerNormLinear(config.width, 4 * config.width, **options),
        torch.nn.GELU(),
        te.Linear(4 * config.width, config.width, **options),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    batch = torch.randn(config.batch, config.width, dtype=torch.bfloat16, device="cuda")
    for step in range(1, config.steps + 1):
        optimizer.zero_grad()
        with fp8.autocast(recipe):
            loss = (model(batch) - batch).float().square().mean()
        loss.backward()
        optimizer.step()
        if step in (1, config.steps):
            print(f"step {step}  loss {loss.item():.4f}")

    print(f"{recipe.name} on {job.device.label}")
    for row in fp8.manifest(model, recipe).rows:
        print(f"{row.module}: {row.recipe}" + (f" ({row.reason})" if row.reason else ""))


if __name__ == "__main__":
    main()
