"""Clipping and clearing by way of the weights, as code does that knows nothing of slices."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import holds_memory, small, small_loss
from residencies import MODES
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

import chunkft
from chunkft.autograd import GradientView, compilable


def gradients(optimizer: chunkft.ChunkOptimizer) -> list[torch.Tensor]:
    return [leaf.grad for _, leaf in optimizer.active_parameters() if leaf.grad is not None]


class Tied(nn.Module):
    """A tied output layer, an atomic norm, and a weight that is read without its module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(23, 12)
        self.norm = nn.LayerNorm(12)
        self.read = nn.Linear(12, 12)
        self.out = nn.Linear(12, 23, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(F.linear(self.norm(self.table(ids)), self.read.weight, self.read.bias))


def tied_loss(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(20).view(4, 5)
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


PLANS = {
    "bytes": {"chunks": 4, "always_active": ["3.weight"]},
    "columns": {"chunks": 5, "slice_dim": 1},
    # several slices of one weight, and an atomic parameter, are active together
    "interleaved": {"chunks": 3, "partition": "interleaved"},
}


@pytest.mark.filterwarnings("ignore:the weight")
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("build", "loss"), [(small, small_loss), (Tied, tied_loss)], ids=["small", "tied"])
def test_clipping_weights_is_clipping_the_active_slices(build, loss, plan, foreach):
    options = dict(PLANS[plan], always_active=None) if build is Tied else PLANS[plan]
    model = build().eval()
    optimizer = chunkft.ChunkAdamW(model, interval=1, **options)
    clipped = 0
    for _ in range(6):
        for _ in range(2):
            loss(model).backward()
        before = [gradient.clone() for gradient in gradients(optimizer)]
        norm = get_total_norm(before)
        limit = 0.3 * float(norm)
        found = clip_grad_norm_(model.parameters(), limit, foreach=foreach)
        torch.testing.assert_close(found, norm)
        for gradient, unclipped in zip(gradients(optimizer), before, strict=True):
            torch.testing.assert_close(gradient, unclipped * (limit / (norm + 1e-6)))
        clipped += len(before)
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())
    assert clipped >= 6


def test_clipping_weights_trains_as_max_grad_norm_does():
    models = [small().eval() for _ in range(2)]
    options = {"lr": 1e-2, "chunks": 4, "interval": 2}
    own = chunkft.ChunkAdamW(models[0], max_grad_norm=0.5, **options)
    foreign = chunkft.ChunkAdamW(models[1], **options)
    for _ in range(10):
        for model in models:
            small_loss(model).backward()
        found = clip_grad_norm_(models[1].parameters(), 0.5)
        own.step()
        foreign.step()
        torch.testing.assert_close(found, own.grad_norm)
    for mine, theirs in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_one_chunk_clips_to_the_bits_of_adamw():
    chunked, plain = small().eval(), small().eval()
    optimizer = chunkft.ChunkAdamW(chunked, lr=1e-2, chunks=1)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(4):
        norms = []
        for model, stepper in ((chunked, optimizer), (plain, reference)):
            small_loss(model).backward()
            norms.append(clip_grad_norm_(model.parameters(), 0.7))
            stepper.step()
            model.zero_grad()
        assert torch.equal(*norms)
        assert all(map(torch.equal, chunked.parameters(), plain.parameters()))


@pytest.mark.parametrize("order", [0.0, 1.0, 2.0, 3.0, math.inf])
def test_norms_of_any_order_are_those_over_all_elements(order):
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=2, partition="interleaved")
    small_loss(model).backward()
    for name in {piece.name for piece, _ in optimizer.active_parameters() if piece.dim is not None}:
        parts = [leaf.grad for piece, leaf in optimizer.active_parameters() if piece.name == name]
        expected = torch.linalg.vector_norm(torch.cat([part.flatten() for part in parts]), order)
        view = model.get_parameter(name).grad
        torch.testing.assert_close(view.norm(order), expected)
        torch.testing.assert_close(view.data.norm(order), expected)


def test_clipping_values_of_weights_clamps_the_active_slices():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=3)
    small_loss(model).backward()
    before = [gradient.clone() for gradient in gradients(optimizer)]
    clip_grad_value_(model.parameters(), 0.01)
    assert all(
        torch.equal(g, b.clamp(-0.01, 0.01)) for g, b in zip(gradients(optimizer), before, strict=True)
    )
    clip_grad_value_(model.parameters(), 0.005, foreach=True)
    assert max(float(g.abs().max()) for g in gradients(optimizer)) <= 0.0051


@pytest.mark.parametrize("foreach", [None, True, False])
def test_slices_that_are_listed_beside_their_weights_count_once(foreach):
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    small_loss(model).backward()
    leaves = [leaf for piece, leaf in optimizer.active_parameters() if piece.dim is not None]
    before = [gradient.clone() for gradient in gradients(optimizer)]
    norm = clip_grad_norm_([*model.parameters(), *leaves], 0.1, foreach=foreach)
    torch.testing.assert_close(norm, get_total_norm(before))
    for gradient, unclipped in zip(gradients(optimizer), before, strict=True):
        torch.testing.assert_close(gradient, unclipped * (0.1 / (norm + 1e-6)))


