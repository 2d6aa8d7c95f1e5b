"""Training data from files: every form of a file, and faults that name the row."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pytest
from datasets import ReadInstruction

from loraover.data.sources import MAX_LINE_BYTES, read_raw
from loraover.data.word_problems import final_number

from support.real_data import real_data
from support.rows import GSM8K, MESSAGES, PAIR, TURNS, Write, fault, lines, load

AS_CHAT = {"prompt": [{"role": "user", "content": "1+1?"}], "completion": [{"role": "assistant", "content": "2"}]}
PART = {"type": "text", "text": "\ud83d"}
LEAVE_OUT = "leave such rows out: --skip-bad-rows, or data.skip_bad_rows in a recipe."
OTHER = {"prompt": "ü €?", "completion": " é"}


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.jsonl", lines(PAIR, OTHER)),
        ("a.jsonl.gz", lines(PAIR, OTHER)),
        ("a.txt", b"\n" + lines(PAIR) + b"  \n\r\n" + lines(OTHER).rstrip()),
        ("a.json", json.dumps([PAIR, OTHER], indent=2).encode()),
    ],
)
def test_the_rows_of_a_file_are_read(name: str, raw: bytes, write: Write) -> None:
    rows = load(write(name, raw=raw))
    assert (rows.rows, rows.origin, rows.revision) == ([PAIR, OTHER], f"file {name}", None)


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz"])
def test_a_folder_holds_its_splits(end: str, write: Write) -> None:
    folder = write(f"folder/train{end}", PAIR, PAIR).parent
    write(f"folder/test{end}", GSM8K)
    assert load(folder).rows == [PAIR, PAIR]
    assert load(folder, split="test").rows[0]["prompt"] == "Question: 1+1?\nAnswer:"
    assert "holds no dev.jsonl" in fault(folder, split="dev")


@pytest.mark.parametrize("format", ["auto", "messages"])
@pytest.mark.parametrize("chat", [True, False])
def test_each_assistant_turn_is_an_example(format: str, chat: bool, write: Write) -> None:
    rows = load(write("a.jsonl", MESSAGES), format=format, chat=chat).rows
    assert rows == [
        {"prompt": TURNS[:2], "completion": [TURNS[2]]},
        {"prompt": TURNS[:4], "completion": [TURNS[4]]},
    ]


def test_a_slice_is_the_hubs(write: Write) -> None:
    rows = [PAIR | {"prompt": str(i)} for i in range(12)]
    folder = write("train.jsonl", *rows).parent
    everything = datasets.Dataset.from_list(rows)
    for split in ("train[:95%]", "train[95%:]", "train[:3]", "train[2:50%]", "train[-2:]"):
        expected = ReadInstruction.from_spec(split).to_absolute({"train": 12})[0]
        found = load(folder, split=split)
        assert found.rows == everything.select(range(expected.from_, expected.to)).to_list(), split
        assert found.origin == f"file train.jsonl, {split}"
    for split in ("train[", "train[:200%]", "train[:x]", "train[:2]+train[4:]"):
        assert "is not a slice of its 12 rows" in fault(folder, split=split), split
    assert "is one file, and slices such as 'train[:95%]' are taken from folders only" in fault(
        folder / "train.jsonl", split="train[:95%]"
    )


def test_rows_are_counted_as_lines(write: Write) -> None:
    """Blank ones too, whatever is wrong with a row; in a slice, those before it."""
    path = write("train.jsonl", raw=lines(PAIR) + b"\n\n" + lines(PAIR, {"prompt": "x"}))
    assert "row 5: has fields" in fault(path)
    assert "row 5: has fields" in fault(path.parent, split="train[2:]")


@pytest.mark.parametrize("row", [PAIR, AS_CHAT])
def test_chat_wraps_text_in_messages(row: dict[str, Any], write: Write) -> None:
    assert load(write("a.jsonl", row), chat=True).rows == [AS_CHAT]
    assert load(write("a.jsonl", row | {"id": 7}), chat=False).rows == [row]


@pytest.mark.parametrize("answer", ["    return x\n", "\treturn x", "  x", "\n\nx ", "x"])
def test_text_in_messages_keeps_its_indentation(answer: str, write: Write) -> None:
    """But for one space, which separates an answer from its prompt where both are text."""
    prompt = "    def f(x):\n"
    for text in (answer, " " + answer if answer == "x" else answer):
        (row,) = load(write("a.jsonl", {"prompt": prompt, "completion": text}), chat=True).rows
        assert [message["content"] for part in row.values() for message in part] == [prompt, answer]


def test_rows_are_recognised_one_by_one(write: Write) -> None:
    rows = load(write("a.jsonl", PAIR, GSM8K, MESSAGES), chat=True).rows
    assert [row["completion"][0]["content"] for row in rows] == ["2", "1+1=<<1+1=2>>2\n#### 2", "2", "4"]


def test_a_limit_counts_examples(write: Write) -> None:
    path = write("a.jsonl", raw=lines(MESSAGES, PAIR, PAIR) + b"not JSON\n")
    assert load(path, limit=1, chat=True).rows == [{"prompt": TURNS[:2], "completion": [TURNS[2]]}]
    assert len(load(path, limit=3, chat=True).rows) == 3
    assert "row 4: not JSON" in fault(path, limit=5, chat=True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a"}, "['prompt']"),
        ({"prompt": "a", "completion": ""}, "'completion' is ''"),
        ({"prompt": " ", "completion": "2"}, "'prompt' is ' '"),
        ({"prompt": 5, "completion": "b"}, "'prompt' is 5"),
        ({"prompt": ["a"], "completion": ["a"]}, "role and content"),
        ({"prompt": "\ud83d", "completion": "b"}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": " "}]}, "the completion is empty"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": [PART | {"text": " "}]}]}, "the completion is empty"),
        ({"messages": [TURNS[1] | {"content": [PART]}, TURNS[2]]}, "lone surrogate"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, "role and content"),
        (PAIR | {"images": ["a.png"]}, "holds images"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, TURNS[1]]}, "holds images"),
        ([1], "found list"),
        ({}, "has fields []"),
    ],
)
def test_a_row_that_does_not_fit_is_numbered(row: Any, said: str, write: Write) -> None:
    message = fault(write("a.jsonl", PAIR, PAIR, row, PAIR))
    assert "row 3" in message
    assert said in message


@pytest.mark.parametrize("format", ["trl", "messages", "gsm8k"])
def test_a_format_that_was_named_is_held_to(format: str, write: Write) -> None:
    rows = {"trl": PAIR, "gsm8k": GSM8K, "messages": MESSAGES}
    assert "row 2" in fault(write("a.jsonl", rows.pop(format), *rows.values()), format=format)


def test_a_key_that_occurs_twice_is_refused(write: Write) -> None:
    row = '{"prompt": "a", "completion": "b", "x": {"prompt": "c", "completion": "d", "prompt": "e"}}'
    assert "row 2: not JSON: the key 'prompt' occurs twice" in fault(write("a.jsonl", raw=lines(PAIR) + row.encode()))
    assert "not JSON: the key 'prompt' occurs twice" in fault(write("a.json", raw=f"[{row}]".encode()))
    tools = {"messages": TURNS[1:3], "tools": '[{"name": "f", "name": "g"}]'}
    assert "row 1: field 'tools' is" in fault(write("a.jsonl", tools), chat=True)


@pytest.mark.parametrize("bad", [b"{'prompt': 1}", b'{"prompt": "a"', b"\xff\xfe{}", b"[" * 100_000, b"x"])
def test_a_line_that_is_not_json_is_numbered(bad: bytes, write: Write) -> None:
    message = fault(write("a.jsonl.gz", raw=lines(PAIR, PAIR) + bad + b"\n" + lines(PAIR)))
    assert "row 3: not JSON" in message
    assert len(message) < 1000


def test_all_bad_rows_are_listed(write: Write) -> None:
    bad = b"".join(lines({"prompt": str(i)}) + b"{broken\n" for i in range(6))
    path = write("a.jsonl", raw=lines(PAIR) + bad + b"x" * (MAX_LINE_BYTES + 9) + b"\n" + lines(PAIR))
    head, *reasons, last = fault(path).splitlines()
    assert head == (f"{path}: 13 rows cannot be learned. Correct them, or {LEAVE_OUT}")
    assert [reason.partition(":")[0] for reason in reasons] == [f"{path}, row {i}" for i in range(2, 12)]
    assert ("has fields ['prompt']" in reasons[0], "not JSON" in reasons[1]) == (True, True)
    assert last == "... and 3 more"
    one = fault(write("b.jsonl", PAIR, {"prompt": "x"}))
    assert "row 2: has fields ['prompt']" in one
    assert one.endswith(f"Or {LEAVE_OUT}")


def test_bad_rows_are_skipped_where_that_is_asked_for(write: Write) -> None:
    path = write("a.jsonl", raw=lines(PAIR, {"prompt": "x"}) + b"{broken\n" + lines(MESSAGES, PAIR))
    found = load(path, chat=True, skip_bad_rows=True)
    assert [*found.numbers] == [1, 4, 4, 5]
    assert (found.skipped.count, found.skipped.first) == (2, [2, 3])
    assert "2 rows cannot be learned" in fault(write("b.jsonl", {}, {}), skip_bad_rows=True), "none would be left"


@pytest.mark.parametrize(("name", "between"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_a_table_is_read_as_text(name: str, between: str, write: Write) -> None:
    """As a spreadsheet writes it; labels alone are numbers."""
    cells = [
        ["prompt", "completion", "label"],
        ["007", "NA", "1"],
        ['"a ""b""\n,\tc"', "  1.50", "False"],
        ["é", "null", "no"],
    ]
    raw = "\ufeff" + "\r\n".join(map(between.join, cells)) + "\r\n"
    path = write(name, raw=raw.encode())
    assert [row for _, row in read_raw(str(path), split="train").rows] == [
        {"prompt": "007", "completion": "NA", "label": 1},
        {"prompt": 'a "b"\n,\tc', "completion": "  1.50", "label": False},
        {"prompt": "é", "completion": "null", "label": "no"},
    ]
    assert load(path).rows[0] == {"prompt": "007", "completion": "NA"}
    if not name.endswith(".gz"):
        folder = write(f"folder/train.{name[2:]}", raw=raw.encode()).parent
        assert load(folder).rows == load(path).rows


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"prompt,completion\na,b\na,b,c\n", "row 2: has 3 cells, and the header 2"),
        (b"prompt,prompt\na,b\n", "expected a name for each column"),
        (b'prompt,completion\n"a,b\n', "line 2: no CSV in UTF-8"),
        ("prompt,completion\né,b\n".encode("latin-1"), "cannot be read: 'utf-8' codec"),
        (b"prompt;completion\na;b\n", "row 1: has fields ['prompt;completion']"),
        (b"", "holds no examples"),
    ],
)
def test_a_table_that_is_none_is_refused(raw: bytes, said: str, write: Write) -> None:
    assert said in fault(write("a.csv", raw=raw))


def test_a_json_file_of_lines_is_read_as_lines(write: Write) -> None:
    assert load(write("a.json", raw=lines(PAIR, OTHER))).rows == [PAIR, OTHER]
    assert "row 2: not JSON" in fault(write("a.json", raw=lines(PAIR) + b"{broken\n"))
    assert "holds dict, expected a list of objects, or one object a line" in fault(write("a.json", PAIR))


@pytest.mark.parametrize("bad", [b"", b"[" * 100_000, b"null"])
def test_a_json_file_that_is_no_list_is_refused(bad: bytes, write: Write) -> None:
    assert ("holds NoneType" if bad == b"null" else "not JSON") in fault(write("a.json", raw=bad))


@pytest.mark.parametrize("keep", [5, -9])
def test_a_truncated_gzip_is_refused(keep: int, write: Write) -> None:
    path = write("a.jsonl.gz", *[PAIR | {"n": n} for n in range(500)])
    path.write_bytes(path.read_bytes()[:keep])
    assert "a.jsonl.gz: cannot be read" in fault(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_giant_line_is_refused_before_it_is_read(name: str, write: Write) -> None:
    row = lines(PAIR).rstrip()
    longest = row + b" " * (MAX_LINE_BYTES - len(row) - 1) + b"\n"
    assert load(write(name, raw=longest)).rows == [PAIR]
    message = fault(write(name, raw=lines(PAIR) + longest.replace(b"\n", b" \n")))
    assert f"row 2: longer than {MAX_LINE_BYTES} bytes" in message


@pytest.mark.parametrize("raw", [b"", b"\n \n"])
def test_a_file_without_rows_is_refused(raw: bytes, write: Write) -> None:
    assert "holds no examples" in fault(write("a.jsonl", raw=raw))


@pytest.mark.parametrize("source", ["./nothing", "a/b/c", "data.gz", "word-problems"])
@pytest.mark.usefixtures("no_network")
def test_what_can_be_no_hub_name_is_refused_without_asking_the_hub(source: str) -> None:
    assert "no such file or folder" in fault(source)


@pytest.mark.parametrize(("name", "count"), [("gsm8k/train.jsonl.gz", 7473), ("gsm8k/test.jsonl", 1000)])
def test_the_real_gsm8k_is_read_whole(name: str, count: int) -> None:
    rows = load(real_data(name)).rows
    assert len(rows) == count
    assert load(real_data(name), format="gsm8k").rows == rows
    for row in rows:
        answer = row["completion"]
        assert final_number(answer) == int(answer.rpartition("####")[2].replace(",", ""))
