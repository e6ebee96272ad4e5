"""What people have is read as it is, and what cannot be learnt from is refused by row, key and fix."""

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest
import typer

from peft_dynamic.cli._data import Columns, Example, to_examples, unused_columns
from peft_dynamic.cli._edge import UserError
from peft_dynamic.cli._encode import encode, encode_all
from peft_dynamic.cli._read import read_rows
from tests.cli import common

tiny = common.tiny  # a fixture

PAIR = {"prompt": "a", "completion": "b"}
USER, ANSWER = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def example(row: dict[str, Any], **columns: Any) -> Example:
    return to_examples([row], Columns(**columns), "rows", "--data")[0]


def turns(row: dict[str, Any], **columns: Any) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in example(row, **columns).messages]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n\n  \n{"prompt": "a", "completion": "b"}'),
        ("bom.jsonl", b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n{"prompt": "a", "completion": "b"}\r\n'),
        ("list.json", json.dumps([PAIR, PAIR], indent=2).encode()),
        ("lines.json", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b"}\n'),
        ("no_suffix", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b"}\n'),
        ("a.csv", b"\xef\xbb\xbfprompt,completion\r\na,b\r\na,b\r\n"),
        ("a.TSV", b"prompt\tcompletion\na\tb\na\tb\n"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 2, mtime=0)),
        ("a.csv.bz2", bz2.compress(b"prompt,completion\na,b\na,b\n")),
        ("a.json.xz", lzma.compress(json.dumps([PAIR, PAIR]).encode())),
    ],
)
def test_text_formats(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_rows(str(tmp_path / name), "--data") == [PAIR, PAIR]


def test_a_text_stays_what_it_is(tmp_path: Path) -> None:
    odd = {"prompt": "2020-01-01T00:00:00", "completion": "one\u2028two\x85three\x0bfour \U0001f600"}
    (tmp_path / "a.jsonl").write_text(json.dumps(odd, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(str(tmp_path / "a.jsonl"), "--data") == [odd]
    (tmp_path / "a.csv").write_text('prompt,completion\n007,NA\n"a\nb",null\n', encoding="utf-8")
    rows = read_rows(str(tmp_path / "a.csv"), "--data")
    assert [row["prompt"] for row in rows] == ["007", "a\nb"]
    assert [row["completion"] for row in rows] == ["NA", "null"]
    (tmp_path / "long.csv").write_text("text\n" + "x" * 300_000, encoding="utf-8")
    assert len(read_rows(str(tmp_path / "long.csv"), "--data")[0]["text"]) == 300_000


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pyarrow, pandas and fsspec, about each other
def test_what_datasets_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, USER, ANSWER]}]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(str(tmp_path / "a.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    other = datasets.Dataset.from_list([PAIR])
    datasets.DatasetDict({"train": made, "test": other}).save_to_disk(str(tmp_path / "splits"))
    for name in ("a.parquet", "saved", "splits"):
        assert read_rows(str(tmp_path / name), "--data") == rows
    assert read_rows(str(tmp_path / "splits"), "--eval-data") == [PAIR]
    assert read_rows(str(tmp_path / "saved"), "--eval-data") == rows
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"b\.parquet: .*Pass a Parquet file that is whole"):
        read_rows(str(tmp_path / "b.parquet"), "--data")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"saved: .*Save it again"):
        read_rows(str(tmp_path / "saved"), "--data")


