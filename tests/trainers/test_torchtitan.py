"""The container with torchtitan's interface: it steps, schedules and checkpoints its parts as they do by themselves."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from toy_models import assert_same_weights, mlp, mlp_loss

import chunkft
from chunkft.integrations.torchtitan import ChunkOptimizersContainer

OPTIONS = {"lr": 1e-2, "chunks": 3, "interval": 2}


def parts():
    return [mlp(0), mlp(1)]


def train(models, optimizers, schedulers, steps):
    for number in steps:
        for model in models:
            mlp_loss(model, number).backward()
        nn.utils.clip_grad_norm_([p for model in models for p in model.parameters()], 0.5)
        for step in (optimizers.step, optimizers.zero_grad):
            step()
        for scheduler in schedulers:
            scheduler.step()


def schedulers_of(optimizers):
    """As torchtitan's container of schedulers makes them: one for each optimizer that it iterates over."""
    return [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers
    ]


class Each:
    """Optimizers side by side, with what the loop calls."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def test_parts_train_as_by_themselves():
    models, alone = parts(), parts()
    container = ChunkOptimizersContainer(models, chunkft.ChunkAdamW, OPTIONS)
    seen = []
    container.register_step_post_hook(lambda *args: seen.append(len(seen)))
    train(models, container, schedulers_of(container), range(13))
    optimizers = [chunkft.ChunkAdamW(model, **OPTIONS) for model in alone]
    train(alone, Each(optimizers), schedulers_of(optimizers), range(13))
    for ours, theirs in zip(models, alone, strict=True):
        assert_same_weights(ours, theirs)
    assert len(container) == 2
    assert seen == list(range(13))


@pytest.mark.parametrize("stop", [1, 5, 8])  # before most chunks had their turn, and inside of intervals
def test_a_distributed_checkpoint_resumes_bit_for_bit(tmp_path, stop):
    undisturbed = parts()
    container = ChunkOptimizersContainer(undisturbed, chunkft.ChunkAdamW, OPTIONS)
    train(undisturbed, container, [], range(13))

    models = parts()
    container = ChunkOptimizersContainer(models, chunkft.ChunkAdamW, OPTIONS)
    train(models, container, [], range(stop))
    dcp.save(
        {"model": [m.state_dict() for m in models], "optimizer": container}, checkpoint_id=tmp_path / "saved"
    )

    resumed = parts()
    container = ChunkOptimizersContainer(resumed, chunkft.ChunkAdamW, OPTIONS)
    weights = {"model": [m.state_dict() for m in resumed], "optimizer": container}
    dcp.load(weights, checkpoint_id=tmp_path / "saved")
    train(resumed, container, [], range(stop, 13))
    for ours, theirs in zip(resumed, undisturbed, strict=True):
        assert_same_weights(ours, theirs)


def test_a_state_of_other_parts_is_refused():
    container = ChunkOptimizersContainer(parts(), chunkft.ChunkAdamW, OPTIONS)
    with pytest.raises(
        ValueError, match=r"entries \['chunkft.0'\]; allowed are \['chunkft.0', 'chunkft.1'\]"
    ):
        container.load_state_dict({"chunkft.0": None})


def test_parts_are_given_back_where_one_is_refused():
    models = [mlp(0), nn.ReLU()]
    with pytest.raises(ValueError, match="trainable"):
        ChunkOptimizersContainer(models, chunkft.ChunkAdamW, OPTIONS)
    assert all(p.requires_grad for p in models[0].parameters())
    assert "_chunkft" not in models[0].__dict__
    with pytest.raises(ValueError, match="model_parts must hold at least one"):
        ChunkOptimizersContainer([])


def test_parameters_of_tensor_parallelism_are_refused_by_name(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_module, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = distribute_module(nn.Linear(3, 5), init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="parameter 'weight' is a DTensor that fully_shard did not make"):
            ChunkOptimizersContainer([model], chunkft.ChunkAdamW, OPTIONS)
    finally:
        dist.destroy_process_group()
