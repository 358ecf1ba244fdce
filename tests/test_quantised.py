"""Quantised weights stay frozen while what is beside them trains in chunks; training them is refused by name."""

import copy
import re

import pytest
import tiny_transformers
import torch
import torch.nn.functional as F
from helpers import assert_slices_equal_dense
from torch import nn

import chunkft


class Int8Linear(nn.Module):
    """A frozen weight of 8-bit numbers with a scale for each row, and trainable low-rank factors beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), requires_grad=False
        )
        self.scale = nn.Parameter(torch.rand(outputs, 1) / 300, requires_grad=False)
        self.down = nn.Linear(inputs, 3, bias=False)
        self.up = nn.Linear(3, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.float() * self.scale) + self.up(self.down(x))


def quantised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(19, 12), Int8Linear(12, 21), nn.LayerNorm(21), Int8Linear(21, 7))


def loss(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(18).view(3, 6)).square().sum()


def test_adapters_beside_a_quantised_weight_have_exact_gradients():
    model = quantised()
    plan = chunkft.partition(model, 5, row_multiple=1)
    assert not any(piece.name.endswith((".scale", "1.weight", "3.weight")) for piece in plan.slices())
    assert_slices_equal_dense(model, plan, loss)


@pytest.mark.parametrize("options", [{}, {"residency": "stream", "update": "backward", "page_bytes": 512}])
def test_training_changes_everything_but_the_quantised_weights(options):
    model = quantised()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=4, interval=1, **options)
    for _ in range(8):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == frozen
    optimizer.detach()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen


class Packed(torch.Tensor):
    """A tensor that is made of others, as those of quantisation libraries and of distributed ones are."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor, requires_grad: bool = False) -> "Packed":
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=scale.dtype, requires_grad=requires_grad
        )

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, requires_grad: bool = False) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Packed(parts["values"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Packed(args[0].values, args[0].scale)
        raise NotImplementedError(str(function))

    def __repr__(self) -> str:
        return "Packed()"


REFUSED = [
    (
        lambda: torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
        r"parameter 'layer.weight' of dtype torch.float8_e4m3fn cannot be trained",
    ),
    (
        lambda: torch.zeros(4, 4, dtype=torch.complex64),
        r"parameter 'layer.weight' of dtype torch.complex64 cannot be trained",
    ),
    (
        lambda: Packed(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4)),
        r"parameter 'layer.weight' is a Packed of dtype torch.float32, made of other tensors",
    ),
    (lambda: torch.zeros(4, 4, device="meta"), r"parameter 'layer.weight' is on device 'meta'"),
]


@pytest.mark.parametrize("master", ["auto", "none"])
@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_a_parameter_that_cannot_be_trained_is_named_and_the_model_left_alone(values, message, master):
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.layer = nn.Module()
    model.layer.weight = nn.Parameter(values())
    with pytest.raises(ValueError, match=message + r".*freeze it with requires_grad_\(False\)"):
        chunkft.ChunkAdamW(model, chunks=2, master=master)
    assert "_chunkft" not in model.__dict__
    assert all(p.requires_grad for p in model.parameters())
    model.layer.weight.requires_grad_(False)
    optimizer = chunkft.ChunkAdamW(model, chunks=2, master=master)
    assert {piece.name for piece in optimizer.plan.slices()} == {"first.weight", "first.bias"}
    optimizer.detach()


def lora(model: nn.Module, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        lora_dropout=0.0,
        init_lora_weights=False,
        target_modules=["q_proj", "down_proj"],
        **options,
    )
    return peft.get_peft_model(model, config)


def test_gradients_of_lora_adapters_equal_dense_ones():
    model = lora(tiny_transformers.build("llama"), modules_to_save=["lm_head"])
    plan = chunkft.partition(model, 5, row_multiple=1)
    names = {piece.name for piece in plan.slices()}
    assert all(re.search(r"lora_[AB]|modules_to_save", name) for name in names)
    assert len(names) == 2 * 2 * 2 + 1
    assert {piece.dim for piece in plan.slices()} == {0}
    assert_slices_equal_dense(model, plan, tiny_transformers.loss_of("llama"))


def test_lora_in_one_chunk_is_adamw_bit_for_bit():
    dense = lora(tiny_transformers.build("llama"))
    chunked = copy.deepcopy(dense)
    reference = torch.optim.AdamW([p for p in dense.parameters() if p.requires_grad], lr=1e-3)
    optimizer = chunkft.ChunkAdamW(chunked, lr=1e-3, chunks=1, interval=2)
    for step in range(3):
        for model, stepper in ((dense, reference), (chunked, optimizer)):
            tiny_transformers.loss_of("llama", step)(model).backward()
            stepper.step()
            stepper.zero_grad()
    optimizer.detach()
    for (name, p), q in zip(dense.named_parameters(), chunked.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
        assert p.requires_grad == q[1].requires_grad


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_lora_on_a_base_that_bitsandbytes_quantised_trains_by_chunks(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    settings = {
        "Linear4bit": {"compute_dtype": torch.float32, "quant_type": "nf4"},
        "Linear8bitLt": {"has_fp16_weights": False},
    }[kind]
    model = tiny_transformers.build("llama", hidden_size=64, intermediate_size=64, num_attention_heads=4)
    for block in model.model.layers:
        for parent, name in ((block.self_attn, "q_proj"), (block.mlp, "down_proj")):
            plain = getattr(parent, name)
            replaced = getattr(bitsandbytes.nn, kind)(
                plain.in_features, plain.out_features, bias=False, **settings
            )
            replaced.load_state_dict(plain.state_dict(), strict=False)
            setattr(parent, name, replaced.to("cpu"))
    model = lora(model)
    family_loss = tiny_transformers.loss_of("llama")
    try:
        family_loss(model).backward()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes cannot compute on this machine: {error}")
    model.zero_grad()
    base = {n: p for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    assert len(base) == 4
    assert not any(p.is_floating_point() or p.requires_grad for p in base.values())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert_slices_equal_dense(model, chunkft.partition(model, 4, row_multiple=1), family_loss)
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=4, interval=1)
    for _ in range(8):
        family_loss(model).backward()
        optimizer.step()
    optimizer.detach()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
