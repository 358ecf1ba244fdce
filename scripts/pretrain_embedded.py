"""Pretrains the embedded byte-level Llama on text that this script makes up itself.

    python scripts/pretrain_embedded.py --out chunkft/data/tiny-llama-bytes

The text holds counting, number words, bare sums, and little stories told as statements. No question with a
numeric answer occurs in it, and no story about a sum of the held-out split of chunkft.cli.problems: both are
left to fine-tuning.
"""

import argparse
import itertools
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chunkft.cli.problems import CHANGE_RANGE, START_RANGE, split_of

PAD, BOS, EOS = 256, 257, 258

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = {2: "twenty", 3: "thirty", 4: "forty"}
NAMES = {
    "he": ("Tom", "Ben", "Sam", "Max", "Leo", "Jim", "Bob", "Dan"),
    "she": ("Ann", "Eva", "Mia", "Sue", "Zoe", "Kim", "Amy", "Liz"),
}
THINGS = ("apples", "books", "coins", "cards", "eggs", "pens", "shells", "stamps", "stones", "cakes")
GAINS = ("buys", "finds", "gets", "wins", "takes")
LOSSES = ("loses", "sells", "gives away", "drops", "eats")
PLACES = ("the garden", "the house", "the park", "the shop", "the school", "the river")
QUALITIES = ("red", "small", "old", "new", "green", "big", "nice")


def number_word(value: int) -> str:
    if value < 20:
        return ONES[value]
    ten, one = divmod(value, 10)
    return TENS[ten] + (f"-{ONES[one]}" if one else "")


def person(rng: random.Random) -> tuple[str, str]:
    pronoun = rng.choice(("he", "she"))
    return rng.choice(NAMES[pronoun]), pronoun


def draw_terms(rng: random.Random, two_steps: float) -> tuple[int, ...]:
    """Draws a start and one change, or two with the given probability, that never go below one."""
    count = 2 if rng.random() < two_steps else 1
    while True:
        start = rng.choice(START_RANGE)
        changes = [rng.choice(CHANGE_RANGE) * rng.choice((1, -1)) for _ in range(count)]
        if all(partial > 0 for partial in itertools.accumulate(changes, initial=start)):
            return (start, *changes)


def result(text: str | int) -> str:
    """Marks what follows from the text before it; `rows` takes the marks out and weighs these tokens more."""
    return f"<{text}>"


def bare_sum(rng: random.Random) -> str:
    terms = draw_terms(rng, two_steps=0.3)
    show: Callable[[int], str] = number_word if rng.random() < 0.1 else str
    steps = [f"{'plus' if term > 0 else 'minus'} {show(abs(term))}" for term in terms[1:]]
    if len(terms) == 3 and rng.random() < 0.5:
        middle = show(terms[0] + terms[1])
        first = f"{show(terms[0])} {steps[0]} is {result(middle)}"
        return f"{first}, and {middle} {steps[1]} is {result(show(sum(terms)))}."
    return f"{show(terms[0])} {' '.join(steps)} is {result(show(sum(terms)))}."


def story(rng: random.Random) -> str:
    terms = draw_terms(rng, two_steps=0.35)
    while split_of(*terms) != "train":
        terms = draw_terms(rng, two_steps=0.35)
    total, thing = result(sum(terms)), rng.choice(THINGS)
    name, pronoun = person(rng)
    kind = rng.random()
    if len(terms) == 2 and terms[1] > 0 and kind < 0.35:
        other = rng.choice([other for names in NAMES.values() for other in names if other != name])
        end = rng.choice((f"Together they have {total} {thing}.", f"That makes {total} {thing}."))
        return f"{name} has {terms[0]} {thing} and {other} has {terms[1]}. {end}"
    if len(terms) == 2 and kind < 0.6:
        change = f"puts in {terms[1]} more" if terms[1] > 0 else f"takes out {-terms[1]}"
        end = rng.choice((f"Now {total} {thing} are in the box.", f"So it holds {total} {thing}."))
        return f"A box holds {terms[0]} {thing}. {name} {change}. {end}"
    sentences = [f"{name} has {terms[0]} {thing}."]
    for position, term in enumerate(terms[1:]):
        change = f"{rng.choice(GAINS)} {term} more" if term > 0 else f"{rng.choice(LOSSES)} {-term}"
        if position and rng.random() < 0.3:
            sentences.append(f"So {pronoun} has {result(terms[0] + terms[1])}.")
        sentences.append(f"Then {pronoun} {change}." if position else f"{pronoun.capitalize()} {change}.")
    left = " left" if terms[-1] < 0 and rng.random() < 0.5 else ""
    sentences.append(rng.choice((f"Now {name}", f"So {pronoun}")) + f" has {total} {thing}{left}.")
    return " ".join(sentences)


