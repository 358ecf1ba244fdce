"""Turns data files into tokenised datasets whose labels are -100 wherever nothing is to be learned."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chunkft.cli.errors import UserError
from chunkft.cli.readers import read_json_rows, read_labelled_rows, suffix_of, where

__all__ = [
    "IGNORED",
    "Collator",
    "DataReport",
    "causal_dataset",
    "classification_dataset",
    "label_map",
    "label_names",
    "pairs_dataset",
]

IGNORED = -100
TOKENISE_AT_ONCE = 1000
PAD_TO_MULTIPLE = 8

FORMATS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("prompt", "completion"),
    ("question", "answer"),
    ("text",),
)
ROLES = ("system", "user", "assistant", "tool")
QUESTION_PROMPT = "{question}\n"

Tokens = tuple[list[int], list[int]]


@dataclass
class DataReport:
    """What became of a data file: examples made, tokens in them, tokens that carry loss, examples cut or
    dropped, and the largest token id.
    """

    path: str
    form: str
    examples: int = 0
    tokens: int = 0
    learned: int = 0
    cut: int = 0
    dropped: int = 0
    largest: int = -1

    def note_ids(self, rows: Iterable[Sequence[Any]]) -> None:
        """Keeps the largest token id; raises UserError for one that no embedding has a row for."""
        for ids in filter(None, rows):
            if None in ids or min(ids) < 0:
                wrong = next(one for one in ids if one is None or one < 0)
                raise UserError(
                    f"{self.path}: the tokenizer gives the token id {wrong!r}, expected whole numbers from 0"
                )
            self.largest = max(self.largest, *ids)

    def __str__(self) -> str:
        share = f"{self.learned / max(self.tokens, 1):.0%}"
        text = (
            f"{self.path}: {self.examples:,} examples ({self.form}), {self.tokens:,} tokens, loss on {share}"
        )
        if self.cut:
            text += f", {self.cut:,} cut to the sequence length"
        if self.dropped:
            text += f", {self.dropped:,} dropped (nothing to learn within the sequence length)"
        return text


class Collator:
    """Pads lists of input_ids (and labels) to the longest of a batch, rounded up to a multiple of 8, within
    `limit`.
    """

    def __init__(self, pad_token: int, limit: int, *, left: bool = False) -> None:
        self.pad_token = pad_token
        self.limit = limit
        self.left = left

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Gives input_ids, attention_mask and labels, int64: (batch, tokens), or (batch,) for class
        labels.
        """
        longest = max(len(example["input_ids"]) for example in examples)
        width = min(-(-longest // PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE, max(self.limit, longest))
        batch = {
            "input_ids": self._pad([example["input_ids"] for example in examples], width, self.pad_token),
            "attention_mask": self._pad([[1] * len(example["input_ids"]) for example in examples], width, 0),
        }
        labels = [example["labels"] for example in examples]
        batch["labels"] = (
            torch.tensor(labels) if isinstance(labels[0], int) else self._pad(labels, width, IGNORED)
        )
        return batch

    def _pad(self, rows: list[list[int]], width: int, value: int) -> torch.Tensor:
        padded = torch.full((len(rows), width), value, dtype=torch.int64)
        for index, row in enumerate(rows):
            start = width - len(row) if self.left else 0
            padded[index, start : start + len(row)] = torch.tensor(row)
        return padded


def detect_form(row: dict[str, Any], place: str) -> tuple[str, ...]:
    """The first of FORMATS whose keys the row has; raises UserError that names what was found."""
    for keys in FORMATS:
        if all(key in row for key in keys):
            return keys
    allowed = "; ".join(" and ".join(repr(key) for key in keys) for keys in FORMATS)
    found = ", ".join(repr(key) for key in row) or "no keys"
    raise UserError(f"{place}: found {found}; a line has one of: {allowed}")


def _text(row: dict[str, Any], key: str, place: str, *, may_be_empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{place}: {key!r} is a {type(value).__name__}, expected a string")
    if not value and not may_be_empty:
        raise UserError(f"{place}: {key!r} is empty, expected text to learn")
    return value


def _messages(row: dict[str, Any], place: str) -> list[dict[str, Any]]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: 'messages' must be a list with at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(
                f"{place}: messages[{index}] must be an object with a 'role' and a string 'content'"
            )
        if message.get("role") not in ROLES:
            raise UserError(
                f"{place}: messages[{index}] has role {message.get('role')!r}, allowed: {', '.join(ROLES)}"
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            f"{place}: 'messages' has no message of role 'assistant', so there is nothing to learn"
        )
    return messages


def _rows(path: Path) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
    form: tuple[str, ...] | None = None
    for number, row in read_json_rows(path):
        place = where(path, number)
        if form is None:
            form = detect_form(row, place)
        missing = [key for key in form if key not in row]
        if missing:
            found = ", ".join(repr(key) for key in row) or "no keys"
            raise UserError(
                f"{place}: no {missing[0]!r}, found {found}; the first line has {' and '.join(form)}"
            )
        yield place, form, row
    if form is None:
        raise UserError(f"{path}: empty file; expected JSON objects, one a line")


def fit(prompt: list[int], completion: list[int], limit: int) -> tuple[list[int], list[int], bool]:
    """Cuts a pair to `limit` tokens: first the start of the prompt, but not below half of the limit, then the
    end.
    """
    if len(prompt) + len(completion) <= limit:
        return prompt, completion, False
    kept = min(len(prompt), max(limit - len(completion), limit // 2))
    prompt = prompt[len(prompt) - kept :]
    return prompt, completion[: limit - kept], True


class _Tokeniser:
    """Adds the tokenizer's beginning-of-text token (if it has one) and its end-of-text token around plain
    token ids.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.tokenizer = tokenizer
        self.limit = limit
        self.end: int | None = tokenizer.eos_token_id
        probe = tokenizer("a")["input_ids"]
        self.begin = (
            [probe[0]] if tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id] else []
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def ending(self) -> list[int]:
        return [] if self.end is None else [self.end]

    def pairs(self, prompts: list[str], completions: list[str], report: DataReport) -> Iterator[Tokens]:
        for prompt, completion in zip(self.encode(prompts), self.encode(completions), strict=True):
            question, answer, cut = fit(self.begin + prompt, completion + self.ending(), self.limit)
            report.cut += cut
            yield question + answer, [IGNORED] * len(question) + answer

    def texts(self, texts: list[str], report: DataReport) -> Iterator[Tokens]:
        for ids in self.encode(texts):
            ids = self.begin + ids + self.ending()
            report.cut += len(ids) > self.limit
            for start in range(0, len(ids), self.limit):
                piece = ids[start : start + self.limit]
                if len(piece) > 1:
                    yield piece, piece

    def chat(self, messages: list[dict[str, Any]], place: str, report: DataReport) -> Tokens | None:
        ids = self._template(messages, False)
        labels = [IGNORED] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:index], True) if index else []
            after = self._template(messages[: index + 1], False)
            if ids[: len(before)] == before and ids[: len(after)] == after:
                labels[len(before) : len(after)] = after[len(before) :]
        if all(label == IGNORED for label in labels):
            raise UserError(
                f"{place}: the chat template rewrites earlier turns when later ones follow, so no"
                f" assistant turn can be"
                " told apart; use 'prompt' and 'completion'"
            )
        if len(ids) > self.limit:
            report.cut += 1
            ids, labels = ids[: self.limit], labels[: self.limit]
        return None if all(label == IGNORED for label in labels) else (ids, labels)

    def _template(self, messages: list[dict[str, Any]], prompt: bool) -> list[int]:
        encoded = self.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=prompt, return_dict=True
        )
        return list(encoded["input_ids"])


def _tokenise(
    rows: Iterable[tuple[str, tuple[str, ...], dict[str, Any]]], encoder: _Tokeniser, report: DataReport
) -> Iterator[Tokens]:
    for batch in _batched(rows, TOKENISE_AT_ONCE):
        form = batch[0][1]
        report.form = "/".join(form)
        if form == ("messages",):
            for place, _, row in batch:
                tokens = encoder.chat(_messages(row, place), place, report)
                report.dropped += tokens is None
                if tokens is not None:
                    yield tokens
        elif form == ("text",):
            yield from encoder.texts([_text(row, "text", place) for place, _, row in batch], report)
        else:
            first, second = form
            template = QUESTION_PROMPT if first == "question" else "{prompt}"
            prompts = [
                template.format(**{first: _text(row, first, place, may_be_empty=first == "prompt")})
                for place, _, row in batch
            ]
            yield from encoder.pairs(prompts, [_text(row, second, place) for place, _, row in batch], report)


def _batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _arrow(examples: Iterator[Tokens], report: DataReport) -> Any:
    parts = []
    for batch in _batched(examples, TOKENISE_AT_ONCE):
        report.examples += len(batch)
        report.tokens += sum(len(ids) for ids, _ in batch)
        report.note_ids(ids for ids, _ in batch)
        report.learned += sum(label != IGNORED for _, labels in batch for label in labels)
        columns = {"input_ids": [ids for ids, _ in batch], "labels": [labels for _, labels in batch]}
        parts.append(_table(columns, label_a_token=True))
    if not parts:
        raise UserError(f"{report.path}: no example is left to learn from within the sequence length")
    return _joined(parts)


def _table(columns: dict[str, list[Any]], label_a_token: bool) -> Any:
    # here: what is wrong with the first lines is told without the package, too
    from datasets import Dataset, Features, Sequence, Value

    labels = Sequence(Value("int32")) if label_a_token else Value("int64")
    return Dataset.from_dict(
        columns, features=Features({"input_ids": Sequence(Value("int32")), "labels": labels})
    )


def _joined(parts: list[Any]) -> Any:
    from datasets import concatenate_datasets

    return concatenate_datasets(parts)


def causal_dataset(path: str | Path, tokenizer: Any, seq_len: int) -> tuple[Any, DataReport]:
    """Reads a jsonl file into a datasets.Dataset of input_ids and labels (int32 lists of at most `seq_len`
    tokens).

    Lines hold `messages`, `prompt` and `completion`, `question` and `answer`, or `text`; all lines of a file
    the same.
    Raises UserError that names file, line, what was found and what is allowed.
    """
    path = Path(path)
    suffix_of(path, (".jsonl",))
    report = DataReport(str(path), "")
    return _arrow(
        _tokenise(_checked_rows(path, tokenizer), _Tokeniser(tokenizer, seq_len), report), report
    ), report


def _checked_rows(path: Path, tokenizer: Any) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
    for place, form, row in _rows(path):
        if form == ("messages",) and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{place}: 'messages' need a chat template, and the tokenizer of this model has none;"
                " use 'prompt' and 'completion', or add a chat_template to its tokenizer"
            )
        yield place, form, row


def pairs_dataset(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, seq_len: int, name: str
) -> tuple[Any, DataReport]:
    """Makes the dataset of `causal_dataset` from (prompt, completion) pairs in memory."""
    report = DataReport(name, "prompt/completion")
    encoder = _Tokeniser(tokenizer, seq_len)
    prompts, completions = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return _arrow(encoder.pairs(prompts, completions, report), report), report


def label_names(path: str | Path, text_column: str | None, label_column: str | None) -> list[str]:
    """The distinct labels of a file: whole numbers in their order, then other texts in theirs; at least
    two.
    """
    names = {label for _, _, label in read_labelled_rows(Path(path), text_column, label_column)}
    if len(names) < 2:
        raise UserError(
            f"{path}: every row has the label {next(iter(names))!r}; classification needs at least two"
        )
    return sorted(names, key=_label_order)


def _label_order(name: str) -> tuple[int, int, str]:
    try:
        return 0, int(name), name
    except ValueError:
        return 1, 0, name


def classification_dataset(
    path: str | Path,
    tokenizer: Any,
    seq_len: int,
    labels: dict[str, int],
    text_column: str | None = None,
    label_column: str | None = None,
) -> tuple[Any, DataReport]:
    """Reads tsv, csv or jsonl rows into a datasets.Dataset of input_ids (at most `seq_len`, cut at the end)
    and labels.

    Raises UserError that names file and line of a label that is not one of `labels`, and as
    `read_labelled_rows` does.
    """
    path = Path(path)
    report = DataReport(str(path), "text/label")
    parts = []
    for batch in _batched(read_labelled_rows(path, text_column, label_column), TOKENISE_AT_ONCE):
        for number, _, label in batch:
            if label not in labels:
                raise UserError(
                    f"{where(path, number)}: label {label!r} is not one of {', '.join(map(repr, labels))}"
                )
        texts = [text for _, text, _ in batch]
        whole = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        ids = tokenizer(texts, truncation=True, max_length=seq_len)["input_ids"]
        report.cut += sum(len(row) > seq_len for row in whole)
        report.examples += len(batch)
        report.tokens += sum(map(len, ids))
        report.note_ids(ids)
        columns = {"input_ids": ids, "labels": [labels[label] for _, _, label in batch]}
        parts.append(_table(columns, label_a_token=False))
    report.learned = report.tokens
    return _joined(parts), report


def label_map(names: Sequence[str], known: dict[str, int] | None) -> dict[str, int]:
    """Numbers the labels: as the model's own label2id does if it knows every one of them and numbers its labels
    from 0 without gaps, else in the order of `names`.
    """
    if known and all(name in known for name in names) and sorted(known.values()) == list(range(len(known))):
        return dict(known)
    return {name: index for index, name in enumerate(names)}
