"""Models that are loaded straight into host pages, and saved from there, are those of transformers."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny_transformers import FAMILIES, batch
from torch import nn

import chunkft
from chunkft.integrations import streamed
from chunkft.integrations.streamed import load_streamed, save_streamed
from chunkft.weights import WeightStream, stream_of
from chunkft.weights.reading import open_weights

PAGE_FILL = 77


class Pages:
    """Puts all weights of a model on one page of host memory, as a stream would; remembers where."""

    def __init__(self):
        self.models = []

    def __call__(self, model):
        self.models.append(model)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert not any(buffer.is_meta for buffer in model.buffers())
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        unique = list(model.parameters())
        size = sum(-(-p.numel() * p.element_size() // 256) * 256 for p in unique)
        self.page = torch.full((size,), PAGE_FILL, dtype=torch.uint8)
        made = {}
        offset = 0
        for parameter in unique:
            nbytes = parameter.numel() * parameter.element_size()
            view = self.page[offset : offset + nbytes].view(parameter.dtype).view(parameter.shape)
            made[id(parameter)] = nn.Parameter(view, parameter.requires_grad)
            offset += -(-nbytes // 256) * 256
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = made[id(parameter)]

    def holds(self, model):
        start = self.page.data_ptr()
        return all(start <= p.data_ptr() < start + self.page.numel() for p in model.parameters())


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)


@pytest.fixture
def pages():
    return Pages()


def make(family, path, **changes):
    config, model, arguments, _ = FAMILIES[family]
    torch.manual_seed(5)
    kind = getattr(transformers, model)
    made = kind(getattr(transformers, config)(**{**arguments, **changes}))
    made.save_pretrained(path)
    return kind


def assert_same(ours, theirs):
    """Same parameters, buffers, ties, and modes."""
    for kind in ("named_parameters", "named_buffers"):
        a, b = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (ours, theirs))
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype, name
            assert torch.equal(a[name], b[name]), name
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert not any(module.training for module in ours.modules())
    assert type(ours) is type(theirs)
    configs = [{**model.config.to_dict(), "_name_or_path": ""} for model in (ours, theirs)]
    assert configs[0] == configs[1]
    if theirs.can_generate():
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


CASES = [
    *(
        ("llama", None),
        ("llama-tied", torch.bfloat16),
        ("qwen3", torch.float16),
        ("gpt2", None),
        ("opt", None),
    ),
    *(("gemma3", torch.bfloat16), ("mixtral", None), ("mixtral", torch.bfloat16), ("qwen3-moe", None)),
    *(("t5", torch.float16), ("bert", None), ("bart", None), ("mamba", torch.float16), ("gpt-oss", None)),
]


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_loaded_and_saved_model_is_that_of_transformers(tmp_path, family, dtype, pages):
    kind = make(family, tmp_path / "model")
    # grouped products in 16 bit want rows of whole 16 bytes, which these do not have
    options = {"experts_implementation": "eager"} if (family, dtype) == ("mixtral", torch.bfloat16) else {}
    expected = kind.from_pretrained(tmp_path / "model", dtype=dtype, **options)
    model = load_streamed(tmp_path / "model", task=kind, dtype=dtype, place=pages, **options)
    assert_same(model, expected)
    assert pages.holds(model)
    assert all(
        torch.equal(buffer, pages.buffers[name]) for name, buffer in model.named_non_persistent_buffers()
    )
    arguments = batch(family, 0)
    with torch.no_grad():
        assert torch.equal(model(**arguments).logits, expected(**arguments).logits)

    save_streamed(model, tmp_path / "ours", max_shard_bytes=20_000)
    expected.save_pretrained(tmp_path / "theirs")
    ours, theirs = open_weights(tmp_path / "ours"), open_weights(tmp_path / "theirs")
    assert set(ours.entries) == set(theirs.entries)
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.entries)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).exists() == (tmp_path / "theirs" / name).exists()
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == json.loads(
        (tmp_path / "theirs" / "config.json").read_text()
    )
    assert_same(kind.from_pretrained(tmp_path / "ours"), kind.from_pretrained(tmp_path / "theirs"))


def test_auto_classes_load_what_was_saved(tmp_path, pages):
    make("qwen3", tmp_path / "model", tie_word_embeddings=True)
    model = chunkft.load_streamed(tmp_path / "model", place=pages)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    chunkft.save_streamed(model, tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(model, back)


@pytest.mark.parametrize("kind", ["AutoModelForSequenceClassification", "AutoModel", "AutoModelForCausalLM"])
@pytest.mark.parametrize("saved", ["LlamaForCausalLM", "LlamaModel"])
def test_other_heads_and_prefixes(tmp_path, kind, saved, pages, caplog):
    config, _, arguments, _ = FAMILIES["llama"]
    getattr(transformers, saved)(getattr(transformers, config)(**arguments)).save_pretrained(tmp_path)
    auto = getattr(transformers, kind)
    torch.manual_seed(11)
    expected, told = auto.from_pretrained(tmp_path, output_loading_info=True)
    caplog.clear()
    torch.manual_seed(11)
    model, ours = load_streamed(tmp_path, task=auto, place=pages, output_loading_info=True)
    assert_same(model, expected)
    assert pages.holds(model)
    assert ours == told
    for name in told["missing_keys"]:
        assert name in caplog.text
    if kind == "AutoModelForSequenceClassification":
        assert told["missing_keys"] == {"score.weight"}


def test_head_of_another_size_is_refused_or_made_anew(tmp_path, pages):
    make("bert", tmp_path)
    options = {"task": "sequence-classification", "num_labels": 5, "place": pages}
    with pytest.raises(
        ValueError, match=r"classifier.bias' has \(3,\), the model \(5,\); with ignore_mismatched"
    ):
        load_streamed(tmp_path, **options)
    assert not pages.models
    torch.manual_seed(2)
    expected = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    torch.manual_seed(2)
    model = load_streamed(tmp_path, ignore_mismatched_sizes=True, **options)
    assert_same(model, expected)
    assert pages.holds(model)


def test_ties_that_the_files_contradict_are_not_made(tmp_path, pages, caplog):
    kind = make("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    expected = kind.from_pretrained(tmp_path)
    model = load_streamed(tmp_path, place=pages)
    assert "not tied" in caplog.text
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert_same(model, expected)
    assert model.all_tied_weights_keys == expected.all_tied_weights_keys
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    save_streamed(model, tmp_path / "same")
    again = Pages()
    assert load_streamed(tmp_path / "same", place=again).lm_head.weight.data_ptr() == again.page.data_ptr()


def broken(path, how):
    file = path / "model.safetensors"
    if how == "torn":
        file.write_bytes(file.read_bytes()[:-4])
    elif how == "bin":
        file.rename(path / "pytorch_model.bin")
    elif how == "gone":
        file.unlink()
    elif how == "file":
        return file
    elif how == "quantised":
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [4, 4]}
        (path / "config.json").write_text(json.dumps(config))
    elif how == "integers":
        rewrite(
            file, lambda tensors: tensors.update({"lm_head.weight": torch.ones(61, 36, dtype=torch.int32)})
        )
    elif how == "eight bits":
        wrong = torch.ones(61, 36).to(torch.float8_e4m3fn)
        rewrite(file, lambda tensors: tensors.update({"lm_head.weight": wrong}))
    return path


def rewrite(file, change):
    import safetensors.torch

    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "options", "kind", "match"),
    [
        ("torn", {}, ValueError, "not a whole safetensors file"),
        ("bin", {}, ValueError, r"as pytorch_model.bin.*convert"),
        ("gone", {}, FileNotFoundError, "holds no weights"),
        ("file", {}, ValueError, "is a file; expected a model directory"),
        ("quantised", {}, Exception, "quantis|quantiz|fp8|FP8"),
        ("integers", {}, ValueError, r"'lm_head.weight' .* I32, its target torch.float32"),
        ("eight bits", {}, ValueError, r"'lm_head.weight' .* F8_E4M3; allowed are"),
        ("", {"device_map": "auto"}, ValueError, "device_map='auto' cannot be used with load_streamed"),
        ("", {"task": "poetry"}, ValueError, "task='poetry': allowed are 'causal-lm', "),
        ("", {"task": dict}, ValueError, "has no from_pretrained"),
    ],
)
def test_refused_before_anything_is_placed(tmp_path, how, options, kind, match, pages):
    make("llama", tmp_path)
    path = broken(tmp_path, how)
    load = transformers.PreTrainedModel._load_pretrained_model
    with pytest.raises(kind, match=match) as caught:
        load_streamed(path, place=pages, **options)
    assert not pages.models
    assert how == "quantised" or "\n" not in str(caught.value)
    assert transformers.PreTrainedModel._load_pretrained_model is load


def test_conversion_that_does_not_work_out_is_refused_by_name(tmp_path, pages):
    make("mixtral", tmp_path)
    rewrite(
        tmp_path / "model.safetensors", lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight")
    )
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.experts.gate_up_proj' cannot be made of the 5 .*'stream'"
    ):
        load_streamed(tmp_path, place=pages)
    assert not pages.models


def test_unexpected_tensors_are_told_but_those_that_the_model_ignores(tmp_path, pages, caplog):
    make("llama", tmp_path)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6), "other.weight": torch.ones(2)}
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.update(more))
    _, told = load_streamed(tmp_path, place=pages, output_loading_info=True)
    assert told["unexpected_keys"] == {"other.weight"}
    assert "other.weight" in caplog.text


def test_from_pretrained_is_left_as_it_was(tmp_path, pages):
    kind = make("llama", tmp_path)

    def place(model):
        assert len(list(kind.from_pretrained(tmp_path).parameters())) > 5
        pages(model)

    model = load_streamed(tmp_path, place=place)
    assert len(pages.models) == 1
    assert_same(model, kind.from_pretrained(tmp_path))
    assert len(pages.models) == 1


def test_other_threads_load_as_ever_meanwhile(tmp_path, pages):
    kind = make("llama", tmp_path)
    with streamed._loading_by(streamed._Loader(pages)):
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(kind.from_pretrained, tmp_path).result()
        model = kind.from_pretrained(tmp_path)
    assert len(pages.models) == 1
    assert pages.models[0] is model
    assert_same(model, other)


def test_model_whose_class_loads_by_itself_is_refused(tmp_path, pages, monkeypatch):
    kind = make("llama", tmp_path)
    own = transformers.PreTrainedModel._load_pretrained_model
    monkeypatch.setattr(kind, "_load_pretrained_model", staticmethod(own), raising=False)
    finish = transformers.PreTrainedModel._finalize_model_loading
    monkeypatch.setattr(kind, "_finalize_model_loading", staticmethod(finish), raising=False)
    with pytest.raises(RuntimeError, match="loads its weights by itself"):
        load_streamed(tmp_path, place=pages)


def test_trained_model_is_saved_with_what_lies_beside_it(tmp_path, pages):
    make("llama", tmp_path / "model")
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "model" / "tokenizer_config.json")
    model = load_streamed(tmp_path / "model", place=pages)
    optimizer = chunkft.ChunkAdamW(model, chunks=3, lr=1e-2)
    for number in range(3):
        model(**batch("llama", number)).loss.backward()
        optimizer.step()
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}

    class Tokenizer:
        def save_pretrained(self, path):
            (path / "tokenizer.json").write_text("{}")

    save_streamed(torch.compile(model), tmp_path / "model")
    assert "tokenizer_config.json" in os.listdir(tmp_path / "model")
    save_streamed(model, tmp_path / "model", tokenizer=Tokenizer())
    assert sorted(os.listdir(tmp_path / "model")) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    ]
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(trained[name], p) for name, p in back.named_parameters())


def test_failing_tokenizer_leaves_the_old_model(tmp_path, pages):
    make("llama", tmp_path / "model")
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "model").iterdir()}

    class Tokenizer:
        def save_pretrained(self, path):
            raise RuntimeError("no vocabulary")

    model = load_streamed(tmp_path / "model", place=pages)
    with pytest.raises(RuntimeError, match="no vocabulary"):
        save_streamed(model, tmp_path / "model", tokenizer=Tokenizer())
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "model").iterdir()} == before
    assert os.listdir(tmp_path) == ["model"]


def test_what_cannot_be_saved_is_refused(tmp_path, pages):
    with pytest.raises(TypeError, match="model is a Linear; save_streamed needs a transformers model"):
        save_streamed(nn.Linear(2, 2), tmp_path / "saved")
    make("llama", tmp_path / "model")
    model = load_streamed(tmp_path / "model", place=pages)
    model.hf_quantizer = object()
    with pytest.raises(TypeError, match="model is quantised"):
        save_streamed(model, tmp_path / "saved")
    assert os.listdir(tmp_path) == ["model"]


def test_import_of_chunkft_needs_no_transformers():
    code = "import chunkft, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="'chunkft' has no attribute 'nothing'"):
        _ = chunkft.nothing
    assert chunkft.load_streamed is streamed.load_streamed


STREAMS = [
    *(("llama", {}), ("mixtral", {}), ("llama-tied", {"resident_blocks": 1})),
    *(("gpt2", {"weights_dir": "file"}), ("llama-tied", {"weights_dir": "file"})),
]


@pytest.mark.parametrize(("family", "options"), STREAMS, ids=str)
def test_weights_that_stream_are_loaded_trained_and_saved(tmp_path, family, options):
    kind = make(family, tmp_path / "model")
    if "weights_dir" in options:
        options = {"weights_dir": tmp_path / "file"}
    expected = kind.from_pretrained(tmp_path / "model")
    place = partial(WeightStream, device="cpu", **options)
    model = load_streamed(tmp_path / "model", task=kind, place=place)
    assert stream_of(model) is not None
    assert_same(model, expected)
    for each in (model, expected):
        optimizer = chunkft.ChunkAdamW(each, chunks=3, lr=1e-2, interval=1)
        for number in range(4):
            each(**batch(family, number)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    save_streamed(model, tmp_path / "ours")
    expected.save_pretrained(tmp_path / "theirs")
    ours, theirs = open_weights(tmp_path / "ours"), open_weights(tmp_path / "theirs")
    assert set(ours.entries) == set(theirs.entries)
    original = open_weights(tmp_path / "model")
    assert not all(torch.equal(ours.read(name), original.read(name)) for name in ours.entries)
    for name in ours.entries:
        assert torch.equal(ours.read(name), theirs.read(name)), name


def test_weights_stream_by_default(tmp_path):
    kind = make("qwen3", tmp_path)
    model = load_streamed(tmp_path, device="cpu", attn_implementation="sdpa")
    assert stream_of(model).streamed
    assert model.config._attn_implementation == "sdpa"
    assert_same(model, kind.from_pretrained(tmp_path, attn_implementation="sdpa"))


def test_new_head_of_streamed_weights_is_initialised(tmp_path):
    make("llama", tmp_path)
    torch.manual_seed(4)
    expected = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.manual_seed(4)
    assert_same(load_streamed(tmp_path, task="sequence-classification", device="cpu"), expected)


def test_device_belongs_to_the_default_place(tmp_path, pages):
    make("llama", tmp_path)
    with pytest.raises(ValueError, match=r"device='cpu' is for the default of place"):
        load_streamed(tmp_path, place=pages, device="cpu")