def opening(rng: random.Random, terms: tuple[int, ...]) -> tuple[str, str, str, str]:
    """Tells what happens in a story, not how it ends; gives also its person, their pronoun, and the things."""
    name, pronoun = person(rng)
    thing = rng.choice(THINGS)
    kind = rng.random()
    if len(terms) == 2 and terms[1] > 0 and kind < 0.3:
        other = rng.choice([other for names in NAMES.values() for other in names if other != name])
        return f"{name} has {terms[0]} {thing} and {other} has {terms[1]}.", name, pronoun, thing
    if len(terms) == 2 and kind > 0.7:
        change = f"puts in {terms[1]} more" if terms[1] > 0 else f"takes out {-terms[1]}"
        return f"A box holds {terms[0]} {thing}. {name} {change}.", name, pronoun, thing
    text = f"{name} has {terms[0]} {thing}."
    for position, term in enumerate(terms[1:]):
        change = f"{rng.choice(GAINS)} {term} more" if term > 0 else f"{rng.choice(LOSSES)} {-term}"
        text += f" Then {pronoun} {change}." if position else f" {pronoun.capitalize()} {change}."
    return text, name, pronoun, thing


def worked_story(rng: random.Random) -> str:
    terms = draw_terms(rng, two_steps=0.35)
    while split_of(*terms) != "train":
        terms = draw_terms(rng, two_steps=0.35)
    text = opening(rng, terms)[0]
    steps, partial = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{partial} {'plus' if term > 0 else 'minus'} {abs(term)} is {partial + term}")
        partial += term
    return f"{text} {result(', and '.join(steps))}."


def questioned_story(rng: random.Random) -> str:
    """Lets a question follow a story, but one that no number answers."""
    text, name, pronoun, thing = opening(rng, draw_terms(rng, two_steps=0.35))
    question = rng.choice(
        (
            f"Does {name} have {thing}? Yes, {pronoun} has.",
            f"Where are the {thing}? They are in {rng.choice(PLACES)}.",
            f"Are the {thing} {rng.choice(QUALITIES)}? No, they are {rng.choice(QUALITIES)} now.",
            f"Is {name} in {rng.choice(PLACES)}? Yes, {pronoun} is.",
            f"Do they have {thing}? Yes, they have many.",
        )
    )
    return f"{text} {question}"


def counting(rng: random.Random) -> str:
    first, step = rng.randrange(0, 34), rng.choice((1, 1, 2, -1))
    values = [first + step * i for i in range(rng.randrange(3, 7))]
    values = [value for value in values if 0 <= value < 50]
    show: Callable[[int], str] = number_word if rng.random() < 0.25 else str
    return ", ".join(show(value) for value in values) + "."


def number_fact(rng: random.Random) -> str:
    value = rng.randrange(1, 40)
    smaller = rng.randrange(0, value)
    return rng.choice(
        (
            f"{value} is {number_word(value)}.",
            f"{value} comes after {value - 1}.",
            f"{value} is more than {smaller}.",
            f"{smaller} is less than {value}.",
        )
    )


def plain_sentence(rng: random.Random) -> str:
    (name, pronoun), thing, place = person(rng), rng.choice(THINGS), rng.choice(PLACES)
    quality = rng.choice(QUALITIES)
    return rng.choice(
        (
            f"{name} goes to {place}. {pronoun.capitalize()} likes the {quality} {thing}.",
            f"The {thing} in {place} are {quality}.",
            f"Where is {name}? {pronoun.capitalize()} is in {place}.",
            f"Does {name} have {thing}? Yes, {pronoun} has many {quality} {thing}.",
            f"Are the {thing} {quality}? No, they are {rng.choice(QUALITIES)} now.",
            f"{name} and {person(rng)[0]} do this together. They have a {quality} box.",
        )
    )


