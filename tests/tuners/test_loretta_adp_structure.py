"""LoRETTA_adp: where adapters and layer norms are in each family of models, and that each of them runs."""

from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import BertConfig

from peft_dynamic.hosts.blocks import find_norms
from peft_dynamic.tuners.loretta_adp import TensorTrainLinear
from peft_dynamic.tuners.loretta_adp.structure import find_targets
from tests.conformance.cases import perturb
from tests.tuners.common import rows
from tests.tuners.loretta_adp import SIZES, SMALL, adapted, layers, logits, settings, step, trainable, trains

ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


FAMILIES: dict[str, tuple[str, Any, list[str], list[str]]] = {
    # model class, configuration, outputs in the first block (or encoder and decoder), the reference's where they differ
    "bert": (
        "BertForMaskedLM",
        lambda: BertConfig(**SIZES),
        ["bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.output.dense"],
        [],
    ),
    "bert decoder": (
        "BertLMHeadModel",
        lambda: BertConfig(**SIZES, is_decoder=True, add_cross_attention=True),
        [
            "bert.encoder.layer.0.attention.output.dense",
            "bert.encoder.layer.0.crossattention.output.dense",
            "bert.encoder.layer.0.output.dense",
        ],
        [],
    ),
    "roberta": (
        "RobertaForSequenceClassification",
        lambda: transformers.RobertaConfig(**SIZES),
        ["roberta.encoder.layer.0.attention.output.dense", "roberta.encoder.layer.0.output.dense"],
        [],
    ),
    "deberta": (
        "DebertaForSequenceClassification",
        lambda: transformers.DebertaConfig(**SIZES, relative_attention=True, pos_att_type="c2p|p2c"),
        ["deberta.encoder.layer.0.attention.output.dense", "deberta.encoder.layer.0.output.dense"],
        [],
    ),
    "deberta v2": (
        "DebertaV2ForSequenceClassification",
        lambda: transformers.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type="c2p|p2c"),
        ["deberta.encoder.layer.0.attention.output.dense", "deberta.encoder.layer.0.output.dense"],
        [],
    ),
    "electra": (
        "ElectraForSequenceClassification",
        lambda: transformers.ElectraConfig(**SIZES, embedding_size=32),
        ["electra.encoder.layer.0.attention.output.dense", "electra.encoder.layer.0.output.dense"],
        [],
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        lambda: transformers.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        ["distilbert.transformer.layer.0.attention.out_lin", "distilbert.transformer.layer.0.ffn.lin2"],
        [],
    ),
    "albert": (
        "AlbertForSequenceClassification",
        lambda: transformers.AlbertConfig(**SIZES, embedding_size=16),
        [
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
        ],
        [],
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        lambda: transformers.ModernBertConfig(
            **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        ),
        ["model.layers.0.attn.Wo", "model.layers.0.mlp.Wo"],
        [],
    ),
    **{
        family: (
            f"{family}ForCausalLM",
            lambda family=family: getattr(transformers, f"{family}Config")(
                **SIZES, num_key_value_heads=2, pad_token_id=0
            ),
            ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"],
            ["<model.layers.0.mlp.gate_proj", "<model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"],
        )
        for family in ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Olmo", "Olmo2")
    },
    "phi": (
        "PhiForCausalLM",
        lambda: transformers.PhiConfig(**SIZES),
        ["model.layers.0.self_attn.dense", "model.layers.0.mlp.fc2"],
        ["<model.layers.0.mlp.fc1", "model.layers.0.mlp.fc2"],
    ),
    "phi3": (  # its o_proj stands before qkv_proj
        "Phi3ForCausalLM",
        lambda: transformers.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
        ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"],
        ["<model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj"],
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
        ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"],
        ["<transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"],
    ),
    "opt": (
        "OPTForCausalLM",
        lambda: transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
        ["model.decoder.layers.0.self_attn.out_proj", "model.decoder.layers.0.fc2"],
        ["<model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"],
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        lambda: transformers.GPTNeoXConfig(**SIZES),
        ["gpt_neox.layers.0.attention.dense", "gpt_neox.layers.0.mlp.dense_4h_to_h"],
        ["<gpt_neox.layers.0.mlp.dense_h_to_4h", "gpt_neox.layers.0.mlp.dense_4h_to_h"],
    ),
    "falcon": (
        "FalconForCausalLM",
        lambda: transformers.FalconConfig(**SMALL),
        ["transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_4h_to_h"],
        ["<transformer.h.0.mlp.dense_h_to_4h", "transformer.h.0.mlp.dense_4h_to_h"],
    ),
    "bloom": (
        "BloomForCausalLM",
        lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        ["transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_4h_to_h"],
        ["<transformer.h.0.mlp.dense_h_to_4h", "transformer.h.0.mlp.dense_4h_to_h"],
    ),
    "t5": (
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(**T5),
        [
            "encoder.block.0.layer.0.SelfAttention.o",
            "encoder.block.0.layer.1.DenseReluDense.wo",
            "decoder.block.0.layer.0.SelfAttention.o",
            "decoder.block.0.layer.1.EncDecAttention.o",
            "decoder.block.0.layer.2.DenseReluDense.wo",
        ],
        [
            "<encoder.block.0.layer.1.DenseReluDense.wi",
            "encoder.block.0.layer.1.DenseReluDense.wo",
            "<decoder.block.0.layer.2.DenseReluDense.wi",
            "decoder.block.0.layer.2.DenseReluDense.wo",
        ],
    ),
    "t5 gated": (
        "T5ForSequenceClassification",
        lambda: transformers.T5Config(**T5, feed_forward_proj="gated-gelu", decoder_start_token_id=0),
        [
            "transformer.encoder.block.0.layer.0.SelfAttention.o",
            "transformer.encoder.block.0.layer.1.DenseReluDense.wo",
            "transformer.decoder.block.0.layer.0.SelfAttention.o",
            "transformer.decoder.block.0.layer.1.EncDecAttention.o",
            "transformer.decoder.block.0.layer.2.DenseReluDense.wo",
        ],
        [
            "<transformer.encoder.block.0.layer.1.DenseReluDense.wi_0",
            "<transformer.encoder.block.0.layer.1.DenseReluDense.wi_1",
            "transformer.encoder.block.0.layer.1.DenseReluDense.wo",
            "<transformer.decoder.block.0.layer.2.DenseReluDense.wi_0",
            "<transformer.decoder.block.0.layer.2.DenseReluDense.wi_1",
            "transformer.decoder.block.0.layer.2.DenseReluDense.wo",
        ],
    ),
    "bart": (
        "BartForSequenceClassification",
        lambda: transformers.BartConfig(**ENCODER_DECODER),
        [
            "model.encoder.layers.0.self_attn.out_proj",
            "model.encoder.layers.0.fc2",
            "model.decoder.layers.0.self_attn.out_proj",
            "model.decoder.layers.0.encoder_attn.out_proj",
            "model.decoder.layers.0.fc2",
        ],
        [
            "<model.encoder.layers.0.fc1",
            "model.encoder.layers.0.fc2",
            "<model.decoder.layers.0.fc1",
            "model.decoder.layers.0.fc2",
        ],
    ),
}


