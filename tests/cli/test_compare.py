"""`peft-dynamic compare`: the scores by hand, pairs of rows, one load of each base model, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_dynamic import DyLoRAConfig, MoSLoRAConfig, resize_adapter
from peft_dynamic.algebra.checkpoint import read_checkpoint
from peft_dynamic.cli import _compare, _memory, _paired
from peft_dynamic.cli._contender import Contender, parsed
from peft_dynamic.cli._data import Columns, to_examples
from peft_dynamic.cli._encode import encode
from peft_dynamic.cli._setting import Setting
from peft_dynamic.reports.curve import aligned
from tests.cli import common
from tests.cli.common import ROWS, invoke, message, write
from tests.conformance.cases import perturb
from tests.stock_cases import build

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, Any] = {
    "lora": lambda **more: LoraConfig(r=4, lora_alpha=8, **TARGETS, **more),
    "dylora": lambda **more: DyLoRAConfig(r=4, ranks=[1, 2, 4], **TARGETS, **more),
    "moslora": lambda **more: MoSLoRAConfig(r=4, **TARGETS, **more),
}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dynamic.cli._load.fast_dtype", lambda: torch.float32)  # whatever is fast here


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", ROWS)


def saved(base: Path, folder: Path, kind: str = "lora", seed: int = 1, **more: Any) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), KINDS[kind](task_type="CAUSAL_LM", **more))
    perturb(model, seed)
    model.save_pretrained(folder)
    return folder


def losses(model: Any, tokenizer: Any) -> list[tuple[float, int]]:
    """For each row the sum of its learnt tokens' losses, and their number."""
    found = []
    for row in encode(to_examples(ROWS, Columns(), "x", "--data"), tokenizer, 64):
        count = sum(label != -100 for label in row["labels"][1:])
        with torch.no_grad():
            mean = model.eval()(**{key: torch.tensor([value]) for key, value in row.items()}).loss.item()
        found.append((mean * count, count))
    return found


def per_token(rows: list[tuple[float, int]]) -> float:
    return sum(total for total, _ in rows) / sum(count for _, count in rows)


