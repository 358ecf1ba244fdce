"""Attaching leaves class, names and results as they are; detaching leaves nothing; dead weights are never trained."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import tiny_transformers
import torch
from helpers import (
    IDS,
    assert_slices_equal_dense,
    dense_gradients,
    holds_memory,
    small,
    small_loss,
    walk,
    window,
)
from torch import nn
from torch.nn.utils import parametrizations

import chunkft
from chunkft import Slice
from chunkft.plan import parameter_specs


def traces(model: nn.Module) -> list[tuple[str, ...]]:
    """Everything that an attachment could leave on modules and parameters."""
    found = []
    for name, module in model.named_modules():
        hooks = [key for key, value in vars(module).items() if "hooks" in key and value]
        found.append((name, *sorted(vars(module)), *hooks))
    for name, parameter in model.named_parameters():
        found.append((name, *sorted(vars(parameter)), str(parameter.requires_grad), str(parameter.grad)))
        found.append((str(bool(parameter._backward_hooks)), str(bool(parameter._post_accumulate_grad_hooks))))
    return found


def assert_same_results(family: str, a: torch.Tensor, b: torch.Tensor) -> None:
    if family == "t5":  # PyTorch folds batches for weights that require grad only, which moves the last bits
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "t5"])
def test_class_names_keys_and_results_stay_as_they_are(family):
    model = tiny_transformers.build(family)
    loss = tiny_transformers.loss_of(family)
    before = (
        type(model),
        [type(module) for module in model.modules()],
        [name for name, _ in model.named_parameters()],
        list(model.state_dict()),
        [name for name, _ in model.named_buffers()],
    )
    results = {}
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(1)
        results[mode] = model(**tiny_transformers.batch(family)).logits.detach()
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1, lr=0.0, weight_decay=0.0)
    for _ in range(4):
        after = (
            type(model),
            [type(module) for module in model.modules()],
            [name for name, _ in model.named_parameters()],
            list(model.state_dict()),
            [name for name, _ in model.named_buffers()],
        )
        assert after == before
        for mode in (True, False):
            model.train(mode)
            with torch.no_grad():
                assert_same_results(family, model(**tiny_transformers.batch(family)).logits, results[mode])
        model.train()
        loss(model).backward()
        optimizer.step()


def test_forward_with_gradients_has_the_bits_of_dense_training():
    model = small()
    dense = copy.deepcopy(model)
    optimizer = chunkft.ChunkAdamW(model, chunks=5, interval=1, lr=0.0)
    for step in range(5):
        torch.manual_seed(step)
        expected = dense(IDS)
        torch.manual_seed(step)
        y = model(IDS)
        assert torch.equal(y, expected)
        y.sum().backward()
        optimizer.step()


def test_detach_leaves_no_trace():
    model = small()
    before = traces(model)
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1)
    assert traces(model) != before
    walk(optimizer, model, 3)
    small_loss(model).backward()
    optimizer.detach()
    assert traces(model) == before
    assert optimizer.param_groups[0]["params"] == []
    again = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    walk(again, model, 3)


def test_frozen_parameters_stay_frozen_after_detach():
    model = small()
    model[1].weight.requires_grad_(False)
    before = model[1].weight.clone()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1, lr=0.1)
    walk(optimizer, model, 6)
    optimizer.detach()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["1.weight"]
    assert torch.equal(model[1].weight, before)


def test_only_the_active_slices_have_gradients():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=6, interval=1)
    for _ in range(6):
        small_loss(model).backward()
        pairs = list(optimizer.active_parameters())
        leaves = {id(leaf) for _, leaf in pairs}
        assert all(leaf.grad is not None and leaf.grad.shape == piece.shape for piece, leaf in pairs)
        assert not any(holds_memory(p.grad) for p in model.parameters() if id(p) not in leaves)
        for piece, leaf in pairs:
            whole = model.get_parameter(piece.name)
            assert window(piece, whole).data_ptr() == leaf.data_ptr()
            assert leaf.is_leaf
            assert isinstance(leaf, nn.Parameter)
        optimizer.step()


def test_nothing_is_alive_after_the_model_and_the_optimizer_are_gone():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=2)
    walk(optimizer, model, 3)
    small_loss(model).backward()
    pairs = list(optimizer.active_parameters())
    watched = [model, optimizer, chunkft.attach(model), *model.parameters(), *(leaf for _, leaf in pairs)]
    references = [weakref.ref(thing) for thing in watched]
    del model, optimizer, pairs, watched
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_a_dropped_optimizer_frees_its_state_and_the_model_can_be_detached():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    walk(optimizer, model, 4)
    states = [weakref.ref(value["exp_avg"]) for value in optimizer.state.values()]
    assert states
    del optimizer
    gc.collect()
    assert [state() for state in states] == [None] * len(states)
    chunkft.attach(model).detach()
    assert all(p.requires_grad for p in model.parameters())


class TestCopies:
    def test_a_deep_copy_is_free_trainable_and_independent(self):
        model = small()
        pristine = traces(copy.deepcopy(model))
        optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=2, lr=0.1)
        walk(optimizer, model, 3)
        small_loss(model).backward()
        duplicate = copy.deepcopy(model)
        vars(duplicate).pop("_chunkft")
        assert [line for line in traces(duplicate) if "grad" not in line[0]] != []
        assert traces(duplicate)[: len(list(model.modules()))] == pristine[: len(list(model.modules()))]
        assert all(p.requires_grad for p in duplicate.parameters())
        before = {name: p.clone() for name, p in duplicate.named_parameters()}
        optimizer.step()
        walk(optimizer, model, 4)
        assert all(torch.equal(p, before[name]) for name, p in duplicate.named_parameters())
        original = {name: p.clone() for name, p in model.named_parameters()}
        theirs = chunkft.ChunkAdamW(duplicate, chunks=2, interval=1, lr=0.1)
        walk(theirs, duplicate, 2)
        assert all(torch.equal(p, original[name]) for name, p in model.named_parameters())
        assert all(not torch.equal(p, before[name]) for name, p in duplicate.named_parameters())

    def test_a_copied_part_computes_as_before_and_has_no_leaves_of_the_original(self):
        model = small()
        optimizer = chunkft.ChunkAdamW(model, partition=[["1.*"], ["0.*", "3.*", "4.*"]], chunks=None)
        part = copy.deepcopy(model[1])
        x = torch.randn(2, 12)
        assert torch.equal(part(x), model[1](x))
        with torch.no_grad():
            part.weight.zero_()
        assert not part(x).sub(part.bias).any()
        part(x).sum().backward()
        assert all(leaf.grad is None for _, leaf in optimizer.active_parameters())

    def test_a_pickled_model_loads_free_and_computes_as_before(self):
        model = small().eval()
        chunkft.ChunkAdamW(model, chunks=2)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(IDS), model(IDS))
        assert loaded.__dict__["_chunkft"] is None
        loaded.requires_grad_(True)
        optimizer = chunkft.ChunkAdamW(loaded, chunks=2, interval=1)
        walk(optimizer, loaded, 2)

    def test_a_single_module_as_the_model_can_be_copied(self):
        model = nn.Linear(5, 20)
        optimizer = chunkft.ChunkAdamW(model, chunks=3)
        duplicate = copy.deepcopy(model)
        x = torch.randn(2, 5)
        assert torch.equal(duplicate(x), model(x))
        duplicate(x).sum().backward()
        assert all(p.grad is not None for p in duplicate.parameters())
        assert all(leaf.grad is None for _, leaf in optimizer.active_parameters())
        theirs = chunkft.ChunkAdamW(duplicate, chunks=2, interval=1)
        walk(theirs, duplicate, 2, lambda m: m(x).square().sum())
        theirs.detach()
        assert "forward" not in vars(duplicate)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass that computes as its parent does."""


