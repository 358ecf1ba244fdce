"""Data files become the right tokens with loss in the right places, and bad lines are named."""

import json
from pathlib import Path

import pytest
from clitools import BEGIN, CHAT_TEMPLATE, END, byte_tokenizer, needs_datasets, write_jsonl

from chunkft.cli.data import (
    IGNORED,
    Collator,
    causal_dataset,
    classification_dataset,
    fit,
    label_map,
    label_names,
)
from chunkft.cli.errors import UserError
from chunkft.cli.readers import read_labelled_rows


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def only(dataset):
    assert len(dataset) == 1
    return dataset[0]["input_ids"], dataset[0]["labels"]


@needs_datasets
@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "2+2 is", "completion": " 4"}, "2+2 is", " 4"),
        ({"question": "How many {x}?", "answer": "#### 4"}, "How many {x}?\n", "#### 4"),
        ({"prompt": "", "completion": "naïve ☃"}, "", "naïve ☃"),
    ],
    ids=["prompt-completion", "question-answer", "empty-prompt"],
)
def test_loss_only_on_the_completion_and_its_end(tmp_path, tokenizer, row, prompt, completion):
    dataset, report = causal_dataset(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer, 64)
    before, after = ids_of(tokenizer, prompt), [*ids_of(tokenizer, completion), END]
    assert only(dataset) == (before + after, [IGNORED] * len(before) + after)
    assert (report.tokens, report.learned, report.cut) == (len(before + after), len(after), 0)


@needs_datasets
def test_beginning_token_is_added_where_the_tokenizer_adds_it(tmp_path):
    tokenizer = byte_tokenizer(begin=True)
    rows = [{"prompt": "a", "completion": "b"}]
    ids, labels = only(causal_dataset(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, 64)[0])
    assert ids == [BEGIN, *ids_of(tokenizer, "ab"), END]
    assert labels == [IGNORED, IGNORED, *ids_of(tokenizer, "b"), END]


@needs_datasets
def test_long_text_is_split_into_pieces_that_lose_nothing(tmp_path, tokenizer):
    text = "abcdefghij" * 5
    dataset, report = causal_dataset(write_jsonl(tmp_path / "a.jsonl", [{"text": text}]), tokenizer, 16)
    assert [token for row in dataset for token in row["input_ids"]] == [*ids_of(tokenizer, text), END]
    assert all(row["labels"] == row["input_ids"] for row in dataset)
    assert max(len(row["input_ids"]) for row in dataset) == 16
    assert report.cut == 1


@pytest.mark.parametrize(
    ("prompt", "completion", "limit", "kept"),
    [(3, 3, 6, (3, 3)), (9, 3, 8, (5, 3)), (9, 9, 8, (4, 4)), (2, 9, 8, (2, 6)), (0, 9, 8, (0, 8))],
)
def test_cutting_keeps_the_end_of_the_prompt_and_the_start_of_the_completion(prompt, completion, limit, kept):
    first, second, cut = fit(list(range(prompt)), list(range(100, 100 + completion)), limit)
    assert (len(first), len(second)) == kept
    assert first == list(range(prompt))[prompt - kept[0] :]
    assert second == list(range(100, 100 + kept[1]))
    assert cut == (prompt + completion > limit)


