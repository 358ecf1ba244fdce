"""Shards of FSDP2: torchrun --nproc-per-node 2 examples/fsdp2.py; called again, it goes on from what it saved."""

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft

device = (
    torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
)
dist.init_process_group(device_id=None if device.type == "cpu" else device)
mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(device)
for block in [*model.model.layers, model]:
    fully_shard(block, mesh=mesh)
optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=4, interval=5, max_grad_norm=1.0)
if os.path.exists("out/optimizer.safetensors"):
    dcp.load(model.state_dict(), checkpoint_id="out/weights")
    chunkft.load_checkpoint(optimizer, "out/optimizer.safetensors")
data = torch.Generator().manual_seed(dist.get_rank())  # each rank has samples of its own
for _ in range(60):
    ids = ((torch.randint(0, 64, (8, 1), generator=data) + torch.arange(12)) % 64).to(device)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    loss = chunkft.token_mean(
        cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"), ids[:, 1:].numel()
    )
    loss.backward()
    optimizer.step()
dcp.save(model.state_dict(), checkpoint_id="out/weights")
chunkft.save_checkpoint(optimizer, "out/optimizer.safetensors")
if dist.get_rank() == 0:
    print("loss", loss.item())
dist.destroy_process_group()
