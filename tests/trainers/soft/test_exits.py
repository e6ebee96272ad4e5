"""`exit_at` and `truncate_to_exit` against models whose later layers were deleted."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from peft_dynamic import DyLoRAConfig, LorettaAdpConfig
from peft_dynamic.exits.layers import exit_at, truncate_to_exit
from tests.processes import python
from tests.trainers.soft.families import DEPTH, FAMILIES, build, cut, layers_of, tokens


def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def generated(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **more)


def state(model: Any) -> dict[str, Any]:
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "class": type(layers_of(model)),
        "parts": list(layers_of(model)),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exit_is_the_model_without_its_later_layers(family: str) -> None:
    model, ids = build(family), tokens(2, 7)
    before, whole = state(model), logits(model, ids)
    for exit in (1, 4, DEPTH):
        with exit_at(model, exit) as same:
            assert same is model
            got, text = logits(model, ids), generated(model, ids)
            uncached = generated(model, ids, use_cache=False)
        reference = cut(build(family), exit)
        torch.testing.assert_close(got, logits(reference, ids), rtol=0, atol=0)
        assert torch.equal(text, generated(reference, ids))
        assert torch.equal(text, uncached)
        assert state(model) == before
    torch.testing.assert_close(logits(model, ids), whole, rtol=0, atol=0)
    assert (got - logits(cut(build(family), DEPTH - 1), ids)).abs().max() > 0.01, "a layer must matter here"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_truncated_model_is_an_ordinary_smaller_one(family: str, tmp_path: Path) -> None:
    model, ids = build(family), tokens(2, 7)
    small = truncate_to_exit(model, 3)
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, ids), logits(cut(build(family), 3), ids), rtol=0, atol=0)
    assert loaded.config.num_hidden_layers == len(layers_of(loaded)) == 3
    assert len(layers_of(model)) == model.config.num_hidden_layers == DEPTH
    assert type(layers_of(small)) is nn.ModuleList
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared, "a copy of its own"


def test_a_truncated_checkpoint_loads_in_a_process_without_this_package(tmp_path: Path) -> None:
    model, ids = build("gemma3"), tokens(2, 7)
    truncate_to_exit(model, 3).save_pretrained(tmp_path)
    with exit_at(model, 3):
        torch.save({"ids": ids, "logits": logits(model, ids), "text": generated(model, ids)}, tmp_path / "expected.pt")
    code = """
