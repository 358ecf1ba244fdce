"""What update="backward" holds at a time, and what it refuses: it has no second look at a gradient."""

import pytest
import torch
import torch.nn.functional as F
from residencies import MODES, adamw, in_memory
from toy_models import (
    assert_same_weights,
    llama_loss,
    tiny_llama,
    tiny_loss,
    tiny_net,
    train,
)

import chunkft


def test_gradients_of_the_chunk_never_exist_together():
    """With update="backward" the gradient of a page is gone before that of the next but one is complete."""
    model = tiny_llama()
    optimizer = adamw(model, chunks=1, residency="stream", page_bytes=2048, update="backward")
    seen = []

    def count(_):
        seen.append(
            sum(leaf.grad.nbytes for _, leaf in optimizer.active_parameters() if leaf.grad is not None)
        )

    for _, leaf in optimizer.active_parameters():
        leaf.register_post_accumulate_grad_hook(count)
    llama_loss(model, 0).backward()
    total = sum(leaf.nbytes for _, leaf in optimizer.active_parameters())
    largest = max(leaf.nbytes for _, leaf in optimizer.active_parameters())
    assert seen
    assert max(seen) <= max(2048, 2 * largest) < total / 2
    assert all(leaf.grad is None for _, leaf in optimizer.active_parameters())


def test_a_second_backward_before_step_is_refused():
    model = tiny_net()
    optimizer = adamw(model, chunks=2, **MODES["backward"])
    tiny_loss(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"second backward pass.*accumulate.*update='step'"):
        tiny_loss(model, 1).backward()
    optimizer.zero_grad()
    tiny_loss(model, 2).backward()
    optimizer.step()
    assert optimizer.updates == 1


def test_state_dict_between_backward_and_step_is_refused(tmp_path):
    model = tiny_net()
    optimizer = adamw(model, chunks=2, **MODES["backward"])
    tiny_loss(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"state_dict\(\) between backward\(\) and step\(\)"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"between backward\(\) and step\(\)"):
        chunkft.save_checkpoint(optimizer, tmp_path / "no.safetensors")
    assert not list(tmp_path.iterdir())
    optimizer.step()
    assert optimizer.state_dict()["cursor"]["updates"] == 1


def test_a_non_finite_gradient_drops_what_is_left_of_the_step():
    model = tiny_net()
    optimizer = adamw(model, chunks=1, **MODES["backward"])
    train(model, optimizer, tiny_loss, range(2))
    table = model.table.weight.detach().clone()
    head = model.head.weight.detach().clone()
    hook = model.blocks[0].register_full_backward_hook(lambda *_: (torch.full((6, 7, 11), float("nan")),))
    tiny_loss(model, 2).backward()
    hook.remove()
    optimizer.step()
    assert torch.equal(model.table.weight, table)  # below the hook: dropped
    assert not torch.equal(model.head.weight, head)  # above: updated before the hook ran
    assert (optimizer.updates, optimizer.skipped, optimizer.interval_position) == (2, 1, 0)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    train(model, optimizer, tiny_loss, range(3, 5))
    assert optimizer.updates == 4


def test_a_weight_that_grows_after_its_update_is_named():
    model = tiny_net()
    optimizer = adamw(model, chunks=1, residency="stream", page_bytes=1 << 20, update="backward")
    ids = torch.zeros(2, 3, dtype=torch.long)
    F.cross_entropy(model(ids), torch.tensor([0, 1])).backward()
    _, leaf = next(iter(optimizer.active_parameters()))
    leaf.grad = torch.zeros_like(leaf)
    with pytest.raises(RuntimeError, match=r"table.weight.*grew after.*update='step'"):
        optimizer.step()
    assert leaf.grad is None


def test_a_weight_that_is_read_without_its_module_is_updated_in_step():
    class Functional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = torch.nn.Linear(5, 7)
            self.last = torch.nn.Linear(7, 3)

        def forward(self, x):
            return F.linear(torch.relu(self.first(x)), self.last.weight, self.last.bias)

    def loss(model, number):
        return model(torch.randn(4, 5, generator=torch.Generator().manual_seed(number))).pow(2).sum()

    model, plain_model = Functional(), Functional()
    paged = adamw(model, chunks=2, **MODES["backward"])
    plain = in_memory(plain_model, paged.plan, adamw)
    with pytest.warns(UserWarning, match=r"last\.weight.*used without a call"):
        train(model, paged, loss, range(6))
    with pytest.warns(UserWarning, match=r"last\.weight.*used without a call"):
        train(plain_model, plain, loss, range(6))
    assert_same_weights(model, plain_model)


def test_an_exception_in_the_middle_of_a_backward_pass_leaves_a_usable_optimizer():
    model = tiny_net()
    optimizer = adamw(model, chunks=1, **MODES["backward"])
    train(model, optimizer, tiny_loss, range(2))

    def fail(*_):
        raise MemoryError("in the middle")

    hook = model.blocks[0].register_full_backward_hook(fail)
    with pytest.raises(MemoryError, match="in the middle"):
        tiny_loss(model, 2).backward()
    hook.remove()
    optimizer.zero_grad()
    train(model, optimizer, tiny_loss, range(3, 6))
    assert optimizer.updates == 5
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_base_without_state_frees_each_gradient_in_the_backward_pass():
    """Slices without a page do not wait for each other."""
    model = tiny_llama()
    optimizer = chunkft.ChunkOptimizer(
        model, torch.optim.SGD, chunks=1, lr=0.1, residency="stream", page_bytes=1 << 20, update="backward"
    )
    llama_loss(model, 0).backward()
    leaves = [leaf for _, leaf in optimizer.active_parameters()]
    assert 0 < optimizer.memory()["gradients"] <= 2 * max(leaf.nbytes for leaf in leaves)
    assert optimizer.memory()["gradients"] < sum(leaf.nbytes for leaf in leaves) / 2