@needs_datasets
def test_chat_has_loss_on_every_assistant_turn_only(tmp_path):
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    turns = [("system", "be"), ("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "ok")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    ids, labels = only(causal_dataset(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer, 128)[0])
    assert tokenizer.decode(ids) == "<system>be<user>hi<assistant>yo<end><user>bye<assistant>ok<end>"
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    assert learned == "yo<end>ok<end>"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


@needs_datasets
def test_template_that_rewrites_earlier_turns_trains_the_turns_it_can_tell(tmp_path):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "ok")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    _, labels = only(causal_dataset(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer, 128)[0])
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "ok"


@needs_datasets
def test_chat_without_anything_to_learn_within_the_limit_is_dropped(tmp_path):
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    rows = [
        {"messages": [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    dataset, report = causal_dataset(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, 24)
    assert (len(dataset), report.dropped, report.cut) == (1, 1, 1)


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        (["{not json"], 1, ["not JSON", "{not json"]),
        ([json.dumps(GOOD), "[1, 2]"], 2, ["[1, 2]", "JSON object"]),
        ([json.dumps(GOOD), "[" * 100_000], 2, ["cannot be read as JSON", "recursion"]),
        (['{"text": ' + "1" * 5000 + "}"], 1, ["cannot be read as JSON", "5000 digits"]),
        ([json.dumps({"text": "a \ud800 b"})], 1, ["half of a surrogate pair"]),
        (
            [json.dumps({"input": "a", "output": "b"})],
            1,
            ["'input', 'output'", "'prompt' and 'completion'", "'text'"],
        ),
        ([json.dumps({})], 1, ["no keys"]),
        ([json.dumps(GOOD), "", json.dumps({"prompt": "a"})], 3, ["no 'completion'", "found 'prompt'"]),
        (
            [json.dumps(GOOD), json.dumps({"prompt": "a", "completion": 3})],
            2,
            ["'completion' is a int", "string"],
        ),
        ([json.dumps({"prompt": "a", "completion": ""})], 1, ["'completion' is empty"]),
        ([json.dumps({"question": "", "answer": "b"})], 1, ["'question' is empty"]),
        ([json.dumps({"text": None})], 1, ["'text' is a NoneType"]),
        ([json.dumps({"messages": []})], 1, ["at least one message"]),
        ([json.dumps({"messages": [{"role": "user"}]})], 1, ["messages[0]", "'content'"]),
        ([json.dumps({"messages": [{"role": "bot", "content": "a"}]})], 1, ["'bot'", "assistant"]),
        (
            [json.dumps({"messages": [{"role": "user", "content": "a"}]})],
            1,
            ["no message of role 'assistant'"],
        ),
    ],
    ids=lambda value: value[-1][:30] if isinstance(value, list) and value and value[-1][:1] in "{[" else "",
)
def test_bad_line_is_named(tmp_path, lines, line, words):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        causal_dataset(path, byte_tokenizer(chat_template=CHAT_TEMPLATE), 64)
    message = str(caught.value)
    assert f"{path}, line {line}:" in message
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_messages_without_a_chat_template_are_refused(tmp_path, tokenizer):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(
        UserError, match=r"line 1: 'messages' need a chat template.*'prompt' and 'completion'"
    ):
        causal_dataset(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer, 64)


def test_bytes_that_are_not_utf8_are_named(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 2: byte 0xff at column 11 is not UTF-8"):
        causal_dataset(path, tokenizer, 64)


@needs_datasets
def test_escaped_characters_outside_of_the_basic_plane_are_read(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "escaped.jsonl", [{"text": "a \U0001f600"}])
    assert "\\ud83d" in path.read_text()
    tokens, _ = only(causal_dataset(path, tokenizer, 64)[0])
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "a \U0001f600"


@needs_datasets
def test_byte_order_mark_and_windows_line_ends_are_understood(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "ok"}\r\n{"text": "ok"}\r\n')
    dataset, _ = causal_dataset(path, tokenizer, 64)
    assert dataset[0] == dataset[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", ["empty file"]),
        ("a.jsonl", "\n \n", ["empty file"]),
        ("a.txt", "hello\n", [".jsonl", "'.txt'"]),
        ("a.jsonl", None, ["no such file"]),
    ],
)
def test_unusable_file_is_named(tmp_path, tokenizer, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        causal_dataset(path, tokenizer, 64)
    assert all(word in str(caught.value) for word in [str(path), *words])


def test_directory_instead_of_a_file_is_named(tmp_path, tokenizer):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(UserError, match=r"d\.jsonl: not a file"):
        causal_dataset(tmp_path / "d.jsonl", tokenizer, 64)


def rows_of(
    path: Path, content: str, text: str | None = None, label: str | None = None
) -> list[tuple[str, str]]:
    path.write_text(content, encoding="utf-8")
    return [(label, text) for _, text, label in read_labelled_rows(path, text, label)]


WANTED = [("0", 'say "no", twice'), ("1", "fine")]


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.tsv", 'label\tsentence\n0\tsay "no", twice\n1\tfine\n', (None, None)),
        ("a.tsv", '0\tsay "no", twice\n1\tfine\n', (None, None)),
        ("a.tsv", 'Text\tid\tLabel\nsay "no", twice\t7\t0\nfine\t8\t1\n', (None, None)),
        ("a.tsv", 'x\t0\t\tsay "no", twice\nx\t1\t*\tfine\n', ("4", "2")),
        ("a.tsv", 'review\tstars\nsay "no", twice\t0\nfine\t1\n', ("review", "stars")),
        ("a.csv", 'label,text\n0,"say ""no"", twice"\n1,fine\n', (None, None)),
        (
            "a.jsonl",
            '{"label": 0, "text": "say \\"no\\", twice"}\n{"label": "1", "sentence": "fine"}\n',
            (None, None),
        ),
    ],
    ids=["tsv-header", "tsv-two-columns", "tsv-any-order", "tsv-numbers", "tsv-names", "csv-quoted", "jsonl"],
)
def test_labelled_rows_are_read(tmp_path, name, content, columns):
    assert rows_of(tmp_path / name, content, *columns) == WANTED


@pytest.mark.parametrize(
    ("name", "content", "columns", "words"),
    [
        ("a.tsv", "", (None, None), ["empty file"]),
        ("a.tsv", "label\tsentence\n", (None, None), ["no rows after the header"]),
        ("a.tsv", "label\tsentence\n0\tgood\n1 bad\n", (None, None), ["line 3: 1 columns, expected 2"]),
        ("a.tsv", "a\tb\tc\n", (None, None), ["line 1", "'a', 'b', 'c'", "--text-column"]),
        (
            "a.tsv",
            "label\treview\n0\tx\n",
            (None, None),
            ["no text (or sentence) column among 'label', 'review'"],
        ),
        ("a.tsv", "label\tsentence\n0\t \n", (None, None), ["line 2: the text in column 2 is empty"]),
        ("a.tsv", "label\tsentence\n\tfine\n", (None, None), ["line 2: the label in column 1 is empty"]),
        ("a.tsv", "label\tsentence\n0\tx\n", ("body", None), ["--text-column 'body'", "'label', 'sentence'"]),
        ("a.tsv", "0\tx\n", ("7", "1"), ["--text-column '7'", "columns 1 to 2"]),
        ("a.tsv", "0\tx\n", ("1", "1"), ["both column 1"]),
        ("a.csv", 'label,text\n0,"open\n', (None, None), ["line 2: not csv"]),
        ("a.parquet", "x", (None, None), [".jsonl or .tsv or .csv", "'.parquet'"]),
        ("a.jsonl", '{"text": "x"}\n', (None, None), ["line 1: found 'text'", "label"]),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', (None, None), ["line 1: 'label' is '0.5'"]),
        ("a.jsonl", '{"text": 3, "label": 0}\n', (None, None), ["line 1: 'text' is '3'"]),
        ("a.jsonl", "", (None, None), ["empty file"]),
    ],
)
def test_bad_labelled_rows_are_named(tmp_path, name, content, columns, words):
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path / name, content, *columns)
    assert all(word in str(caught.value) for word in [str(tmp_path / name), *words]), str(caught.value)


