"""Weights between safetensors files and memory: read in place, written as they lie, refused before anything happens."""

import json
import os
import struct

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from chunkft.weights import format as format_module
from chunkft.weights import reading, writing
from chunkft.weights.reading import open_weights, read_weights
from chunkft.weights.writing import Deferred, write_weights

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def tensors():
    """Every dtype, odd shapes, an empty one, a scalar, and views that do not lie as a file would."""
    torch.manual_seed(3)
    found = {f"float.{i}": torch.randn(5 + i, 7).to(dtype) for i, dtype in enumerate(FLOATS)}
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        found[f"int.{dtype}"] = torch.randint(0, 99, (3, 2, 5)).to(dtype)
    found["bool"] = torch.rand(11) > 0.5
    found["scalar"] = torch.tensor(2.5)
    found["empty"] = torch.zeros(0, 4)
    found["transposed"] = torch.randn(6, 9).t()
    found["strided"] = torch.randn(4, 3, 8)[:, ::2, 1::3]
    return found


def small_pieces(monkeypatch, size=48):
    monkeypatch.setattr(reading, "PIECE", size)
    monkeypatch.setattr(writing, "PIECE", size)


def assert_reads_back(directory, expected):
    found = open_weights(directory)
    assert set(found.entries) == set(expected)
    by_file = {}
    for name, entry in found.entries.items():
        assert entry.offset % entry.dtype.itemsize == 0
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == set(names)
            for name in names:
                assert torch.equal(opened.get_tensor(name), expected[name]), name


@pytest.mark.parametrize("limit", [1, 100, 700, 10**9])
def test_written_weights_are_read_by_safetensors(tmp_path, monkeypatch, limit):
    small_pieces(monkeypatch)
    expected = tensors()
    write_weights(tmp_path / "model", expected, max_shard_bytes=limit)
    assert_reads_back(tmp_path / "model", expected)
    names = sorted(os.listdir(tmp_path / "model"))
    if limit == 10**9:
        assert names == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    total = sum(t.numel() * t.element_size() for t in expected.values())
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in expected.values()),
        "total_size": total,
    }
    count = len(names) - 1
    assert names[:-1] == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name in names[:-1]:
        sizes = [e.nbytes for e in format_module.read_header(tmp_path / "model" / name).values()]
        assert sum(sizes) <= limit or len([size for size in sizes if size]) == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_tensors_are_filled_in_place(tmp_path, monkeypatch, threads, poisoned_memory):
    small_pieces(monkeypatch)
    expected = tensors()
    write_weights(tmp_path / "model", expected, max_shard_bytes=300)
    targets = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    targets["strided"] = torch.empty(3, 2, 8)[:, :, ::2].permute(2, 1, 0)
    memory = {name: tensor.data_ptr() for name, tensor in targets.items()}
    read_weights(tmp_path / "model", targets, threads=threads)
    for name, tensor in targets.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.data_ptr() == memory[name]


@pytest.mark.parametrize("wanted", FLOATS)
def test_dtypes_are_converted_as_torch_does(tmp_path, monkeypatch, wanted):
    small_pieces(monkeypatch)
    expected = {name: t for name, t in tensors().items() if t.is_floating_point()}
    write_weights(tmp_path / "model", expected)
    targets = {name: torch.full(t.shape, 7.0, dtype=wanted) for name, t in expected.items()}
    read_weights(tmp_path / "model" / "model.safetensors", targets)
    for name, tensor in targets.items():
        assert torch.equal(tensor, expected[name].to(wanted)), name


def test_deferred_tensor_is_made_when_it_is_written(tmp_path):
    made = []

    def make():
        made.append(os.listdir(tmp_path))
        return torch.arange(12.0).view(3, 4)

    write_weights(tmp_path / "m", {"a": torch.ones(2), "b": Deferred((3, 4), torch.float32, make)})
    assert len(made) == 1
    assert "m" not in made[0]
    assert_reads_back(tmp_path / "m", {"a": torch.ones(2), "b": torch.arange(12.0).view(3, 4)})
    with pytest.raises(RuntimeError, match=r"tensors\['a'\] became torch.float32 \(2,\)"):
        write_weights(tmp_path / "m", {"a": Deferred((3,), torch.float32, lambda: torch.ones(2))})
    assert os.listdir(tmp_path) == ["m"]


def saved(tmp_path, **extra):
    values = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4), **extra}
    write_weights(tmp_path / "model", values, max_shard_bytes=24)
    return tmp_path / "model"


def refused(path, targets, match, kind=ValueError, **options):
    """Reading raises, and has written nothing."""
    before = {name: tensor.clone() for name, tensor in targets.items() if not tensor.is_meta}
    with pytest.raises(kind, match=match):
        read_weights(path, targets, **options)
    assert all(torch.equal(targets[name], tensor) for name, tensor in before.items())


