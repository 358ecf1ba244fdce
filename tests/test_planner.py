"""The planner: what it chooses, refuses and says, and the optimizers that are built from it."""

import gc
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner_truth import llama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chunkft
from bench import planner_table
from chunkft.cli import main
from chunkft.optim.planner import parse_rate, parse_size
from chunkft.optim.planner.estimate import CONTEXT, Model
from chunkft.optim.planner.search import Space, search
from chunkft.optim.planner.setting import Machine
from chunkft.optim.planner.twin import empty_model, language_model_step, meta_twin, shallow_twin

transformers = pytest.importorskip("transformers")
TOKENS = 24


@pytest.fixture(scope="module")
def config():
    return llama(num_hidden_layers=3, tie_word_embeddings=False)


def planned(config, gpu, **options):
    return chunkft.plan_memory(
        config, gpu=gpu, tokens=TOKENS, dtype=torch.float32, device="cpu", page_bytes=1 << 15, **options
    )


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 8 << 30), ("24 GB", 24 * 10**9), ("1.5kib", 1536), ("700", 700), (5, 5), (" 2 TiB ", 2 << 40)],
)
def test_sizes_are_read(text, nbytes):
    assert parse_size(text, "gpu") == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "8 gigs", "-1GiB", "0", 0, -5, "1e3", "0.0001 B"])
def test_a_size_that_is_none_is_refused_by_name(text):
    with pytest.raises(ValueError, match="gpu="):
        parse_size(text, "gpu")


@pytest.mark.parametrize("value", [1.5, True, None, b"8GiB"])
def test_a_size_of_another_type_is_refused(value):
    with pytest.raises(TypeError, match="ram="):
        parse_size(value, "ram")


def test_speeds_are_read():
    assert parse_rate(25, "link") == parse_rate("25", "link") == parse_rate("25GB/s", "link") == 25e9
    for wrong in (0, -1, float("inf"), float("nan"), "fast"):
        with pytest.raises(ValueError, match="link="):
            parse_rate(wrong, "link")


@pytest.mark.parametrize("name", ["RobertaConfig", "GPT2Config"])
def test_a_twin_has_the_shapes_of_its_model_and_no_memory(name):
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 60}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes))
    twin = meta_twin(model)
    assert [(n, p.shape) for n, p in twin.named_parameters()] == [
        (n, p.shape) for n, p in model.named_parameters()
    ]
    assert all(p.is_meta for p in twin.parameters())
    shallow = shallow_twin(model)
    assert len(shallow.blocks) == 2
    assert shallow.kinds == (0, 1, 1, 1)
    assert len(dict(model.named_modules())[shallow.deep[3]].state_dict()) > 0  # the model itself is as it was


def test_a_shallow_twin_keeps_two_blocks_of_each_kind():
    options = {
        "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 40, "vocab_size": 60, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    }  # fmt: skip
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**options))
    assert shallow_twin(model).kinds == (0, 1, 2, 3, 2, 3)


GPUS = [CONTEXT + (kib << 10) for kib in (300, 600, 900, 1400, 4000, 64000)]
RAMS = [500 << 10, 1 << 20, 4 << 20, None]


@pytest.fixture(scope="module")
def looked(config):
    """The model, with what the planner found out about it."""
    base = torch.optim.AdamW, {"lr": 1e-4}
    return Model(empty_model(config, torch.float32), language_model_step, 1, TOKENS, *base, 64 << 20)


@pytest.fixture(scope="module")
def ladder(looked):
    """Plans for many machines, by their memory."""
    space = Space(chunks=(1, 4, 16))
    return {
        (gpu, ram): search(looked, Machine(gpu=gpu, host=ram), space, interval=50)
        for gpu in GPUS
        for ram in RAMS
    }


def test_more_memory_never_gives_a_slower_plan(ladder):
    fitting = {place: plan for place, plan in ladder.items() if plan.fits}
    assert 3 < len(fitting) < len(ladder)
    room = {None: 1 << 62}
    for (gpu, ram), plan in fitting.items():
        for (more, wider), other in ladder.items():
            if more >= gpu and room.get(wider, wider) >= room.get(ram, ram):
                assert other.fits
                assert other.seconds.total <= 1.05 * plan.seconds.total


def test_a_plan_holds_no_more_than_it_may(ladder):
    for (gpu, ram), plan in ladder.items():
        assert plan.fits == (plan.gpu.total <= gpu and (ram is None or plan.host.total <= ram))
        assert bool(plan.change) != plan.fits