def test_labels_are_numbered_by_value_or_as_the_model_does(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("10\tx\n9\ty\nneutral\tz\n")
    names = label_names(path, None, None)
    assert names == ["9", "10", "neutral"]
    assert label_map(names, None) == {"9": 0, "10": 1, "neutral": 2}
    assert label_map(names, {"neutral": 0, "9": 1, "10": 2}) == {"neutral": 0, "9": 1, "10": 2}
    assert label_map(names, {"LABEL_0": 0, "LABEL_1": 1}) == {"9": 0, "10": 1, "neutral": 2}


def test_one_label_is_not_enough(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("1\tx\n1\ty\n")
    with pytest.raises(UserError, match="every row has the label '1'"):
        label_names(path, None, None)


@needs_datasets
def test_classification_rows_are_tokenised_and_cut(tmp_path, tokenizer):
    path = tmp_path / "a.tsv"
    path.write_text("0\tabc\n1\tabcdefghijkl\n")
    dataset, report = classification_dataset(path, tokenizer, 8, {"0": 0, "1": 1})
    assert dataset["labels"][:] == [0, 1]
    assert [len(ids) for ids in dataset["input_ids"]] == [3, 8]
    assert (report.cut, report.tokens) == (1, 11)


def test_unknown_label_in_held_out_data_is_named(tmp_path, tokenizer):
    path = tmp_path / "a.tsv"
    path.write_text("0\tabc\n7\tabc\n")
    with pytest.raises(UserError, match=r"line 2: label '7' is not one of '0', '1'"):
        classification_dataset(path, tokenizer, 8, {"0": 0, "1": 1})


@pytest.mark.parametrize("left", [False, True])
def test_batches_are_padded_and_padding_is_never_learned(left):
    examples = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_token=0, limit=64, left=left)(examples)
    assert batch["input_ids"].shape == (2, 8)
    for row, example in enumerate(examples):
        count = len(example["input_ids"])
        here = slice(8 - count, 8) if left else slice(0, count)
        assert batch["input_ids"][row, here].tolist() == example["input_ids"]
        assert batch["labels"][row, here].tolist() == example["labels"]
        assert batch["attention_mask"][row].sum() == count
        assert batch["attention_mask"][row, here].all()
        assert (batch["labels"][row][batch["attention_mask"][row] == 0] == IGNORED).all()


def test_padding_stays_within_the_sequence_length():
    assert Collator(pad_token=0, limit=13)([{"input_ids": [3] * 12, "labels": 1}])["input_ids"].shape == (
        1,
        13,
    )