def test_without_datasets_the_way_to_get_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dynamic.cli._edge.has_package", lambda name: False)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"needs datasets\. Install it with: pip install datasets .*'\.\[demo\]'"):
        read_rows(str(tmp_path / "a.parquet"), "--data")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "line 2: not JSON"),
        ("a.jsonl", b"{}\n[1]\n", "line 2: each line must be one JSON object"),
        ("a.json", b'[{"prompt": "a"}, 3]', "row 2: each entry must be one JSON object"),
        ("a.json", b'{\n "data": []\n}', "or one list of objects"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        ("a.jsonl", "ä".encode("latin1"), "not UTF-8 text"),
        ("a.jsonl", '{"prompt": "ä"}'.encode("utf-16"), "not UTF-8 text"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 1000, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl.xz", b"no xz", "cannot be read"),
        ("a.csv", b'a,b\n1,"2\n', "unexpected end of data"),
        ("a.csv", b"a,b\n1\n", "row 1: it has more or fewer fields"),
        ("a.csv", b"a,b\n1,2,3\n", "row 1: it has more or fewer fields"),
        ("a.csv", b"a,a\n1,2\n", "two columns have the same name"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.csv", b"", "has no rows"),
    ],
)
def test_damaged_files_are_named_with_the_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(typer.BadParameter) as caught:
        read_rows(str(tmp_path / name), "--data")
    assert words in caught.value.message
    assert name in caught.value.message


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.xz"])
def test_no_damage_gives_a_traceback(tmp_path: Path, name: str) -> None:
    rows = [{**PAIR, "tools": [TOOL], "system": "x"}, {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}], **PAIR}]
    whole = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        ".json": json.dumps(rows).encode(),
        ".csv": b'prompt,completion\n"a, b",c\nd,"e\nf"\n',
        ".gz": gzip.compress(json.dumps(PAIR).encode(), mtime=0),
        ".xz": lzma.compress(json.dumps(PAIR).encode()),
    }[Path(name).suffix]
    read, refusals = 0, []
    for seed in range(200):
        chance, content = random.Random(seed), bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            start = chance.randrange(len(content))
            content[start : start + chance.randrange(3)] = chance.choice(
                [b"", b"\0", b"[", b"}", b'"', b"\n", b"\xff", b"9"]
            )
        (tmp_path / name).write_bytes(content)
        try:
            to_examples(read_rows(str(tmp_path / name), "--data"), Columns(), name, "--data")
            read += 1
        except typer.BadParameter as error:
            refusals.append(error.message)
    assert all(name in refusal for refusal in refusals)
    assert len(refusals) > 50
    assert read + len(refusals) == 200


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"none that Dataset\.save_to_disk wrote"):
        read_rows(str(tmp_path), "--data")


@pytest.mark.parametrize(
    ("row", "expected", "learns"),
    [
        (PAIR, [("user", "a"), ("assistant", "b")], (1,)),
        ({"prompt": [USER], "completion": [ANSWER]}, [("user", "ab"), ("assistant", "cd")], (1,)),
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER]},
            [("user", "ab"), ("assistant", "cd")] * 3,
            (3, 5),  # the prompt's turns are given
        ),
        ({"messages": [USER, ANSWER] * 2}, [("user", "ab"), ("assistant", "cd")] * 2, (1, 3)),
        ({"messages": [USER, ANSWER, USER]}, [("user", "ab"), ("assistant", "cd"), ("user", "ab")], (1,)),
        (
            {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "cd"}]},
            [("user", "ab"), ("assistant", "cd")],
            (1,),
        ),
        (
            {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "ab"}, ANSWER]},
            [("assistant", "hi"), ("user", "ab"), ("assistant", "cd")],
            (2,),  # the first one has nothing before it
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            [("user", "Add.\n\n1 2"), ("assistant", "3")],
            (1,),
        ),
        ({"instruction": "Add.", "input": "", "output": "3"}, [("user", "Add."), ("assistant", "3")], (1,)),
        (
            {**PAIR, "system": "Be kind."},
            [("system", "Be kind."), ("user", "a"), ("assistant", "b")],
            (2,),
        ),
        (
            {"messages": [USER, ANSWER], "system": "Be kind."},
            [("system", "Be kind."), ("user", "ab"), ("assistant", "cd")],
            (2,),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                    ANSWER,
                ]
            },
            [("user", "ab"), ("assistant", "cd")],
            (1,),
        ),
        (
            {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
            [("user", "ab"), ("assistant", "cd")] * 2,
            (3,),
        ),
        ({"text": "abc"}, [("assistant", "abc")], (0,)),
    ],
)
def test_shapes_of_rows(row: dict, expected: list, learns: tuple) -> None:
    before = json.dumps(row)
    assert turns(row) == expected
    assert example(row).learns == learns
    assert json.dumps(row) == before  # the rows stay as they were read


def test_an_answer_with_nothing_before_it_is_counted() -> None:
    assert example({"messages": [ANSWER, USER, ANSWER]}).skipped == 1
    assert example({"messages": [USER, ANSWER]}).skipped == example({"text": "abc"}).skipped == 0


