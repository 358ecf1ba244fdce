"""An evaluation leaves the outermost module gathered, in its compute dtype: what is asked then is of shards."""

import rigs
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import chunkft


def predicted(optimizer):
    parts = optimizer.memory_report().parts()
    return {name: (part.predicted, part.full) for name, part in parts.items()}


def asked(group, folder):
    case = rigs.Case("llama-tied", 2, 3)
    model = case.model()
    mesh = DeviceMesh.from_group(group, "cpu")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in rigs.blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = chunkft.ChunkAdamW(model, lr=1e-3, chunks=3, interval=1)
    ids = torch.arange(12).view(2, 6)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    before = optimizer.memory(), predicted(optimizer)
    saved = optimizer.state_dict()
    chunkft.save_checkpoint(optimizer, f"{folder}/state.safetensors")
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    gathered = {parameter.dtype for parameter in model.parameters()}
    after = optimizer.memory(), predicted(optimizer)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    chunkft.load_checkpoint(optimizer, f"{folder}/state.safetensors")
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return (before, after), torch.bfloat16 in gathered, optimizer.updates


def test_memory_saving_and_loading_behind_an_evaluation(pool, tmp_path):
    for same, gathered, updates in pool.run(2, asked, str(tmp_path)):
        assert same[0] == same[1]
        assert gathered
        assert updates == 4
