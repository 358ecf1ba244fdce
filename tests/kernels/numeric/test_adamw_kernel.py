"""The AdamW kernel gives the bits of its reference, whatever the dtypes, strides and sizes of the slices."""

import copy

import pytest
import torch

from chunkft.kernels import adamw_table
from chunkft.kernels.adamw import adamw


@pytest.fixture
def exact_sqrt(monkeypatch):
    """MKL's square root, which PyTorch takes on a CPU, is off by a bit for a fifth of all numbers; ours is not."""
    root = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda tensor: root(tensor.double()).to(tensor.dtype))


def chunk(shapes, device, dtype=torch.float32, grad=None, state=torch.float32, master="none"):
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    arguments = {
        "params": params,
        "grads": [torch.randn(shape).to(grad or dtype) for shape in shapes],
        "exp_avgs": [(torch.randn(shape) * 0.1).to(state) for shape in shapes],
        "exp_avg_sqs": [torch.rand(shape).to(state) for shape in shapes],
        "steps": [torch.tensor(float(j * 7)) for j in range(len(shapes))],
    }
    if master == "residual":
        arguments["residuals"] = [torch.randint(-(2**15), 2**15, p.shape, dtype=torch.int16) for p in params]
    if master == "fp32":
        arguments["masters"] = [p.float() * (1 + 1e-4 * torch.rand(p.shape)) for p in params]
    return {name: [tensor.to(device) for tensor in tensors] for name, tensors in arguments.items()}


def on_cpu(arguments):
    return {name: [tensor.cpu().clone() for tensor in tensors] for name, tensors in arguments.items()}


def run_both(arguments, **options):
    reference = on_cpu(arguments)
    moved = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    adamw(**arguments, **options, backend="triton")
    adamw(**reference, **moved, backend="torch")
    return reference


def assert_same(arguments, reference):
    for name, tensors in reference.items():
        for j, (ours, theirs) in enumerate(zip(arguments[name], tensors, strict=True)):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True, msg=f"{name}[{j}]")


# one program, several, ends within a block, nothing, one element
SHAPES = [(3, 5), (0, 7), (33, 130), (), (4096,), (5, 3, 11), (4097,), (513,)]
KINDS = [
    (torch.float32, torch.float32, torch.float32, "none"),
    (torch.float32, torch.bfloat16, torch.float32, "none"),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, "none"),
    (torch.float16, torch.float16, torch.float32, "none"),
    (torch.float16, torch.float32, torch.float32, "fp32"),
    (torch.bfloat16, torch.bfloat16, torch.float32, "fp32"),
    (torch.bfloat16, torch.bfloat16, torch.float32, "residual"),
    (torch.bfloat16, torch.float32, torch.float32, "stochastic"),
]


@pytest.mark.parametrize(("dtype", "grad", "state", "master"), KINDS, ids=str)
@pytest.mark.usefixtures("exact_sqrt")
def test_the_bits_of_the_reference(device, dtype, grad, state, master):
    arguments = chunk(SHAPES, device, dtype, grad, state, master)
    for step in range(2):
        arguments["steps"] = [s.to("cpu" if step else device) for s in arguments["steps"]]
        assert_same(arguments, run_both(arguments, lr=1e-2, master=master, seed=2**62 + step))


def test_how_far_from_torch_on_a_cpu(device):
    # with MKL's square root: moments have the same bits, parameters differ in the last one
    arguments = chunk([(64, 77)], device)
    reference = run_both(arguments, lr=1e-2)
    for name in ("exp_avgs", "exp_avg_sqs", "steps"):
        assert torch.equal(arguments[name][0].cpu(), reference[name][0])
    ours, theirs = arguments["params"][0].cpu(), reference["params"][0]
    assert (ours != theirs).float().mean() < 0.02
    torch.testing.assert_close(ours, theirs, rtol=2.4e-7, atol=2e-9)


@pytest.mark.usefixtures("exact_sqrt")
def test_scale_clip_rates_and_decays(device):
    arguments = chunk([(70, 9), (257,)], device)
    options = {"grad_scale": torch.tensor(3.0), "clip_factor": torch.tensor([0.3])}
    options = {name: value.to(device) for name, value in options.items()}
    reference = run_both(
        arguments, lr=[1e-2, 3e-1], weight_decay=[0.0, 0.7], betas=(0.4, 0.5), eps=1e-3, **options
    )
    assert_same(arguments, reference)


def test_found_inf_stops_every_program(device):
    arguments = chunk([(70, 90), (3,)], device, torch.bfloat16, master="residual")
    before = copy.deepcopy(arguments)
    options = {"lr": 0.1, "master": "residual", "backend": "triton"}
    adamw(**arguments, **options, found_inf=torch.ones(1, device=device))
    assert_same(arguments, on_cpu(before))
    adamw(**arguments, **options, found_inf=torch.zeros((), device=device))
    assert all(s == t + 1 for s, t in zip(arguments["steps"], before["steps"], strict=True))
    assert not torch.equal(arguments["params"][0], before["params"][0])


