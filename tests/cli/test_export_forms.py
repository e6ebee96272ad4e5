"""`peft-dynamic export` in its forms: without the base model's weights, whole, shallow, dry, and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_dynamic import QDyLoRAConfig, export_lora
from peft_dynamic.exits import exit_at
from tests import methods
from tests.cli import common
from tests.cli.common import invoke, message
from tests.conformance.cases import perturb

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures

INPUTS = torch.tensor([[3, 4, 5, 6]])
KINDS: dict[str, Any] = {
    **methods.configs("all-linear", lora=True),
    "lora": lambda **more: LoraConfig(**{"r": 4, "target_modules": "all-linear"} | more),
}


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the base model, of which a test may take parts away."""
    shutil.copytree(tiny, tmp_path / "base")
    return tmp_path / "base"


def saved(base: Path, folder: Path, kind: str = "dylora", **more: Any) -> Any:
    """An adapter with random values, saved; the model that it belongs to."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), KINDS[kind](task_type="CAUSAL_LM", **more))
    perturb(model)
    model.save_pretrained(folder)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(INPUTS).logits


def done(*words: object, code: int = 0) -> Any:
    result = invoke("export", *words)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("kind", ["dylora", "moslora", "density-lora", "loretta-rep", "calibrated"])
def test_no_weights_of_the_base_model_are_read(base: Path, tmp_path: Path, kind: str) -> None:
    model = saved(base, tmp_path / "adapter", "dylora" if kind == "calibrated" else kind)
    if kind == "calibrated":
        model.calibrate([{"input_ids": INPUTS, "labels": INPUTS}])
        model.save_pretrained(tmp_path / "adapter")
    rank = 2 if hasattr(model, "set_rank") else None
    export_lora(model, tmp_path / "loaded", rank=rank)
    (base / "model.safetensors").unlink()
    if kind not in ("calibrated", "loretta-rep"):  # which need its configuration
        shutil.rmtree(base)
    done(tmp_path / "adapter", tmp_path / "lora", *(["--rank", rank] if rank else []))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("loaded", "lora")]
    assert files[0] == files[1]


def test_a_quantised_adapter_needs_no_quantised_model(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = QDyLoRAConfig.quantization_config(compute_dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=settings)
    config = QDyLoRAConfig(r=4, ranks=[1, 4], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(loaded, config)
    perturb(model)
    model.eval().calibrate([{"input_ids": INPUTS, "labels": INPUTS}])
    model.save_pretrained(tmp_path / "adapter")
    export_lora(model, tmp_path / "loaded", rank=2)
    done(tmp_path / "adapter", tmp_path / "lora", "--rank", 2)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("loaded", "lora")]
    assert files[0] == files[1]
    refused = done(tmp_path / "adapter", tmp_path / "model", "--rank", 2, "--merge", code=2)
    assert "--merge: " in message(refused)
    assert "in which the sum would be rounded away" in message(refused)


def test_what_needs_the_base_model_asks_for_it(base: Path, tmp_path: Path) -> None:
    model = saved(base, tmp_path / "adapter")
    model.calibrate([{"input_ids": INPUTS, "labels": INPUTS}])
    model.peft_config["default"].base_model_name_or_path = None
    model.base_model.model.name_or_path = ""
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    done(tmp_path / "adapter", tmp_path / "alone", "--rank", 2)  # the file says whose measurements they are
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if not name.endswith("moments_of")}
    save_file(kept, weights, metadata={"format": "pt"})  # as an earlier version wrote it
    result = done(tmp_path / "adapter", tmp_path / "lora", "--rank", 2, code=2)
    assert "--model: missing." in message(result)
    assert "whose configuration tells the order of its modules" in message(result)
    done(tmp_path / "adapter", tmp_path / "lora", "--rank", 2, "--model", base)
    AutoConfig.from_pretrained(base, num_hidden_layers=1).save_pretrained(base)
    other = done(tmp_path / "adapter", tmp_path / "other", "--rank", 2, "--model", base, code=1)
    assert "cannot be written as a LoRA: the adapter holds moments of" in message(other)
    assert not (tmp_path / "other").exists()


def test_the_tokenizer_and_its_template_come_along(base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").write_text("of the base")
    saved(base, tmp_path / "adapter", "moslora")
    done(tmp_path / "adapter", tmp_path / "one")
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == "of the base"
    (tmp_path / "adapter" / "chat_template.jinja").write_text("of the adapter")
    done(tmp_path / "adapter", tmp_path / "two")
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == "of the adapter"
    assert (tmp_path / "two" / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.add_tokens(["x y"])
    (tmp_path / "adapter" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path / "adapter")
    done(tmp_path / "adapter", tmp_path / "three")
    assert (tmp_path / "three" / "tokenizer.json").read_bytes() == (
        tmp_path / "adapter" / "tokenizer.json"
    ).read_bytes()
    assert not (tmp_path / "three" / "chat_template.jinja").exists()  # a tokenizer without one
    shutil.rmtree(base)
    done(tmp_path / "adapter", tmp_path / "four")


@pytest.mark.parametrize("kind", ["dylora", "moslora", "loretta-rep", "lora"])
def test_a_merged_model_is_an_ordinary_one(base: Path, tmp_path: Path, kind: str) -> None:
    (base / "chat_template.jinja").write_text("{{ messages }}")
    model = saved(base, tmp_path / "adapter", kind)
    rank = ["--rank", 2] if hasattr(model, "set_rank") else []
    if rank:
        model.set_rank(2)
    result = done(tmp_path / "adapter", tmp_path / "model", "--merge", *rank)
    assert result.output.endswith(f"{tmp_path / 'adapter'} is in {tmp_path / 'model'}, as a model.\n")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == "{{ messages }}"
    assert not list(tmp_path.glob(".export-*"))
    again = done(tmp_path / "adapter", tmp_path / "model", "--merge", *rank, code=2)
    assert "is not empty, and a model gets a folder of its own" in message(again)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_head_of_the_adapters_is_not_tied_again(base: Path, tmp_path: Path) -> None:
    tied = AutoModelForCausalLM.from_pretrained(base)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(base)
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = saved(base, tmp_path / "adapter", "lora", **settings)
    done(tmp_path / "adapter", tmp_path / "model", "--merge")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not merged.config.tie_word_embeddings  # other programs go by it, where transformers sees both tensors
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    saved(base, tmp_path / "shared", "lora", target_modules=["embed_tokens"])  # an update of the head too, if merged
    refused = done(tmp_path / "shared", tmp_path / "other", "--merge", code=1)
    assert "the merged model computes other logits than the adapter" in message(refused)
    assert not (tmp_path / "other").exists()


def test_a_classifier_is_merged_with_its_head(base: Path, tmp_path: Path) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    loaded.config.pad_token_id = 0
    model = get_peft_model(loaded, KINDS["dylora"](task_type="SEQ_CLS"))
    perturb(model)
    model.eval().calibrate([{"input_ids": INPUTS, "labels": torch.tensor([1])}])
    model.save_pretrained(tmp_path / "adapter")
    model.set_rank(2)
    done(tmp_path / "adapter", tmp_path / "model", "--merge", "--rank", 2)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert merged.config.num_labels == 3
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    export_lora(model, tmp_path / "loaded", rank=2)
    done(tmp_path / "adapter", tmp_path / "lora", "--rank", 2)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("loaded", "lora")]
    assert files[0] == files[1]


def test_the_first_layers_are_a_model(base: Path, tmp_path: Path) -> None:
    model = saved(base, tmp_path / "adapter")
    done(tmp_path / "adapter", tmp_path / "shallow", "--merge", "--rank", 2, "--depth", 1)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "shallow")
    assert small.config.num_hidden_layers == 1
    with model.at_rank(2), exit_at(model, 1):
        torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-5)
    result = done(base, tmp_path / "whole", "--depth", 1)
    assert result.output == f"{base} at depth 1 is in {tmp_path / 'whole'}, as a model.\n"
    whole, small = (AutoModelForCausalLM.from_pretrained(path) for path in (base, tmp_path / "whole"))
    with exit_at(whole, 1):
        assert torch.equal(logits(small), logits(whole))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "whole").vocab_size == AutoTokenizer.from_pretrained(base).vocab_size
    )


def test_a_dry_run_tells_the_sizes(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter")
    for words in (["--rank", 2], ["--rank", 2, "--merge"], ["--rank", 2, "--merge", "--depth", 1]):
        out = tmp_path / "out"
        dry = json.loads(done(tmp_path / "adapter", out, *words, "--dry-run", "--json").stdout)
        assert not out.exists()
        assert not dry["written"]
        real = json.loads(done(tmp_path / "adapter", out, *words, "--json").stdout)
        assert real["written"]
        assert real["parameters"] == dry["parameters"]
        if "--merge" in words:
            weights = real["files"]["model.safetensors"]
            assert dry["bytes"] < weights < 1.2 * dry["bytes"]
        else:
            assert real["files"] == dry["files"]
            assert set(real["ranks"].values()) == set(dry["ranks"].values()) == {2}
        assert real["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
        shutil.rmtree(out)


def test_a_quantised_base_model_is_not_merged_into(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    for more in ([], ["--dry-run"]):
        result = done(tmp_path / "adapter", tmp_path / "model", "--rank", 2, "--merge", *more, code=1)
        assert "is quantised: rounded to so few bits again, the sum would lose most of the update" in message(result)
    assert not (tmp_path / "model").exists()


def test_a_model_that_fails_half_way_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(base, tmp_path / "adapter")
    (tmp_path / "model").mkdir()

    def fail(self: Any, folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    result = done(tmp_path / "adapter", tmp_path / "model", "--rank", 2, "--merge", code=1)
    assert "could not be written: OSError: disk full" in message(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "model"]
    assert not list((tmp_path / "model").iterdir())


def test_what_has_no_meaning_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "dylora")
    saved(base, tmp_path / "lora", "lora")
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), prompt).save_pretrained(tmp_path / "prompt")
    cases: list[tuple[list[object], str]] = [
        (["dylora"], "OUT: missing. Pass the folder to write, or --gguf"),
        (["dylora", "out", "--rank", 2, "--depth", 1], "--depth: 1: must be with --merge"),
        (["dylora", "out", "--rank", 2, "--merge", "--depth", 0], "--depth: 0: must be at least 1"),
        (["dylora", "out", "--rank", 2, "--merge", "--depth", 9], "--depth: 9: must be at most 2, the layers of"),
        (["dylora", "out", "--rank", 9], "--rank: 9 is above 4, the largest rank of"),
        (["dylora", "out", "--rank", 2, "--gguf", "x.bin"], "--gguf: x.bin: must be a file that ends in .gguf"),
        (["dylora", "out", "--rank", 2, "--merge", "--engine", "vllm"], "--engine: vllm: must be left out"),
        (["dylora", "out", "--rank", 2, "--merge", "--model", "/no/where"], "--model: /no/where is not a folder"),
        (["lora", "out", "--merge", "--rank", 2], "--rank: 2: a LORA adapter has one rank"),
        (["prompt", "out", "--merge"], "is a PROMPT_TUNING adapter, which is not merged here"),
        (["base", "out"], "must be an adapter; of a model pass --depth"),
        (["base", "out", "--depth", 1, "--rank", 1], "--rank: 1: must be left out: a model has no ranks"),
        (["base", "out", "--depth", 1, "--model", "x"], "--model: x: must be left out: ADAPTER is a model itself"),
        (["base", "out", "--depth", 9], "--depth: 9: must be at most 2"),
    ]
    for words, expected in cases:
        places = [tmp_path / str(word) if i == 0 or word == "out" else word for i, word in enumerate(words)]
        result = invoke("export", *places)
        assert result.exit_code == 2, (words, result.output)
        assert expected in message(result)
        assert not (tmp_path / "out").exists()


def test_an_engine_of_one_rank_gets_one(base: Path, tmp_path: Path) -> None:
    model = saved(base, tmp_path / "adapter", rank_pattern={"q_proj": 2})
    model.set_rank(4)
    done(tmp_path / "adapter", tmp_path / "lora", "--rank", 4, "--engine", "vllm")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {}, {})
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)
    saved(base, tmp_path / "bias", "moslora", bias="lora_only")
    refused = done(tmp_path / "bias", tmp_path / "other", "--engine", "llama.cpp", code=1)
    assert "llama.cpp does not read bias='lora_only'" in message(refused)
