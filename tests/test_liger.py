"""Models that Liger-Kernel patched: its loss reads the output layer's weight instead of calling the layer."""

import copy
import types
import warnings

import pytest
import tiny_transformers
import torch
import torch.nn.functional as F
from helpers import assert_slices_equal_dense
from transformers.modeling_outputs import CausalLMOutputWithPast

import chunkft


class FusedLoss(torch.autograd.Function):
    """What Liger's fused loss does, in plain PyTorch: gradients are computed in the forward pass, of the weight only
    if it requires grad then."""

    weight_gradients = 0

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        needs_weight = weight.requires_grad
        with torch.enable_grad():
            x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(needs_weight)
            loss = F.cross_entropy(x @ w.t(), labels)
        grads = torch.autograd.grad(loss, [x, w] if needs_weight else [x])
        FusedLoss.weight_gradients += needs_weight
        ctx.save_for_backward(*grads)
        return loss.detach()

    @staticmethod
    def backward(ctx, dy):
        dx, *dw = (gradient * dy for gradient in ctx.saved_tensors)
        return dx, (dw[0] if dw else None), None


def fused_loss(hidden_states, lm_head_weight, labels, hidden_size, **_):
    hidden, labels = hidden_states[:, :-1].reshape(-1, hidden_size), labels[:, 1:].reshape(-1)
    return FusedLoss.apply(hidden, lm_head_weight, labels)


def forward(self, input_ids, labels):
    hidden = self.model(input_ids=input_ids)[0]
    loss = fused_loss(hidden, self.lm_head.weight, labels, self.config.hidden_size)
    return CausalLMOutputWithPast(loss=loss)


def patched(family):
    model = tiny_transformers.build(family)
    model.forward = types.MethodType(forward, model)
    return model


@pytest.mark.filterwarnings("ignore:the weight .* is used without a call:UserWarning")
@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_slices_of_an_output_layer_that_is_read_have_exact_gradients(family, slice_dim):
    model = patched(family)
    plan = chunkft.partition(model, 6, slice_dim=slice_dim, row_multiple=1)
    assert_slices_equal_dense(model, plan, tiny_transformers.loss_of(family))


def test_the_whole_gradient_of_the_output_layer_is_computed_only_while_it_is_active_and_the_user_told():
    model = patched("llama")
    loss = tiny_transformers.loss_of("llama")
    optimizer = chunkft.ChunkAdamW(model, chunks=6, interval=1)
    seen = []
    for _ in range(6):
        active = any(piece.name == "lm_head.weight" for piece, _ in optimizer.active_parameters())
        before = FusedLoss.weight_gradients
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss(model).backward()
        told = [str(w.message) for w in caught if "is used without a call" in str(w.message)]
        assert FusedLoss.weight_gradients - before == active
        assert bool(told) == (active and True not in seen)
        assert all("lm_head.weight" in message for message in told)
        seen.append(active)
        optimizer.step()
        optimizer.zero_grad()
    assert True in seen
    assert False in seen
    optimizer.detach()
    assert model.forward.__func__ is forward


@pytest.fixture
def liger(monkeypatch):
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from liger_kernel.transformers.model import llama
    from transformers.models.llama import modeling_llama

    for name in (
        "LlamaRMSNorm",
        "LlamaMLP",
        "apply_rotary_pos_emb",
    ):  # Liger replaces them for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(llama, "LigerForCausalLMLoss", fused_loss)  # the kernel itself needs a GPU
    return apply_liger_kernel_to_llama


def test_a_model_that_liger_patched_is_cut_as_without_and_keeps_its_patches(liger):
    model = tiny_transformers.build("llama")
    plan = chunkft.partition(model, 6, row_multiple=1)
    liger(rope=False, model=model)
    assert chunkft.partition(model, 6, row_multiple=1).to_dict() == plan.to_dict()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    optimizer = chunkft.ChunkAdamW(model, chunks=6, interval=1)
    optimizer.detach()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert module.__dict__.get("forward") == before[name].get("forward"), name


@pytest.mark.filterwarnings("ignore:the weight .* is used without a call:UserWarning")
def test_gradients_through_ligers_own_forward_are_exact(liger):
    model = tiny_transformers.build("llama")
    liger(rope=False, rms_norm=False, swiglu=False, model=model)
    before = FusedLoss.weight_gradients
    plan = chunkft.partition(copy.deepcopy(model), 6, row_multiple=1)
    assert_slices_equal_dense(model, plan, tiny_transformers.loss_of("llama"))
    assert FusedLoss.weight_gradients > before