def answer(*words: object, code: int = 0) -> dict[str, Any]:
    result = invoke("compare", *words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The base models that are loaded from here on."""
    done: list[str] = []
    load = _compare.Subject.base_model
    monkeypatch.setattr(_compare.Subject, "base_model", lambda self, *a: done.append(self.base) or load(self, *a))
    return done


def test_the_scores_are_those_of_each_alone(tiny: Path, tmp_path: Path, data: Path, loads: list[str]) -> None:
    paths = {kind: saved(tiny, tmp_path / kind, kind, seed) for seed, kind in enumerate(KINDS, start=1)}
    words = [
        "base",
        paths["lora"],
        f"{paths['dylora']}@2",
        f"{paths['lora']}@0.5",
        paths["moslora"],
        f"{paths['moslora']}@1",
    ]
    found = answer(*words, "--data", data)
    assert loads == [str(tiny)]  # once for all
    tokenizer, base = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    expected = [losses(base, tokenizer)]
    resize_adapter(paths["lora"], tmp_path / "half", parameters=0.5)
    resize_adapter(paths["moslora"], tmp_path / "one", rank=1)
    for path in (paths["lora"], paths["dylora"], tmp_path / "half", paths["moslora"], tmp_path / "one"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), path)
        if path == paths["dylora"]:
            model.set_rank(2)
        expected.append(losses(model, tokenizer))
    assert (found["metric"], found["rows"], found["missing"]) == ("loss", 6, [])
    rows = found["compared"]
    assert [row["name"] for row in rows] == list(map(str, words))
    first = per_token(expected[0])
    for row, values in zip(rows, expected, strict=True):
        assert row["metrics"]["loss"] == pytest.approx(per_token(values), rel=1e-5)
        assert row["metrics"]["perplexity"] == pytest.approx(math.exp(per_token(values)), rel=1e-4)
        assert row["base_model"] == str(tiny)
        assert row["seconds"] > 0
        if row is not rows[0]:
            assert row["difference"] == pytest.approx(per_token(values) - first, rel=1e-4)
            low, high = row["interval"]
            assert low < row["difference"] < high
    assert (rows[0]["difference"], rows[0]["interval"]) == (None, None)
    assert rows[0]["parameters"] == rows[0]["bytes"] == 0
    assert rows[1]["parameters"] == read_checkpoint(paths["lora"]).size
    assert rows[1]["bytes"] == (paths["lora"] / "adapter_model.safetensors").stat().st_size
    assert rows[2]["parameters"] == rows[1]["parameters"] // 2  # rank 2 of 4
    assert rows[2]["bytes"] == 4 * rows[2]["parameters"]
    assert rows[3]["parameters"] <= rows[1]["parameters"] // 2
    assert rows[5]["parameters"] == rows[1]["parameters"] // 4


def test_the_table_says_the_same(tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tiny, tmp_path / "lora")
    monkeypatch.chdir(tmp_path)  # a long path would be cut in the table
    adapter = "lora"
    result = invoke("compare", "base", adapter, f"{adapter}@1", "--data", data)
    assert result.exit_code == 0, result.output
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    assert [line[0] for line in lines] == ["base", str(adapter), f"{adapter}@1"]
    found = answer("base", adapter, f"{adapter}@1", "--data", data)["compared"]
    for line, row in zip(lines, found, strict=True):
        assert float(line[1]) == pytest.approx(row["metrics"]["loss"], abs=5e-3)
        assert len(line[1].partition(".")[2]) == len(lines[0][1].partition(".")[2])
        assert int(line[3].replace(",", "")) == row["parameters"]
    low, high = found[1]["interval"]
    assert lines[1][2].startswith(f"{found[1]['difference']:+.3f}"[:5])
    word = "" if low <= 0 <= high else "better" if high < 0 else "worse"
    assert lines[1][2].endswith(word or "]")
    assert "Over 6 rows of" in result.output


def test_the_table_is_written_too(tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tiny, tmp_path / "a_b")
    monkeypatch.chdir(tmp_path)
    words = ["base", "a_b@1", "--data", data, "--out"]
    found = answer(*words, "new/table.json")
    assert json.loads(Path("new/table.json").read_text()) == found
    result = invoke("compare", *words, "table.md")
    assert result.exit_code == 0, result.output
    assert result.output.endswith("The table is in table.md.\n")
    head, line, *rows, _, note = Path("table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    assert cells[0][1:4] == ["loss", "beside the first", "parameters"]
    assert line.count("---") == len(cells[0]) == 7
    assert [row[0] for row in cells[1:]] == ["base", r"a\_b\@1"]  # what it shows is the name
    for row, expected in zip(cells[1:], found["compared"], strict=True):
        assert float(row[1]) == pytest.approx(expected["metrics"]["loss"], abs=5e-3)
        assert int(row[3].replace(",", "")) == expected["parameters"]
    assert note.startswith("Over 6 rows of")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["data.jsonl", "table.md"]


def test_base_models_differ_and_each_is_loaded_once(tiny: Path, tmp_path: Path, data: Path, loads: list[str]) -> None:
    """The other one reads the same text in half as many tokens: the loss of a whole row is what they have in common."""
    other = tmp_path / "other"
    model = build("llama")[0]
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    model.save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["one", "two", "three", "four"])
    model.resize_token_embeddings(len(tokenizer) + 30, mean_resizing=False)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    one, two, three = (
        saved(tiny, tmp_path / "1"),
        saved(other, tmp_path / "2", seed=2),
        saved(tiny, tmp_path / "3", seed=3),
    )
    words = [one, two, "base", three]
    found = answer(*words, "--data", data)
    assert loads == [str(tiny), str(other)]
    assert [row["name"] for row in found["compared"]] == [
        str(one),
        str(two),
        f"base {tiny}",
        f"base {other}",
        str(three),
    ]
    assert found["metric"] == "example_loss"
    for row, path, base in zip(
        found["compared"], (one, two, None, None, three), (tiny, other, tiny, other, tiny), strict=True
    ):
        model = AutoModelForCausalLM.from_pretrained(base)
        if path is not None:
            model = PeftModel.from_pretrained(model, path)
        rows = losses(model, AutoTokenizer.from_pretrained(base))
        assert row["metrics"]["example_loss"] == pytest.approx(sum(total for total, _ in rows) / 6, rel=1e-5)
    by_token = answer(*words, "--data", data, "--metric", "loss")
    assert by_token["metric"] == "loss"
    said = invoke("compare", *words, "--data", data).output
    assert "Their tokenizers cut the rows differently" in said


def test_what_an_adapter_leaves_in_the_base_model_is_not_there_for_the_next(
    tiny: Path, tmp_path: Path, data: Path, loads: list[str]
) -> None:
    biased = AutoModelForCausalLM.from_pretrained(tiny, attention_bias=True)
    biased.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "base")
    one = saved(tmp_path / "base", tmp_path / "one", bias="all")
    two = saved(tmp_path / "base", tmp_path / "two", seed=2)
    found = answer(one, two, "--data", data)
    assert loads == [str(tmp_path / "base")] * 2
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = per_token(losses(PeftModel.from_pretrained(base, two), AutoTokenizer.from_pretrained(tiny)))
    assert found["compared"][1]["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_classifier_is_compared_by_accuracy(tiny: Path, tmp_path: Path, loads: list[str]) -> None:
    rows = [{"text": row["prompt"], "label": i % 3} for i, row in enumerate(ROWS)]
    right = []
    for seed in (1, 2):
        model = get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3), KINDS["lora"](task_type="SEQ_CLS")
        )
        model.config.pad_token_id = 0
        perturb(model, seed)
        model.save_pretrained(tmp_path / str(seed))
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        with torch.no_grad():
            said = [int(model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]
        right.append([answer == row["label"] for answer, row in zip(said, rows, strict=True)])
    data = write(tmp_path / "rows.jsonl", rows)
    found = answer(tmp_path / "1", tmp_path / "2", "--data", data, "--batch-size", 4)
    assert found["metric"] == "accuracy"
    assert [row["metrics"]["accuracy"] for row in found["compared"]] == [sum(each) / 6 for each in right]
    assert found["compared"][1]["difference"] == pytest.approx((sum(right[1]) - sum(right[0])) / 6)
    assert len(loads) == 2  # each brings a head of its own
    lora = saved(tiny, tmp_path / "lora")
    mixed = invoke("compare", tmp_path / "1", lora, "--data", data)
    assert mixed.exit_code == 2
    assert "is of another kind of model than the first adapter" in message(mixed)


def test_what_has_no_time_is_missing(tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = saved(tiny, tmp_path / "lora")
    monkeypatch.setattr(_compare, "_expected", lambda *_: 5.0)
    left = iter([60.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(_compare.Budget, "left", lambda self: next(left))
    words = ["base", adapter, f"{adapter}@1", "--data", data, "--minutes", 1]
    found = answer(*words, code=3)
    assert [row["name"] for row in found["compared"]] == ["base"]
    assert found["missing"] == [str(adapter), f"{adapter}@1"]
    left = iter([1.0, 1.0])
    none = invoke("compare", *words, "--out", "table.md")
    assert none.exit_code == 3
    assert Path("table.md").read_text().startswith("Missing: base, ")
    assert "--minutes 1: the next takes about 5 s, and 1 s are left." in none.output
    assert f"Missing: base, {adapter}, {adapter}@1. Pass more --minutes, or fewer --rows." in none.output


def test_rows_that_one_model_would_cut_are_left_out_for_all() -> None:
    one, other = [(2.0, 2), (3.0, 3), (1.0, 1)], [(5.0, 4), (1.0, 1), (2.0, 2)]
    found = _paired.table([one, other], [[True, True, True], [True, False, True]], None)
    assert (found.metric, found.used, found.alike) == ("example_loss", 2, False)
    assert [values["example_loss"] for values in found.values] == [[2.0, 1.0], [5.0, 2.0]]
    same = _paired.table([one, [(4.0, 2), (3.0, 3), (0.0, 1)]], [[False] * 3] * 2, None)
    assert (same.metric, same.used, same.alike) == ("loss", 3, True)
    assert [_paired.mean(values["loss"]) for values in same.values] == [pytest.approx(1.0), pytest.approx(7 / 6)]
    empty = _paired.table([[(0.0, 0), (1.0, 1)], [(0.0, 0), (2.0, 1)]], [[False, True]] * 2, None)
    assert empty.used == 1


def test_an_example_has_what_all_its_rows_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation may be several rows, and one that is too long is none."""
    found = iter([[(1.0, 1), (2.0, 2)], [(4.0, 3)]])
    monkeypatch.setattr(_paired, "row_losses", lambda *_: next(found))
    read = _paired.Examples([([1, 0], {}), ([2], {})], [0, 2, 2], [True, False, True])
    assert _paired.scored(None, None, read, torch.float32) == [(2.0, 2), (0.0, 0), (5.0, 4)]  # type: ignore[arg-type]


def test_the_interval_is_that_of_the_pairs() -> None:
    generator = torch.Generator().manual_seed(3)
    first = (10 * torch.randn(400, generator=generator)).tolist()
    own = [value + 1 + 0.5 * x for value, x in zip(first, torch.randn(400, generator=generator).tolist(), strict=True)]
    low, high = _paired.interval(own, first) or (0.0, 0.0)
    differences = [a - b for a, b in zip(own, first, strict=True)]
    mean = sum(differences) / 400
    error = (sum((each - mean) ** 2 for each in differences) / 399 / 400) ** 0.5
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert _paired.interval(own, first) == (low, high)  # the same each time
    assert _paired.interval([1.0], [2.0]) is None
    assert _paired.interval(1.0, [2.0, 3.0]) is None
    assert _paired.interval([1.0, math.inf], [1.0, 2.0]) is None


@pytest.mark.parametrize(
    ("interval", "metric", "word"),
    [
        ([-0.2, -0.1], "loss", " better"),
        ([0.1, 0.2], "loss", " worse"),
        ([0.1, 0.2], "accuracy", " better"),
        ([-0.2, -0.1], "example_loss", " better"),
        ([-0.1, 0.1], "loss", ""),
        ([0.1, 0.2], "strange", ""),
    ],
)
def test_what_is_better(interval: list[float], metric: str, word: str) -> None:
    assert _compare._verdict(interval, metric) == word


def test_the_peak_is_that_of_the_block() -> None:
    with _memory.watched() as before:
        pass
    with _memory.watched() as peak:
        torch.ones(2**25).sum()  # 128 MiB
    with _memory.watched() as after:
        pass
    if peak.bytes is None or before.bytes is None or after.bytes is None:
        pytest.skip("this system does not tell")
    assert peak.bytes - before.bytes > 100 * 2**20
    assert peak.bytes - after.bytes > 100 * 2**20


def test_what_may_be_compared(tmp_path: Path) -> None:
    odd = tmp_path / "a@2"
    odd.mkdir()
    assert parsed("base") == Contender("base", None)
    assert parsed("run/a") == Contender("run/a", "run/a")
    assert parsed("run/a@4") == Contender("run/a@4", "run/a", Setting(rank=4))
    assert parsed("run/a@0.25") == Contender("run/a@0.25", "run/a", Setting(budget=0.25))
    assert parsed(str(odd)) == Contender(str(odd), str(odd))
    assert parsed(f"{odd}@1").adapter == str(odd)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ADAPTER"], "two or more, such as base and an adapter"),
        (["base", "base"], "must be different ones"),
        (["base", "ADAPTER@0"], "ADAPTER@0: after @ must be a rank of at least 1, as run@4, or a share"),
        (["base", "ADAPTER@1.5"], "after @ must be a rank of at least 1"),
        (["base", "ADAPTER@x"], "after @ must be a rank of at least 1"),
        (["base", "ADAPTER@nan"], "after @ must be a rank of at least 1"),
        (["base", "ADAPTER@5"], "ADAPTER@5: must be at a rank of at most 4, the largest of the adapter"),
        (["base", "no where"], "is no folder and no name on the Hub"),
        (["base", "ADAPTER", "--minutes", 0], "--minutes: 0.0: must be above 0"),
        (["base", "ADAPTER", "--metric", "f1"], "--metric: f1: must be one of loss, perplexity, example_loss"),
        (["base", "ADAPTER", "--out", "table.csv"], "--out: table.csv: must be a file that ends in .json or .md"),
        (["base", "ADAPTER", "--out", "."], "--out: .: must be a file that ends in .json or .md"),
        (["base", "ADAPTER", "--rows", 0], "--rows: 0: must be at least 1"),
        (["base", "ADAPTER", "--model", "/no/where"], "--model: /no/where is not a folder with a model in it"),
        (["base", "BIASED"], "trained its biases, which cannot be switched off. Leave base out."),
    ],
)
def test_bad_input_is_one_message(tiny: Path, tmp_path: Path, data: Path, words: list[object], expected: str) -> None:
    adapter = saved(tiny, tmp_path / "adapter")
    if "BIASED" in words:
        saved(tiny, tmp_path / "biased", "dylora", bias="all")
    given = [str(word).replace("ADAPTER", str(adapter)).replace("BIASED", str(tmp_path / "biased")) for word in words]
    result = invoke("compare", *given, "--data", data)
    assert result.exit_code == 2, result.output
    assert expected.replace("ADAPTER", str(adapter)) in message(result)


def test_numbers_of_a_column_have_the_same_decimals() -> None:
    assert aligned([1.5, 12.25, 0.125]) == ["1.50", "12.25", "0.12"]
    assert aligned([0.5, -0.25], signed=True) == ["+0.5000", "-0.2500"]
    assert aligned([12345.6, 1.0]) == ["12,346", "1"]
    assert aligned([math.inf, 2.0]) == ["inf", "2.000"]
    assert aligned([]) == []
    assert aligned([0.0]) == ["0"]
