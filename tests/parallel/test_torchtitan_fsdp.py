"""The container of torchtitan around a part that ``fully_shard`` shards: steps, torchtitan's clipping, checkpoints."""

import pytest
import rigs
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rigs import Case, Trained
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from chunkft.integrations.torchtitan import ChunkOptimizersContainer

CASE = Case("llama", 2, 4, clip=0.5, steps=16)


def train(group, case, place=None, steps=None):
    """From the middle on if steps begin there."""
    first, last = steps or (0, case.steps)
    model = rigs.sharded(case.model(), group)
    keywords = {name: value for name, value in case.keywords().items() if name != "max_grad_norm"}
    container = ChunkOptimizersContainer([model], optimizer_kwargs=keywords)
    if first:
        state = {"model": get_model_state_dict(model), "optimizer": container}
        dcp.load(state, checkpoint_id=place, process_group=group)
        set_model_state_dict(model, state["model"])
    losses, norms = [], []
    for step in range(first, last):
        loss = model(**rigs.batch_of(case, step, 0, dist.get_rank(group), group.size())).loss
        loss.backward()
        losses.append(loss.item())
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        norm = nn.utils.get_total_norm(gradients, 2.0, error_if_nonfinite=False, foreach=True)
        nn.utils.clip_grads_with_norm_(model.parameters(), case.clip, norm, foreach=True)
        norms.append(float(norm))
        container.step()
        container.zero_grad()
    if place is not None and not first:
        state = {"model": get_model_state_dict(model), "optimizer": container}
        dcp.save(state, checkpoint_id=place, process_group=group)
    (inner,) = container
    counts = inner.updates, inner.skipped, inner.active
    return Trained(losses, norms, rigs.digest(model), *counts, inner.plan.to_dict())


def test_a_sharded_part_trains_as_one_process(pool):
    ranks = pool.run(2, train, CASE)
    rigs.assert_same_run(CASE, ranks, pool.run(1, rigs.train_alone, CASE, ranks[0].plan))


@pytest.mark.parametrize("stop", [3, 8])  # inside of an interval, and before a chunk had its turn
def test_a_sharded_part_resumes_to_the_same_bits(pool, stop, tmp_path):
    place = str(tmp_path / "saved")
    whole = pool.run(2, train, CASE)
    pool.run(2, train, CASE, place, (0, stop))
    for one, rest in zip(whole, pool.run(2, train, CASE, place, (stop, CASE.steps)), strict=True):
        assert rest.losses == one.losses[stop:]
        assert rest.weights == one.weights
