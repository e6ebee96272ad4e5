"""The verbs that take finished adapters: no base model, and bad input is one message."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dynamic import AdapterMoments, DyLoRAConfig, MoSLoRAConfig, merge_adapters, resize_adapter
from peft_dynamic.algebra.checkpoint import read_checkpoint
from peft_dynamic.cli._data import Columns, to_examples
from peft_dynamic.cli._encode import encode
from peft_dynamic.cli._given import PICTURES
from peft_dynamic.reports.curve import PLOT_SUFFIXES
from tests.cli import common
from tests.cli.common import ROWS, invoke, message, write
from tests.conformance.cases import perturb
from tests.tuners.common import tiny_llama

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def ranks(folder: Path) -> set[int]:
    return {product.rank for product in read_checkpoint(folder).products.values()}


def test_resize_merge_and_average_write_adapters(adapter: Path, tmp_path: Path) -> None:
    result = invoke("resize", adapter, tmp_path / "small", "--rank", 2)
    assert result.exit_code == 0, result.output
    assert "has 448 of the 1,792 numbers of" in result.output
    assert ranks(tmp_path / "small") == {2}
    assert invoke("resize", adapter, tmp_path / "half", "--parameters", 0.5).exit_code == 0
    assert read_checkpoint(tmp_path / "half").size <= 896
    assert invoke("resize", adapter, tmp_path / "bytes", "--bytes", 2000).exit_code == 0
    assert read_checkpoint(tmp_path / "bytes").size <= 500
    result = invoke("merge", tmp_path / "sum", f"{adapter}=0.5", f"{tmp_path / 'small'}=0.5")
    assert "is the sum of 2 adapters" in result.output
    assert ranks(tmp_path / "sum") == {10}
    assert invoke("average", tmp_path / "mean", adapter, tmp_path / "small", "--rank", 3).exit_code == 0
    assert ranks(tmp_path / "mean") == {3}


def test_merge_keeps_a_budget_and_pads_for_an_engine(adapter: Path, tmp_path: Path) -> None:
    exact, two = tmp_path / "exact", f"{adapter}/"
    assert invoke("merge", exact, f"{adapter}=0.5", f"{two}=0.25").exit_code == 0
    half = invoke("merge", tmp_path / "half", f"{adapter}=0.5", f"{two}=0.25", "--parameters", 0.5)
    assert half.exit_code == 0, half.output
    resize_adapter(exact, tmp_path / "expected", parameters=0.5)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("half", "expected")]
    assert files[0] == files[1]
    padded = invoke("merge", tmp_path / "vllm", f"{adapter}=1", "--parameters", 0.4, "--engine", "vllm")
    assert padded.exit_code == 0, padded.output
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["rank_pattern"] == {}
    assert ranks(tmp_path / "vllm") == {config["r"]}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", ["lora", "dylora", "moslora"])
def test_measure_by_moments_is_the_cut_that_resize_makes(tiny: Path, tmp_path: Path, kind: str) -> None:
    data, out, file = write(tmp_path / "data.jsonl", ROWS), tmp_path / "curve.json", tmp_path / "x.moments"
    adapter = saved(tiny, tmp_path / "whole", kind)
    by_moments = ["resize", adapter, tmp_path / "one", "--rank", 1, "--data", data, "--rows", 3, "--moments", file]
    for words in (by_moments, ["resize", adapter, tmp_path / "plain", "--rank", 1]):
        assert invoke(*words).exit_code == 0

    def loss(folder: Path, *words: object) -> float:
        result = invoke("measure", folder, "--data", data, "--ranks", 1, "--json", *words)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["rows"][1]["metrics"]["loss"]

    found = loss(adapter, "--moments", file, "--out", out)
    assert found == pytest.approx(loss(tmp_path / "one"), rel=1e-5)
    assert found != pytest.approx(loss(tmp_path / "plain"), rel=1e-5)
    other = invoke("measure", adapter, "--data", data, "--ranks", 1, "--out", out)
    assert other.exit_code == 2
    assert "holds another measurement: moments was" in message(other)
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert card.endswith("Cut from a larger adapter: rank 1; cut by the loss.\n")


@pytest.mark.usefixtures("exact")
def test_merge_cuts_by_moments(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", ROWS)
    words, moments = [], {}
    for seed in (1, 2):
        path, file = saved(tiny, tmp_path / str(seed), seed=seed), tmp_path / f"{seed}.moments"
        assert invoke("resize", path, tmp_path / "x", "--rank", 1, "--data", data, "--moments", file).exit_code == 0
        moments[str(path)] = AdapterMoments.load(file)
        words += ["--moments", file]
    weights = {name: 0.5 for name in moments}
    merge_adapters(weights, tmp_path / "expected", 2, moments=moments)
    given = [f"{name}=0.5" for name in weights]
    result = invoke("merge", tmp_path / "sum", *given, "--rank", 2, *words)
    assert result.exit_code == 0, result.output
    merge_adapters(weights, tmp_path / "plain", 2)
    sums = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("sum", "expected", "plain")]
    assert sums[0] == sums[1] != sums[2]
    few = invoke("merge", tmp_path / "few", *given, "--rank", 2, *words[:2])
    assert "--moments: 1: must be given once for each of the 2 adapters, with --rank" in message(few)
    none = invoke("merge", tmp_path / "few", *given, *words)
    assert none.exit_code == 2


def test_resize_says_what_it_leaves_out(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), DyLoRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    perturb(model)
    ids = torch.randint(3, 60, (2, 6))
    model.eval().calibrate([{"input_ids": ids, "labels": ids}])
    model.save_pretrained(tmp_path / "calibrated")
    result = invoke("resize", tmp_path / "calibrated", tmp_path / "out", "--rank", 2)
    assert "was calibrated, and this cut goes by its weights alone" in " ".join(result.output.split())
    assert "Its modules have rank 2." in result.output


def test_resize_pads_for_an_engine(adapter: Path, tmp_path: Path) -> None:
    result = invoke("resize", adapter, tmp_path / "vllm", "--parameters", 0.4, "--engine", "vllm")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["rank_pattern"] == {}
    assert ranks(tmp_path / "vllm") == {config["r"]}


def test_inspect_shows_the_energy_of_each_rank(adapter: Path) -> None:
    result = invoke("inspect", adapter)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("LORA, 4 modules, largest rank 8, 1,792 numbers")
    assert "layers.1.self_attn.v_proj" in result.output
    assert "100.0%" in result.output
    assert "No rank below 8, the largest, keeps 99% of the energy in every module: model." in result.output


def test_inspect_draws_and_prints_json(adapter: Path, tmp_path: Path) -> None:
    result = invoke("inspect", adapter, "--plot", tmp_path / "energy.svg", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)  # and nothing else
    assert (found["adapter"], found["type"], found["largest_rank"]) == (str(adapter), "LORA", 8)
    assert len(found["modules"]) == 4
    assert result.stderr == f"The picture is in {tmp_path / 'energy.svg'}.\n"
    assert (tmp_path / "energy.svg").read_text().startswith("<?xml")


def test_the_pictures_are_those_that_are_drawn() -> None:
    assert PICTURES == PLOT_SUFFIXES


KINDS = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "dylora": DyLoRAConfig(r=4, ranks=[1, 4], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "moslora": MoSLoRAConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}


def saved(tiny: Path, folder: Path, kind: str = "lora", seed: int = 1) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), copy.deepcopy(KINDS[kind]))
    perturb(model, seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dynamic.cli._load.fast_dtype", lambda: torch.float32)  # whatever is fast here


def seen_by(tiny: Path, module: str) -> torch.Tensor:
    """What a module of the base model, with the adapter on it, sees of the rows: (tokens, in)."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    inputs: list[torch.Tensor] = []
    model.get_submodule(module).register_forward_hook(lambda _, given, __: inputs.append(given[0][0].double()))
    for row in encode(to_examples(ROWS, Columns(), "x", "--data"), tokenizer, 64):
        model(torch.tensor([row["input_ids"]]))
    return torch.cat(inputs)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_fits_the_file_whatever_the_method(tiny: Path, tmp_path: Path, kind: str) -> None:
    adapter, data = saved(tiny, tmp_path / "whole", kind), write(tmp_path / "data.jsonl", ROWS)
    file = tmp_path / "moments.safetensors"
    words = ["resize", adapter, tmp_path / "small", "--parameters", 0.5, "--data", data, "--moments", file]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    moments = AdapterMoments.load(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    a = read_checkpoint(adapter).products[name].a.double()
    z = seen_by(tiny, "model.layers.0.self_attn.q_proj") @ a.T
    assert f"{len(z)} tokens of 6 rows measured in " in result.output
    torch.testing.assert_close(moments.inputs[name], z.T @ z / len(z), rtol=1e-4, atol=1e-6)
    assert moments.losses[name].trace() > 0
    # the same cut as in Python
    resize_adapter(adapter, tmp_path / "python", parameters=0.5, moments=moments)
    small, python = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("small", "python"))
    assert small == python