def test_what_nothing_fits_names_is_enough(config):
    few = {"chunks": (2, 8), "weights": "resident", "state_bits": 32}
    lacking = planned(config, 100 << 10, **few)
    assert "more GPU memory" in lacking.change
    assert planned(config, lacking.gpu.total, **few).fits
    ram = planned(config, 4 << 20, host=1000, **few)
    assert "host memory" in ram.change or "a disk" in ram.change
    alone = {
        "chunks": 8,
        "weights": "resident",
        "state_bits": 32,
        "residency": "chunk",
        "checkpointing": False,
    }
    enough = planned(config, 64 << 20, **alone).gpu.total
    long = chunkft.plan_memory(config, gpu=enough * 2, tokens=512, dtype=torch.float32, device="cpu", **alone)
    assert "tokens a sequence instead of 512" in long.change


@pytest.mark.parametrize(
    "choices",
    [
        {"weights": ("resident",), "residency": ("chunk",)},
        {"weights": ("resident",), "residency": ("stream",), "update": ("backward",)},
        {"weights": ("stream",), "update_on": ("host",), "offload_inputs": (True,)},
        {"weights": ("stream",), "update_on": ("device",), "resident_blocks": (1,), "state_bits": (8,)},
    ],
    ids=lambda choices: ", ".join(str(value[0]) for value in choices.values()),
)
def test_the_arguments_of_a_plan_build_its_optimizer(looked, choices):
    plan = search(looked, Machine(gpu=8 << 30), Space(chunks=(4,), **choices), interval=50)
    assert all(getattr(plan.setting, name) == value for name, (value,) in choices.items())
    model = language_model()
    place = {"device": "cpu"} if plan.setting.weights == "stream" else {}
    optimizer = chunkft.ChunkAdamW(model, lr=1e-3, **plan.optimizer_arguments(), **place)
    ids = torch.randint(0, 192, (1, TOKENS))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert len(optimizer.plan) == 4
    optimizer.detach()


def test_a_plan_is_json_and_text(ladder):
    plan = ladder[GPUS[-1], None]
    read = json.loads(plan.to_json())
    assert read == json.loads(json.dumps(plan.as_dict()))
    assert read["gpu"]["total"] == plan.gpu.total == sum(v for k, v in read["gpu"].items() if k != "total")
    assert read["seconds"]["total"] == pytest.approx(
        sum(read["seconds"][k] for k in ("compute", "exposed", "update"))
    )
    text = plan.table()
    assert f"chunks={plan.setting.chunks}" in text
    assert "TFLOP/s" in text
    assert "GB/s" in text
    assert str(plan) == text
    for other in plan.alternatives:
        assert other.difference in text


@settings(max_examples=30, deadline=None)
@given(gpu=st.integers(1, 1 << 24), more=st.integers(0, 1 << 24), ram=st.none() | st.integers(1, 1 << 23))
def test_any_more_memory_never_gives_a_slower_plan(looked, gpu, more, ram):
    space = Space(chunks=(1, 8), state_bits=(32,))
    plan = search(looked, Machine(gpu=CONTEXT + gpu, host=ram), space, interval=50)
    other = search(looked, Machine(gpu=CONTEXT + gpu + more, host=ram), space, interval=50)
    assert other.fits >= plan.fits
    assert not plan.fits or other.seconds.total <= 1.05 * plan.seconds.total


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunks": 0}, ValueError, "chunks=0"),
        ({"residency": "nowhere"}, ValueError, "residency='nowhere'"),
        ({"state_bits": 4}, ValueError, "state_bits=4"),
        ({"pages": 3}, TypeError, "'pages'"),
        ({"tokens": 0}, ValueError, "tokens=0"),
        ({"tflops": 0}, ValueError, "tflops=0"),
        ({"gpu": "big"}, ValueError, "gpu='big'"),
        ({"device": "tpu"}, ValueError, "device='tpu'"),
        ({"state_dir": "somewhere"}, ValueError, "needs disk="),
    ],
)
def test_mistakes_are_named(config, options, error, message):
    with pytest.raises(error, match=message):
        chunkft.plan_memory(config, **{"gpu": "1GiB", **options})


def test_a_module_that_is_no_language_model_needs_a_step():
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    with pytest.raises(ValueError, match="give step="):
        chunkft.plan_memory(model, gpu="1GiB")

    def step(model, batch, tokens):
        return model(torch.empty(batch, tokens, 8, device="meta")).sum()

    assert chunkft.plan_memory(model, gpu="1GiB", step=step).fits
    with pytest.raises(TypeError, match="model_or_config"):
        chunkft.plan_memory({"layers": 3}, gpu="1GiB")


def language_model(layers=3):
    return transformers.AutoModelForCausalLM.from_config(
        llama(num_hidden_layers=layers, tie_word_embeddings=False)
    )


