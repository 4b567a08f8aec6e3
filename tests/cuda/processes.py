"""Sums over processes: two draw the same curves and train alike, through NCCL on GPUs and through gloo elsewhere."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_collapse import CollapseGuard, CollapseMonitor, GradientMonitor, SpectralAlignmentMonitor
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, MemoryLogger, PointKeeper, Toy, batches, weights


def agree(device: str) -> bool:
    """Print what came of it, and whether all held."""
    backend = "nccl" if device == "cuda" else "gloo"
    try:
        on_two_processes(_check, device, backend)
    except Exception as error:
        print(f"two processes through {backend}: {error!r:.600}")
        return False
    print(f"two processes through {backend}: the same curves on both, the same weights as without monitors")
    return True


def _check(rank: int, device: str, backend: str) -> None:
    bare, _ = _fit(device, backend, [])
    keeper = PointKeeper()
    monitors = [CollapseMonitor(every_n_steps=2), SpectralAlignmentMonitor(), GradientMonitor(), CollapseGuard("log")]
    watched, strategy = _fit(device, backend, [*monitors, keeper])
    assert all(torch.equal(value, watched[name]) for name, value in bare.items()), "the weights are others"
    values = torch.tensor([point.value for point in keeper.points], dtype=torch.float32, device=strategy.root_device)
    both = strategy.all_gather(values)
    assert len(values), "no point"
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=0, equal_nan=True)


def _fit(device: str, backend: str, callbacks: list) -> tuple[dict[str, torch.Tensor], object]:
    torch.manual_seed(0)
    model = Toy()
    options = {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 2, "log_every_n_steps": 2}
    strategy = DDPStrategy(process_group_backend=backend)
    trainer = Trainer(**{**QUIET, **options}, logger=MemoryLogger(), strategy=strategy, callbacks=callbacks)
    trainer.fit(model, batches())
    return weights(model), trainer.strategy
