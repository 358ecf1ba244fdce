"""``state_bits=8``: moments are kept, paged and saved as codes, and training goes on from them bit for bit."""

import io

import pytest
import torch
from test_kernel_slices import RESIDENCIES
from torch import nn
from toy_models import (
    WAYS,
    assert_same_state,
    assert_same_weights,
    mlp,
    mlp_loss,
    tiny_loss,
    tiny_net,
    train,
)

import chunkft
from chunkft.kernels.companding import decode_first, decode_second
from chunkft.optim.eight_bit import SCALES

DECODE = {"exp_avg": decode_first, "exp_avg_sq": decode_second}


def build(model, plan=None, **options):
    chosen = {"chunks": 3} if plan is None else {"chunks": None, "partition": plan}
    options = {"lr": 1e-2, "weight_decay": 0.1, "interval": 2, "state_bits": 8, **chosen, **options}
    return chunkft.ChunkAdamW(model, **options)


def run(model, steps, plan=None, **options):
    optimizer = build(model, plan, **options)
    train(model, optimizer, tiny_loss, steps)
    return optimizer


def moments(optimizer):
    """Both moments of every parameter as numbers, from a state_dict; NaN where there are none."""
    found = {}
    for name, entry in optimizer.state_dict()["state"].items():
        for key, decode in DECODE.items():
            if key not in entry["tensors"]:  # forgotten, and only a master is left
                continue
            whole = torch.full(entry["shape"], torch.nan)
            for part in entry["ranges"]:
                if key not in part["elementwise"]:
                    continue
                rows = slice(part["start"], part["stop"])
                window = {None: ..., 0: rows, 1: (slice(None), rows)}[part["dim"]]
                values = entry["tensors"][key][window]
                scales = part["values"].get(SCALES[key])
                whole[window] = values if scales is None else decode(values.contiguous(), scales)
            found[name, key] = whole
    return found


@pytest.mark.parametrize(
    ("kind", "master", "keep_state"),
    [
        ("device", "stochastic", False),
        ("paged", "none", True),
        ("stream", "fp32", True),
        ("stream", "none", False),
        ("backward", "residual", True),
        ("backward", "fp32", False),
    ],
)
def test_every_residency_trains_alike(kind, master, keep_state):
    dtype = torch.float32 if master == "none" else torch.bfloat16
    options = {"master": master, "keep_state": keep_state, "always_active": ["norm.*"]}
    model, plain_model = tiny_net(dtype=dtype), tiny_net(dtype=dtype)
    ours = run(model, range(14), **options, **RESIDENCIES[kind])
    del options["always_active"]
    plain = run(plain_model, range(14), ours.plan, **options)
    assert_same_weights(model, plain_model)
    states = [{k: moments(o)[k] for k in sorted(moments(o))} for o in (ours, plain)]
    assert_same_state(*states)


@pytest.mark.parametrize("slice_dim", [0, 1])
def test_it_stays_near_training_with_32_bits(slice_dim):
    """In 24 steps of a rate of 1e-2 weights part by a hundredth of their way."""
    model, exact_model, start = tiny_net(), tiny_net(), tiny_net()
    ours = run(model, range(24), slice_dim=slice_dim, chunks=2)
    run(exact_model, range(24), ours.plan, state_bits=32)
    way = apart = 0.0
    for p, exact, before in zip(*(m.parameters() for m in (model, exact_model, start)), strict=True):
        way += float((exact - before).detach().square().sum())
        apart += float((exact - p).detach().square().sum())
    assert 0 < apart < 4e-4 * way


