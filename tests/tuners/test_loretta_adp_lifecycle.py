"""LoRETTA_adp: saved, loaded, switched, taken off, over quantised layers; and every refusal."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dynamic import LorettaAdpConfig
from tests.conformance.cases import perturb
from tests.processes import python
from tests.tuners.common import rows, tiny_llama
from tests.tuners.loretta_adp import (
    SIZES,
    adapted,
    changed,
    layers,
    logits,
    settings,
    snapshot,
    step,
    tiny_bert,
    tiny_roberta,
    trainable,
)

pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")

# Life cycle


def test_disabled_is_the_base_model_bit_for_bit_also_after_training() -> None:
    for base, others in ((tiny_llama(), {}), (tiny_bert(), {"task_type": "SEQ_CLS"})):
        expected = logits(base)
        model = adapted(base, **others)
        perturb(model)
        tuned = logits(model)
        assert not torch.allclose(tuned, expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("others", [{}, {"placement": "reference", "train_layer_norms": False, "scaling": 0.3}])
def test_saved_and_loaded(tmp_path: Path, others: dict) -> None:
    model = adapted(**others)
    perturb(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORETTA_ADP"
    assert saved["target_modules"] is None
    assert isinstance(PeftConfig.from_pretrained(tmp_path), LorettaAdpConfig)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))
    light = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(light), logits(model))
    fresh = adapted()
    expected = logits(fresh)
    fresh.load_adapter(tmp_path, "loaded")
    assert torch.equal(logits(fresh), expected)
    fresh.set_adapter("loaded")
    assert torch.equal(logits(fresh), logits(model))
    resumed = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert set(trainable(resumed)) == set(trainable(model))


LOAD = """
import sys
import torch
from peft import PeftModel
import peft_dynamic.tuners.loretta_adp
from tests.tuners.loretta_adp import logits, tiny_bert, tiny_roberta
base = {"bert": tiny_bert, "roberta": tiny_roberta}[sys.argv[1]]()
torch.save(logits(PeftModel.from_pretrained(base, sys.argv[2])), sys.argv[2] + "/output.pt")
"""


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_classifier_saved_here_loads_in_another_process(name: str, tmp_path: Path) -> None:
    model = adapted({"bert": tiny_bert, "roberta": tiny_roberta}[name](), task_type="SEQ_CLS")
    perturb(model)
    model.save_pretrained(tmp_path)
    python("-c", LOAD, name, tmp_path)
    assert torch.equal(torch.load(tmp_path / "output.pt"), logits(model))


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_two_adapters_are_independent_and_deleted_apart(task: str) -> None:
    base = tiny_llama() if task == "CAUSAL_LM" else tiny_roberta()
    expected = logits(base)
    model = adapted(base, task_type=task)
    perturb(model)
    first = logits(model)
    model.add_adapter("other", settings(task_type=task, tensor_rank=3, placement="reference"))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert all(".other." in name for name in trainable(model))
    perturb(model, seed=2)
    second = logits(model)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert all(".default." in name for name in trainable(model))
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not [name for name in model.state_dict() if ".default." in name]
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_two_adapters_with_layer_norms_cannot_be_active_at_once() -> None:
    model = adapted()
    model.add_adapter("other", settings(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_unload_gives_the_base_back(task: str) -> None:
    base = {"CAUSAL_LM": tiny_llama, "SEQ_CLS": tiny_roberta}[task]()
    names, expected = {name: type(module) for name, module in base.named_modules()}, logits(base)
    model = adapted(base, task_type=task)
    perturb(model)
    unloaded = model.unload()
    assert {name: type(module) for name, module in unloaded.named_modules()} == names
    assert torch.equal(logits(unloaded), expected)


def test_merging_is_refused_and_changes_nothing() -> None:
    model = adapted()
    perturb(model)
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload, next(iter(layers(model).values())).merge):
        with pytest.raises(NotImplementedError, match=r"LoRETTA_adp cannot be merged: .*non-linearity.*unload\(\)"):
            merge()
    assert torch.equal(logits(model), before)


def test_mixed_batches_are_refused() -> None:
    model = adapted()
    with pytest.raises(TypeError, match="LorettaAdpModel does not support mixed adapter batches"):
        model(input_ids=rows(2), adapter_names=["default", "__base__"])
    with pytest.raises(TypeError, match="LorettaAdpModel does not support mixed adapter batches"):
        model.generate(input_ids=rows(2), adapter_names=["default", "__base__"])


def test_copies_and_pickles_are_independent() -> None:
    model = adapted()
    perturb(model)
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        perturb(twin)
        assert not torch.allclose(logits(twin), expected)
        assert torch.equal(logits(model), expected)


def test_generation_uses_the_cache() -> None:
    model = adapted()
    perturb(model)
    model.eval()
    outputs = [
        model.generate(input_ids=rows(2, 5), max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(outputs[0], outputs[1])


def test_transformers_own_adapter_methods() -> None:
    model = tiny_llama()
    expected = logits(model)
    model.add_adapter(settings())
    assert torch.equal(logits(model), expected)
    perturb(model)
    assert not torch.allclose(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | {"hidden_size": 64, "intermediate_size": 128}))
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    for module in list(base.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                if bits == 4:
                    layer = bnb.nn.Linear4bit(
                        child.in_features, child.out_features, False, compute_dtype=torch.bfloat16, quant_type="nf4"
                    )
                    layer.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                else:
                    layer = bnb.nn.Linear8bitLt(child.in_features, child.out_features, False, has_fp16_weights=False)
                    layer.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
                setattr(module, name, layer.to("cpu"))
    model = adapted(base)
    with model.disable_adapter():
        expected = logits(model)
    assert torch.equal(logits(model), expected)
    before, names = snapshot(model), set(trainable(model))
    optimizer = torch.optim.Adam(trainable(model).values(), lr=1e-2)
    for _ in range(3):
        logits(model)  # an evaluation in between must not end the training on a CPU
        step(model, optimizer)
    moved = changed(model, before)
    assert {name for name in names if "loretta_" in name} <= moved
    assert moved <= names


# Refusals


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        ({"bottleneck": 0}, ValueError, "bottleneck must be at least 1, got 0"),
        ({"bottleneck": 8.0}, TypeError, r"bottleneck must be an int, got 8\.0 of float"),
        ({"tensor_rank": 0}, ValueError, "tensor_rank must be at least 1, got 0"),
        ({"tensor_rank": True}, TypeError, "tensor_rank must be an int, got True"),
        ({"tensor_shape": [256]}, ValueError, r"tensor_shape needs at least two factors.*\[256\].*Pass None"),
        ({"tensor_shape": [256, -1]}, ValueError, r"each at least 1, got \[256, -1\]"),
        ({"tensor_shape": "8,8"}, TypeError, "tensor_shape must be a list of ints or None, got '8,8'"),
        ({"tensor_shape": [3, 5]}, ValueError, r"15, the product of \[3, 5\], is no multiple of bottleneck=8"),
        ({"non_linearity": "nope"}, ValueError, "non_linearity must name .*relu.*; got 'nope'"),
        ({"non_linearity": "prelu"}, ValueError, "has no parameters.*got 'prelu'"),
        ({"scaling": float("nan")}, ValueError, "scaling must be a finite number, got nan"),
        ({"dropout": 1.0}, ValueError, r"dropout must be a number from 0 to below 1, got 1\.0"),
        ({"placement": "both"}, ValueError, r"placement must be one of \('paper', 'reference'\), got 'both'"),
        ({"init_weights": False}, ValueError, "init_weights must be True or 'reference', got False"),
        ({"target_modules": []}, ValueError, "target_modules is empty. Pass None"),
        ({"target_modules": [1]}, TypeError, r"target_modules must be a list of names.* got \[1\]"),
        ({"exclude_modules": 3}, TypeError, "exclude_modules must be a list of names"),
        ({"target_modules": ["a"], "placement": "reference"}, ValueError, "Leave one of the two at its default"),
        ({"target_modules": "a", "layers_to_transform": 1}, ValueError, "layers_to_transform has no effect"),
        ({"layers_pattern": "h"}, ValueError, "layers_pattern='h' needs layers_to_transform"),
    ],
)
def test_bad_settings_are_refused_at_construction(others: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"LorettaAdpConfig: .*{message}|LorettaAdpConfig: {message}"):
        settings(**others)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"bottleneck": 64}, "bottleneck=64 is above 32, the width at .*o_proj'.*Pass at most 32, for example 4"),
        ({"tensor_rank": 9}, r"o_proj': tensor_rank=9 is above 8, .*\[8, 4, 8\].*Lower tensor_rank to 8 or less"),
        ({"tensor_shape": [8, 16]}, r"must multiply to 32 x 8 = 256, got \[8, 16\] with a product of 128"),
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is a Embedding, and adapters go after linear"),
        ({"target_modules": ["input_layernorm"]}, "is a LlamaRMSNorm, and adapters go after linear layers only"),
        ({"target_modules": ["nowhere"]}, r"no layer of LlamaForCausalLM is left to adapt.*\{'nowhere'\}"),
        ({"layers_to_transform": [7]}, r"no layer .*layers_to_transform=\[7\]"),
        ({"exclude_modules": ".*"}, "no layer .*exclude_modules='.*'"),
    ],
)
def test_bad_settings_are_refused_before_the_model_is_changed(others: dict, message: str) -> None:
    base = tiny_llama()
    names = {name: type(module) for name, module in base.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    with pytest.raises(ValueError, match=message):
        adapted(base, **others)
    assert {name: type(module) for name, module in base.named_modules()} == names
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == flags
    model = adapted(base)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", settings(**({"task_type": "CAUSAL_LM"} | others)))
    assert set(model.state_dict()) == before
    assert list(model.peft_config) == ["default"]


def test_layers_that_torch_does_not_call_are_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)

    with pytest.raises(
        ValueError, match=r"'attention\.out_proj' lies inside 'attention', a MultiheadAttention of torch"
    ):
        get_peft_model(Attention(), settings(target_modules=["out_proj"]))
    encoder = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(16, 2, 32)})
    with pytest.raises(ValueError, match=r"'layer\.linear2' lies inside 'layer', a TransformerEncoderLayer"):
        get_peft_model(encoder, settings(target_modules=["linear2"]))
