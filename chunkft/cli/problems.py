"""Arithmetic word problems, the task of the embedded model: generated, with splits that share no sum."""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypedDict

Split = Literal["train", "heldout"]

START_RANGE = range(2, 21)
CHANGE_RANGE = range(2, 10)
HELDOUT_ONE_IN = 5

_NAMES_HE = ("Tom", "Ben", "Sam", "Max", "Leo", "Jim")
_NAMES_SHE = ("Ann", "Eva", "Mia", "Sue", "Zoe", "Kim")
_THINGS = ("apples", "books", "coins", "cards", "eggs", "pens", "shells", "stamps")
_GAINS = ("buys", "finds", "gets", "wins")
_LOSSES = ("loses", "sells", "gives away", "drops")


class Problem(TypedDict):
    """A question that ends in a question mark, and its answer, worked out: " 7 plus 5 is 12."."""

    prompt: str
    completion: str


def canonical(*terms: int) -> str:
    """Names a sum independently of the order of its terms, so that 7 + 5 and 5 + 7 are one problem."""
    return "".join(f"{term:+d}" for term in sorted(terms))


def split_of(*terms: int) -> Split:
    """Says which split owns a sum: a hash of its canonical name decides, whatever the wording or seed."""
    digest = hashlib.sha256(canonical(*terms).encode("ascii")).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


def _person(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        return rng.choice(_NAMES_HE), "He"
    return rng.choice(_NAMES_SHE), "She"


def _change(rng: random.Random, change: int) -> str:
    return f"{rng.choice(_GAINS)} {change} more" if change > 0 else f"{rng.choice(_LOSSES)} {-change}"


def _gain_terms(rng: random.Random) -> tuple[int, ...]:
    return rng.choice(START_RANGE), rng.choice(CHANGE_RANGE)


def _loss_terms(rng: random.Random) -> tuple[int, ...]:
    return rng.choice(START_RANGE), -rng.choice(CHANGE_RANGE)


def _two_step_terms(rng: random.Random) -> tuple[int, ...]:
    first, second = (rng.choice(CHANGE_RANGE) * rng.choice((1, -1)) for _ in range(2))
    return rng.choice(START_RANGE), first, second


def _own(rng: random.Random, terms: tuple[int, ...]) -> str:
    name, pronoun = _person(rng)
    thing = rng.choice(_THINGS)
    start, change = terms
    question = f"How many {thing} does {name} have {'left' if change < 0 else 'now'}?"
    return f"{name} has {start} {thing}. {pronoun} {_change(rng, change)}. {question}"


def _together(rng: random.Random, terms: tuple[int, ...]) -> str:
    one, other = _person(rng)[0], _person(rng)[0]
    while other == one:
        other = _person(rng)[0]
    thing = rng.choice(_THINGS)
    return f"{one} has {terms[0]} {thing} and {other} has {terms[1]}. How many {thing} do they have together?"


def _box(rng: random.Random, terms: tuple[int, ...]) -> str:
    name, thing = _person(rng)[0], rng.choice(_THINGS)
    start, change = terms
    action = f"puts in {change} more" if change > 0 else f"takes out {-change}"
    return f"A box holds {start} {thing}. {name} {action}. How many {thing} are in the box?"


def _two_step(rng: random.Random, terms: tuple[int, ...]) -> str:
    name, pronoun = _person(rng)
    thing = rng.choice(_THINGS)
    changes = f"{pronoun} {_change(rng, terms[1])}. Then {pronoun.lower()} {_change(rng, terms[2])}."
    return f"{name} has {terms[0]} {thing}. {changes} How many {thing} does {name} have now?"


_Terms = Callable[[random.Random], tuple[int, ...]]
_Wording = Callable[[random.Random, tuple[int, ...]], str]
_TEMPLATES: tuple[tuple[_Terms, _Wording], ...] = (
    (_gain_terms, _own),
    (_gain_terms, _together),
    (_gain_terms, _box),
    (_loss_terms, _own),
    (_loss_terms, _box),
    (_two_step_terms, _two_step),
)


def _worked_out(terms: tuple[int, ...]) -> str:
    steps, partial = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{partial} {'plus' if term > 0 else 'minus'} {abs(term)} is {partial + term}")
        partial += term
    return f" {', and '.join(steps)}."


def generate(n: int, seed: int, split: Split = "train") -> list[Problem]:
    """Makes `n` problems, the same ones for the same seed; no sum of one split occurs in the other.

    Raises ValueError for a negative `n` or an unknown `split`.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    rng = random.Random(f"{split}-{seed}")
    problems: list[Problem] = []
    while len(problems) < n:
        draw_terms, wording = rng.choice(_TEMPLATES)
        terms = draw_terms(rng)
        if min(accumulate(terms)) > 0 and split_of(*terms) == split:
            problems.append({"prompt": wording(rng, terms), "completion": _worked_out(terms)})
    return problems


_ANSWER = re.compile(r"(?:.* is)?\s*(-?[0-9]+)\s*\.?\s*")


def answer_of(text: str) -> str | None:
    """Reads the number that a completion is or, after the word "is", ends in; None where there is no such number."""
    match = _ANSWER.fullmatch(text)
    return str(int(match.group(1))) if match else None


def exact_match(model: Any, tokenizer: Any, problems: Sequence[Problem], batch_size: int = 100) -> float:
    """Decodes greedily after every prompt and gives the share, 0 to 1, of right answers.

    `model` is a causal language model of transformers, `tokenizer` its tokenizer; prompts are padded on the
    left, and at most 48 tokens are decoded. The model is put back into the mode it was in. Raises ValueError
    for no problems.
    """
    if not problems:
        raise ValueError("problems must hold at least one problem, got none")
    was_training = model.training
    model.eval()
    right = 0
    # Prompts of similar length share a batch, so that little of the prefill is spent on padding.
    ordered = sorted(problems, key=lambda problem: len(problem["prompt"]))
    try:
        for first in range(0, len(ordered), batch_size):
            batch = ordered[first : first + batch_size]
            prompts = [problem["prompt"] for problem in batch]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(
                model.device
            )
            width = inputs["input_ids"].shape[1]
            decoded = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=48,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(decoded[:, width:], skip_special_tokens=True)
            right += sum(
                answer_of(text) == answer_of(wanted["completion"])
                for text, wanted in zip(texts, batch, strict=True)
            )
    finally:
        model.train(was_training)
    return right / len(problems)


def embedded_model_dir() -> Path:
    """Finds the directory of the embedded byte-level Llama inside the installed package."""
    directory = Path(str(resources.files("chunkft") / "data" / "tiny-llama-bytes"))
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded model is not at {directory}: chunkft was installed without its package data"
        )
    return directory