def test_columns_of_other_names() -> None:
    row = {"instruction": "Add.", "input": "1 2", "answer": "3", "id": 7}
    columns = Columns("instruction", "answer", None, "Please.")
    assert turns(row, prompt="instruction", completion="answer", instruction="Please.")[0] == (
        "user",
        "Please.\nAdd.\n\n1 2",
    )
    assert unused_columns([row, {**row, "source": "x"}], columns) == ["id", "source"]
    assert turns({"prompt": "abc"}, text="prompt") == [("assistant", "abc")]
    assert unused_columns([{"messages": [], "tools": [], "system": ""}], Columns()) == []


def test_options_that_would_be_passed_over_are_refused() -> None:
    chat = {"messages": [USER, ANSWER], "text": "x"}
    for columns in (Columns("question"), Columns(completion="answer")):
        with pytest.raises(typer.BadParameter, match="has no columns"):
            to_examples([chat], columns, "rows", "--data")
    for row, columns in [
        (chat, Columns(instruction="Please.")),
        ({"text": "x"}, Columns(instruction="Please.")),
        ({"body": "x"}, Columns(text="body", instruction="Please.")),
    ]:
        with pytest.raises(typer.BadParameter, match="no prompts to put it before"):
            to_examples([row], columns, "rows", "--data")


