"""Lightning: return a ChunkAdamW from configure_optimizers; clipping, accumulation and checkpoints are Lightning's."""

import lightning
import torch
from torch import nn

import chunkft


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 3))

    def training_step(self, batch, number):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = chunkft.ChunkAdamW(self, lr=3e-3, chunks=4, interval=5)  # the one line
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)]


torch.manual_seed(0)
x = torch.randn(640, 20)
data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
trainer = lightning.Trainer(max_epochs=10, gradient_clip_val=1.0, accumulate_grad_batches=2, logger=False)
model = Classifier()
trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=32))
print("loss", model.training_step((x, x[:, :3].argmax(1)), 0).item())