@pytest.mark.usefixtures("exact")
def test_moments_are_kept_for_their_adapter(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, data = saved(tiny, tmp_path / "whole"), write(tmp_path / "data.jsonl", ROWS)
    file = tmp_path / "moments.safetensors"
    first = invoke("resize", adapter, tmp_path / "one", "--rank", 1, "--data", data, "--moments", file)
    assert f"They are in {file}." in first.output
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone"  # as on another machine
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("the base model"))
    again = invoke("resize", adapter, tmp_path / "two", "--rank", 1, "--moments", file)
    assert again.exit_code == 0, again.output
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    plain = invoke("resize", adapter, tmp_path / "plain", "--rank", 1)
    assert plain.exit_code == 0
    assert (tmp_path / "plain" / "adapter_model.safetensors").read_bytes() != one
    monkeypatch.undo()
    other = saved(tiny, tmp_path / "other", seed=2)
    fewer = write(tmp_path / "fewer.jsonl", ROWS[:3])
    for words, expected in [
        ([other], "holds the moments of something else: adapter.sha256 was"),
        ([adapter, "--data", fewer], "data.rows was 6 and is 3"),
    ]:
        refused = invoke("resize", words[0], tmp_path / "three", "--rank", 1, "--moments", file, *words[1:])
        assert refused.exit_code == 2
        assert expected in message(refused)
        assert not (tmp_path / "three").exists()
    moved = invoke("resize", adapter, tmp_path / "three", "--rank", 1, "--data", data)
    assert "--model: missing." in message(moved)
    assert "names /gone as its base model, which is not there" in message(moved)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["resize", "ADAPTER", "out"], "--rank, --parameters, --bytes: pass one of the three"),
        (["resize", "ADAPTER", "out", "--rank", 2, "--bytes", 100], "pass one of the three"),
        (["resize", "ADAPTER", "out", "--rank", 0], "--rank: 0: must be at least 1"),
        (["resize", "ADAPTER", "out", "--rank", 9], "--rank: rank=9: must be at most 8"),
        (["resize", "ADAPTER", "out", "--parameters", 1.5], "--parameters: 1.5: must be a share above 0"),
        (["resize", "ADAPTER", "ADAPTER/README.md", "--rank", 2], "OUT: out="),
        (["resize", "ADAPTER", "out", "--rank", 2, "--cut", "loss"], "--cut: loss needs --data, or --moments"),
        (["resize", "ADAPTER", "out", "--rank", 2, "--damping", -1], "--damping: -1.0: must be at least 0"),
        (["resize", "ADAPTER", "out", "--rank", 2, "--moments", "gone"], "--moments: gone is not there, and without"),
        (["resize", "ADAPTER", "out", "--rank", 2, "--moments", "ADAPTER/README.md"], "holds no moments of an adapter"),
        (["resize", "ADAPTER", "out", "--rank", 2, "--data", "gone.jsonl"], "--data: 'gone.jsonl' is not a file"),
        (["resize", "ADAPTER", "out", "--rank", 2, "--model", "m"], "--model: without --data no base model is loaded"),
        (["inspect", "ADAPTER", "--plot", "x.txt"], "--plot: x.txt: must be a file that ends in .png, .svg, .pdf"),
        (["inspect", "ADAPTER/.."], "has no adapter_config.json"),
        (["resize", "", "out", "--rank", 2], "ADAPTER: '' is no folder and no name on the Hub"),
        (["resize", "nowhere", "out", "--rank", 2], "is no folder and no name on the Hub"),
        (["merge", "out", "ADAPTER"], "must be ADAPTER=WEIGHT"),
        (["merge", "out", "ADAPTER=1", "--rank", 2, "--parameters", 0.5], "--parameters: 0.5: must be left out where"),
        (["merge", "out", "ADAPTER=1", "--parameters", 1.5], "--parameters: 1.5: must be a share above 0"),
        (["merge", "out", "ADAPTER=1", "--rank", 2, "--moments", "gone"], "--moments: gone: must be a file"),
        (
            ["merge", "out", "ADAPTER=0.5", "ADAPTER=0.5"],
            "=0.5: must be an adapter that is named once: add its",
        ),
        (["merge", "out", "ADAPTER=much"], "must be ADAPTER=WEIGHT"),
        (["average", "out", "nowhere", "other"], "is no folder and no name on the Hub"),
        (["average", "out", "ADAPTER"], "one adapter has no mean. The folder to write comes first"),
        (["merge", "sql=0.7", "ADAPTER=0.3"], "sql=0.7 looks like ADAPTER=WEIGHT. The folder to write comes first"),
        (["resize", "ADAPTER", "ADAPTER", "--rank", 2], "is an adapter that is read"),
        (["average", "ADAPTER", "ADAPTER", "ADAPTER"], "is an adapter that is read"),
        (["inspect", "nowhere"], "is no folder and no name on the Hub"),
    ],
)
def test_bad_input_is_one_message(words: list[object], expected: str, adapter: Path, tmp_path: Path) -> None:
    given = [str(word).replace("ADAPTER", str(adapter)) for word in words]
    given = [str(tmp_path / word) if word in ("out", "nowhere") else word for word in given]
    result = invoke(*given)
    assert result.exit_code == 2
    assert expected in message(result)
    assert not (tmp_path / "out").exists()
