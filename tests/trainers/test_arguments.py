"""The adapter's settings beside TRL's: from words, from a file, and what the file of a run says again."""

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("trl")
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from trl import ModelConfig, ScriptArguments, SFTConfig

from peft_dynamic import DyLoRAConfig
from peft_dynamic.trainers import AdapterParser
from peft_dynamic.trainers.arguments import adapter_fields, adapter_names
from peft_dynamic.trainers.ppo.config import PPOConfig
from peft_dynamic.trainers.soft.config import SoFTConfig

KINDS = (ScriptArguments, SFTConfig, ModelConfig)


def parsed(tmp_path: Path, *words: str, parser: Any = None) -> Any:
    parser = parser or AdapterParser(KINDS)
    return parser.parse_args_and_config(["--output_dir", str(tmp_path), "--bf16", "false", *words])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--r", "8", "--ranks", "1,2,8"], {"r": 8, "ranks": [1, 2, 8]}),
        (["--r=8", "--ranks", "1", "2", "8"], {"ranks": [1, 2, 8]}),
        (["--ranks", "4", "--r", "4"], {"ranks": [4]}),
        (["--lora_alpha", "5.25"], {"lora_alpha": 5.25}),
        (["--lora-dropout", "0.1"], {"lora_dropout": 0.1}),
        (["--target_modules", "q_proj,v_proj"], {"target_modules": {"q_proj", "v_proj"}}),
        (["--target-modules", "q_proj", "v_proj"], {"target_modules": {"q_proj", "v_proj"}}),
        (["--target_modules", "q_proj"], {"target_modules": {"q_proj"}}),
        (["--target_modules", "self_attn.q_proj"], {"target_modules": {"self_attn.q_proj"}}),
        (["--modules_to_save", "lm_head"], {"modules_to_save": ["lm_head"]}),  # of a text PEFT would take the letters
        (["--modules_to_save", "my-head"], {"modules_to_save": ["my-head"]}),
        (["--modules_to_save", "none"], {"modules_to_save": None}),
        (["--target_modules", "all-linear"], {"target_modules": "all-linear"}),
        (["--target_modules", r".*\.(q|v){1,2}_proj"], {"target_modules": r".*\.(q|v){1,2}_proj"}),
        (["--target_modules", "0,2"], {"target_modules": {"0", "2"}}),  # names of a Sequential's modules
        (["--rank_pattern", "{q_proj: 2}"], {"rank_pattern": {"q_proj": 2}}),
        (["--use_mixer"], {"use_mixer": True}),
        (["--use_mixer", "false"], {"use_mixer": False}),
        (["--init_lora_weights", "false"], {"init_lora_weights": False}),
        (["--init_lora_weights", "gaussian"], {"init_lora_weights": "gaussian"}),
        (["--rank_sampling", "none"], {"rank_sampling": "full"}),
        (["--rank_sampling", "uniform"], {"rank_sampling": "uniform"}),
        (["--layers_to_transform", "1", "--target_modules", "q_proj,k_proj"], {"layers_to_transform": [1]}),
    ],
)
def test_words_are_what_the_configuration_takes(tmp_path: Path, words: list[str], expected: dict[str, Any]) -> None:
    *_, config = parsed(tmp_path, "--adapter", "dylora", *words)
    assert isinstance(config, DyLoRAConfig)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.task_type == "CAUSAL_LM"


def test_a_file_and_what_is_written_of_it(tmp_path: Path) -> None:
    settings = {"adapter": "dylora", "r": 4, "ranks": [1, 4], "target_modules": ["0", "2"], "learning_rate": 1e-3}
    settings["rank_sampling"] = "full"
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    parser = AdapterParser(KINDS)
    _, training, _, config = parsed(tmp_path, "--config", str(tmp_path / "a.yaml"), "--r", "4", parser=parser)
    assert (config.ranks, config.target_modules, training.learning_rate) == ([1, 4], {"0", "2"}, 1e-3)
    assert parser.given == {**settings, "output_dir": str(tmp_path), "bf16": False}
    assert yaml.safe_load(yaml.safe_dump(parser.given)) == parser.given
    (tmp_path / "b.yaml").write_text("adapter: lora\nmodules_to_save: lm_head\ntarget_modules: all-linear\n")
    *_, other = parsed(tmp_path, "--config", str(tmp_path / "b.yaml"))
    assert (other.modules_to_save, other.target_modules) == (["lm_head"], "all-linear")
    # a word comes before the file
    *_, config = parsed(tmp_path, f"--config={tmp_path / 'a.yaml'}", "--ranks", "2,4")
    assert config.ranks == [2, 4]


def test_without_an_adapter_it_is_trls_parser(tmp_path: Path) -> None:
    *_, model, config = parsed(tmp_path)
    assert config is None
    *_, model, config = parsed(tmp_path, "--use_peft", "--lora_r", "3", "--lora_alpha", "6")
    assert type(config) is LoraConfig
    assert (config.r, config.lora_alpha, model.lora_alpha) == (3, 6, 6)
    *_, model, config = parsed(tmp_path, "--adapter", "lora", "--lora_alpha", "6")
    assert (config.lora_alpha, model.lora_alpha) == (6, ModelConfig().lora_alpha)


@pytest.mark.parametrize("adapter", ["LoRA", "loretta-rep", "ia3", "vera"])
def test_any_method_of_peft_can_be_named(tmp_path: Path, adapter: str) -> None:
    *_, config = parsed(tmp_path, "--adapter", adapter, "--target_modules", "q_proj,v_proj")
    assert str(config.peft_type.value).lower() == adapter.lower().replace("-", "_")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter", "dylora", "--r", "x"], "r must be an int, got 'x'"),
        (["--adapter", "dylora", "--r", "4", "8"], "r='4 8': one value is wanted"),
        (["--adapter", "dylora", "--ranks"], "ranks: a value is missing"),
        (["--adapter", "ia3", "--r", "4"], "--r is not known with the adapter ia3. It is one of --adapter dylora"),
    ],
)
def test_a_wrong_word_is_named(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        parsed(tmp_path, *words)


def test_no_setting_of_an_adapter_is_one_of_a_trainer() -> None:
    """Else an option would mean two things; ModelConfig's own LoRA is known, and anything new has to be looked at."""
    from dataclasses import fields

    shared = {"lora_alpha", "lora_dropout", "use_dora", "use_rslora"}
    others = {each.name for kind in (*KINDS, PPOConfig, SoFTConfig) for each in fields(kind) if each.init} - shared
    for name in adapter_names():
        assert not others & {*adapter_fields(name)}, name
    assert len(adapter_names()) == len(PEFT_TYPE_TO_CONFIG_MAPPING)


def test_a_parser_takes_one_adapter() -> None:
    parser = AdapterParser((SFTConfig,))
    words = ["--output_dir", "out", "--use_cpu"]
    assert parser.parse_args_and_config(words)[-1] is None
    assert parser.parse_args_and_config([*words, "--adapter", "dylora", "--ranks", "1,8"])[-1].ranks == [1, 8]
    for more in (["--adapter", "lora", "--ranks", "1,8"], []):
        with pytest.raises(ValueError, match="Make an AdapterParser for each command line"):
            parser.parse_args_and_config([*words, *more])
