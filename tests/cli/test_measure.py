"""`peft-dynamic measure`: the curve by hand, what is gone on with, what is refused, and what is recommended."""

import json
import math
import shutil
import signal
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from peft_dynamic import DyLoRAConfig, MoSLoRAConfig, QDyLoRAConfig, resize_adapter
from peft_dynamic.cli import _curve
from peft_dynamic.cli._choice import _error, choice
from peft_dynamic.cli._data import Columns, to_examples
from peft_dynamic.cli._encode import encode
from peft_dynamic.cli._record import Setting
from peft_dynamic.ranks import RankCurve, RankRow
from tests.cli import common
from tests.cli.common import ROWS, invoke, message, write
from tests.conformance.cases import perturb

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


def saved(tiny: Path, folder: Path, kind: str = "dylora", seed: int = 1, **more: Any) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), KINDS[kind](task_type="CAUSAL_LM", **more))
    perturb(model, seed)
    model.save_pretrained(folder)
    return folder


def loss(model: Any, tokenizer: Any) -> float:
    """The loss per learnt token, row by row."""
    total, tokens = 0.0, 0
    for row in encode(to_examples(ROWS, Columns(), "x", "--data"), tokenizer, 64):
        inputs = {key: torch.tensor([value]) for key, value in row.items()}
        count = sum(label != -100 for label in row["labels"][1:])
        with torch.no_grad():
            total += model(**inputs).loss.item() * count
        tokens += count
    return total / tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_is_the_loss_at_each_rank(tiny: Path, tmp_path: Path, data: Path, kind: str) -> None:
    adapter, out = saved(tiny, tmp_path / "whole", kind), tmp_path / "curve.json"
    words = ["measure", adapter, "--data", data, "--ranks", "4,1", "--budgets", 0.5, "--out", out]
    result = invoke(*words, "--plot", tmp_path / "curve.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    curve = RankCurve.from_json(out)
    assert [(row.rank, row.budget) for row in curve.rows] == [(None, None), (1, None), (4, None), (None, 0.5)]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    base = AutoModelForCausalLM.from_pretrained(tiny).eval()
    assert curve.rows[0].metrics["loss"] == pytest.approx(loss(base, tokenizer), rel=1e-5)
    model = PeftModel.from_pretrained(base, adapter).eval()
    assert curve.rows[2].metrics["loss"] == pytest.approx(loss(model, tokenizer), rel=1e-5)
    if kind == "dylora":
        model.set_rank(1)
    else:
        resize_adapter(adapter, tmp_path / "one", rank=1)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "one").eval()
    assert curve.rows[1].metrics["loss"] == pytest.approx(loss(model, tokenizer), rel=1e-5)
    for row in curve.rows:
        assert row.metrics["perplexity"] == pytest.approx(math.exp(row.metrics["loss"]))
        assert len(row.samples["loss"]) == 6
        assert sum(row.samples["loss"]) / 6 == pytest.approx(row.metrics["loss"])
    assert curve.rows[3].parameters <= curve.rows[2].parameters / 2


