"""Plain PyTorch with autocast and a GradScaler: nothing but the optimizer differs from the usual loop."""

import torch
from torch import nn

import chunkft

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3)).to(device)
x = torch.randn(512, 20, device=device)
y = x[:, :3].argmax(1)

optimizer = chunkft.ChunkAdamW(model, lr=3e-3, chunks=4, interval=5)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=120)
scaler = torch.amp.GradScaler(device)
for _ in range(120):
    with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    scheduler.step()
print("loss", loss.item())
