"""What users do to a model whose weights stream: it works exactly, or is refused in a sentence with nothing changed."""

import copy
import io
import pickle

import pytest
import torch
from tiny_transformers import batch as family_batch
from tiny_transformers import build
from tiny_transformers import loss_of as family_loss
from torch import nn
from weight_rigs import (
    assert_at_rest,
    assert_same,
    assert_same_state,
    batch,
    loss_of,
    pair,
    places,
    streamed,
    tower,
    train,
)

import chunkft
from chunkft.weights import WeightStream, stream_of

UPDATES = ("host", "device")


@pytest.mark.parametrize("update", UPDATES)
def test_detach_leaves_no_trace_and_training_goes_on_with_resident_weights(update):
    models = tower(), tower()
    before = [places(model) for model in models]
    resident = chunkft.ChunkAdamW(models[1], lr=1e-2, chunks=3, interval=1)
    optimizer = chunkft.ChunkAdamW(
        models[0], lr=1e-2, chunks=3, interval=1, weights="stream", device="cpu", update_on=update
    )
    train([(models[0], optimizer), (models[1], resident)], range(4))
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(resident.state_dict())
    for one in (optimizer, resident):
        one.detach()
    for model, known in zip(models, before, strict=True):
        after = places(model)
        for name, value in known.items():
            if name in dict(model.named_parameters()):
                continue  # their memory is that of the pages
            assert after[name] == value, name
        assert after.keys() == known.keys()
    again = [chunkft.ChunkAdamW(m, lr=1e-2, chunks=3, interval=1) for m in models]
    for one, state in zip(again, saved, strict=True):
        one.load_state_dict(state)
    pairs = list(zip(models, again, strict=True))
    train(pairs, range(4, 8))
    assert_same(pairs)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta"),
        lambda m: m.to_empty(device="meta"),
    ],
)
def test_conversions_are_refused_before_anything_is_converted(convert):
    model = nn.Sequential(nn.LayerNorm(16), tower())  # what stays comes first
    stream = WeightStream(model, device="cpu")
    before = places(model)
    with pytest.raises(RuntimeError, match="streams"):
        convert(model)
    assert places(model) == before
    stream.detach()


def test_moves_to_where_everything_is_already_do_nothing():
    pairs = pair(chunks=2)
    train(pairs, range(1))
    for model, _ in pairs:
        assert model.cpu().float().to("cpu").to(torch.float32).eval().train() is model
    train(pairs, range(1, 4))
    assert_same(pairs)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "t5"])
def test_generation_is_that_of_the_resident_model(family):
    models = build(family).eval(), build(family).eval()
    WeightStream(models[0], device="cpu", poison=True)
    ids = family_batch(family)["input_ids"]
    made = [m.generate(input_ids=ids, max_new_tokens=7, do_sample=False) for m in models]
    assert made[0].shape[1] > 6
    assert torch.equal(*made)


@pytest.mark.parametrize("update", UPDATES)
def test_saving_and_loading(update, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build("llama-tied")
    optimizer = streamed(model, update, chunks=2)
    for step in range(3):
        family_loss("llama-tied", step)(model).backward()
        optimizer.step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(model.state_dict(), tmp_path / "state.pt")
    model.save_pretrained(tmp_path / "saved")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        build("llama-tied"),
    ]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    copies[3].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    expected = model.eval()(**family_batch("llama-tied")).loss
    for one in copies:
        assert stream_of(one) is None
        assert one.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
        assert torch.equal(one.eval()(**family_batch("llama-tied")).loss, expected)
        assert all(p.requires_grad for p in one.parameters())
        family_loss("llama-tied")(one.train()).backward()  # of its own weights
        chunkft.ChunkAdamW(one, chunks=2, weights="stream", device="cpu", update_on=update).detach()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="assign=True"):
        model.load_state_dict(state, assign=True)
    model.load_state_dict(state, strict=True)
    family_loss("llama-tied")(model.train()).backward()
    optimizer.step()


def test_a_copy_keeps_a_forward_that_was_replaced_on_the_instance():
    model = tower()
    block = model.blocks[1]
    block.forward = lambda x: x * 2
    expected = model(batch())
    WeightStream(model, device="cpu")
    assert torch.equal(model(batch()), expected)
    assert torch.equal(copy.deepcopy(model)(batch()), expected)