def test_tools_and_their_calls_go_to_the_template() -> None:
    as_text = {**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}
    asks = {"role": "assistant", "content": None, "tool_calls": [as_text]}
    row = {"messages": [USER, asks, {"role": "tool", "content": "7"}, ANSWER], "tools": json.dumps([TOOL])}
    made = example({**row, "chat_template_kwargs": {"enable_thinking": False, "other": None}})
    assert made.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert made.template == {"tools": [TOOL], "enable_thinking": False}
    assert made.learns == (1, 3)
    assert example({**PAIR, "tools": None}).template == {}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [USER, USER]}, "no assistant turn"),
        ({"messages": [USER]}, "'messages' must be a list of at least two objects"),
        ({"messages": "x"}, "'messages' must be a list of at least two objects"),
        ({"messages": [USER, "x"]}, "'messages' must be a list of at least two objects"),
        ({"messages": [ANSWER, USER]}, "no assistant turn with something before it"),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, "messages[1] is an assistant's turn without text"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1] is an assistant's turn without text"),
        ({"messages": [USER, {**ANSWER, "role": "robot"}]}, "messages[1] has the role 'robot'; there are system"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]},
            "'tool_calls'",
        ),
        ({"messages": [USER, {**ANSWER, "content": 3}]}, "messages[1] must have text"),
        (
            {"messages": [{**USER, "content": [{"type": "image"}]}, ANSWER]},
            "messages[0] has a part that is no text ('image')",
        ),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight 0.5"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "x"}]}, "'tool_calls' is text but no JSON"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"function": 3}]}]}, "needs a function with a 'name'"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "the arguments of 'f' are no JSON",
        ),
        ({**PAIR, "tools": [3]}, "'tools' must be a list of objects"),
        ({**PAIR, "chat_template_kwargs": [3]}, "'chat_template_kwargs' must be an object"),
        ({**PAIR, "system": 3}, "column 'system' must be text"),
        ({"messages": [{"role": "system", "content": "x"}, USER, ANSWER], "system": "y"}, "Keep one of them"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history' is not read"),
        ({"instruction": "a", "output": "b", "input": 3}, "column 'input' must be text"),
        ({"prompt": "a", "completion": "b\ud800"}, "column 'completion' holds half a character ('\\ud800'"),
        ({"messages": [USER, {**ANSWER, "content": "\udc00"}]}, "messages[1] holds half a character"),
        ({**PAIR, "tools": [{"name": "\ud800"}]}, "'tools' holds half a character"),
        ({"prompt": [USER], "completion": [USER]}, "no assistant turn"),
        ({"prompt": [], "completion": [ANSWER]}, "'prompt' must be a list of at least one object"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_by_row_and_key(row: dict, words: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        to_examples([row], Columns(), "rows.jsonl", "--data")
    assert words in caught.value.message
    assert caught.value.message.startswith("rows.jsonl, row 1: ")
    caught.value.message.encode()  # it can be printed


TURNS = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tiny)
    loaded.chat_template = TURNS
    return loaded


def learnt(rows: list[dict], tokenizer: Any) -> list[tuple[str, str]]:
    """Of each row: the whole text, and what of it is learnt, with dots for the rest."""
    texts = []
    for row in rows:
        letters = tokenizer.convert_ids_to_tokens(row["input_ids"])
        shown = [letter if label != -100 else "." for letter, label in zip(letters, row["labels"], strict=True)]
        texts.append(("".join(letters), "".join(shown)))
    return texts


def test_every_answer_is_learnt_with_its_end(tokenizer: Any) -> None:
    rows = encode([example({"messages": [USER, ANSWER] * 2})], tokenizer, 64)
    assert learnt(rows, tokenizer) == [("u:ab\na:cd\n" * 2, ".......cd\n" * 2)]
    tokenizer.chat_template = None
    rows = encode([example({"messages": [USER, ANSWER] * 2})], tokenizer, 64)
    assert learnt(rows, tokenizer) == [("ab\ncd</s>", "...cd</s>"), ("ab\ncd\nab\ncd</s>", ".........cd</s>")]


def test_an_answer_that_is_written_otherwise_later_has_a_row_of_its_own(tokenizer: Any) -> None:
    """As templates do that write the thoughts of the last answer only."""
    tokenizer.chat_template = TURNS.replace(
        "{{ m.content }}", "{{ '!' if m.role[0] == 'a' and loop.last }}{{ m.content }}"
    )
    found = encode_all([example({"messages": [USER, ANSWER] * 2})], tokenizer, 64)
    assert learnt(found.rows, tokenizer) == [
        ("u:ab\na:cd\nu:ab\na:!cd\n", ".................!cd\n"),
        ("u:ab\na:!cd\n", ".......!cd\n"),
    ]
    assert (found.turns, found.apart) == (2, 1)


def test_a_generation_prompt_that_is_not_in_the_text_ends_as_in_use(tokenizer: Any) -> None:
    tokenizer.chat_template = TURNS.replace("a:{% endif", "a:?{% endif")
    rows = encode([example({"messages": [USER, ANSWER]})], tokenizer, 64)
    assert learnt(rows, tokenizer) == [("u:ab\na:?cd</s>", "........cd</s>")]


def test_what_a_template_leaves_out_is_refused(tokenizer: Any) -> None:
    called = {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}]}
    for row, words in [
        ({"messages": [USER, ANSWER], "tools": [TOOL]}, "leaves out the column 'tools'"),
        (called, "leaves out the 'tool_calls' of turn 1"),
    ]:
        with pytest.raises(UserError, match=words):
            encode([example(row)], tokenizer, 64)
    tokenizer.chat_template = "{% if tools %}t{% endif %}" + TURNS.replace("\n", "{{ 'c' if m.tool_calls }}\n")
    rows = encode([example({**called, "tools": [TOOL]})], tokenizer, 64)
    assert learnt(rows, tokenizer) == [("tu:ab\na:cdc\n", "........cdc\n")]
    tokenizer.chat_template = TURNS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(UserError, match=r"rows, row 1: .* leaves out turn 0, of the role 'system'"):
        encode([example({**PAIR, "system": "Be kind."})], tokenizer, 64)
    tokenizer.chat_template = "{{ raise_exception('no such roles') }}"
    with pytest.raises(UserError, match=r"rows, row 1: the model's chat template refuses it .*no such roles"):
        encode([example(PAIR)], tokenizer, 64)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="the model has no chat template to write them"):
        encode([example(called)], tokenizer, 64)


def test_what_lies_beyond_the_length_is_counted(tokenizer: Any) -> None:
    two = example({"messages": [USER, ANSWER] * 2})
    whole = encode_all([two], tokenizer, 20)
    assert (whole.turns, whole.lost, whole.cut, whole.without) == (2, 0, 0, 0)
    cut = encode_all([two], tokenizer, 19)
    assert (cut.lost, cut.cut) == (0, 1)
    lost = encode_all([two], tokenizer, 17)
    assert (lost.lost, lost.cut, len(lost.rows)) == (1, 0, 1)
    none = encode_all([two, two], tokenizer, 7)
    assert (none.turns, none.lost, none.without, none.rows) == (4, 4, 2, [])


def test_trl_reads_these_shapes_as_we_do() -> None:
    """A canary: our shapes are TRL's, whose own functions are not used by the command."""
    trl = pytest.importorskip("trl")
    row = {"conversations": [{"from": "user", "value": "ab"}, {"from": "assistant", "value": "cd"}]}
    theirs = trl.maybe_convert_to_chatml(json.loads(json.dumps(row)))
    assert theirs == {"messages": [USER, ANSWER]}
    assert example(row).messages == example(theirs).messages == theirs["messages"]
