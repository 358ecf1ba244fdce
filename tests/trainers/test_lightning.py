"""Lightning's Trainer with a ChunkAdamW trains as the loop written by hand, also after a stop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_models import assert_same_weights, mlp

import chunkft

lightning = pytest.importorskip("lightning")

EPOCHS = 6  # of three optimizer steps of two batches each
STEPS = 3 * EPOCHS
OPTIONS = {"lr": 1e-2, "chunks": 3, "interval": 2}


def batches():
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(5, 13, generator=generator), torch.randint(0, 9, (5,), generator=generator))
        for _ in range(6)
    ]


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.rates: list[float] = []

    def training_step(self, batch, number):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def on_train_batch_end(self, *args):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = chunkft.ChunkAdamW(self, **OPTIONS)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module, folder, epochs=EPOCHS, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=0.3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    loader = torch.utils.data.DataLoader(batches(), batch_size=None, shuffle=False)
    trainer.fit(module, loader, weights_only=True, **options)
    return trainer


def by_hand() -> tuple[nn.Module, list[float], list[float]]:
    model = mlp()
    optimizer = chunkft.ChunkAdamW(model, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    rates, norms = [], []
    for number, (x, y) in enumerate(batches() * EPOCHS):
        (F.cross_entropy(model(x), y) / 2).backward()
        if number % 2:
            leaves = [leaf for _, leaf in optimizer.active_parameters()]
            norms.append(float(nn.utils.clip_grad_norm_(leaves, 0.3)))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return model, rates, norms


def test_trains_as_the_loop_by_hand_with_clipping_accumulation_and_a_scheduler(tmp_path):
    module = Module()
    trainer = fit(module, tmp_path)
    model, rates, norms = by_hand()
    assert max(norms) > 0.3  # clipping did something
    assert_same_weights(module.net, model)
    assert module.rates == rates
    (optimizer,) = trainer.optimizers
    assert (optimizer.updates, optimizer.sweep) == (STEPS, STEPS // 6)


@pytest.mark.parametrize("epochs", [1, 2])  # inside of an interval, and at the end of one
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path, epochs):
    trainer = fit(Module(), tmp_path, epochs)
    assert trainer.optimizers[0].interval_position == (epochs * 3) % 2
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = Module()
    fit(resumed, tmp_path, ckpt_path=tmp_path / "stopped.ckpt")
    assert_same_weights(resumed.net, by_hand()[0])
