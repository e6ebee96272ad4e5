"""Rows of one batch at ranks of their own: what is refused, and how the model is afterwards."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import set_seed

from peft_dynamic import DyLoRAConfig, MoSLoRAConfig
from peft_dynamic.tuners.dylora.rows import Batch, RowCut, row_ranks
from tests.stock_cases import CASES, Mlp, build
from tests.tuners.common import a_layer, rows, tiny_llama
from tests.tuners.test_row_ranks import together
from tests.tuners.test_stock_ranks import adapted as stock
from tests.tuners.test_stock_ranks import fingerprint
from tests.tuners.test_threads import perturbed


@pytest.mark.parametrize("kind", ["dylora", "lora"])
def test_the_model_is_as_before_after_an_error(kind: str) -> None:
    model, inputs = (perturbed(), rows(2)) if kind == "dylora" else stock("llama")
    base = model.get_base_model()
    before, expected = fingerprint(base), together(model, None, inputs)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = base.model.layers[1].register_forward_pre_hook(fail)
    for call in (model, model.generate):
        with pytest.raises(KeyboardInterrupt):
            call(input_ids=inputs, ranks=[1, 2], **({} if call is model else {"max_new_tokens": 2}))
    handle.remove()
    with pytest.raises(ValueError, match=r"outside 1\.\.8"):
        together(model, [1, 9], inputs)
    assert fingerprint(base) == before
    assert "_expand_inputs_for_generation" not in base.__dict__
    assert torch.equal(together(model, None, inputs), expected)


@pytest.mark.parametrize(
    ("ranks", "kind", "message"),
    [
        (8, TypeError, "ranks=8: must be a list with a rank for each row"),
        ("8", TypeError, "ranks='8': must be a list"),
        ([], ValueError, r"ranks=\[\]: must have a rank for each row"),
        ([2], ValueError, r"ranks=\[2\] are 1, and .*_proj.* sees 2 rows"),
        ([2, 4, 8], ValueError, r"ranks=\[2, 4, 8\] are 3, and .*_proj.* sees 2 rows"),
        ([2, 9], ValueError, "rank=9 for .* is outside 1..8"),
        ([2, -1], ValueError, "rank=-1 for .* is outside 1..8"),
        ([2, 1.5], TypeError, "rank must be an int or a dict"),
        ([2, False], TypeError, "rank must be an int or a dict"),
        ([2, "8"], TypeError, "rank must be an int or a dict"),
        ([2, {"nothing": 2}], ValueError, "match no module of the adapter"),
    ],
)
def test_what_are_no_ranks(ranks: Any, kind: type[Exception], message: str) -> None:
    model = perturbed()
    with pytest.raises(kind, match=message):
        model(input_ids=rows(2), ranks=ranks)
    with pytest.raises(kind, match=message):
        model.generate(input_ids=rows(2), ranks=ranks, max_new_tokens=2)


def test_numpy_s_and_torch_s_integers() -> None:
    model = perturbed()
    expected = together(model, [1, 4], rows(2))
    for ranks in (torch.tensor([1, 4]), torch.tensor([1, 4]).numpy(), (1, 4), [*torch.tensor([1, 4]).numpy()]):
        assert torch.equal(together(model, ranks, rows(2)), expected)


def refused(model: Any, inputs: Any, message: str, ranks: Any = (1, 2), kind: type[Exception] = ValueError) -> None:
    before = copy.deepcopy([dict(vars(m).get("_scaling", {})) for m in model.modules()])
    with pytest.raises(kind, match=message):
        model(inputs, ranks=[*ranks])
    assert [dict(vars(m).get("_scaling", {})) for m in model.modules()] == before


def test_states_of_a_model_that_are_refused() -> None:
    model = perturbed()
    refused(model.train(), rows(2), "the model is in training mode")
    a_layer(model.eval()).train()
    refused(model, rows(2), "q_proj is in training mode")
    model.eval()
    with model.disable_adapter():
        refused(model, rows(2), "the adapters are disabled, at .*q_proj")
    model.merge_adapter()
    refused(model, rows(2), r"the adapter is merged into .*q_proj. Call unmerge_adapter\(\) first")
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="ranks and adapter_names: a batch takes one of the two"):
        model(input_ids=rows(2), ranks=[1, 2], adapter_names=["default", "default"])
    model.get_base_model().config.model_type = "xlnet"
    refused(model, rows(2), "the layers of xlnet have the rows of a batch in their second dimension")


@pytest.mark.parametrize("config", [DyLoRAConfig, LoraConfig])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("embedding", "emb is a LoRA layer of the kind Embedding, which does not show its rows"),
        ("experts", "experts is a LoRA layer of the kind ParamWrapper, which does not show its rows"),
        ("attention", "attention is a LoRA layer of the kind MultiheadAttention"),
        ("convolutions", "g2 is a convolution in groups"),
        ("lora_bias", "lora_bias"),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_layers_that_are_refused(case: str, message: str, config: Any) -> None:
    base, inputs = build(case)
    more = {"ranks": [2, 4, 8]} if config is DyLoRAConfig else {}
    model = get_peft_model(base, config(r=8, **more, **CASES[case].config)).eval()
    refused(model, inputs, message, [2] * len(inputs))


def test_a_row_of_the_base_model_alone_where_more_was_trained() -> None:
    for more, what in (
        ({"modules_to_save": ["head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"trainable_token_indices": {"emb": [1, 2]}}, "trainable_token_indices"),
    ):
        set_seed(0)
        model = get_peft_model(Mlp(), DyLoRAConfig(r=8, target_modules=["a"], **more)).eval()
        refused(model, torch.tensor([1, 2]), f"the base model alone, and 'default' has {what} too", [1, None])
        assert together(model, [1, 8], torch.tensor([1, 2])).isfinite().all()
    model = perturbed()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"base model alone, and \['other'\] are active beside"):
        row_ranks(model.eval(), [0, 2], "default").__enter__()


def test_methods_without_ranks_and_models_without_the_argument() -> None:
    model = get_peft_model(tiny_llama(), MoSLoRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"ranks=\[1, 2\]: .* Its adapters are of type MOSLORA"):
            call(input_ids=rows(2), ranks=[1, 2])  # before generate looks at its settings
    with pytest.raises(TypeError, match="it is an argument of a PeftModel, and LlamaForCausalLM cannot take it"):
        perturbed().get_base_model()(input_ids=rows(2), ranks=[1, 2])
    dora = get_peft_model(tiny_llama(), LoraConfig(use_dora=True, target_modules=["q_proj"])).eval()
    refused(dora, rows(2), "use_dora=True")


def test_tokens_in_one_list_have_no_rows() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, length, 8)
            return self.gate(x.flatten(0, 1))

    model = get_peft_model(Flat(), DyLoRAConfig(r=4, target_modules=["gate"])).eval()
    refused(model, torch.randn(2, 3, 8), r"gate sees 6 rows.*an expert")


def test_a_rank_that_is_changed_meanwhile_is_an_error() -> None:
    model = perturbed()
    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(lambda *_: model.set_rank(2))
    with pytest.raises(RuntimeError, match="was changed while rows have ranks of their own"):
        together(model, [1, 4], rows(2))
    handle.remove()


def test_compiled_passes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = RowCut("q_proj", torch.ones(2, 4), Batch([4, 4]), False)
    z = torch.randn(2, 3, 4)
    assert torch.equal(cut(z), z)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="rows at ranks of their own are not compiled"):
        cut(z)


def test_nested_blocks_and_a_named_adapter() -> None:
    model = perturbed()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    expected = together(model, [1, 4], rows(2))
    with torch.no_grad(), row_ranks(model, [4, 1], "default"):
        assert torch.equal(together(model, [1, 4], rows(2)), expected)
        torch.testing.assert_close(model(input_ids=rows(2)[[1, 0]]).logits, expected[[1, 0]], rtol=0, atol=1e-5)
    assert model.get_rank() == 8