import sys, torch, transformers
folder = sys.argv[1]
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
expected = torch.load(folder + "/expected.pt")
with torch.no_grad():
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
assert torch.equal(model.generate(expected["ids"], max_new_tokens=6, do_sample=False), expected["text"])
assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
assert "peft_dynamic" not in sys.modules
"""
    python("-c", code, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_whatever_happens_the_model_is_put_back(family: str) -> None:
    model = build(family)
    before = state(model)
    with pytest.raises(RuntimeError, match="mine"), exit_at(model, 2):
        raise RuntimeError("mine")
    assert state(model) == before

    with exit_at(model, 4), exit_at(model, 2), exit_at(model, 5):  # the innermost counts, deeper or not
        assert len(layers_of(model)) == model.config.num_hidden_layers == 5
    assert state(model) == before

    def leave() -> Any:
        with exit_at(model, 3):
            yield len(layers_of(model))

    halted = leave()
    assert next(halted) == 3
    halted.close()
    assert state(model) == before

    first, second = exit_at(model, 2), exit_at(model, 4)  # ended in the order in which they began
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert len(layers_of(model)) == model.config.num_hidden_layers == 4
    second.__exit__(None, None, None)
    assert state(model) == before


def test_modes_and_weights_set_inside_reach_the_hidden_layers_too() -> None:
    model = build("llama").train()
    with exit_at(model, 2):
        model.eval()
        assert len(list(model.named_parameters())) == len(list(build("llama").named_parameters()))
    assert not any(module.training for module in model.modules())


def test_the_trial_leaves_modes_and_random_numbers_alone() -> None:
    model = build("opt").train()
    model.model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    with exit_at(model, 2):
        pass
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert [module.training for module in model.modules()] == modes


def test_an_exit_trains_its_own_layers_only() -> None:
    model = build("llama")
    with exit_at(model, 2):
        model(input_ids=tokens(1, 5), labels=tokens(1, 5)).loss.backward()
    moved = [layer.mlp.up_proj.weight.grad is not None for layer in model.model.layers]
    assert moved == [True, True, False, False, False, False]


def test_a_compiled_model_runs_the_layers_of_the_exit() -> None:
    model, ids = build("llama"), tokens(2, 7)
    compiled = torch.compile(model, backend="eager")
    whole = logits(compiled, ids)
    with exit_at(model, 2):
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids))
    torch.testing.assert_close(logits(compiled, ids), whole)
    assert (whole - logits(cut(build("llama"), 2), ids)).abs().max() > 0.01


CONFIGS = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dylora": lambda: DyLoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "loretta": lambda: LorettaAdpConfig(bottleneck=4, tensor_rank=2),
}


def adapted(kind: str, family: str = "llama") -> Any:
    torch.manual_seed(4)
    model = get_peft_model(build(family), CONFIGS[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_exit_of_an_adapted_model(kind: str) -> None:
    model, ids = adapted(kind), tokens(2, 7)
    reference = adapted(kind)
    cut(reference.get_base_model(), 3)
    with exit_at(model, 3):
        torch.testing.assert_close(logits(model, ids), logits(reference, ids), rtol=0, atol=0)
        assert torch.equal(generated(model, ids), generated(reference, ids))
        with model.disable_adapter():
            plain = logits(model, ids)
    assert (plain - logits(reference, ids)).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT, at each token of a prompt-tuned model
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_an_exit_of_a_model_with_a_trained_prompt(kind: Any) -> None:
    ids = tokens(1, 7)
    torch.manual_seed(4)
    model = get_peft_model(build("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    reference = copy.deepcopy(model)
    cut(reference.get_base_model(), 3)
    with exit_at(model, 3):
        torch.testing.assert_close(logits(model, ids), logits(reference, ids), rtol=0, atol=0)
        assert torch.equal(generated(model, ids), generated(reference, ids))
    with pytest.raises(ValueError, match="prompt cannot be merged"):
        truncate_to_exit(model, 3)


@pytest.mark.parametrize("kind", ["lora", "dylora"])
def test_adapters_are_merged_into_a_truncated_model(kind: str) -> None:
    model, ids = adapted(kind), tokens(2, 7)
    if kind == "dylora":
        model.set_rank(2)
    small = truncate_to_exit(model, 3)
    assert isinstance(small, transformers.LlamaForCausalLM)
    assert not [name for name, _ in small.named_parameters() if "lora" in name]
    with exit_at(model, 3):
        torch.testing.assert_close(logits(small, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    assert (logits(small, ids) - logits(cut(build("llama"), 3), ids)).abs().max() > 0.01


def test_an_adapter_that_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be merged.*exit_at\(model, 3\)"):
        truncate_to_exit(adapted("loretta"), 3)


@pytest.mark.parametrize(
    ("exit", "error"), [(0, ValueError), (7, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError)]
)
@pytest.mark.parametrize("function", [truncate_to_exit, lambda model, exit: exit_at(model, exit).__enter__()])
def test_what_is_no_exit_is_refused(function: Any, exit: Any, error: type[Exception]) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(error, match=f"exit={exit}"):
        function(model, exit)
    assert state(model) == before


class Counting(transformers.LlamaForCausalLM):
    """Its logits depend on how many layers there are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.config.num_hidden_layers
        return output


class Repeating(transformers.LlamaForCausalLM):
    """Runs its first layer again after the last."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        first = self.model.layers[0]
        first.register_forward_pre_hook(lambda module, args, kwargs: self.last.update(kwargs), with_kwargs=True)
        self.model.layers[-1].register_forward_hook(lambda module, args, output: first(output, **self.last))
        self.last: dict[str, Any] = {}


def test_architectures_that_would_compute_something_else_are_refused_untouched() -> None:
    config = build("llama").config
    for kind, reason in ((Counting, "with 3 layers its logits are not"), (Repeating, "run in the order")):
        torch.manual_seed(0)
        model = kind(config).eval()
        before = state(model)
        with pytest.raises(ValueError, match=f"{kind.__name__} cannot be left at an earlier layer: .*{reason}"):
            exit_at(model, 2).__enter__()
        assert state(model) == before
    encoder = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, vocab_size=30)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration cannot be left at an earlier layer"):
        exit_at(encoder, 1).__enter__()
    with pytest.raises(ValueError, match="cannot be left at an earlier layer"):
        exit_at(nn.Linear(2, 2), 1).__enter__()


def test_layers_that_depend_on_the_number_of_layers_are_not_written_to_a_checkpoint() -> None:
    config = transformers.MiniCPM3Config(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=DEPTH, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MiniCPM3ForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    with exit_at(model, 3):  # each layer as it was trained
        assert len(model.model.layers) == 3
    with pytest.raises(ValueError, match="computes its layers by their number"):
        truncate_to_exit(model, 3)