def on_meta(family: str) -> nn.Module:
    name, config, _, _ = FAMILIES[family]
    with torch.device("meta"):
        return getattr(transformers, name)(config())


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_after_attention_and_feed_forward_in_every_family(family: str) -> None:
    model = on_meta(family)
    _, _, paper, reference = FAMILIES[family]
    for placement, first in (("paper", paper), ("reference", reference or paper)):
        found = [f"{'<' if target.before else ''}{target.name}" for target in find_targets(model, placement)]
        blocks = 1 if family == "albert" else 2  # ALBERT has one block for all its layers
        assert len(found) == blocks * len(first)
        # the first block; of encoder and decoder where there are two, which both count from 0
        assert [name for name in found if name in first] == first
        if blocks == 2:
            second = [name for name in found if name not in first]
            assert [name.replace(".1.", ".0.", 1) for name in second] == first


@pytest.mark.parametrize("family", FAMILIES)
def test_the_structure_is_the_same_through_adapters(family: str) -> None:
    model = on_meta(family)
    before = find_targets(model, "paper"), find_norms(model)
    tuned = get_peft_model(model, settings()).base_model
    assert (find_targets(tuned.model, "paper"), find_norms(tuned.model)) == before
    assert len(layers(tuned)) == len(before[0])
    assert sum(isinstance(module, ModulesToSaveWrapper) for module in tuned.modules()) == len(before[1])


@pytest.mark.parametrize(
    ("family", "number"),
    [
        ("bert", 2 * 2 + 2),  # two a block, one at the embeddings, one in the language model head
        ("deberta", 2 * 2 + 1),
        ("Llama", 2 * 2 + 1),
        ("Qwen3", 4 * 2 + 1),  # of queries and keys too
        ("gpt2", 2 * 2 + 1),  # ln_1, ln_2, ln_f
        ("t5", 2 * 2 + 1 + 3 * 2 + 1),
        ("Olmo", 0),  # they have no parameters
    ],
)
def test_layer_norms_are_found_by_name_or_type(family: str, number: int) -> None:
    assert len(find_norms(on_meta(family))) == number