def test_clearing_the_weights_clears_the_slices():
    model, untouched = small().eval(), small().eval()
    optimizer, reference = (chunkft.ChunkAdamW(m, lr=0.1, chunks=3, interval=2) for m in (model, untouched))
    for number in range(6):
        (3.0 * small_loss(model)).backward()
        model.zero_grad()
        if number % 2:
            assert not gradients(optimizer)  # read before the next backward pass, or not
        for m in (model, untouched):
            small_loss(m).backward()
        optimizer.step()
        reference.step()
    assert all(map(torch.equal, model.parameters(), untouched.parameters()))
    small_loss(model).backward()
    model.zero_grad(set_to_none=False)
    assert all(not gradient.any() for gradient in gradients(optimizer))
    updates = optimizer.updates
    model.zero_grad()
    optimizer.step()
    assert optimizer.updates == updates  # without any gradient it is no step


def test_zero_grad_of_the_optimizer_clears_the_weights():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=3)
    small_loss(model).backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert float(clip_grad_norm_(model.parameters(), 1.0)) == 0.0


def test_views_take_no_memory_and_die_with_their_chunk():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1)
    small_loss(model).backward()
    views = [p.grad for p in model.parameters() if isinstance(p.grad, GradientView)]
    leaves = [weakref.ref(leaf) for piece, leaf in optimizer.active_parameters() if piece.dim is not None]
    assert views
    assert not any(holds_memory(view) for view in views)
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    optimizer.step()
    assert float(views[0].norm()) == 0.0
    gc.collect()
    assert not any(leaf() is not None for leaf in leaves)


def test_detach_takes_views_away():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=4)
    small_loss(model).backward()
    optimizer.detach()
    assert not any(isinstance(p.grad, GradientView) for p in model.parameters())


def test_a_run_that_ends_within_a_window_leaves_nothing_behind():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    small_loss(model).backward()
    references = [weakref.ref(thing) for thing in (model, optimizer, *model.parameters())]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_a_model_that_moves_within_a_window_still_clips():
    model, still = small().eval(), small().eval()
    both = [chunkft.ChunkAdamW(m, lr=0.1, chunks=3) for m in (model, still)]
    for m in (model, still):
        small_loss(m).backward()
    model.share_memory()  # other storage
    for m, optimizer in zip((model, still), both, strict=True):
        small_loss(m).backward()
        clip_grad_norm_(m.parameters(), 0.1)
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), still.parameters()))


def test_gradients_of_a_checkpoint_within_a_window_are_clipped():
    source, target = small().eval(), small().eval()
    first = chunkft.ChunkAdamW(source, chunks=3)
    small_loss(source).backward()
    second = chunkft.ChunkAdamW(target, chunks=3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(clip_grad_norm_(target.parameters(), 0.1), clip_grad_norm_(source.parameters(), 0.1))
    assert all(map(torch.equal, gradients(first), gradients(second)))


def test_a_dense_gradient_that_is_put_into_a_weight_counts():
    model, plain = small().eval(), small().eval()
    optimizer = chunkft.ChunkAdamW(model, lr=0.1, chunks=1)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.1)
    small_loss(model).backward()
    for m in (model, plain):
        for p in m.parameters():
            p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    reference.step()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_a_grad_scaler_unscales_what_is_clipped():
    chunked, plain = small().eval(), small().eval()
    optimizer = chunkft.ChunkAdamW(chunked, lr=1e-2, chunks=1)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for model, stepper in ((chunked, optimizer), (plain, reference)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for step in range(5):
            scaler.scale(small_loss(model) * (math.inf if step == 2 else 1.0)).backward()
            scaler.unscale_(stepper)
            clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(stepper)
            scaler.update()
            model.zero_grad()
    assert all(map(torch.equal, chunked.parameters(), plain.parameters()))
    assert (optimizer.updates, optimizer.skipped) == (4, 1)


def test_slices_of_a_compiled_model_are_clipped():
    torch._dynamo.reset()
    model, eager = small().eval(), small().eval()
    both = [
        chunkft.ChunkAdamW(m, lr=0.1, chunks=2, interval=1, always_active=["3.*"]) for m in (model, eager)
    ]
    compilable(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(4):
        for called, m, optimizer in ((compiled, model, both[0]), (eager, eager, both[1])):
            for _ in range(2):  # a graph is made, or its guards are checked, while weights have views
                small_loss(called).backward()
            assert float(clip_grad_norm_(m.parameters(), 0.1)) > 0.1
            optimizer.step()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()


@pytest.mark.parametrize("chunks", [1, 3])
def test_updates_in_the_backward_pass_tell_their_norm_and_refuse_to_be_clipped(chunks):
    model, plain = small().eval(), small().eval()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=chunks, interval=1, **MODES["backward"])
    reference = chunkft.ChunkAdamW(plain, lr=1e-2, chunks=None, partition=optimizer.plan, interval=1)
    for _ in range(4):
        for m in (model, plain):
            small_loss(m).backward()
        norm = clip_grad_norm_(plain.parameters(), math.inf)
        torch.testing.assert_close(clip_grad_norm_(model.parameters(), math.inf), norm)
        clip_grad_norm_(model.parameters(), 2 * float(norm))  # would change nothing
        with pytest.raises(RuntimeError, match=r"cannot be clipped or scaled with update='backward'"):
            clip_grad_norm_(model.parameters(), 0.5 * float(norm))
        with pytest.raises(RuntimeError, match=r"cannot be clipped or scaled with update='backward'"):
            clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        reference.step()
        assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_where_nothing_can_tell_that_a_backward_update_is_not_clipped_there_is_a_warning():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 2, 1))
    optimizer = chunkft.ChunkAdamW(model, chunks=1, **MODES["backward"])
    with pytest.warns(UserWarning, match=r"clip_grad_norm_ and the like .* will do nothing"):
        model(torch.randn(2, 3, 5)).sum().backward()
    optimizer.step()
