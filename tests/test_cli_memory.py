"""`chunkft finetune` with state that is paged, streamed or in files: the same weights, less memory."""

import json

import pytest
import torch
from clitools import assert_same_weights, needs_datasets, save_tiny_llama, sums, weights_of

from chunkft.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_tiny_llama(root / "llama")
    sums(root / "train.jsonl", 40)
    return root


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def finetune(place, out, *options):
    basis = {"--model": place / "llama", "--data": place / "train.jsonl", "--out": out, "--device": "cpu"}
    basis |= {"--steps": 6, "--seq-len": 32, "--batch-size": 4, "--chunks": 2, "--lr": 1e-2}
    words = [str(word) for pair in basis.items() for word in pair]
    return main(["finetune", *words, "--quiet", *map(str, options)])


@needs_datasets
@pytest.mark.parametrize(
    "options",
    [
        ["--residency", "stream", "--page-mib", "1"],
        ["--residency", "stream", "--update", "backward"],
        ["--state-dir", "DIR"],
    ],
    ids=["stream", "backward", "files"],
)
def test_the_weights_are_those_of_a_run_in_memory_and_of_a_resumed_one(place, tmp_path, options):
    options = [tmp_path / "files" if word == "DIR" else word for word in options]
    clip = [] if "backward" in options else ["--max-grad-norm", "0"]
    plain, paged, resumed = tmp_path / "plain", tmp_path / "paged", tmp_path / "resumed"
    assert finetune(place, plain, "--max-grad-norm", "0") == 0
    assert finetune(place, paged, *options, *clip) == 0
    assert_same_weights(plain, paged)
    assert finetune(place, resumed, *options, *clip, "--save-every", "3") == 0
    kept = resumed / "checkpoints" / "checkpoint-3"
    assert kept.is_dir()
    assert main(["finetune", "--resume", "--out", str(resumed)]) == 0
    assert_same_weights(plain, resumed)


@needs_datasets
@pytest.mark.parametrize(
    "options",
    [[], ["--update-on", "device", "--weights-dir", "DIR"], ["--offload-inputs", "--resident-blocks", "1"]],
    ids=["host", "device, in a file", "inputs on the host"],
)
def test_weights_that_stream_train_as_resident_ones_and_resume(place, tmp_path, options):
    options = ["--weights", "stream", *(tmp_path / "files" if word == "DIR" else word for word in options)]
    plain, streamed, resumed = tmp_path / "plain", tmp_path / "streamed", tmp_path / "resumed"
    assert finetune(place, plain) == 0
    assert finetune(place, streamed, *options) == 0
    found = weights_of(streamed)
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)  # the head comes in two tiles
    assert finetune(place, resumed, *options, "--save-every", "3") == 0
    assert (resumed / "checkpoints" / "checkpoint-3").is_dir()
    assert main(["finetune", "--resume", "--out", str(resumed)]) == 0
    assert_same_weights(streamed, resumed)


@pytest.mark.parametrize(
    "options",
    [
        ["--update-on", "host"],
        ["--resident-blocks", "1"],
        ["--weights", "stream", "--resize-embeddings"],
        ["--weights", "stream", "--offload-inputs", "--gradient-checkpointing"],
        ["--weights", "stream", "--update-on", "host", "--residency", "stream"],
        ["--weights", "stream", "--resident-blocks", "9"],
        ["--weights", "stream", "--optimizer", "adamw"],
    ],
    ids=" ".join,
)
def test_options_of_weights_that_do_not_fit_are_named(place, tmp_path, capsys, options):
    assert finetune(place, tmp_path / "out", *options) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert any(word.lstrip("-").replace("-", "_") in said[0].replace("-", "_") for word in options)


@needs_datasets
def test_moments_of_8_bits_are_resumed_and_take_their_bytes(place, tmp_path):
    options = ["--state-bits", "8", "--chunks", "1", "--residency", "stream", "--update", "backward"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert finetune(place, whole, *options) == 0
    report = json.loads((whole / "memory.json").read_text())
    # padding to 256 bytes a tensor is much of it in so small a model
    assert report["this_run"]["optimizer state"] < report["full_adamw"]["optimizer state"] / 2
    assert finetune(place, resumed, *options, "--save-every", "3") == 0
    assert (resumed / "checkpoints" / "checkpoint-3").is_dir()
    assert main(["finetune", "--resume", "--out", str(resumed)]) == 0
    assert_same_weights(whole, resumed)


@needs_datasets
def test_the_memory_table_tells_what_existed_at_a_time(place, tmp_path):
    out = tmp_path / "out"
    assert finetune(place, out, "--chunks", "1", "--residency", "stream", "--update", "backward") == 0
    report = json.loads((out / "memory.json").read_text())
    run, full = report["this_run"], report["full_adamw"]
    assert 0 < run["gradients"] <= full["gradients"]
    # All of this model's state is on one page, in one slot, padded to 256 bytes a tensor.
    assert full["optimizer state"] <= run["optimizer state"] <= 1.05 * full["optimizer state"]


@needs_datasets
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--update", "backward"], "--update backward needs --residency stream"),
        (
            ["--residency", "stream", "--update", "backward", "--grad-accum", "2"],
            "--grad-accum 2 and --update backward exclude each other",
        ),
        (
            ["--residency", "stream", "--update", "backward", "--max-grad-norm", "0.5"],
            "--max-grad-norm 0.5 and --update backward exclude each other",
        ),
        (["--page-mib", "8"], "--page-mib 8 needs --residency stream"),
        (
            ["--optimizer", "adamw", "--residency", "stream"],
            "--residency stream needs --optimizer chunkadamw",
        ),
        (["--optimizer", "adamw", "--state-bits", "8"], "--state-bits 8 needs --optimizer chunkadamw"),
        (["--state-bits", "4"], "--state-bits: invalid choice: 4"),
        (["--optimizer", "adamw", "--state-dir", "x"], "--state-dir x needs --optimizer chunkadamw"),
        (["--state-dir", "/dev/null/x"], "no place for the optimizer state"),
    ],
)
def test_what_excludes_each_other_is_one_line_and_leaves_nothing(place, tmp_path, capsys, options, words):
    out = tmp_path / "out"
    assert finetune(place, out, *options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()