def test_a_budget_chooses_the_chunks():
    model = language_model()
    weights = sum(4 * p.numel() for p in model.parameters())
    small = chunkft.ChunkAdamW(
        model, memory_budget=weights + (800 << 10), memory_tokens=TOKENS, page_bytes=1 << 15
    )
    few = len(small.plan), small._residency
    small.detach()
    large = chunkft.ChunkAdamW(model, memory_budget="1GiB", memory_tokens=TOKENS)
    assert large.plan.by == "bytes"
    assert few[0] >= 1
    large.detach()
    other = chunkft.ChunkOptimizer(
        model, torch.optim.SGD, memory_budget="1GiB", memory_tokens=TOKENS, lr=0.1, momentum=0.9
    )
    other.detach()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": 32}, "chunks=32"),
        ({"partition": "layers"}, "partition='layers'"),
        ({"state_device": "device"}, "state_device='device'"),
        ({"memory_budget": "300KiB"}, "more GPU memory"),
        ({"memory_budget": "lots"}, "lots"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_and_leaves_the_model_alone(options, message):
    model = language_model(2)
    with pytest.raises(ValueError, match=message):
        chunkft.ChunkAdamW(model, **{"memory_budget": "1GiB", "memory_tokens": TOKENS, **options})
    assert "_chunkft" not in model.__dict__
    assert all(p.requires_grad for p in model.parameters())


def test_a_budget_is_not_for_parameter_groups():
    model = language_model(2)
    with pytest.raises(ValueError, match="parameter groups"):
        chunkft.ChunkAdamW([{"params": list(model.parameters())}], memory_budget="1GiB")
    chunkft.attach(model)
    with pytest.raises(ValueError, match="not attached"):
        chunkft.ChunkAdamW(model, memory_budget="1GiB")


def run(capsys, *arguments):
    status = main(["plan", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_plans_for_a_preset_and_a_directory(capsys, config, tmp_path):
    status, out, _ = run(
        capsys, "--model", "1B", "--gpu", "8GiB", "--ram", "32GiB", "--chunks", "16", "--tokens", "256"
    )
    assert status == 0
    assert "chunks=16" in out
    config.save_pretrained(tmp_path)
    status, out, _ = run(capsys, "--model", str(tmp_path), "--gpu", "1GiB", "--json", "--chunks", "4")
    assert status == 0
    assert json.loads(out)["setting"]["chunks"] == 4
    target = tmp_path / "plan.json"
    status, out, _ = run(
        capsys, "--model", str(tmp_path), "--gpu", "1MiB", "--json", str(target), "--chunks", "4"
    )
    assert status == 1
    assert "more GPU memory" in json.loads(target.read_text())["change"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "much"), "--gpu"),
        (("--ram", "8GiB"), "needs --gpu"),
        (("--gpu", "8GiB", "--save", "x"), "exclude each other"),
        (("--gpu", "8GiB", "--link", "0"), "--link"),
    ],
)
def test_mistakes_of_the_command_are_one_line(capsys, arguments, message):
    status, out, err = run(capsys, "--model", "1B", *arguments)
    assert status == 2
    assert not out
    assert message in err
    assert err.count("\n") == 1


def test_the_table_of_models_and_cards(tmp_path, capsys):
    out = tmp_path / "table.json"
    planner_table.main(
        ["--models", "1B", "--gpus", "6", "24", "--ram", "64", "--tokens", "256", "--out", str(out)]
    )
    cells = json.loads(out.read_text())["cells"]
    assert [cell["gpu_gib"] for cell in cells] == [6, 24]
    assert all(cell["fits"] for cell in cells)
    assert cells[1]["step_seconds"] <= 1.05 * cells[0]["step_seconds"]
    assert "| 1B |" in capsys.readouterr().out


def test_a_model_that_was_planned_for_can_be_let_go():
    model = transformers.LlamaForCausalLM(llama(num_hidden_layers=3))
    chunkft.plan_memory(model, gpu="1GiB", host="8GiB", tokens=16)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_weights_stream_where_nothing_else_fits_a_budget():
    def optimizer(budget, **options):
        model = transformers.LlamaForCausalLM(llama(num_hidden_layers=12))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return chunkft.ChunkAdamW(model, lr=1e-4, memory_budget=budget, memory_tokens=8, **options)

    whole = optimizer("1GiB")
    needed = sum(p.numel() * 4 for p in whole._attachment.model.parameters())
    assert whole._stream is None
    small = optimizer(needed * 3 // 4)
    assert small._stream is not None
    small.detach()
    told = optimizer("1GiB", weights="stream", update_on="host", resident_blocks=2)
    assert told._stream.resident_blocks == 2
    assert not told._attachment.wiring.residence.on_device
    with pytest.raises(ValueError, match=r"memory_budget=.*more GPU memory"):
        optimizer(needed * 3 // 4, weights="resident")
