"""Master weights: what 16-bit weights need so that small updates are not lost."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_models import assert_same_state, assert_same_weights, same_bits, tiny_loss, tiny_net, train, weights

import chunkft

BF16 = torch.bfloat16


def round_half_away(master: Tensor) -> Tensor:
    """The nearest bf16, ties away from zero, by integers."""
    return ((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(BF16)


class Reference:
    """torch.optim.AdamW on fp32 copies of the slices, fed with the gradients that the optimizer under test sees."""

    def __init__(self, model: nn.Module, plan: chunkft.ChunkPlan, **options) -> None:
        self.masters = {
            piece: nn.Parameter(piece.of(model.get_parameter(piece.name)).detach().float())
            for piece in plan.slices()
        }
        self.optimizers = {piece: torch.optim.AdamW([p], **options) for piece, p in self.masters.items()}

    def step(self, optimizer: chunkft.ChunkOptimizer) -> None:
        for piece, leaf in optimizer.active_parameters():
            self.masters[piece].grad = leaf.grad.float()
            self.optimizers[piece].step()


def saved_extra(optimizer: chunkft.ChunkOptimizer, piece: chunkft.Slice, key: str) -> Tensor:
    return piece.of(optimizer.state_dict()["state"][piece.name]["tensors"][key])


@pytest.mark.parametrize("master", ["residual", "fp32", "auto"])
@pytest.mark.parametrize("partition", ["bytes", "interleaved"])
def test_masters_take_the_bits_of_fp32_adamw_across_switches_and_resume(master, partition, tmp_path):
    options = {"lr": 3e-4, "weight_decay": 0.1}

    def build(model):
        return chunkft.ChunkAdamW(
            model, chunks=3, interval=4, partition=partition, master=master, schedule="random", **options
        )

    model = tiny_net(dtype=BF16)
    optimizer = build(model)
    reference = Reference(model, optimizer.plan, **options)
    trained = set()
    for step in range(90):
        if step in (10, 41):
            chunkft.save_checkpoint(optimizer, tmp_path / "c")
            optimizer.detach()
            optimizer = build(model)
            chunkft.load_checkpoint(optimizer, tmp_path / "c")
        tiny_loss(model, step).backward()
        reference.step(optimizer)
        trained |= {piece for piece, _ in optimizer.active_parameters()}
        optimizer.step()
        for piece, expected in reference.masters.items():
            weight = piece.of(model.get_parameter(piece.name).detach())
            rounded = expected.detach().to(BF16) if master == "fp32" else round_half_away(expected.detach())
            assert same_bits(weight, rounded), (step, str(piece))
    assert trained == set(optimizer.plan.slices())
    for piece, expected in reference.masters.items():
        weight = piece.of(model.get_parameter(piece.name).detach())
        if master == "fp32":
            kept = saved_extra(optimizer, piece, "master")
        else:
            residual = saved_extra(optimizer, piece, "residual")
            kept = ((weight.view(torch.int16).int() << 16) + residual.int()).view(torch.float32)
        assert same_bits(kept.contiguous(), expected.detach()), str(piece)


def test_small_updates_are_lost_without_a_master_and_kept_with_one():
    moved = {}
    for master in ("none", "residual", "fp32", "stochastic"):
        torch.manual_seed(0)
        model = nn.Linear(64, 64, bias=False).to(BF16)
        with torch.no_grad():
            model.weight.fill_(1.0)
        optimizer = chunkft.ChunkAdamW(model, lr=1e-4, weight_decay=0.0, chunks=2, interval=1, master=master)
        for _ in range(100):
            for _, leaf in optimizer.active_parameters():
                leaf.grad = torch.ones_like(leaf)
            optimizer.step()
        moved[master] = 1.0 - model.weight.detach().float().mean().item()
        if master == "stochastic":
            # new noise at every step: with the same each time only 2.6 % of the weights would ever move
            assert 0.6 < (model.weight < 1.0).float().mean() < 0.85
    # each half saw 50 steps of 1e-4, and bf16 has steps of 2^-8 below one
    assert moved["none"] == 0.0
    assert moved["residual"] == moved["fp32"]
    assert math.isclose(moved["fp32"], 0.005, abs_tol=2**-9)
    assert math.isclose(moved["stochastic"], 0.005, rel_tol=0.1)


def test_no_master_is_torch_adamw_in_bf16():
    model = tiny_net(dtype=BF16)
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1, master="none")
    copies = {p.name: nn.Parameter(leaf.detach().clone()) for p, leaf in optimizer.active_parameters()}
    reference = torch.optim.AdamW(list(copies.values()), lr=1e-2)
    for step in range(20):
        tiny_loss(model, step).backward()
        for piece, leaf in optimizer.active_parameters():
            copies[piece.name].grad = leaf.grad.clone()
        reference.step()
        optimizer.step()
        assert all(same_bits(model.get_parameter(name).detach(), copy) for name, copy in copies.items())
    assert optimizer.memory()["master_active"] == 0


def test_stochastic_weights_are_neighbours_of_the_fp32_result():
    model = tiny_net(dtype=BF16)
    optimizer = chunkft.ChunkAdamW(model, lr=1e-3, chunks=3, interval=2, master="stochastic")
    up = total = 0
    for step in range(30):
        tiny_loss(model, step).backward()
        expected = {}
        for piece, leaf in optimizer.active_parameters():
            copy = nn.Parameter(leaf.detach().float())
            copy.grad = leaf.grad.float()
            single = torch.optim.AdamW([copy], lr=1e-3)
            state = optimizer.state.get(leaf)
            if state:
                single.state[copy] = {key: value.clone() for key, value in state.items()}
            single.step()
            expected[piece] = copy.detach()
        optimizer.step()
        for piece, value in expected.items():
            weight = piece.of(model.get_parameter(piece.name).detach())
            below = (value.view(torch.int32) & ~0xFFFF).view(torch.float32)  # towards zero
            above = ((value.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
            between = value != below
            assert bool(((weight.float() == below) | (between & (weight.float() == above))).all())
            up += int((between & (weight.float() == above)).sum())
            total += int(between.sum())
    assert 0.3 < up / total < 0.7


def test_stochastic_rounding_follows_the_seed_and_resumes(tmp_path):
    def run(seed, steps, model=None, load=False):
        model = model or tiny_net(dtype=BF16)
        optimizer = chunkft.ChunkAdamW(model, lr=1e-3, chunks=3, interval=2, master="stochastic", seed=seed)
        if load:
            chunkft.load_checkpoint(optimizer, tmp_path / "c")
        train(model, optimizer, tiny_loss, steps)
        return model, optimizer

    straight, _ = run(1, range(14))
    again, _ = run(1, range(14))
    other, _ = run(2, range(14))
    assert_same_weights(straight, again)
    assert any(not torch.equal(p, q) for p, q in zip(straight.parameters(), other.parameters(), strict=True))
    half, optimizer = run(1, range(7))
    chunkft.save_checkpoint(optimizer, tmp_path / "c")
    optimizer.detach()
    half, _ = run(1, range(7, 14), half, load=True)
    assert_same_weights(straight, half)


@pytest.mark.parametrize("master", ["residual", "stochastic", "fp32", "none"])
@pytest.mark.parametrize("way", ["file", "dict"])
def test_masters_go_over_to_another_number_of_chunks(master, way, tmp_path):
    model = tiny_net(dtype=BF16)
    source = chunkft.ChunkAdamW(model, lr=1e-3, chunks=3, interval=2, master=master)
    train(model, source, tiny_loss, range(9))
    copy = tiny_net(dtype=BF16)
    copy.load_state_dict(model.state_dict())
    target = chunkft.ChunkAdamW(copy, lr=1e-3, chunks=4, interval=2, master=master)
    if way == "file":
        chunkft.save_checkpoint(source, tmp_path / "c")
        chunkft.load_checkpoint(target, tmp_path / "c")
    else:
        target.load_state_dict(source.state_dict())
    ours, theirs = source.state_dict()["state"], target.state_dict()["state"]
    for name, entry in ours.items():
        # the new active chunk may have got masters of its own where none were before: zero, or the weight itself
        for key, tensor in entry["tensors"].items():
            for found in entry["ranges"]:
                piece = chunkft.Slice(
                    name, found["dim"], found["start"], found["stop"], tuple(entry["shape"])
                )
                assert same_bits(piece.of(tensor), piece.of(theirs[name]["tensors"][key])), (name, key)
    assert_same_weights(model, copy)
    train(copy, target, tiny_loss, range(9, 25))
    assert all(torch.isfinite(p).all() for p in copy.parameters())


@pytest.mark.parametrize("base", [torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.SGD])
def test_any_base_updates_the_fp32_value(base):
    model = tiny_net(dtype=BF16)
    options = {"lr": 1e-2, **({"momentum": 0.9} if base is torch.optim.SGD else {})}
    optimizer = chunkft.ChunkOptimizer(model, base, chunks=2, interval=3, **options)
    masters = {
        piece: nn.Parameter(piece.of(model.get_parameter(piece.name)).detach().float())
        for piece in optimizer.plan.slices()
    }
    references = {piece: base([p], **options) for piece, p in masters.items()}
    for step in range(14):
        tiny_loss(model, step).backward()
        for piece, leaf in optimizer.active_parameters():
            masters[piece].grad = leaf.grad.float()
            references[piece].step()
        optimizer.step()
    for piece, expected in masters.items():
        weight = piece.of(model.get_parameter(piece.name).detach())
        assert same_bits(weight, round_half_away(expected.detach())), str(piece)
    assert all(
        value.dtype == torch.float32
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def half_loss(model: nn.Module, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return F.mse_loss(model(torch.randn(5, 12, generator=generator).half()).float(), torch.ones(5, 7))


def half_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 21), nn.Tanh(), nn.Linear(21, 7)).half()


@pytest.mark.parametrize("master", ["auto", "fp32"])
def test_half_precision_weights_have_fp32_masters(master):
    model = half_model()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-3, chunks=2, interval=2, master=master)
    reference = Reference(model, optimizer.plan, lr=1e-3)
    for step in range(25):
        half_loss(model, step).backward()
        reference.step(optimizer)
        optimizer.step()
        for piece, expected in reference.masters.items():
            assert same_bits(piece.of(model.get_parameter(piece.name)).detach(), expected.detach().half())
    assert optimizer.memory()["master_active"] == sum(
        leaf.numel() * 4 for _, leaf in optimizer.active_parameters()
    )


@pytest.mark.parametrize("master", ["residual", "stochastic"])
def test_half_precision_weights_refuse_what_needs_bf16(master):
    model = half_model()
    with pytest.raises(ValueError, match=f"master='{master}' needs bfloat16.*'fp32' and 'none'"):
        chunkft.ChunkAdamW(model, chunks=2, master=master)
    assert all(p.requires_grad for p in model.parameters())
    chunkft.ChunkAdamW(model, chunks=2, master="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("master", ["fp32", "residual", "stochastic"])
def test_wide_weights_ignore_the_master(dtype, master):
    plain, model = tiny_net(dtype=dtype), tiny_net(dtype=dtype)
    reference = chunkft.ChunkAdamW(plain, chunks=3, interval=2, master="none")
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=2, master=master)
    for m, o in ((plain, reference), (model, optimizer)):
        train(m, o, tiny_loss, range(9))
    assert_same_weights(plain, model)
    assert optimizer.memory()["master_active"] == 0


def test_each_parameter_has_the_master_of_its_own_dtype():
    model = tiny_net(dtype=BF16)
    model.norm.float()
    model.head.float()
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    ids = torch.randint(0, 19, (4, 7))
    x = model.table(ids)
    for block in model.blocks:
        x = x + block(x)
    model.head(model.norm(x.float().mean(1))).square().sum().backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]
    for name, parameter in model.named_parameters():
        assert ("residual" in state[name]["tensors"]) == (parameter.dtype == BF16), name


@pytest.mark.parametrize(("master", "size"), [("residual", 2), ("fp32", 4), ("stochastic", 0), ("none", 0)])
def test_masters_take_so_many_bytes_an_element(master, size):
    model = tiny_net(dtype=BF16)
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1, master=master)
    for step in range(4):
        elements = sum(leaf.numel() for _, leaf in optimizer.active_parameters())
        assert optimizer.memory()["master_active"] == size * elements
        train(model, optimizer, tiny_loss, [step])


@pytest.mark.parametrize("keep_state", [True, False])
def test_forgetting_moments_does_not_forget_masters(keep_state):
    torch.manual_seed(0)
    model = nn.Linear(8, 16, bias=False).to(BF16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = chunkft.ChunkAdamW(
        model, lr=1e-4, weight_decay=0.0, chunks=2, interval=1, master="residual", keep_state=keep_state
    )
    for _ in range(100):
        for _, leaf in optimizer.active_parameters():
            leaf.grad = torch.ones_like(leaf)
        optimizer.step()
    assert bool((model.weight < 1).all())


@pytest.mark.parametrize("master", ["residual", "fp32", "stochastic"])
def test_non_finite_gradients_leave_masters_alone(master):
    model = tiny_net(dtype=BF16)
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=3, interval=2, master=master)
    train(model, optimizer, tiny_loss, range(3))
    before, state = weights(model), optimizer.state_dict()
    tiny_loss(model, 5).backward()
    next(iter(optimizer.active_parameters()))[1].grad.view(-1)[0] = math.inf
    optimizer.step()
    state["cursor"]["skipped"] = 1
    assert_same_weights(model, before)
    assert_same_state(optimizer.state_dict(), state)


@pytest.mark.parametrize("master", ["residual", "fp32", "stochastic", "none"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_weights_changed_by_others_win_over_their_master(master, dtype):
    if dtype == torch.float16 and master in ("residual", "stochastic"):
        master = "auto"
    torch.manual_seed(0)
    model = nn.Linear(8, 16, bias=False).to(dtype)
    optimizer = chunkft.ChunkAdamW(model, lr=1e-3, weight_decay=0.0, chunks=2, interval=2, master=master)
    for _ in range(8):
        for _, leaf in optimizer.active_parameters():
            leaf.grad = torch.randn_like(leaf)
        optimizer.step()
    loaded = torch.randn(16, 8).to(dtype)
    loaded[::3] = 0.0
    loaded[1::3, ::2] = -0.0
    model.load_state_dict({"weight": loaded})
    for _, leaf in optimizer.active_parameters():
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    change = (model.weight.detach().float() - loaded.float()).abs()
    assert bool(torch.isfinite(change).all())
    # one step of 1e-3, rounded to a weight below 4
    assert float(change.max()) <= 1e-3 + 2**-7