def test_forwards_that_are_not_known_make_parameters_atomic():
    patched = nn.Linear(6, 6)
    original = patched.forward
    patched.forward = lambda x: original(x) + x
    normed = parametrizations.weight_norm(nn.Linear(6, 6))
    spectral = parametrizations.spectral_norm(nn.Linear(6, 6))
    model = nn.ModuleDict(
        {
            "subclass": Doubled(6, 6),
            "patched": patched,
            "renormed": nn.Embedding(6, 6, max_norm=1.0),
            "normed": normed,
            "spectral": spectral,
            "same": Renamed(6, 6),
            "plain": nn.Linear(6, 6),
        }
    )
    sliced = {spec.name for spec in parameter_specs(model) if spec.dims}
    assert sliced == {"same.weight", "plain.weight"}


class Chain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_gradients_of_unknown_forwards_and_parametrizations_equal_dense_ones():
    patched = nn.Linear(6, 6)
    patched.forward = lambda x: torch.tanh(x @ patched.weight.t()) + patched.bias
    model = Chain(Doubled(6, 6), parametrizations.weight_norm(nn.Linear(6, 6)), Renamed(6, 6))
    x = torch.randn(4, 6)
    assert_slices_equal_dense(model, chunkft.partition(model, 3), lambda m: m(x).square().sum())
    # its forward closes over its own weight, so a copy would not be a reference
    dense = dense_gradients(patched, lambda m: m(x).square().sum())
    optimizer = chunkft.ChunkAdamW(patched, chunks=1)
    patched(x).square().sum().backward()
    for piece, leaf in optimizer.active_parameters():
        assert piece.dim is None
        assert torch.equal(leaf.grad, dense[piece.name])