class Block(nn.Module):
    """A block whose attention registers its linear layers in the order given."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.mixer = nn.ModuleDict({"first": nn.Linear(8, 16), "second": nn.Linear(16, 8)})
        self.attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in order})


def test_the_output_of_an_attention_is_told_by_name_where_the_order_does_not() -> None:
    def found(order: list[str]) -> list[str]:
        model = nn.ModuleDict({"blocks": nn.ModuleList([Block(order)])})
        return [target.name for target in find_targets(model, "paper")]

    for order in (["q_proj", "k_proj", "v_proj", "merge"], ["merge", "q_proj", "k_proj", "v_proj"]):
        assert found(order) == ["blocks.0.attn.merge", "blocks.0.mixer.second"]
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn has no output projection, .* blocks\.0\.mixer\.second \(8\)"
    ):
        found(["query", "key", "value"])


@pytest.mark.parametrize(
    ("name", "others", "reason"),
    [
        (
            "Mixtral",
            SIZES | {"num_key_value_heads": 2, "num_local_experts": 2},
            r"layers\.0\.mlp\.experts is a mixture of experts",
        ),
        ("Mamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}, "MambaForCausalLM has none"),
    ],
)
def test_a_structure_that_does_not_tell_is_refused_with_the_reason(name: str, others: dict, reason: str) -> None:
    config = getattr(transformers, f"{name}Config")(**others)
    with torch.device("meta"):
        base = getattr(transformers, f"{name}ForCausalLM")(config)
    before = dict(base.named_modules())
    with pytest.raises(ValueError, match=rf"{reason}.*target_modules=\[\.\.\.\]"):
        get_peft_model(base, settings())
    assert dict(base.named_modules()) == before


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    given = {"input_ids": rows(2, 6).clamp(min=3)}
    if model.config.is_encoder_decoder and "Classification" not in type(model).__name__:
        given["decoder_input_ids"] = rows(2, 4, seed=5)
    if getattr(model.config, "add_cross_attention", False):
        given["encoder_hidden_states"] = torch.randn(2, 3, 32)
    if "Classification" in type(model).__name__:
        given["input_ids"][:, -1] = model.config.eos_token_id or 0  # BART and T5 pool there
    return given


@pytest.mark.filterwarnings("ignore:.*MaskedLM:UserWarning")
@pytest.mark.parametrize("placement", ["paper", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_with_adapters(family: str, placement: str) -> None:
    torch.manual_seed(0)
    name, config, _, _ = FAMILIES[family]
    base = getattr(transformers, name)(config()).eval()
    given = inputs_of(base)
    with torch.no_grad():
        expected = base(**given).logits
        task = "SEQ_CLS" if "Classification" in name else None
        model = get_peft_model(base, settings(placement=placement, task_type=task, tensorize_classifier=False)).eval()
        assert torch.equal(model(**given).logits, expected)
    model(**given).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())
    perturb(model)
    with torch.no_grad():
        assert not torch.allclose(model(**given).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(**given).logits, expected)


@pytest.mark.parametrize(
    ("family", "dense"),
    [
        ("roberta", "classifier.modules_to_save.default.dense"),
        ("electra", "classifier.modules_to_save.default.dense"),
        ("deberta", "pooler.dense.modules_to_save.default"),
        ("distilbert", "pre_classifier.modules_to_save.default"),
        ("albert", "albert.pooler.modules_to_save.default"),
        ("t5 gated", "classification_head.modules_to_save.default.dense"),
        ("bart", "classification_head.modules_to_save.default.dense"),
    ],
)
def test_the_classifiers_dense_layer_is_a_tensor_train(family: str, dense: str) -> None:
    model = get_peft_model(on_meta(family), settings(task_type="SEQ_CLS"))
    train = model.base_model.model.get_submodule(dense)
    assert isinstance(train, TensorTrainLinear)
    assert (train.in_features, train.out_features) == (32, 32)
    assert all(parameter.requires_grad for parameter in train.parameters())
    others = [module for module in trains(model) if module.in_features == module.out_features]
    assert others == [train]


def test_a_convolution_like_linear_layer_of_gpt2() -> None:
    torch.manual_seed(0)
    _, config, _, _ = FAMILIES["gpt2"]
    base = transformers.GPT2LMHeadModel(config()).eval()
    expected = logits(base)
    model = adapted(base)
    assert torch.equal(logits(model), expected)
    step(model)
    step(model)
    assert not torch.allclose(logits(model), expected)


def test_further_modules_and_chosen_blocks() -> None:
    model = adapted(modules_to_save=["lm_head"], layers_to_transform=[1])
    assert {name.split(".")[4] for name in layers(model)} == {"1"}
    assert any("lm_head" in name for name in trainable(model))
    fewer = adapted(exclude_modules=["o_proj"])
    assert {name.rpartition(".")[2] for name in layers(fewer)} == {"down_proj"}
    named = adapted(target_modules=["q_proj", "v_proj"])
    assert {name.rpartition(".")[2] for name in layers(named)} == {"q_proj", "v_proj"}
    everywhere = adapted(target_modules="all-linear")
    assert len(layers(everywhere)) == 2 * 7
    matched = adapted(target_modules=r".*\.1\..*_proj")
    assert len(layers(matched)) == 7


def test_an_explicit_shape_is_used() -> None:
    model = adapted(tensor_shape=[4, 8, 8])
    assert {train.shape for train in trains(model)} == {(4, 8, 8)}
