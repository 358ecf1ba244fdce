"""What is done to weights between steps, by anybody, counts in the next forward pass."""

import copy

import pytest
import torch
from torch import nn
from weight_rigs import assert_same, assert_same_state, batch, loss_of, pair, streamed, tower, train

import chunkft
from chunkft.optim.backward import BackwardResidency
from chunkft.weights import WeightStream

UPDATES = ("host", "device")


def scale_data(model, optimizer):
    for parameter in model.parameters():
        parameter.data.mul_(1.25)


def scale_in_place(model, optimizer):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)


def average(model, optimizer):
    """An EMA, by ``.data.copy_`` as most implementations do it."""
    average = copy.deepcopy(model)
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        mine.data.lerp_(torch.ones_like(mine), 0.1)
        theirs.data.copy_(mine.data)


def load(model, optimizer):
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def scale_leaves(model, optimizer):
    with torch.no_grad():
        for _, leaf in optimizer.active_parameters():
            leaf.mul_(1.25)


CHANGES = (scale_data, scale_in_place, average, load, scale_leaves)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_between_steps_are_seen(change, update):
    pairs = pair(update, {"poison": False}, chunks=2)  # so that pages stay in slots
    for step in range(5):
        train(pairs, [step])
        for model, optimizer in pairs:
            change(model, optimizer)
            loss_of(model, 9).backward()  # the first blocks stay on the device
            optimizer.zero_grad()
            change(model, optimizer)
        assert_same_state(pairs[0][0], pairs[1][0])
    train(pairs, range(5, 7))
    assert_same(pairs)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("change", [scale_in_place, load, scale_leaves], ids=lambda change: change.__name__)
def test_changes_between_backward_and_step_are_seen(change, update):
    pairs = pair(update, chunks=1)
    for step in range(3):
        for model, optimizer in pairs:
            loss_of(model, step).backward()
            change(model, optimizer)
            optimizer.step()
    assert_same(pairs)


@pytest.mark.parametrize(
    "change", [scale_data, scale_in_place, average, load, scale_leaves], ids=lambda c: c.__name__
)
def test_changes_are_seen_with_update_in_backward(change, monkeypatch):
    update_unit = BackwardResidency._update_unit

    def uncounted(residency, number):
        """As the kernels of a GPU update: PyTorch's counts of changes know nothing of it."""
        with torch.autograd._unsafe_preserve_version_counter(
            tuple(leaf for _, leaf in residency._units[number])
        ):
            update_unit(residency, number)

    monkeypatch.setattr(BackwardResidency, "_update_unit", uncounted)
    options = {"residency": "stream", "page_bytes": 4096, "update": "backward", "chunks": 2}
    pairs = pair("device", **options)
    for step in range(4):
        for model, optimizer in pairs:
            loss_of(model, step).backward()
            with torch.no_grad():
                loss_of(model, step)  # sees what was updated and not yet written back
            optimizer.step()
            change(model, optimizer)
    train(pairs, range(4, 6))
    assert_same(pairs)


@pytest.mark.parametrize("update", UPDATES)
def test_a_block_called_by_itself_sees_what_its_weights_are_at_that_moment(update):
    pairs = pair(update, chunks=1)
    train(pairs, range(2))
    outputs = []
    for model, _ in pairs:
        x = model.table(batch())
        for block in model.blocks:
            block.up.weight.data.mul_(1.5)  # after the call of the block before it
            x = block(x)
        outputs.append(x)
    assert torch.equal(*outputs)
    for x in outputs:
        x.square().sum().backward()
    assert_same(pairs)


@pytest.mark.parametrize("update", UPDATES)
def test_a_hook_that_changes_the_weights_of_a_block_is_followed(update):
    pairs = pair(update, chunks=1)

    def change(block, _):
        with torch.no_grad():
            block.up.weight.mul_(1.1)

    for model, _ in pairs:
        model.blocks[2].register_forward_pre_hook(change)
    with torch.no_grad():
        for model, _ in pairs:
            loss_of(model)
    assert_same_state(pairs[0][0], pairs[1][0])
    for model, _ in pairs:
        loss_of(model).backward()
    assert_same(pairs)


class Sharpened(nn.Linear):
    """Changes its own weight in its forward pass."""

    def forward(self, input):
        with torch.no_grad():
            self.weight.mul_(1.01)
        return super().forward(input)


def test_a_layer_that_changes_its_own_weight_keeps_the_change():
    def make():
        model = tower()
        layer = nn.Linear(16, 48)
        torch.manual_seed(5)
        nn.init.normal_(layer.weight)
        model.blocks[1].up = layer
        return model

    models = make(), make()
    WeightStream(models[0], device="cpu")

    def sharpen(layer, _):
        with torch.no_grad():
            layer.weight.mul_(1.01)

    for model in models:
        model.blocks[1].up.register_forward_pre_hook(sharpen)
        for number in range(3):
            with torch.no_grad():
                model(batch(number))
    assert torch.equal(models[0](batch()), models[1](batch()))
    assert_same_state(*models)


@pytest.mark.parametrize("update", UPDATES)
def test_step_between_forward_and_backward_is_refused(update):
    model = tower()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("blocks") and parameter.dim() == 2)  # what streams
    optimizer = streamed(model, update, chunks=1)
    loss_of(model).backward()
    late = loss_of(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"call step\(\) only after backward"):
        late.backward()
    train([(model, optimizer)], range(2))


class Overwrites(nn.Module):
    """Changes in place what autograd saved."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        y = torch.sigmoid(self.layer(x))
        z = y * y
        y.mul_(2)
        return z


def test_a_change_in_place_of_what_autograd_saved_is_refused_in_a_block_too():
    model = tower(2)
    model.blocks = nn.ModuleList([Overwrites(), Overwrites()])
    streamed(model, chunks=1)
    loss = loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("update", UPDATES)
def test_freezing_a_weight_midway_and_training_it_again(update):
    pairs = pair(update, chunks=2)
    for step in range(8):
        for model, optimizer in pairs:
            if step in (2, 5):
                model.blocks[1].up.weight.requires_grad_(step == 5)
                model.table.weight.requires_grad_(step == 5)
            loss_of(model, step).backward()
            optimizer.step()
    assert_same(pairs)


def test_a_plain_optimizer_may_train_what_streams():
    models = tower(), tower()
    WeightStream(models[0], device="cpu", poison=True, tile_bytes=1 << 20)
    assert chunkft.weights.stream_of(models[0]) is not None
    optimizers = [
        torch.optim.SGD([m.norm.weight, *(b.norm.weight for b in m.blocks)], lr=0.1) for m in models
    ]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    assert_same_state(*models)