def good():
    return {"a": torch.full((2, 3), 9.0), "b": torch.full((4,), 9)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"c": torch.ones(1)}, r"lacks 'c'"),
        ({"a": torch.ones(3, 2)}, r"'a' of .*model-00001.*\(2, 3\), its target \(3, 2\)"),
        ({"a": torch.ones(2, 3, dtype=torch.int32)}, r"'a' .* F32, its target torch.int32; allowed are two"),
        ({"b": torch.ones(4)}, r"'b' .* I64, its target torch.float32"),
        ({"a": torch.ones(2, 3, dtype=torch.complex64)}, r"'a' .*complex64, .*allowed are float64"),
        ({"a": torch.ones(2, 3, device="meta")}, "'a' .* meta device"),
    ],
)
def test_targets_that_do_not_fit_are_refused_by_name(tmp_path, change, match):
    refused(saved(tmp_path), {**good(), **change}, match)


def test_tensor_without_a_target_is_refused_unless_allowed(tmp_path):
    path = saved(tmp_path)
    refused(path, {"b": torch.full((4,), 9)}, "holds 'a', for which there is no target")
    target = torch.full((4,), 9)
    read_weights(path, {"b": target}, allow_unexpected=["^a$"])
    assert torch.equal(target, torch.arange(4))
    absent = torch.full((1,), 5.0)
    read_weights(path, {**good(), "c": absent}, allow_missing=["c"])
    assert float(absent) == 5.0


def test_eight_bit_floats_are_refused_by_name(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", {"w": torch.ones(4)}, r"'w' .* F8_E4M3; allowed are float64")


def test_torn_files_are_refused_at_every_length(tmp_path):
    path = saved(tmp_path) / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refused(path.parent, good(), "is not a whole safetensors file")
    path.write_bytes(data + b"\0")
    refused(path.parent, good(), r"has \d+ bytes, its header promises \d+")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}x",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}',
        b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]}}',
        b'{"a": {"dtype": "F32", "shape": [2, -3], "data_offsets": [0, 24]}}',
        b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]}}',
        b"\xff\xfe",
    ],
)
def test_damaged_headers_are_refused(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    refused(tmp_path / "x.safetensors", {"a": torch.ones(2, 3)}, "is not a whole safetensors file")


def test_index_must_fit_its_files(tmp_path):
    path = saved(tmp_path)
    index = path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    whole["weight_map"]["a"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(whole))
    refused(path, good(), "says that model-00002-of-00002.safetensors holds 'a', which it does not")
    index.write_text("{}")
    refused(path, good(), "is not an index")
    whole["weight_map"] = {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}
    index.write_text(json.dumps(whole))
    refused(path, good(), r"files that are not there: 'gone.safetensors'", FileNotFoundError)
    (path / "gone.safetensors").write_bytes((path / "model-00001-of-00002.safetensors").read_bytes())
    refused(path, good(), "tensor 'a' is in .* and in .*; it may be in one only")


def test_what_is_no_model_is_refused(tmp_path):
    refused(tmp_path / "none", good(), "does not exist; expected a model directory", FileNotFoundError)
    refused(tmp_path, good(), "holds no weights; expected model.safetensors", FileNotFoundError)
    (tmp_path / "x.gguf").write_bytes(b"")
    refused(tmp_path / "x.gguf", good(), "a file of another kind")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, good(), r"as pytorch_model.bin.*convert.*from_pretrained.*save_pretrained")


def test_file_that_changes_while_it_is_read_is_told(tmp_path, monkeypatch):
    path = saved(tmp_path)
    file = open_weights(path).entries["a"].file
    read = os.preadv

    def shrinking(descriptor, buffers, offset):
        os.truncate(file, file.stat().st_size - 4)
        return read(descriptor, buffers, offset)

    files = open_weights(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", shrinking)
        with pytest.raises(OSError, match=r"tensor 'a' of .* ends too early"):
            files.read_into({"a": torch.ones(2, 3)}, threads=1)
    with pytest.raises(OSError, match=r"00001.* was replaced or written to while the model was loaded"):
        files.read_into({"a": torch.ones(2, 3)})


def test_model_that_is_replaced_while_it_is_loaded_is_not_mixed_with_the_new_one(tmp_path):
    files = open_weights(saved(tmp_path))
    saved(tmp_path, b=torch.ones(4, dtype=torch.int64))
    for name in "ab":
        with pytest.raises(OSError, match="was replaced or written to"):
            files.read(name)


@pytest.mark.parametrize(
    ("values", "options", "kind", "match"),
    [
        ({}, {}, ValueError, "tensors is empty"),
        ({"a": torch.ones(2)}, {"max_shard_bytes": 0}, ValueError, "max_shard_bytes=0"),
        ({"a": 3}, {}, TypeError, r"tensors\['a'\] is a int"),
        ({"a": torch.ones(2, device="meta")}, {}, TypeError, "meta device"),
        ({"a": torch.ones(2, 2).to_sparse()}, {}, TypeError, "layout torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, {}, TypeError, "complex64; allowed are float64"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, values, options, kind, match):
    with pytest.raises(kind, match=match):
        write_weights(tmp_path / "model", values, **options)
    assert not list(tmp_path.iterdir())
