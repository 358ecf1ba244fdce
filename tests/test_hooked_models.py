"""Models with accelerate's hooks, as ``device_map`` puts them in, train in chunks like models without."""

import copy
import gc
import weakref

import pytest
import tiny_transformers
import torch
from helpers import assert_slices_equal_dense, chunk_gradients, dense_gradients, window
from torch import nn

import chunkft
from chunkft.autograd import compilable

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

pytestmark = pytest.mark.filterwarnings("error:the weight .* is used without a call:UserWarning")


class Counting(hooks.ModelHook):
    """Counts calls, and scales outputs so that a hook which is left out changes the results."""

    def __init__(self, log, factor=1.0):
        self.log, self.factor = log, factor

    def pre_forward(self, module, *args, **kwargs):
        self.log.append(type(module).__name__)
        return args, kwargs

    def post_forward(self, module, output):
        return output * self.factor


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(19, 12), nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 7, bias=False))


def loss(model):
    return model(torch.arange(18).view(3, 6)).square().sum()


def hooked(log, factor=0.5):
    model = small()
    for number in (0, 1, 3):
        hooks.add_hook_to_module(model[number], Counting(log, factor))
    return model


@pytest.mark.parametrize("slice_dim", [0, 1])
def test_hooks_that_are_there_first_run_and_gradients_stay_exact(slice_dim):
    log: list[str] = []
    model = hooked(log)
    plan = chunkft.partition(model, 5, slice_dim=slice_dim, row_multiple=1)
    assert {piece.dim for piece in plan.slices() if not piece.name.endswith("bias")} == {slice_dim}
    assert_slices_equal_dense(model, plan, loss)
    assert log == ["Embedding", "Linear", "Linear"] * len(plan)


def test_hooks_that_come_while_slices_are_active_run_and_gradients_stay_exact():
    log: list[str] = []
    dense = dense_gradients(hooked([]), loss)
    model = small()
    plan = chunkft.partition(model, 5, row_multiple=1)
    attachment = chunkft.attach(model)
    attachment.freeze()
    for number, chunk in enumerate(plan):
        pairs = attachment.activate(chunk.slices)
        if number == 0:
            for index in (0, 1, 3):
                hooks.add_hook_to_module(model[index], Counting(log, 0.5))
        loss(model).backward()
        for piece, leaf in pairs:
            assert torch.equal(leaf.grad, window(piece, dense[piece.name])), piece
    assert len(log) == 3 * len(plan)
    attachment.detach()
    assert_slices_equal_dense(model, plan, loss)


@pytest.mark.parametrize("first", ["hooks", "chunkft"])
@pytest.mark.parametrize("last", ["hooks", "chunkft"])
def test_whoever_came_first_and_leaves_last_nothing_is_left(first, last):
    log: list[str] = []
    model, plain = small(), small()
    if first == "hooks":
        for module in model:
            hooks.add_hook_to_module(module, Counting(log))
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=4, interval=1)
    reference = chunkft.ChunkAdamW(plain, lr=1e-2, chunks=4, interval=1)
    if first == "chunkft":
        for module in model:
            hooks.add_hook_to_module(module, Counting(log))
    for _ in range(6):
        for net, stepper in ((model, optimizer), (plain, reference)):
            loss(net).backward()
            stepper.step()
            stepper.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    alive = weakref.ref(optimizer)
    if last == "chunkft":
        for module in model:
            hooks.remove_hook_from_module(module)
        loss(model).backward()  # active slices stay so without the hooks
        assert any(leaf.grad is not None for _, leaf in optimizer.active_parameters())
        optimizer.detach()
    else:
        optimizer.detach()
        for module in model:
            assert not type(module._old_forward).__module__.startswith("chunkft")
            hooks.remove_hook_from_module(module)
    for module in model:
        own = module.__dict__.pop("forward", None)  # accelerate leaves the bound method of the class there
        assert own is None or own.__func__ is type(module).forward
        assert not [name for name in module.__dict__ if "chunkft" in name or "hf_hook" in name]
    del optimizer, stepper
    gc.collect()
    assert alive() is None
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_of_an_optimizer_lives_on_in_hooks():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    for module in model:
        hooks.add_hook_to_module(module, Counting([]))
    leaves = [weakref.ref(leaf) for _, leaf in optimizer.active_parameters() if leaf.dim() == 2]
    attachment = weakref.ref(chunkft.attach(model))
    optimizer.detach()
    del optimizer
    gc.collect()
    assert attachment() is None
    assert all(leaf() is None for leaf in leaves)


def test_copies_of_a_hooked_model_have_forwards_of_their_own():
    model = hooked([])
    dense = dense_gradients(hooked([]), loss)
    optimizer = chunkft.ChunkAdamW(model, chunks=2, interval=1)
    twin = copy.deepcopy(model)
    optimizer.step()
    optimizer.detach()
    loss(twin).backward()
    for name, p in twin.named_parameters():
        assert torch.equal(p.grad, dense[name]), name
    for module in (twin[0], twin[1]):
        assert module._old_forward.__self__ is module


def test_modules_with_hooks_keep_them_where_a_compiler_is_prepared_for():
    log: list[str] = []
    model = hooked(log)
    assert compilable(model) == 0
    loss(model).backward()
    assert len(log) == 3


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_dispatched_model_trains_through_its_hooks(family):
    model = tiny_transformers.build(family)
    family_loss = tiny_transformers.loss_of(family)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dense = dense_gradients(copy.deepcopy(model), family_loss)
    model = accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    assert any("_hf_hook" in module.__dict__ for module in model.modules())
    plan = chunkft.partition(model, 5, row_multiple=1)
    assert any(piece.dim == 0 and piece.numel < 61 * 36 for piece in plan.slices())
    for piece, gradient in chunk_gradients(model, plan, family_loss):
        assert torch.equal(gradient, window(piece, dense[piece.name])), piece


def test_offloaded_parameters_are_refused_by_name_before_and_after():
    model = small()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[1].weight.is_meta
    with pytest.raises(
        ValueError, match=r"parameter '0.weight' is on device 'meta'.*offloaded.*load it onto a device"
    ):
        chunkft.ChunkAdamW(model, chunks=2)
    assert "_chunkft" not in model.__dict__

    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=2, interval=1)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        RuntimeError, match=r"parameter '0.weight' is on device 'meta' now.*without offloading"
    ):
        optimizer.step()
    optimizer.detach()


def test_a_frozen_part_may_be_offloaded():
    model = small()
    model[0].requires_grad_(False)
    dense = dense_gradients(copy.deepcopy(model), loss)
    hooks.attach_align_device_hook(
        model[0],
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map={"weight": model[0].weight.data},
    )
    assert model[0].weight.is_meta
    for piece, gradient in chunk_gradients(model, chunkft.partition(model, 3, row_multiple=1), loss):
        assert torch.equal(gradient, window(piece, dense[piece.name])), piece