def test_the_standard_error_is_that_of_a_ratio() -> None:
    """As `HeldOut.gain` has it."""
    from peft_dynamic.cli import _measure

    rows = {"base": [(3.0, 1), (10.0, 5)], "one": [(2.0, 1), (6.0, 5)]}
    held = _measure.HeldOut([], [1], None, 0.0, torch.float32)  # type: ignore[arg-type]
    held.seen = {None: [rows["base"]], 1: [rows["one"]]}
    held.batches = [{"labels": torch.zeros(2)}]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, values in rows.items():
            patch.setattr(_measure, "row_losses", lambda *_, values=values: values)
            found[name] = _measure.text_metrics(None, [{}], torch.float32)
    base, one = (
        RankRow(rank, {}, samples={"loss": found[name]["loss"]}) for rank, name in ((None, "base"), (1, "one"))
    )

    gain, error = held.gain(1)
    assert sum(base.samples["loss"]) / 2 - sum(one.samples["loss"]) / 2 == pytest.approx(gain)
    assert _error(one, base, "loss") == pytest.approx(error)
    assert found["one"]["perplexity"] == pytest.approx(math.exp(8 / 6))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured from here on."""
    done: list[str] = []
    row = _curve._Measuring.row
    monkeypatch.setattr(_curve._Measuring, "row", lambda self, at: done.append(str(at)) or row(self, at))
    return done


def test_a_second_call_measures_what_is_missing(
    tiny: Path, tmp_path: Path, data: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = saved(tiny, tmp_path / "whole"), tmp_path / "deep" / "curve.json"
    words = ["measure", adapter, "--data", data, "--out", out]
    monkeypatch.setattr(_curve._Measuring, "expected", lambda self: 5.0)
    left = chain([60.0, 60.0, 0.0, 0.0], repeat(60.0))
    monkeypatch.setattr(_curve.Budget, "left", lambda self: next(left))
    monkeypatch.setattr(_curve.time, "monotonic", count().__next__)
    first = invoke(*words, "--minutes", 1)
    assert first.exit_code == 3, first.output  # unfinished
    assert measured == ["base model", "rank 1"]
    assert "--minutes 1: a row takes about 1 s, and 0 s are left." in first.output
    assert "Missing: rank 2, rank 4. Go on with: " in first.output
    assert "So far. " in first.output
    before = RankCurve.from_json(out)
    second = invoke(*words)
    assert second.exit_code == 0, second.output
    assert f"{out} has 2 of 4 rows already." in second.output
    assert measured[2:] == ["rank 2", "rank 4"]
    assert "Missing" not in second.output
    assert RankCurve.from_json(out).rows[:2] == before.rows
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("the base model"))
    third = invoke(*words)
    assert third.exit_code == 0, third.output
    assert len(measured) == 4
    assert third.output.count("\n│") == second.output.count("\n│") == 4
    fourth = invoke(*words, "--ranks", 2)
    assert fourth.exit_code == 0
    assert RankCurve.from_json(out).ranks == [1, 2, 4]
    assert list(out.parent.iterdir()) == [out]  # and nothing beside it


def test_no_row_is_begun_that_does_not_fit(
    tiny: Path, tmp_path: Path, data: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_curve._Measuring, "expected", lambda self: 1e6)
    result = invoke("measure", saved(tiny, tmp_path / "whole"), "--data", data, "--minutes", 1)
    assert result.exit_code == 3, result.output  # unfinished
    assert measured == []
    assert "Missing: base model, rank 1, rank 2, rank 4. Pass --out to keep the rows" in result.output


def test_measurements_of_different_things_are_not_mixed(tiny: Path, tmp_path: Path, data: Path) -> None:
    adapter, out = saved(tiny, tmp_path / "whole"), tmp_path / "curve.json"
    words = ["--ranks", 1, "--out", out]
    assert invoke("measure", adapter, "--data", data, *words).exit_code == 0
    before = out.read_bytes()
    other = saved(tiny, tmp_path / "other", seed=2)
    fewer = write(tmp_path / "fewer.jsonl", ROWS[:3])
    for given, expected in [
        ([other, "--data", data], "adapter.sha256 was"),
        ([adapter, "--data", fewer], "data.rows was 6 and is 3"),
        ([adapter, "--data", data, "--instruction", "Say it."], "data.sha256 was"),
        ([adapter, "--data", data, "--max-length", 32], "data.max_length was 512 and is 32"),
        ([adapter, "--data", data, "--rows", 2], "data.rows was 6 and is 2"),
    ]:
        result = invoke("measure", *given, *words)
        assert result.exit_code == 2, result.output
        assert "--out:" in message(result)
        assert "holds another measurement" in message(result)
        assert expected in message(result)
        assert out.read_bytes() == before
    out.write_text('{"rows": []}')
    result = invoke("measure", adapter, "--data", data, *words)
    assert "is there already, and no curve that measure wrote" in message(result)


def test_a_call_that_is_stopped_says_how_to_go_on(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = saved(tiny, tmp_path / "whole"), tmp_path / "curve.json"
    row = _curve._Measuring.row

    def stopped(self: Any, at: Setting) -> RankRow:
        if at.rank == 2:
            signal.raise_signal(signal.SIGTERM)
        return row(self, at)

    monkeypatch.setattr(_curve._Measuring, "row", stopped)
    result = invoke("measure", adapter, "--data", data, "--out", out)
    assert result.exit_code == 128 + signal.SIGTERM
    assert f"{out} has 2 rows. Go on with: " in message(result)
    assert RankCurve.from_json(out).ranks == [1]


def test_the_tokenizer_that_was_saved_with_the_adapter_is_taken(tiny: Path, tmp_path: Path, data: Path) -> None:
    adapter = saved(tiny, tmp_path / "whole", "lora")
    words = ["measure", adapter, "--data", data, "--ranks", 4]
    plain = invoke(*words)
    base = tmp_path / "base"
    shutil.copytree(tiny, base, ignore=shutil.ignore_patterns("tokenizer*"))
    AutoTokenizer.from_pretrained(tiny).save_pretrained(adapter)
    result = invoke(*words, "--model", base)
    assert result.exit_code == 0, result.output
    assert [line for line in result.output.splitlines() if "│" in line] == [
        line for line in plain.output.splitlines() if "│" in line
    ]


def test_an_adapter_over_four_bits_is_measured_there(tiny: Path, tmp_path: Path, data: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=QDyLoRAConfig.quantization_config(compute_dtype=torch.float32)
    )
    model = get_peft_model(base, QDyLoRAConfig(r=4, ranks=[1, 4], **TARGETS, task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path / "whole")
    out = tmp_path / "curve.json"
    result = invoke("measure", tmp_path / "whole", "--data", data, "--out", out)
    assert result.exit_code == 0, result.output
    curve = RankCurve.from_json(out)
    assert curve.ranks == [1, 4]
    assert curve[4]["loss"] == pytest.approx(loss(model.eval(), AutoTokenizer.from_pretrained(tiny)), rel=1e-3)
    small = invoke("resize", tmp_path / "whole", tmp_path / "small", "--rank", 2, "--data", data)
    assert small.exit_code == 0, small.output


def test_an_adapter_with_biases_has_no_row_for_the_base_model(tiny: Path, tmp_path: Path, data: Path) -> None:
    adapter = saved(tiny, tmp_path / "whole", bias="all")
    result = invoke("measure", adapter, "--data", data, "--ranks", "1,4")
    assert result.exit_code == 0, result.output
    assert "No row for the base model" in result.output
    assert "Recommended: rank " in result.output
    words = " ".join(result.output.split())
    assert f"Write it: peft-dynamic export {adapter} OUT --rank " in words


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_classifier_is_measured_by_its_labels(tiny: Path, tmp_path: Path, outputs: int) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=outputs)
    base.config.pad_token_id = 0
    model = get_peft_model(base, KINDS["lora"](task_type="SEQ_CLS"))
    perturb(model)
    model.save_pretrained(tmp_path / "whole")
    rows = [{"left": row["prompt"], "right": row["completion"], "id": 1, "label": i % 3} for i, row in enumerate(ROWS)]
    data = write(tmp_path / "data.jsonl", rows)
    out = tmp_path / "curve.json"
    result = invoke("measure", tmp_path / "whole", "--data", data, "--ranks", 4, "--out", out, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    assert "Columns that are not read: id." in result.output
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    right, squares = 0, 0.0
    for row in rows:
        with torch.no_grad():
            logits = model.eval()(**tokenizer(row["left"], row["right"], return_tensors="pt")).logits[0]
        right += int(logits.argmax()) == row["label"]
        squares += (logits[0].item() - row["label"]) ** 2
    found = RankCurve.from_json(out)[4]
    if outputs == 1:
        assert found == {"mse": pytest.approx(squares / 6, rel=1e-5)}
    else:
        assert found["accuracy"] == pytest.approx(right / 6)
        assert list(found) == ["accuracy", "loss"]
        for label, expected in [(7, "the label 7 must be a whole number from 0 to 2"), ("x", "the label 'x' must be")]:
            wrong = write(tmp_path / "wrong.jsonl", [{"text": "a", "label": label}])
            result = invoke("measure", tmp_path / "whole", "--data", wrong)
            assert result.exit_code == 2
            assert expected in message(result)


def test_an_adapter_of_another_base_model_is_told(tiny: Path, tmp_path: Path, data: Path) -> None:
    adapter = saved(tiny, tmp_path / "whole", "lora")
    config = LlamaConfig.from_pretrained(tiny)
    for name, changes, expected in [
        ("wide", {"hidden_size": 2 * config.hidden_size}, "in the adapter, and the model has room for ["),
        ("deep", {"num_hidden_layers": config.num_hidden_layers + 1}, "2 modules are in the model alone"),
        ("flat", {"num_hidden_layers": config.num_hidden_layers - 1}, "2 modules are in the adapter alone"),
    ]:
        other = AutoModelForCausalLM.from_config(LlamaConfig(**(config.to_dict() | changes)))
        other.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / name)
        result = invoke("measure", adapter, "--data", data, "--model", tmp_path / name)
        assert result.exit_code == 2, result.output
        assert "--model:" in message(result)
        assert f"does not fit {tmp_path / name}: " in message(result)
        assert expected in message(result)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ranks", "1,8"], "--ranks: 8: must be at most 4, the largest rank of"),
        (["--ranks", "a"], "--ranks: 'a': must be whole numbers of at least 1"),
        (["--ranks", "0,1"], "--ranks: '0,1': must be whole numbers of at least 1"),
        (["--budgets", "1.5"], "--budgets: '1.5': must be shares above 0 and up to 1, or whole numbers"),
        (["--budgets", "1e9"], "--budgets: 1000000000: must be at most"),
        (["--minutes", 0], "--minutes: 0.0: must be above 0"),
        (["--tolerance", -1], "--tolerance: -1.0: must be at least 0"),
        (["--rows", 0], "--rows: 0: must be at least 1"),
        (["--plot", "x.txt"], "--plot: x.txt: must be a file that ends in .png, .svg, .pdf"),
        (["--out", "."], "--out: . is a folder; pass the name of a file"),
        (["--moments", "gone"], "--moments: gone: must be a file that resize --moments wrote"),
        (["--metric", "f1"], "--metric: f1: must be one of loss, perplexity"),
        (["--model", "/no/where"], "--model: /no/where is not a folder with a model in it"),
        (["--data", "gone.jsonl"], "--data: 'gone.jsonl' is not a file"),
        (["--text-column", "x"], "has no column 'x'"),
    ],
)
def test_bad_input_is_one_message(tiny: Path, tmp_path: Path, data: Path, words: list[object], expected: str) -> None:
    adapter = saved(tiny, tmp_path / "whole")
    result = invoke("measure", adapter, "--data", data, *words)
    assert result.exit_code == 2, result.output
    assert expected in message(result)
    assert not list(Path.cwd().iterdir())


def test_other_tasks_are_refused_by_name(tiny: Path, tmp_path: Path, data: Path) -> None:
    adapter = saved(tiny, tmp_path / "whole")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_2_SEQ_LM"}))
    result = invoke("measure", adapter, "--data", data)
    assert result.exit_code == 2
    assert "is of a model for SEQ_2_SEQ_LM; the command runs causal language models and classifiers" in message(result)


def curve(base: list[float] | None, **ranks: list[float]) -> RankCurve:
    """Rows with a loss for each example; `r2` is rank 2."""

    def row(rank: int | None, values: list[float]) -> RankRow:
        return RankRow(rank, {"loss": sum(values) / len(values)}, samples={"loss": values} if len(values) > 1 else {})

    rows = [] if base is None else [row(None, base)]
    return RankCurve(rows + [row(int(name[1:]), values) for name, values in ranks.items()])


CHOICES: list[tuple[RankCurve, str]] = [
    (
        curve([3.0], r1=[2.0], r2=[1.0]),
        "Recommended: rank 2. Here the loss is 1, 2 below the base model's, the greatest gain.",
    ),
    (
        curve([3.0], r1=[1.01], r2=[1.0]),
        "Recommended: rank 1. Here the loss is 1.01, 1.99 below the base model's, 99.5 % of the gain of rank 2, the "
        "best with 1.",
    ),
    (
        curve([3.0, 5.0], r1=[1.0, 2.4], r2=[1.1, 2.0]),
        "Recommended: rank 1. Here the loss is 1.7, 2.3 ± 0.3 below the base model's, behind rank 2, the best with "
        "1.55, by no more than one standard error over these rows.",
    ),
    (
        curve([3.0, 5.0], r1=[3.2, 4.6]),
        "Nothing was learnt that these rows show. Of the best, rank 1, the loss is 3.9, 0.1 ± 0.3 below the base "
        "model's. That is no gain of more than twice its standard error. None is recommended.",
    ),
    (
        curve(None, r1=[2.0], r2=[1.995]),
        "Recommended: rank 1. Here the loss is 2, within 0.3 % of rank 2, the best with 1.995.",
    ),
    (curve(None, r1=[math.nan]), "Nothing is recommended: the loss is finite nowhere."),
]


@pytest.mark.parametrize(("rows", "expected"), CHOICES)
def test_what_is_recommended_and_why(rows: RankCurve, expected: str) -> None:
    row, said = choice(rows, "loss", 0.01)
    assert said == expected
    assert (row is None) == ("Recommended" not in said)


def test_rows_have_their_order_and_their_names() -> None:
    settings = [Setting(budget=1000), Setting(budget=0.5), Setting(rank=4), Setting(), Setting(rank=1)]
    ordered = sorted(settings, key=lambda at: at.order)
    assert [str(at) for at in ordered] == ["base model", "rank 1", "rank 4", "budget 0.5", "budget 1,000"]