@pytest.mark.parametrize("update", UPDATES)
def test_two_optimizers_on_one_model(update):
    models = tower(), tower()
    stream = WeightStream(models[0], device="cpu", poison=True, tile_bytes=1 << 20)
    optimizers = []
    for model in models:
        chunkft.attach(model)
        low = [p for n, p in model.named_parameters() if n.startswith(("table", "blocks.0", "blocks.1"))]
        high = [p for n, p in model.named_parameters() if n.startswith(("norm", "blocks.2", "blocks.3"))]
        extra = {"weights": stream, "update_on": update} if model is models[0] else {}
        optimizers.append(
            [chunkft.ChunkAdamW(ps, lr=1e-2, chunks=2, interval=1, **extra) for ps in (low, high)]
        )
    for step in range(5):
        for model, both in zip(models, optimizers, strict=True):
            loss_of(model, step).backward()
            for optimizer in both:
                optimizer.step()
    assert_same_state(*models)
    optimizers[0][0].detach()
    for model, both in zip(models, optimizers, strict=True):
        loss_of(model, 7).backward()
        both[1].step()
    with pytest.raises(RuntimeError, match="detach"):
        stream.detach()
    optimizers[0][1].detach()
    stream.detach()


@pytest.mark.parametrize("what", ["functional_call", "vmap", "grad", "jvp", "trace", "export"])
def test_transforms_are_refused_with_nothing_changed(what):
    model = tower()
    stream = WeightStream(model, device="cpu", tile_bytes=640)
    model(batch())
    before = places(model)
    values = {name: torch.ones_like(p) for name, p in model.named_parameters()}

    def call(ids):
        return model(ids).sum()

    calls = {
        "functional_call": lambda: torch.func.functional_call(model, values, (batch(),)),
        "vmap": lambda: torch.vmap(call)(batch()),
        "grad": lambda: torch.func.grad(
            lambda w: torch.func.functional_call(model, {"norm.weight": w}, (batch(),)).sum()
        )(values["norm.weight"]),
        "jvp": lambda: torch.func.jvp(
            lambda w: torch.func.functional_call(model, {"norm.weight": w}, (batch(),)).sum(),
            (values["norm.weight"],),
            (values["norm.weight"],),
        ),
        "trace": lambda: torch.jit.trace(model, (batch(),)),
        "export": lambda: torch.export.export(model, (batch(),)),
    }
    with pytest.raises((RuntimeError, torch._dynamo.exc.TorchDynamoException), match=r"stream|moved|traced"):
        calls[what]()
    assert places(model) == before
    assert_at_rest(model)
    stream.detach()


def test_compiled_models_compute_as_they_do_without():
    pairs = pair(chunks=2)
    compiled = [(torch.compile(model, backend="eager"), optimizer) for model, optimizer in pairs]
    train(compiled, range(3))
    assert_same(pairs)
    with pytest.raises(RuntimeError, match="cannot be compiled"):
        chunkft.autograd.compilable(pairs[0][0])


def test_resizing_the_vocabulary_is_refused():
    model = build("llama-tied")
    stream = WeightStream(model, device="cpu")
    model.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(RuntimeError, match="detach"):
        model(**family_batch("llama-tied"))
    stream.detach()
    assert model(**family_batch("llama-tied")).logits.shape[-1] == 70


def test_a_weight_in_another_place_is_refused_until_it_is_back():
    model = tower()
    WeightStream(model, device="cpu")
    weight = model.blocks[2].up.weight
    home = weight.data
    weight.data = home.clone()
    with pytest.raises(RuntimeError, match=r"blocks\.2\.up\.weight.*moved or replaced"):
        model(batch())
    weight.data = home
    model(batch())
    assert_at_rest(model)


def test_a_forward_that_a_wrapper_kept_computes_without_the_stream():
    model = tower()
    expected = model(batch())
    stream = WeightStream(model, device="cpu")
    for module in (model.blocks[0], model.head):
        kept = module.forward
        module.forward = lambda *args, kept=kept: kept(*args)
    assert torch.equal(model(batch()), expected)
    stream.detach()
    assert torch.equal(model(batch()), expected)