def test_a_forward_that_was_wrapped_while_attached_still_gets_exact_gradients():
    model = Chain(nn.Linear(6, 20), nn.Linear(20, 6))
    x = torch.randn(4, 6)
    dense = dense_gradients(copy.deepcopy(model), lambda m: (2 * m(x)).square().sum())
    attachment = chunkft.attach(model)
    attachment.freeze()
    pieces = [Slice("layers.1.weight", 0, 1, 5, (6, 20)), Slice("layers.0.weight", 0, 3, 17, (20, 6))]
    attachment.activate(pieces[:1])
    wrapped = model.layers[1].forward
    model.layers[1].forward = lambda x: 2 * wrapped(x)
    for active in ([pieces[1]], [pieces[0]], pieces):
        pairs = attachment.activate(active)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the weight 'layers.1.weight' is used without")
            model(x).square().sum().backward()
        for piece, leaf in pairs:
            assert torch.equal(leaf.grad, window(piece, dense[piece.name]))
    attachment.detach()
    (2 * wrapped(x @ torch.zeros(6, 20))).sum().backward()
    assert model.layers[1].weight.grad is not None


def test_attach_is_idempotent_and_freezes_nothing():
    model = small()
    attachment = chunkft.attach(model)
    assert chunkft.attach(model) is attachment
    assert all(p.requires_grad for p in model.parameters())
    attachment.detach()
    assert chunkft.attach(model) is not attachment


def test_bad_arguments_leave_nothing_behind():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        chunkft.attach([nn.Linear(2, 2)])
    frozen = small().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        chunkft.attach(frozen)
    assert "_chunkft" not in vars(frozen)


@pytest.mark.parametrize("outer_first", [True, False])
def test_parts_and_wholes_cannot_be_attached_at_once(outer_first):
    model = small()
    first, second = (model, model[1]) if outer_first else (model[1], model)
    optimizer = chunkft.ChunkAdamW(first, chunks=1)
    second.requires_grad_(True)
    with pytest.raises(ValueError, match=r"belongs to another module that is attached"):
        chunkft.ChunkAdamW(second, chunks=1)
    assert "_chunkft" not in vars(second)
    optimizer.detach()
    chunkft.ChunkAdamW(second, chunks=1)
