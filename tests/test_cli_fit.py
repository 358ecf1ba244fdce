"""Tokenizer, data, labels and positions are held against the model before training; two classes are judged fairly."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clitools import byte_tokenizer, needs_datasets, save_tiny_bert, save_tiny_llama, write_jsonl

from chunkft.cli import main
from chunkft.cli.data import DataReport, label_map
from chunkft.cli.errors import UserError
from chunkft.cli.job import classification_metrics
from chunkft.cli.models import check_positions
from chunkft.cli.progress import EVALUATED

ROW = {"prompt": "2 plus 2", "completion": " is 4."}


def longer_tokenizer(path, **more):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"], **more})
    tokenizer.save_pretrained(path)
    return len(tokenizer)


def finetune(model, data, out, *options):
    basis = ["finetune", "--model", model, "--data", data, "--out", out, "--device", "cpu", "--steps", "4"]
    return main(
        [*map(str, basis), "--batch-size", "4", "--seq-len", "32", "--chunks", "2", *map(str, options)]
    )


def refused(capsys, out):
    assert not out.exists()
    # The first time, a library may warn before.
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def llama(tmp_path):
    save_tiny_llama(tmp_path / "llama")
    return tmp_path / "llama"


def rows_of(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().num_embeddings


@needs_datasets
def test_data_with_a_token_beyond_the_embedding_is_refused_before_training(llama, tmp_path, capsys):
    rows = rows_of(llama)
    tokens = longer_tokenizer(llama)
    assert tokens > rows
    data = write_jsonl(tmp_path / "d.jsonl", [ROW] * 20 + [ROW | {"prompt": "<tool> 2"}])
    assert finetune(llama, data, tmp_path / "out") == 2
    line = refused(capsys, tmp_path / "out")
    assert f"{tokens:,} tokens" in line
    assert f"{rows:,} rows" in line
    assert f"token id {tokens - 1}" in line
    assert "--resize-embeddings" in line


@needs_datasets
def test_held_out_data_is_looked_at_too(llama, tmp_path, capsys):
    longer_tokenizer(llama)
    data = write_jsonl(tmp_path / "d.jsonl", [ROW] * 20)
    held_out = write_jsonl(tmp_path / "e.jsonl", [ROW | {"prompt": "<tool> 2"}])
    assert finetune(llama, data, tmp_path / "out", "--eval-data", held_out) == 2
    assert "--resize-embeddings" in refused(capsys, tmp_path / "out")


@needs_datasets
def test_a_padding_token_beyond_the_embedding_is_refused(llama, tmp_path, capsys):
    longer_tokenizer(llama, pad_token="<new pad>")
    data = write_jsonl(tmp_path / "d.jsonl", [ROW] * 20)
    assert finetune(llama, data, tmp_path / "out") == 2
    assert "the padding token has id" in refused(capsys, tmp_path / "out")


@needs_datasets
def test_tokens_that_no_data_uses_are_only_noted(llama, tmp_path, capsys):
    longer_tokenizer(llama)
    data = write_jsonl(tmp_path / "d.jsonl", [ROW] * 20)
    assert finetune(llama, data, tmp_path / "out", "--quiet") == 0
    assert "the data uses none of the tokens beyond" in capsys.readouterr().out


@needs_datasets
def test_resized_embeddings_are_trained_saved_and_resumed(llama, tmp_path):
    tokens = longer_tokenizer(llama)
    data = write_jsonl(tmp_path / "d.jsonl", [ROW | {"prompt": "<tool> 2 plus 2"}] * 20)
    out = tmp_path / "out"
    assert finetune(llama, data, out, "--resize-embeddings", "--quiet") == 0
    assert rows_of(out) == tokens
    assert json.loads((out / "config.json").read_text())["vocab_size"] == tokens
    assert main(["finetune", "--resume", "--out", str(out), "--steps", "6", "--quiet"]) == 0
    assert rows_of(out) == tokens


@pytest.mark.parametrize("ids", [[3, None], [-1, 4]])
def test_ids_that_no_embedding_has_are_refused(ids):
    with pytest.raises(
        UserError, match=f"d.jsonl: the tokenizer gives the token id {[*ids, -1][ids[0] > 0]}"
    ):
        DataReport("d.jsonl", "text").note_ids([[1], ids])


def test_positions_behind_a_padding_index_are_not_counted_twice():
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=18,
    )  # fmt: skip
    model = RobertaModel(config)
    check_positions(model, "M", 16)
    model(torch.full((1, 16), 5))
    with pytest.raises(UserError, match="--seq-len 17: M was made for at most 16 tokens"):
        check_positions(model, "M", 17)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 17), 5))


def test_labels_that_a_head_numbers_with_gaps_are_numbered_anew():
    assert label_map(["a", "b"], {"a": 1, "b": 0}) == {"a": 1, "b": 0}
    assert label_map(["a", "b"], {"a": 1, "b": 2}) == {"a": 0, "b": 1}
    assert label_map(["a", "b"], {"a": 0, "b": 1, "c": 2}) == {"a": 0, "b": 1, "c": 2}
    assert label_map(["a", "d"], {"a": 0, "b": 1, "c": 2}) == {"a": 0, "d": 1}


@pytest.mark.parametrize("text", ["", "\n\n", "label\tsentence\n", "sentence\tother\nA\tB\n"])
def test_files_without_rows_or_labels_are_refused(tmp_path, capsys, text):
    save_tiny_bert(tmp_path / "bert")
    (tmp_path / "d.tsv").write_text(text)
    options = ("--task", "sequence-classification")
    assert finetune(tmp_path / "bert", tmp_path / "d.tsv", tmp_path / "out", *options) == 2
    assert "d.tsv" in refused(capsys, tmp_path / "out")


def judged(preferred, labels, classes=2):
    return classification_metrics(
        SimpleNamespace(predictions=np.array(preferred), label_ids=np.array(labels)), classes
    )


def test_matthews_is_the_correlation_of_predictions_and_labels():
    generator = np.random.default_rng(0)
    preferred, labels = generator.integers(0, 2, 50), generator.integers(0, 2, 50)
    assert judged(preferred, labels)["matthews"] == pytest.approx(np.corrcoef(preferred, labels)[0, 1])
    assert judged(labels, labels) == {"accuracy": 1.0, "matthews": 1.0}
    assert judged(1 - labels, labels) == {"accuracy": 0.0, "matthews": -1.0}
    assert judged([1, 1, 1, 1], [1, 1, 1, 0]) == {"accuracy": 0.75, "matthews": 0.0}
    assert judged([1, 0], [1, 1])["matthews"] == 0.0
    assert judged([0, 1, 2], [0, 1, 2], classes=3) == {"accuracy": 1.0}
    assert "eval_matthews" in EVALUATED


@needs_datasets
def test_an_evaluation_of_two_classes_tells_matthews(tmp_path, capsys):
    save_tiny_bert(tmp_path / "bert")
    rows = [(index % 2, "good and fine" if index % 2 else "bad and sad") for index in range(8)]
    (tmp_path / "d.tsv").write_text("label\tsentence\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    options = ("--task", "sequence-classification", "--eval-data", tmp_path / "d.tsv")
    assert finetune(tmp_path / "bert", tmp_path / "d.tsv", tmp_path / "out", *options) == 0
    assert "held-out loss" in (shown := capsys.readouterr().out)
    assert ", matthews " in shown
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if "eval_loss" in record]
    assert all("eval_matthews" in record for record in found)
