"""What training loops do on a GPU: compile, autocast with a GradScaler, optimizers of 8 bits, side streams."""

import importlib

import pytest
import torch
from gpu_training import PLACES, assert_same_bits, batch, model_of, optimizer_of, places, same_bits, train
from torch import nn

import chunkft

pytestmark = [pytest.mark.timeout(120)]


class Gated(nn.Module):
    """A gated MLP behind a norm, as inductor fuses it."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def stack(machine, dtype=torch.float32, width=(256, 16)):
    torch.manual_seed(7)
    size = machine.pick(*width)
    return nn.Sequential(Gated(size), Gated(size), nn.Linear(size, 8)).to(machine.device, dtype)


def inputs(machine, step, width=(256, 16)):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(machine.pick(96, 6), machine.pick(*width), generator=generator).to(machine.device)


@pytest.mark.parametrize("kind", ["paged", "backward"])
def test_a_compiled_model_trains_as_an_eager_one(machine, kind):
    """Inductor's kernels in forward and backward passes, slices that change, updates inside of the backward pass."""
    torch._dynamo.reset()
    options = places(machine)[kind]
    losses = []
    for compiled in (True, False):
        model = stack(machine)
        optimizer = optimizer_of(model, chunks=2, interval=machine.pick(3, 1), **options)
        if compiled and machine.pick(True, kind == "paged"):  # tracing takes a rehearsal long enough once
            run = torch.compile(model, backend=machine.pick("inductor", "eager"))
        else:
            run = model
        found = []
        for _ in range(machine.pick(12, 3)):
            loss = run(inputs(machine, 0)).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        losses.append(torch.stack(found))
        optimizer.detach()
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-5)
    assert losses[0][-1] < losses[0][0]
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["paged", "stream", "device"])
def test_autocast_with_a_scaler_skips_and_trains_as_torch_does(machine, kind):
    """fp32 weights, fp16 products; a scale that overflows at first, so that steps are skipped until it fits."""
    options = {**places(machine), "device": {"state_device": "device"}}[kind]
    ours, theirs = stack(machine), stack(machine)
    chunked = chunkft.ChunkAdamW(ours, lr=1e-3, chunks=1, interval=2, **options)
    dense = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    kept = machine.pick(torch.float16, torch.bfloat16)
    scales = []
    for model, optimizer in ((ours, chunked), (theirs, dense)):
        scaler = torch.amp.GradScaler(machine.device.type, init_scale=2.0**24, growth_interval=4)
        found = []
        for step in range(machine.pick(20, 6)):
            with torch.autocast(machine.device.type, kept):
                loss = (model(inputs(machine, step)).float() - 1).square().sum()
            if step == 3:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
            found.append(scaler.get_scale())
        scales.append(found)
    assert scales[0] == scales[1]
    assert chunked.skipped >= 1
    assert chunked.updates >= 2
    for weight, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)


def test_a_norm_that_was_asked_for_by_a_trainer(machine):
    """torch.nn.utils.clip_grad_norm_ over the model finds the slices' gradients, and changes them on the device."""
    found = []
    for clipped in (True, False):
        model = model_of(machine)
        optimizer = optimizer_of(model, state_device="paged", max_grad_norm=None if clipped else 0.05)
        with same_bits():
            for step in range(machine.pick(8, 3)):
                model(batch(machine, step)).backward()
                if clipped:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
        found.append(model)
    for weight, other in zip(*(model.parameters() for model in found), strict=True):
        torch.testing.assert_close(weight, other, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", ["paged", "stream"])
@pytest.mark.parametrize(
    ("module", "name"), [("bitsandbytes.optim", "AdamW8bit"), ("torchao.optim", "AdamW8bit")]
)
def test_state_of_eight_bits_is_paged_as_it_is(machine, module, name, kind):
    """Blocks of 8-bit moments with their scales: other tensors than those of AdamW, and the same run."""
    pytest.importorskip(module.split(".")[0])
    base = getattr(importlib.import_module(module), name)
    machine.need("kernels of 8-bit optimizers")
    found = []
    plan = None
    for options in (places(machine)[kind], {"state_device": "device"}):
        model = model_of(machine)
        chosen = {"chunks": 4} if plan is None else {"chunks": None, "partition": plan}
        optimizer = chunkft.ChunkOptimizer(model, base, lr=1e-3, interval=2, **chosen, **options)
        plan = optimizer.plan
        train(machine, model, optimizer, range(20))
        found.append(model)
        optimizer.detach()
    assert_same_bits(*found)


@pytest.mark.parametrize("kind", PLACES)
def test_a_loop_on_a_side_stream(machine, kind):
    """All work of a run on a stream that the default stream does not wait for; pages follow the caller's stream."""
    options = places(machine)[kind]
    side, models, plan = machine.stream(), [], None
    for stream in (side, None):
        with machine.on(stream):
            model = model_of(machine)
            optimizer = optimizer_of(model, plan, **options)
            plan = optimizer.plan
            train(machine, model, optimizer, range(machine.pick(20, 5)))
        machine.synchronize()
        models.append(model)
    assert_same_bits(*models)


def test_a_loop_that_changes_its_stream_between_steps(machine):
    """Leaves, gradients and state made on one stream are used on another that waits for it; so are pages."""
    options = places(machine)["paged"]
    streams, models, plan = [machine.stream(), machine.stream()], [], None
    for changing in (True, False):
        model = model_of(machine)
        optimizer = optimizer_of(model, plan, **options)
        plan = optimizer.plan
        machine.synchronize()
        for step in range(machine.pick(16, 5)):
            own, other = streams[step % 2], streams[(step + 1) % 2]
            with machine.on(own if changing else None):
                if changing:
                    machine.after(own, other)
                train(machine, model, optimizer, range(step, step + 1))
        machine.synchronize()
        models.append(model)
    assert_same_bits(*models)


def test_the_loss_of_a_head_without_its_logits(machine):
    """Sliced rows of a head under linear cross entropy, trained beside a model that makes its logits."""
    from chunkft import Slice
    from chunkft.autograd.linear_cross_entropy import sliced_linear_cross_entropy

    tokens, width, vocabulary = machine.pick((1027, 264, 4099), (37, 12, 61))
    hidden = machine.randn(tokens, width)
    weight = machine.randn(vocabulary, width)
    targets = torch.randint(0, vocabulary, (tokens,)).to(machine.device)
    rows = slice(vocabulary // 3, vocabulary // 2)
    piece = Slice("weight", 0, rows.start, rows.stop, tuple(weight.shape))
    leaf = nn.Parameter(weight[rows])
    own = hidden.clone().requires_grad_(True)
    loss = sliced_linear_cross_entropy(own, weight, targets, [(piece, leaf)])
    loss.backward()
    dense = [tensor.clone().requires_grad_(True) for tensor in (hidden, weight)]
    expected = nn.functional.cross_entropy(dense[0] @ dense[1].t(), targets)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.grad, dense[0].grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(leaf.grad, dense[1].grad[rows], rtol=1e-3, atol=1e-6)