def test_the_state_is_codes_and_scales_of_2_bytes_an_element():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 960, bias=False), nn.Linear(960, 80, bias=False))
    optimizer = chunkft.ChunkAdamW(model, chunks=2, interval=1, state_bits=8, state_device="paged")
    for _ in range(3):
        model(torch.randn(5, 64)).square().sum().backward()
        optimizer.step()
    for _, leaf in optimizer.active_parameters():
        state = optimizer.state[leaf]
        assert {key: (value.dtype, value.shape) for key, value in state.items()} == {
            "step": (torch.float32, ()),
            "exp_avg": (torch.int8, leaf.shape),
            "exp_avg_sq": (torch.uint8, leaf.shape),
            "exp_avg_scale": (torch.float32, (-(-leaf.numel() // 128),)),
            "exp_avg_sq_scale": (torch.float32, (-(-leaf.numel() // 128),)),
        }
    elements = sum(p.numel() for p in model.parameters())
    assert 2 * elements < optimizer.memory_report().state_host.now <= 2.1 * elements


@pytest.mark.parametrize(
    ("kind", "way", "options"),
    [
        ("host", "dict", {}),
        ("device", "file", {"always_active": "head", "schedule": "random"}),
        ("paged", "file", {"dtype": torch.bfloat16, "master": "fp32"}),
        ("host", "file", {"slice_dim": 1, "partition": "interleaved"}),
        ("stream", "dict", {"keep_state": False}),
        ("backward", "file", {}),
        ("backward", "dict", {"dtype": torch.bfloat16, "slice_dim": 1}),
    ],
    ids=str,
)
def test_resume_is_bit_exact(way, kind, options, tmp_path):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    options |= RESIDENCIES[kind]
    model = tiny_net(dtype=dtype)
    optimizer = run(model, range(9), **options)  # in the middle of an interval
    copy = tiny_net(seed=9, dtype=dtype)
    copy.load_state_dict(model.state_dict())
    twin = build(copy, **options)
    WAYS[way](optimizer, twin, tmp_path / "c")
    assert_same_state(twin.state_dict(), optimizer.state_dict())
    for each, of in ((model, optimizer), (copy, twin)):
        train(each, of, tiny_loss, range(9, 20))
    assert_same_weights(model, copy)
    assert_same_state(twin.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(("kind", "way"), [("host", "dict"), ("backward", "file")])
@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("slice_dim", [0, 1])
def test_another_number_of_chunks_keeps_the_moments(way, slice_dim, chunks, kind, tmp_path):
    """Blocks begin elsewhere then: each moment moves by half a step of its new block at most, and step counts not."""
    source = run(tiny_net(), range(9), slice_dim=slice_dim)
    target = build(tiny_net(), chunks=chunks, slice_dim=slice_dim, **RESIDENCIES[kind])
    WAYS[way](source, target, tmp_path / "c")
    before, after = moments(source), moments(target)
    for (name, key), old in before.items():
        new = after[name, key]
        assert torch.equal(old.isnan(), new.isnan()), name
        largest = old.nan_to_num().abs().max()
        assert ((new - old).nan_to_num().abs() <= largest / 120).all()
        assert torch.equal((old != 0) & ~old.isnan(), (new != 0) & ~new.isnan()) or key == "exp_avg"
    counts = [
        {(name, row): float(part["values"]["step"]) for name, entry in o.state_dict()["state"].items()
         for part in entry["ranges"] for row in range(part["start"], part["stop"])}
        for o in (source, target)
    ]  # fmt: skip
    assert counts[0] == counts[1]
    train(target._attachment.model, target, tiny_loss, range(9, 12))


def test_cut_and_joined_again_is_the_same_moment():
    """Row by row and back: decoding and encoding in the same blocks changes nothing."""
    torch.manual_seed(0)
    model = nn.Linear(128, 12, bias=False)
    source = chunkft.ChunkAdamW(model, chunks=1, state_bits=8)
    model(torch.randn(5, 128)).square().sum().backward()
    source.step()
    rows = chunkft.ChunkAdamW(nn.Linear(128, 12, bias=False), chunks=12, state_bits=8)
    rows.load_state_dict(source.state_dict())
    assert len(rows.state_dict()["state"]["weight"]["ranges"]) == 12
    back = chunkft.ChunkAdamW(nn.Linear(128, 12, bias=False), chunks=1, state_bits=8)
    back.load_state_dict(rows.state_dict())
    assert_same_state(back.state_dict()["state"], source.state_dict()["state"])


@pytest.mark.parametrize(
    ("kind", "way", "dtype"),
    [("host", "dict", torch.float32), ("paged", "file", torch.bfloat16), ("backward", "file", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 32])
def test_a_checkpoint_goes_from_32_bits_to_8_and_back(bits, dtype, way, kind, tmp_path):
    model = tiny_net(dtype=dtype)
    source = run(model, range(9), state_bits=40 - bits)
    target = build(tiny_net(dtype=dtype), state_bits=bits, **RESIDENCIES[kind])
    WAYS[way](source, target, tmp_path / "c")
    kinds = {
        tensor.dtype for e in target.state_dict()["state"].values() for k, tensor in e["tensors"].items()
        if k in DECODE
    }  # fmt: skip
    assert kinds == ({torch.int8, torch.uint8} if bits == 8 else {torch.float32})
    before, after = moments(source), moments(target)
    for name, old in before.items():
        rounded = 0 if bits == 32 else old.nan_to_num().abs().max() / 120
        assert ((after[name] - old).nan_to_num().abs() <= rounded).all()
    copy = target._attachment.model
    copy.load_state_dict(model.state_dict())
    train(copy, target, tiny_loss, range(9, 15))
    assert target.updates == 15


def test_a_file_holds_codes(tmp_path):
    torch.manual_seed(0)
    sizes = {}
    for bits in (8, 32):
        model = nn.Linear(256, 256, bias=False)
        optimizer = chunkft.ChunkAdamW(model, chunks=1, state_bits=bits)
        model(torch.randn(5, 256)).square().sum().backward()
        optimizer.step()
        chunkft.save_checkpoint(optimizer, tmp_path / "c")
        sizes[bits] = (tmp_path / "c").stat().st_size
    assert sizes[8] < 2.1 * 256 * 256 + 4096
    assert sizes[32] > 8 * 256 * 256


def scalar_and_single():
    """A parameter without dimensions, and one whose scale has the shape of the slice."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 7)
            self.gain = nn.Parameter(torch.ones(()))
            self.shift = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.linear(x) * self.gain + self.shift

    return Net()


@pytest.mark.parametrize("kind", RESIDENCIES)
@pytest.mark.parametrize("bits", [8, 32])
def test_parameters_of_one_element(kind, bits):
    torch.manual_seed(0)
    inputs = torch.randn(9, 5)
    model = scalar_and_single()
    optimizer = build(model, chunks=1, **RESIDENCIES[kind])
    copy = scalar_and_single()
    for _ in range(3):
        model(inputs).square().sum().backward()
        optimizer.step()
    twin = build(copy, chunks=1, state_bits=bits, **RESIDENCIES[kind])
    copy.load_state_dict(model.state_dict())
    twin.load_state_dict(optimizer.state_dict())
    for each, of in ((model, optimizer), (copy, twin)):
        each(inputs).square().sum().backward()
        of.step()
    assert torch.equal(model.gain, copy.gain)
    assert torch.equal(model.shift, copy.shift)


def test_a_convolution_in_channels_last_trains_as_in_the_other_order():
    """Its state follows the order of the elements, not that of its memory."""
    torch.manual_seed(0)
    model = nn.Conv2d(7, 9, 3)
    other = nn.Conv2d(7, 9, 3)
    other.load_state_dict(model.state_dict())
    other.to(memory_format=torch.channels_last)
    inputs = torch.randn(2, 7, 6, 6)
    optimizers = [build(each, chunks=1) for each in (model, other)]
    for _ in range(3):
        for each, optimizer in zip((model, other), optimizers, strict=True):
            each.weight.grad = None
            each(inputs).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, other.weight, rtol=1e-4, atol=1e-5)
    a, b = (moments(optimizer)["weight", "exp_avg"] for optimizer in optimizers)
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(a.abs().max()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state_bits": 4}, r"state_bits=4 is not allowed; allowed are 8 and 32"),
        ({"state_bits": True}, r"state_bits=True is not allowed"),
        ({"first_moment": "bf16"}, r"state_bits=8 cannot be combined with first_moment='bf16'"),
        ({"fused": True}, r"state_bits=8 cannot be combined with fused=True in parameter group 0"),
        ({"foreach": True}, r"state_bits=8 cannot be combined with foreach=True in parameter group 0"),
        ({"dtype": torch.float64}, r"state_bits=8 cannot be used with float64 weights, as '0.weight' is"),
    ],
)
def test_what_excludes_it_is_said_before_anything_is_attached(options, words):
    options = {"state_bits": 8, **options}
    model = mlp(dtype=options.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=words):
        chunkft.ChunkAdamW(model, chunks=2, **options)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "_chunkft")
    chunkft.ChunkAdamW(model, chunks=2)


@pytest.mark.parametrize("options", [{"state_bits": 8}, {"first_moment": "bf16"}], ids=str)
def test_a_checkpoint_does_not_bring_an_update_that_cannot_be_done(options):
    saved = chunkft.ChunkAdamW(mlp(), chunks=1).state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    optimizer = chunkft.ChunkAdamW(mlp(), chunks=1, **options)
    with pytest.raises(
        ValueError, match=r"state_dict has amsgrad=True in parameter group 0, which .* cannot do"
    ):
        optimizer.load_state_dict(saved)


def saved_state():
    model = mlp()
    optimizer = chunkft.ChunkAdamW(model, chunks=1, state_bits=8)
    train(model, optimizer, mlp_loss, range(2))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def change(state, what):
    entry = state["state"]["0.weight"]
    values = entry["ranges"][0]["values"]
    if what == "nan":
        values["exp_avg_scale"][1] = torch.nan
    elif what == "negative":
        values["exp_avg_sq_scale"][0] = -1.0
    elif what == "short":
        values["exp_avg_sq_scale"] = values["exp_avg_sq_scale"][:-1]
    elif what == "one of two":
        del values["exp_avg_scale"]
    elif what == "codes without scales":
        del values["exp_avg_scale"], values["exp_avg_sq_scale"]
    elif what == "scales without codes":
        entry["tensors"]["exp_avg"] = entry["tensors"]["exp_avg"].float()
    return state


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nan", r"'0.weight\[0:37\]' has exp_avg_scale = .*needs finite numbers >= 0"),
        ("negative", r"has exp_avg_sq_scale = .*needs finite numbers >= 0"),
        ("short", r"has exp_avg_sq_scale = .*needs float32 of shape \(4,\)"),
        ("one of two", r"has exp_avg_scale = None; needs float32 of shape \(4,\)"),
        ("codes without scales", r"has exp_avg = torch.int8; needs torch.float32"),
        ("scales without codes", r"has exp_avg = torch.float32; needs torch.int8"),
    ],
)
def test_damaged_codes_are_refused_and_nothing_changes(what, words, bits):
    model = mlp()
    optimizer = chunkft.ChunkAdamW(model, chunks=1, state_bits=bits)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(change(saved_state(), what))
    assert_same_state(optimizer.state_dict(), before)
    optimizer.load_state_dict(change(saved_state(), "nothing"))
    train(model, optimizer, mlp_loss, range(2))