Text = Callable[[random.Random], str]
# Sums first: a story's result can only be learnt once the sum behind it is known.
EARLY: dict[Text, float] = {
    bare_sum: 0.80,
    story: 0.14,
    counting: 0.02,
    number_fact: 0.02,
    plain_sentence: 0.02,
}
LATE: dict[Text, float] = {
    bare_sum: 0.35,
    story: 0.50,
    counting: 0.03,
    number_fact: 0.04,
    plain_sentence: 0.08,
}
WORKED: dict[Text, float] = {
    bare_sum: 0.22,
    worked_story: 0.40,
    story: 0.16,
    questioned_story: 0.12,
    counting: 0.02,
    number_fact: 0.03,
    plain_sentence: 0.05,
}
RESULT_WEIGHT = 8.0
RESULT_MARK = re.compile("[<>]")


def rows(
    rng: random.Random, length: int, mixture: dict[Text, float]
) -> Iterator[tuple[list[int], list[float]]]:
    """Packs texts, each closed by the end mark, into rows of `length` tokens and their weights."""
    makers, shares = list(mixture), list(mixture.values())
    while True:
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < length:
            text = rng.choices(makers, shares)[0](rng)
            for position, part in enumerate(RESULT_MARK.split(text)):
                tokens += part.encode("ascii")
                weights += [RESULT_WEIGHT if position % 2 else 1.0] * len(part)
            tokens.append(EOS)
            weights.append(1.0)
        yield tokens[:length], weights[:length]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a fast tokenizer whose token i is byte i, followed by three special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = itertools.count(256)
    vocabulary = {chr(byte if byte in printable else next(stand_ins)): byte for byte in range(256)}
    specials = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, **specials}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(hidden: int, layers: int, heads: int, intermediate: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=512,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            tie_word_embeddings=False,
        )
    )


def save(model: LlamaForCausalLM, out: Path) -> None:
    model.save_pretrained(out)
    byte_tokenizer().save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--stop-after", type=int, help="end at this step of the schedule of --steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--early", type=float, default=0.3, help="share of the steps that see mostly bare sums"
    )
    parser.add_argument(
        "--worked", type=float, default=0.25, help="share of the steps, at the end, with worked stories"
    )
    parser.add_argument("--init", type=Path, help="a directory that this script wrote before, to go on from")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    if arguments.init:
        model = LlamaForCausalLM.from_pretrained(arguments.init, dtype=torch.float32)
    else:
        model = build_model(arguments.hidden, arguments.layers, arguments.heads, arguments.intermediate)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters:,} parameters, {arguments.steps} steps of {arguments.batch_size} x {arguments.length}",
        flush=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 100

    def factor(step: int) -> float:
        progress = max(0.0, (step - warmup) / max(1, arguments.steps - warmup))
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rng = random.Random(arguments.seed)
    streams = [rows(rng, arguments.length, mixture) for mixture in (EARLY, LATE, WORKED)]
    first_late = arguments.steps * arguments.early
    first_worked = arguments.steps * (1 - arguments.worked)
    started, recent = time.monotonic(), 0.0
    for step in range(1, arguments.steps + 1):
        stream = streams[(step > first_late) + (step > max(first_late, first_worked))]
        batch = [next(stream) for _ in range(arguments.batch_size)]
        ids = torch.tensor([tokens for tokens, _ in batch])
        weights = torch.tensor([weights for _, weights in batch])[:, 1:]
        logits = model(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        recent += loss.item()
        if step % 50 == 0:
            print(f"step {step} loss {recent / 50:.4f} seconds {time.monotonic() - started:.0f}", flush=True)
            recent = 0.0
        last = step == min(arguments.steps, arguments.stop_after or arguments.steps)
        if last or step % arguments.save_every == 0:
            save(model, arguments.out)
        if last:
            break


if __name__ == "__main__":
    main()