@pytest.mark.usefixtures("exact_sqrt")
def test_columns_misaligned_rows_and_strided_gradients(device):
    weight = torch.randn(50, 77, device=device)
    kept = weight.clone()
    pieces = [weight[1:9], weight[9:41, 5:70], weight[41:, 76:]]
    arguments = chunk([piece.shape for piece in pieces], device)
    arguments["params"] = pieces
    arguments["grads"][1] = torch.randn(65, 32, device=device).t()
    assert_same(arguments, run_both(arguments, lr=1e-2))
    outside = torch.ones(50, 77, dtype=torch.bool, device=device)
    outside[1:9] = outside[9:41, 5:70] = outside[41:, 76:] = False
    assert torch.equal(weight[outside], kept[outside])


@pytest.mark.usefixtures("exact_sqrt")
def test_more_slices_than_slots_and_mixed_dtypes(device, monkeypatch):
    monkeypatch.setattr(adamw_table, "SLOTS_MIN", 2)
    monkeypatch.setattr(adamw_table, "SLOTS_MAX", 8)
    arguments = chunk([(j + 1, 3) for j in range(21)], device)
    for j in range(0, 21, 4):
        arguments["params"][j] = arguments["params"][j].bfloat16()
    assert_same(arguments, run_both(arguments, lr=1e-2))


def test_special_values_of_residual_masters(device):
    upper = torch.arange(1 << 16, dtype=torch.int64)[::37]
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    master = (upper[:, None] << 16 | lower).to(torch.int32).view(torch.float32)
    from chunkft.kernels import apply_residual, split_residual

    weight, residual = (tensor.to(device) for tensor in split_residual(master))
    zeros = [torch.zeros_like(master, device=device) for _ in range(3)]
    adamw([weight], zeros[:1], zeros[1:2], zeros[2:], [torch.ones(())], lr=0.0, master="residual",
          residuals=[residual], backend="triton")  # fmt: skip
    after = apply_residual(weight, residual).cpu()
    number = ~master.isnan()
    assert torch.equal(after[number].view(torch.int32), master[number].view(torch.int32))
    assert after[~number].isnan().all()


def test_residual_follows_an_fp32_master_over_many_steps(device):
    arguments = chunk([(97,)], device, torch.bfloat16, torch.float32, master="residual")
    arguments["residuals"][0].zero_()
    exact = chunk([(97,)], device)
    for name in ("exp_avgs", "exp_avg_sqs", "steps"):
        exact[name] = [tensor.clone() for tensor in arguments[name]]
    exact["params"] = [arguments["params"][0].float()]
    for _ in range(25):
        exact["grads"] = arguments["grads"] = [torch.randn(97, device=device)]
        adamw(**arguments, lr=1e-4, master="residual", backend="triton")
        adamw(**exact, lr=1e-4, backend="triton")
    from chunkft.kernels import apply_residual

    joined = apply_residual(arguments["params"][0].cpu(), arguments["residuals"][0].cpu())
    assert torch.equal(joined, exact["params"][0].cpu())


def test_what_the_kernel_cannot_do_is_said_before_anything_changes(device):
    double = chunk([(4,)], device, torch.float64, state=torch.float64)
    with pytest.raises(ValueError, match=r"takes parameters of 16 or 32 bits, got torch\.float64"):
        adamw(**double, lr=0.1, backend="triton")
    odd = chunk([(4, 6, 2)], device)
    odd["params"] = [torch.randn(2, 6, 4, device=device).permute(2, 1, 0)]
    with pytest.raises(ValueError, match="is not a matrix with contiguous rows"):
        adamw(**odd, lr=0.1, backend="triton")
    assert odd["steps"][0] == 0


@pytest.mark.usefixtures("exact_sqrt")
def test_tensors_and_numbers_that_change_between_steps(device):
    """The rows of the table are kept from call to call: none may outlive what it was made of."""
    arguments = chunk([(40, 64), (9,), (4097,)], device)
    rates = {"lr": 1e-2, "weight_decay": 0.1}
    assert_same(arguments, run_both(arguments, **rates))
    # only numbers, and gradients that moved or lost their alignment
    arguments["grads"] = [torch.randn(2561, device=device)[1:].view(40, 64), *arguments["grads"][:0:-1][::-1]]
    assert_same(
        arguments, run_both(arguments, lr=[0.1, 0.2, 0.3], weight_decay=[0.5, 0.0, 0.1], betas=(0.2, 0.3))
    )
    # the same memory as another matrix, as columns of a wider one, and in another order
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        arguments[name][0] = arguments[name][0].view(64, 40)
    assert_same(arguments, run_both(arguments, **rates))
    wide = arguments["params"][0].view(-1).new_zeros(64, 50)
    arguments["params"][0] = wide[:, :40]
    assert_same(arguments, run_both(arguments, **rates))
    assert not bool(wide[:, 40:].any())
    for tensors in arguments.values():
        tensors.reverse()
    assert_same(arguments, run_both(arguments, **rates))
    # freed and allocated again, which may well be at the same address
    for _ in range(3):
        arguments["params"][0] = None
        arguments["params"][0] = torch.randn(4097, device=device)
        assert_same(arguments, run_both(arguments, **rates))
