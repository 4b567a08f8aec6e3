"""Below Lightning: the engine of the monitors and the judge in a callback of Hugging Face's ``Trainer``.

Run: ``python examples/hugging_face_trainer.py`` (needs ``pip install transformers accelerate``)
"""

import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTModel

from lightning_collapse.monitoring import FeatureWindow, read_points
from lightning_collapse.rules import Judge
from lightning_collapse.utilities import default_taps


class CollapseCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]  # where transformers is not installed
    """Watches layers of whatever model the trainer trains, and prints what fails; ``judge.verdicts`` has it all."""

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every, self.judge = every_n_steps, Judge()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Hook the model."""
        self.window = FeatureWindow(model, default_taps(model), args.device, rows=256)
        self.judge.planned = state.max_steps // self.every

        def before(module: nn.Module, args: Any, batch: dict[str, Tensor]) -> None:
            if module.training:  # the batch has the padding mask
                self.window.before_batch(batch, -(state.global_step + 1) % self.every)

        self.handle = model.register_forward_pre_hook(before, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge a point, if one is due."""
        left = -state.global_step % self.every
        self.window.after_batch(left, self.every)
        if left == 0:
            judgement = self.judge.update(read_points(self.window.features(), state.global_step))
            print("".join(f"- {verdict}\n" for verdict in judgement.new), end="")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        self.handle.remove()
        self.window.close()


class Pulled(nn.Module):
    """A small vision transformer whose two noisy views are pulled together, and nothing holds them apart."""

    def __init__(self) -> None:
        super().__init__()
        small = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        small.image_size, small.patch_size, small.num_channels = 8, 2, 1
        self.encoder = ViTModel(small, add_pooling_layer=False)
        self.projector = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Squared distance between the views."""
        views = torch.cat([pixel_values, pixel_values]) + 0.1 * torch.randn(2 * len(pixel_values), 1, 8, 8)
        first, second = self.projector(self.encoder(views).last_hidden_state.mean(dim=1)).chunk(2)
        return {"loss": (first - second).square().sum(dim=1).mean()}


def train(model: nn.Module, steps: int, *callbacks: TrainerCallback) -> None:
    """Fit digits."""
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        data = [{"pixel_values": image} for image in images]
        Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks)).train()


def main(steps: int = 200) -> None:
    """Train, and say what fails."""
    torch.manual_seed(0)
    callback = CollapseCallback()
    train(Pulled(), steps, callback)
    print(f"After {steps} steps the judge gave {len(callback.judge.verdicts)} verdicts.")


if __name__ == "__main__":
    main()
