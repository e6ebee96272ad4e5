"""Every field of LoraConfig works or is refused by name; every bad value fails at construction and says what to do."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.config import ArrowConfig, CordaConfig, EvaConfig, KasaConfig, LoraGAConfig

from peft_dynamic import DyLoRAConfig, QDyLoRAConfig

# What becomes of each field of PEFT's LoraConfig; one that PEFT adds later fails the test below until it is decided.
WORKS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "trainable_token_indices", "layer_replication", "runtime_config", "lora_bias", "target_parameters",
    "ensure_weight_tying", "qalora_group_size",
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "use_rslora": True,
    "use_dora": True,
    "use_qalora": True,
    "use_bdlora": {"target_modules_bd_a": ["a"], "nblocks": 2},
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [1],
    "monteclora_config": {"num_samples": 2},
    "arrow_config": ArrowConfig(),
    "kasa_config": KasaConfig(),
    "megatron_config": {"a": 1},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": EvaConfig(),
    "corda_config": CordaConfig(),
    "lora_ga_config": LoraGAConfig(),
}


def test_each_field_of_loraconfig_is_decided() -> None:
    assert {field.name for field in fields(LoraConfig)} == WORKS | REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_fields_are_named_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match=f"DyLoRAConfig does not support {name}=.*: ...") as error:
        DyLoRAConfig(target_modules=["a"], **{name: REFUSED[name]})
    assert len(str(error.value).rpartition(": ")[2]) > 20


@pytest.mark.parametrize("value", ["orthogonal", "pissa", "pissa_niter_4", "olora", "eva", "corda", "lora_ga", "mica"])
def test_inits_that_start_from_another_model_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="does not support init_lora_weights="):
        DyLoRAConfig(init_lora_weights=value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"r": "8"}, "r must be an int, got '8'"),
        ({"r": True}, "r must be an int, got True"),
        ({"r": 8.0}, "r must be an int, got 8.0"),
        ({"lora_alpha": 0}, "lora_alpha must be a number above 0"),
        ({"ranks": "1,2"}, "ranks must be a list of ints"),
        ({"ranks": [1, 2.5, 8]}, "ranks must be a list of ints"),
        ({"ranks": []}, "ranks must be strictly increasing"),
        ({"ranks": [0, 8]}, "start at 1 or above"),
        ({"ranks": [2, 2, 8]}, "drop duplicates"),
        ({"ranks": [4, 2, 8]}, "Sort the list"),
        ({"ranks": [1, 2, 4]}, "the largest of ranks must equal r, got .* Pass r=4"),
        ({"rank_pattern": {"q": 16}}, "rank_pattern caps a module's rank.*got 16 for 'q'"),
        ({"rank_sampling": "sometimes"}, "rank_sampling must be 'mostly_full'"),
        ({"rank_sampling": 3}, "rank_sampling must be a name or a list"),
        ({"rank_sampling": [1.0]}, "one number per rank"),
        ({"ranks": [1, 8], "rank_sampling": [0, 0]}, "not all 0"),
        ({"ranks": [1, 8], "rank_sampling": [-1, 2]}, "at least 0"),
        ({"ranks": [1, 8], "rank_sampling": [float("nan"), 2]}, "finite"),
        ({"geometric_p": 0}, "geometric_p must be a number between 0 and 1"),
        ({"geometric_p": 1}, "geometric_p must be a number between 0 and 1"),
        ({"update": "half"}, "update must be 'nested' or 'frozen'"),
        ({"update": "frozen"}, "Pass truncation='prefix'"),
        ({"truncation": "qr"}, "truncation must be 'svd' or 'prefix'"),
        ({"scaling": "alpha"}, "scaling must be one of"),
        ({"rank_seed": "x"}, "rank_seed must be an int"),
    ],
)
def test_bad_values_name_the_argument_and_the_fix(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        DyLoRAConfig(**settings)


increasing = st.sets(st.integers(1, 64), min_size=1, max_size=8).map(sorted)


@given(
    ranks=increasing,
    scaling=st.sampled_from(["alpha/b", "alpha/r", "alpha/sqrt(b)", "alpha/sqrt(r*b)"]),
    alpha=st.floats(0.1, 256),
    sampling=st.sampled_from(["uniform", "geometric", "mostly_full", "weights"]),
)
def test_every_valid_config_survives_a_save(
    tmp_path_factory: Any, ranks: Any, scaling: str, alpha: Any, sampling: str
) -> None:
    weights = [float(i) for i in range(1, len(ranks) + 1)] if sampling == "weights" else sampling
    config = DyLoRAConfig(r=ranks[-1], ranks=ranks, scaling=scaling, lora_alpha=alpha, rank_sampling=weights)
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    loaded = PeftConfig.from_pretrained(folder)
    assert type(loaded) is DyLoRAConfig
    assert loaded.to_dict() == config.to_dict()
    assert loaded.trained_ranks == tuple(ranks)


@given(
    ranks=st.lists(
        st.one_of(st.integers(-3, 20), st.floats(), st.text(max_size=2), st.none(), st.booleans()), max_size=5
    ),
    r=st.one_of(st.integers(-3, 20), st.floats(), st.text(max_size=2), st.none(), st.booleans()),
)
def test_any_ranks_work_or_fail_with_a_message_that_names_them(ranks: list, r: Any) -> None:
    valid = (
        type(r) is int
        and all(type(rank) is int for rank in ranks)
        and bool(ranks)
        and ranks == sorted(set(ranks))
        and ranks[0] >= 1
        and ranks[-1] == r
    )
    if valid:
        assert DyLoRAConfig(r=r, ranks=ranks).trained_ranks == tuple(ranks)
        return
    with pytest.raises((ValueError, TypeError), match=r"^DyLoRAConfig: (r|ranks|the largest of ranks) must"):
        DyLoRAConfig(r=r, ranks=ranks)


def test_the_papers_rules_by_name() -> None:
    config = DyLoRAConfig.paper(r=4)
    assert (config.truncation, config.scaling, config.rank_sampling) == ("prefix", "alpha/b", "uniform")
    assert config.trained_ranks == (1, 2, 3, 4)
    assert DyLoRAConfig.paper(r=4, update="frozen").update == "frozen"


def test_qdylora_has_the_papers_list_of_ranks() -> None:
    assert QDyLoRAConfig().trained_ranks == (1, 2, 4, 8, 16, 32, 64)
    assert QDyLoRAConfig(r=12).trained_ranks == (1, 2, 4, 8, 12)
    assert QDyLoRAConfig(r=1).trained_ranks == (1,)
    assert QDyLoRAConfig(r=8, ranks=[3, 8]).trained_ranks == (3, 8)
    with pytest.raises(TypeError, match="QDyLoRAConfig: r must be an int"):
        QDyLoRAConfig(r="64")


@pytest.mark.parametrize(
    ("text", "message"), [('"r": "8"', "r must be an int"), ('"ranks": 4', "ranks must be a list")]
)
def test_a_config_file_with_a_wrong_type_is_a_clear_error(tmp_path: Any, text: str, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "DYLORA", ' + text + "}")
    with pytest.raises(TypeError, match=message):
        PeftConfig.from_pretrained(tmp_path)
