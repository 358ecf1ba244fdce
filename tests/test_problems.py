import itertools
import random
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from chunkft.cli.problems import (
    CHANGE_RANGE,
    START_RANGE,
    answer_of,
    embedded_model_dir,
    exact_match,
    generate,
    split_of,
)

GAIN = re.compile(r" (?:buys|finds|gets|wins|puts in|has|holds) ([0-9]+)")
LOSS = re.compile(r" (?:loses|sells|gives away|drops|takes out) ([0-9]+)")

STEP = re.compile("([0-9]+) (plus|minus) ([0-9]+) is ([0-9]+)")


def terms_of(prompt):
    """Reads the signed terms back from the words of a prompt, knowing nothing of how it was made."""
    gains = [int(number) for number in GAIN.findall(prompt)]
    losses = [-int(number) for number in LOSS.findall(prompt)]
    assert len(gains) + len(losses) == len(re.findall("[0-9]+", prompt)), prompt
    return (*gains, *losses)


def every_sum():
    changes = [sign * size for size in CHANGE_RANGE for sign in (1, -1)]
    for start in START_RANGE:
        for count in (1, 2):
            yield from ((start, *change) for change in itertools.product(changes, repeat=count))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_dir())


def test_no_sum_can_be_generated_in_both_splits():
    owner = {}
    for terms in every_sum():
        for order in itertools.permutations(terms):
            assert owner.setdefault(tuple(sorted(order)), split_of(*order)) == split_of(*terms)
    heldout = [terms for terms, split in owner.items() if split == "heldout"]
    assert 0.15 < len(heldout) / len(owner) < 0.25
    for split in ("train", "heldout"):
        for problem in generate(3000, seed=3, split=split):
            assert owner[tuple(sorted(terms_of(problem["prompt"])))] == split


def test_heldout_prompts_never_occur_in_train():
    heldout = {problem["prompt"] for problem in generate(4000, seed=1, split="heldout")}
    train = {problem["prompt"] for seed in (1, 2) for problem in generate(20000, seed=seed)}
    assert len(heldout) > 1000
    assert not heldout & train


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_completion_works_out_the_sum_that_the_words_tell(split):
    lengths = set()
    for problem in generate(3000, seed=5, split=split):
        terms = terms_of(problem["prompt"])
        lengths.add((len(terms), min(terms) < 0))
        value = terms[0]
        for step in problem["completion"].removesuffix(".").split(", and "):
            left, sign, right, made = STEP.fullmatch(step.strip()).groups()
            assert int(left) == value
            value += int(right) if sign == "plus" else -int(right)
            assert int(made) == value
        assert answer_of(problem["completion"]) == str(value) == str(sum(terms))
        assert sum(terms) > 0
        assert len(problem["prompt"].encode()) <= 100
    assert lengths == {(2, False), (2, True), (3, False), (3, True)}


def test_the_seed_alone_decides_the_problems():
    random.seed(0)
    first = generate(50, seed=7)
    random.seed(1)
    assert generate(50, seed=7) == first
    assert generate(80, seed=7)[:50] == first
    assert generate(50, seed=8) != first
    assert first[0] == {
        "prompt": "A box holds 13 cards. Kim puts in 5 more. How many cards are in the box?",
        "completion": " 13 plus 5 is 18.",
    }


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 12", "12"),
        ("12.", "12"),
        (" 012\n", "12"),
        ("-3", "-3"),
        (" 7 plus 5 is 12.", "12"),
        (" 7 plus 5 is 12, and 12 minus 4 is 8.", "8"),
        (" 7 plus 5 is 12, and 12 minus 4", None),
        (" this 12", None),
        (" 12 apples", None),
        ("1 2", None),
        ("", None),
        ("twelve", None),
        ("1.5", None),
        ("٣", None),
    ],
)
def test_answer_is_the_number_at_the_end_or_nothing(text, answer):
    assert answer_of(text) == answer


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        generate(-1, seed=0)
    with pytest.raises(ValueError, match="split must be 'train' or 'heldout', got 'test'"):
        generate(1, seed=0, split="test")
    with pytest.raises(ValueError, match="problems"):
        exact_match(SimpleNamespace(), None, [])


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_tokenizer_gives_one_token_a_byte_and_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


def test_tokenizer_is_fast_and_its_special_tokens_follow_the_bytes(tokenizer):
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert len(tokenizer) == 259
    assert [tokenizer.decode([byte]) for byte in (65, 10, 32)] == ["A", "\n", " "]


def test_embedded_model_is_small_and_speaks_its_language(tokenizer):
    directory = embedded_model_dir()
    assert (directory / "model.safetensors").stat().st_size <= 10 * 2**20
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert model.config.vocab_size == len(tokenizer)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    inputs = tokenizer("Tom has 9 books. He buys 3 more. Now Tom has 1", return_tensors="pt")
    with torch.inference_mode():
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    # A uniform guess over the vocabulary is 5.56 nats a byte.
    assert loss < 1.0


class Oracle(torch.nn.Module):
    """Answers a problem from its words, rightly for the share of prompts whose length is even."""

    device = torch.device("cpu")

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def generate(self, input_ids, attention_mask, max_new_tokens, pad_token_id, **_):
        assert not self.training
        # Greedy decoding goes on from the last column: it has to hold a prompt's last token, never padding.
        assert attention_mask[:, -1].all()
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()])
            answer = f"this is {sum(terms_of(prompt))}." if len(prompt) % 2 == 0 else "5 apples"
            made = [*f" {answer}".encode(), self.tokenizer.eos_token_id][:max_new_tokens]
            rows.append(ids.tolist() + made + [pad_token_id] * (max_new_tokens - len(made)))
        return torch.tensor(rows)


def test_exact_match_counts_the_right_answers_only(tokenizer):
    problems = generate(61, seed=2, split="heldout")
    even = sum(len(problem["prompt"]) % 2 == 0 for problem in problems)
    model = Oracle(tokenizer).train()
    assert 0 < even < 61
    assert exact_match(model, tokenizer, problems, batch_size=17) == even / 61
    assert model.training
