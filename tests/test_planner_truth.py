"""The planner promises no byte less than a training step holds, and at most 3 % more."""

import itertools

import pytest
import torch
from planner_rigs import counted_peak

import chunkft
from chunkft.optim.planner.estimate import Model
from chunkft.optim.planner.profiles import _on_meta, set_checkpointing
from chunkft.optim.planner.setting import Setting
from chunkft.optim.planner.tape import Tape
from chunkft.optim.planner.timeline import Kept, peak_of
from chunkft.optim.planner.twin import language_model_step, meta_twin

transformers = pytest.importorskip("transformers")

SLACK = 0.03
PAGE_BYTES = 1 << 15
BATCH, TOKENS, VOCABULARY = 2, 24, 192


def llama(**options):
    return transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )


def gpt2(**options):
    return transformers.GPT2Config(
        n_embd=64, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, loss_type="ForCausalLM", **options,
    )  # fmt: skip


SHAPES = {
    "llama, 3 blocks": lambda: llama(num_hidden_layers=3, tie_word_embeddings=False),
    "llama, tied, 2 blocks": lambda: llama(num_hidden_layers=2, tie_word_embeddings=True),
    "gpt2, 2 blocks": lambda: gpt2(n_layer=2),
}
PLACES = (("chunk", "step"), ("stream", "step"), ("stream", "backward"))
RESIDENT = [
    {"residency": residency, "update": update, "checkpointing": checkpointing}
    for (residency, update), checkpointing in itertools.product(PLACES, (False, True))
]
STREAMED = [
    {
        "weights": "stream",
        "checkpointing": True,
        "update_on": on,
        "offload_inputs": offload,
        "resident_blocks": stay,
    }
    for on, offload, stay in (
        ("host", False, 0),
        ("host", True, 0),
        ("device", False, 1),
        ("device", True, 0),
    )
]
SMALL = [
    {"state_bits": 8, "residency": residency, "checkpointing": True} for residency in ("chunk", "stream")
]
GRID = [
    *itertools.product(SHAPES, (torch.float32,), (1, 4), RESIDENT),
    *itertools.product(("llama, 3 blocks",), (torch.float32,), (2,), RESIDENT),
    *itertools.product(("llama, 3 blocks", "gpt2, 2 blocks"), (torch.float32,), (1, 4), STREAMED),
    *itertools.product(
        ("llama, 3 blocks",), (torch.bfloat16,), (3,), [*RESIDENT[1::2], *STREAMED[1:3], *SMALL]
    ),
]


def test_the_grid_has_sixty_settings():
    assert len(GRID) >= 60


@pytest.fixture(scope="module")
def models():
    """Every model of the grid, made once, with what the planner knows of it."""
    known = {}

    def get(shape, dtype):
        if (shape, dtype) not in known:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype).train()
            base = torch.optim.AdamW, {"lr": 1e-4}
            planned = Model(model, language_model_step, BATCH, TOKENS, *base, PAGE_BYTES, device="cpu")
            known[shape, dtype] = model, planned
        return known[shape, dtype]

    return get


def loss_of(model, input_ids):
    return model(input_ids=input_ids, labels=input_ids).loss


def named(value):
    return "/".join(str(entry) for entry in value.values()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("shape", "dtype", "chunks", "choices"), GRID, ids=named)
def test_promised_bytes_are_not_less_than_counted_ones_and_hardly_more(models, shape, dtype, chunks, choices):
    model, planned = models(shape, dtype)
    setting = Setting(chunks=chunks, **choices)
    promised = planned.gpu(setting)
    set_checkpointing(model, setting.checkpointing and not setting.offload_inputs)
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    arguments = {**setting.arguments(), "page_bytes": PAGE_BYTES}
    if setting.weights == "stream":
        arguments["device"] = "cpu"
    counted = counted_peak(model, arguments, loss_of, input_ids=ids)
    assert counted <= promised.total <= (1 + SLACK) * counted, promised
    assert planned.gpu(setting, exact=False).total >= promised.total


@pytest.mark.parametrize("chunks", [12, 20])
def test_many_chunks_are_promised_no_less(models, chunks):
    model, planned = models("llama, 3 blocks", torch.float32)
    setting = Setting(chunks=chunks, checkpointing=True)
    set_checkpointing(model, True)
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    assert planned.gpu(setting).total >= counted_peak(model, {"chunks": chunks}, loss_of, input_ids=ids)


def deep_peak(model, slices):
    """The most bytes at a time that a step of all blocks makes on the meta device."""
    twin = meta_twin(model)
    attachment = chunkft.attach(twin)
    attachment.freeze()
    attachment.activate(slices)
    tape = Tape()
    for tensor in [*twin.parameters(), *twin.buffers()]:
        tape.given(tensor)
    with _on_meta("cpu"), tape:
        language_model_step(twin, BATCH, TOKENS).backward()
    live = most = 0
    freed = [(made.freed, -made.nbytes) for made in tape.allocations if made.freed is not None]
    for _, change in sorted([(made.born, made.nbytes) for made in tape.allocations] + freed):
        live += change
        most = max(most, live)
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_shallow_model_tells_to_the_byte_what_the_deep_one_takes(shape, checkpointing):
    config = SHAPES[shape]()
    config.num_hidden_layers = 5
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    set_checkpointing(model, checkpointing)
    planned = Model(
        model, language_model_step, BATCH, TOKENS, torch.optim.AdamW, {}, PAGE_BYTES, device="cpu"
    )
    setting = Setting(chunks=6, checkpointing=checkpointing)
    for window, chunk in zip(planned.windows(setting), planned.plan(6), strict=True):
        composed = peak_of(planned.profiles(setting), window, Kept(window), exact=True)
        assert composed.total == pytest.approx(deep_peak(model, chunk.slices), rel=2e-3)
