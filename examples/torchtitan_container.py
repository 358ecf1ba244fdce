"""torchtitan: what a train spec's build_optimizers returns, with the calls that its trainer makes."""

import tempfile

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from chunkft.integrations.torchtitan import ChunkOptimizersContainer


def build_optimizers(model_parts, *_):  # give this one to the TrainSpec
    return ChunkOptimizersContainer(model_parts, optimizer_kwargs={"lr": 3e-3, "chunks": 4, "interval": 5})


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))
optimizers = build_optimizers([model])
schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 120) for optimizer in optimizers]
x = torch.randn(512, 20)
for _ in range(120):
    loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizers.step()
    optimizers.zero_grad()
    schedulers[0].step()
with tempfile.TemporaryDirectory() as folder:
    dcp.save({"model": model.state_dict(), "optimizer": optimizers}, checkpoint_id=folder, no_dist=True)
print("loss", loss.item())
