"""Which exits are trained, and what is refused before any training."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

trl = pytest.importorskip("trl")
import peft
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from peft_dynamic.hosts.decoder import check_decoder, find_decoder
from peft_dynamic.trainers import SoFTConfig, SoFTTrainer
from peft_dynamic.trainers.soft.config import draw_exits, evenly_spaced
from tests.trainers.soft.common import first_batch, trainer
from tests.trainers.soft.families import build, layers_of


def config(**fields: Any) -> SoFTConfig:
    return SoFTConfig("unused", use_cpu=True, report_to=[], **fields)


@pytest.mark.parametrize(
    ("exits", "depth", "wanted"),
    [
        (None, 40, [12, 16, 20, 24, 28, 32, 36, 40]),  # the paper's
        (None, 30, [9, 12, 15, 18, 21, 24, 27, 30]),
        (None, 4, [1, 2, 3, 4]),
        (None, 2, [1, 2]),
        (8, 40, [12, 16, 20, 24, 28, 32, 36, 40]),
        (2, 40, [12, 40]),
        (1, 40, [40]),
        (3, 30, [9, 20, 30]),  # 19.5 rounded up
        ([30, 10], 30, [10, 30]),
        ("4", 40, [12, 21, 31, 40]),  # 21 1/3 and 30 2/3
        ("10,30", 30, [10, 30]),
        ("[10, 30]", 30, [10, 30]),
        ("[30]", 30, [30]),
        ("10 30", 30, [10, 30]),
    ],
)
def test_the_exits(exits: Any, depth: int, wanted: list[int]) -> None:
    made = config(exits=exits)
    assert made.trained_exits(depth) == made.evaluated_exits(depth) == wanted


@given(count=st.integers(1, 40), depth=st.integers(2, 100))
def test_evenly_spaced_exits_end_with_the_full_depth(count: int, depth: int) -> None:
    found = evenly_spaced(count, depth)
    assert found[-1] == depth
    assert found[0] >= 1
    assert found == sorted(set(found))
    if count > 1 and depth >= 2 * count:
        assert len(found) == count
        steps = [b - a for a, b in itertools.pairwise(found)]
        assert max(steps) - min(steps) <= 1


def test_drawn_exits() -> None:
    exits = [2, 4, 6, 8]
    assert draw_exits(exits, None, 0, 0) == exits
    draws = [tuple(draw_exits(exits, 2, 0, step)) for step in range(3000)]
    counts = Counter(draws)
    assert set(counts) == {(2, 4, 8), (2, 6, 8), (4, 6, 8)}
    assert all(abs(count - 1000) < 100 for count in counts.values())  # four standard deviations
    assert draws == [tuple(draw_exits(exits, 2, 0, step)) for step in range(3000)]
    assert draws != [tuple(draw_exits(exits, 2, 1, step)) for step in range(3000)]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"exits": []}, ValueError, r"exits=\[\]: must be different depths"),
        ({"exits": [0, 3]}, ValueError, r"exits=\[0, 3\]: must be different depths of at least 1"),
        ({"exits": [3, 3]}, ValueError, r"exits=\[3, 3\]: must be different"),
        ({"exits": [1.5]}, TypeError, r"exits=\[1.5\]: must be a list of depths"),
        ({"exits": True}, TypeError, "exits=True: must be a list"),
        ({"exits": 0}, ValueError, "exits=0: a count must be at least 1"),
        ({"exits": "some"}, ValueError, "exits='some': must be a count such as '8'"),
        ({"eval_exits": [3, 3]}, ValueError, r"eval_exits=\[3, 3\]: must be different"),
        ({"exits": 2, "exit_weights": [1.0]}, ValueError, r"exit_weights=\[1.0\]: must have one number .* 2 exits"),
        ({"exits": [1, 2], "exit_weights": [1.0, 0.0]}, ValueError, "each must be positive .*leave it out of exits"),
        ({"exits": [1, 2], "exit_weights": [1.0, float("nan")]}, ValueError, "each must be positive and finite"),
        ({"exit_weights": "1,2"}, TypeError, "exit_weights='1,2': must be a list of numbers"),
        ({"exits": 3, "exits_per_step": 3}, ValueError, "exits_per_step=3: besides .* 2 exits .* from 1 to 2"),
        ({"exits": 3, "exits_per_step": 0}, ValueError, "exits_per_step=0"),
        ({"exits_per_step": 1.0}, TypeError, "exits_per_step=1.0: must be an integer"),
        ({"loss_type": "dft"}, ValueError, "loss_type='dft'.*use loss_type='nll'"),
        ({"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor=0.1.*set it to 0"),
    ],
)
def test_settings_without_a_meaning(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exits": [2, 4]}, r"exits=\[2, 4\]: the full depth, 6, must be among them"),
        ({"exits": [2, 9]}, r"exits=\[2, 9\]: the model has 6 layers"),
        ({"exits": 6}, r"exits=6: a model of 6 layers has only 5 evenly spaced exits .*\[2, 3, 4, 5, 6\]"),
        ({"exits": None, "exit_weights": [1.0] * 8}, "must have one number for each of the 5 exits"),
        ({"exits": None, "exits_per_step": 5}, "from 1 to 4"),
        ({"eval_exits": [7]}, r"eval_exits=\[7\]: the model has 6 layers"),
    ],
)
def test_settings_that_do_not_fit_the_model(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **fields)


def test_trls_parser_reads_the_fields(tmp_path: Path) -> None:
    parser = trl.TrlParser(SoFTConfig)
    line = ["--output_dir", "x", "--use_cpu", "--exits", "10,30", "--exit_weights", "1", "2", "--eval_exits", "5", "30"]
    (made,) = parser.parse_args_and_config(line)
    assert (made.exits, made.exit_weights, made.eval_exits, made.exits_per_step) == ([10, 30], [1, 2], [5, 30], None)
    file = tmp_path / "soft.yaml"
    file.write_text("output_dir: x\nuse_cpu: true\nexits: [10, 20, 30]\nexits_per_step: 1\n")
    (made,) = trl.TrlParser(SoFTConfig).parse_args_and_config(["--config", str(file)])
    assert (made.exits, made.exits_per_step) == ([10, 20, 30], 1)
    file.write_text("output_dir: x\nuse_cpu: true\nexits: 8\n")
    (made,) = trl.TrlParser(SoFTConfig).parse_args_and_config(["--config", str(file)])
    assert made.exits == 8
    assert made.to_dict()["exits"] == 8


def test_every_field_of_ours_has_a_default_and_a_help() -> None:
    own = {field.name for field in dataclasses.fields(SoFTConfig)} - {f.name for f in dataclasses.fields(trl.SFTConfig)}
    defaults = {"exits": None, "exit_weights": None, "exits_per_step": None, "eval_exits": None}
    assert own == {*defaults, "exit_kd", "exit_kd_temperature"}
    for field in dataclasses.fields(SoFTConfig):
        if field.name in own:
            assert field.default == defaults.get(field.name, field.name.endswith("temperature"))
            assert field.metadata["help"]


LINEAR = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]), "lm_head"),
        (peft.LoraConfig(**LINEAR, trainable_token_indices={"lm_head": [1, 2]}), "its head is a TrainableTokens"),
        (peft.LoraConfig(**LINEAR, layers_to_transform=[4, 5]), "nothing that is trained lies in front of exit 2"),
        (
            peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[4], cpt_mask=[1], cpt_tokens_type_mask=[1]),
            "CPTConfig: .*own loss",
        ),
    ],
)
def test_adapters_that_would_not_be_trained(adapter: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, peft_config=adapter)


def test_an_adapter_in_front_of_every_exit_is_enough(tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_config=peft.LoraConfig(**LINEAR, layers_to_transform=[1]), exits=[2, 6])
    made.compute_loss(made.model, first_batch(made)).backward()
    assert all(p.grad is not None for p in made.model.parameters() if p.requires_grad)


def test_a_loss_function_of_the_users_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute_loss_func"):
        SoFTTrainer(build("llama"), config(), compute_loss_func=lambda *_: 0)


def test_a_routers_loss_is_refused_and_can_be_switched_off(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = transformers.MixtralConfig(
        **sizes, vocab_size=67, num_key_value_heads=2, num_local_experts=2, output_router_logits=True, pad_token_id=0
    )
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0.001: .*set router_aux_loss_coef=0.0"):
        trainer(tmp_path, transformers.MixtralForCausalLM(config))
    made = trainer(tmp_path, transformers.MixtralForCausalLM(config), router_aux_loss_coef=0.0)
    assert made.compute_loss(made.model, first_batch(made)).requires_grad


def test_architectures_that_have_no_such_exits() -> None:
    sizes = {"vocab_size": 67, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "pad_token_id": 0}
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=67, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration cannot be left .*an encoder beside its decoder"):
        find_decoder(t5)
    bert = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, intermediate_size=48, is_decoder=True))
    with pytest.raises(ValueError, match=r"BertLMHeadModel cannot be left .*no list of layers"):
        find_decoder(bert)
    with pytest.raises(ValueError, match=r"GPT2Model cannot be left"):
        find_decoder(transformers.GPT2Model(transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=67)))
    with pytest.raises(ValueError, match=r"Linear cannot be left .*no transformers model"):
        find_decoder(torch.nn.Linear(2, 2))
    single = build("llama")
    del layers_of(single)[1:]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be left .*a single layer"):
        find_decoder(single)
    unnamed = build("llama")
    unnamed.model.normalise = unnamed.model.norm
    del unnamed.model.norm
    with pytest.raises(ValueError, match="LlamaModel, has no final norm"):
        find_decoder(unnamed)


def test_a_model_that_does_more_after_its_layers_is_found_out() -> None:
    model = build("llama")
    decoder = find_decoder(model)
    check_decoder(decoder)
    generator = torch.get_rng_state()
    check_decoder(decoder)
    assert torch.equal(generator, torch.get_rng_state())
    plain = model.forward

    def scaled(**kwargs: Any) -> Any:
        output = plain(**kwargs)
        output.logits = output.logits * 1.1
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be left .*logits are not head\(norm\("):
        check_decoder(decoder)


def test_several_gpus_without_a_launcher_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SoFTConfig, "n_gpu", property(lambda self: 2))
    monkeypatch.setattr(transformers.Trainer, "_wrap_model", lambda self, model, **_: model)
    with pytest.raises(ValueError, match=r"SoFTTrainer does not support `nn.DataParallel`"):
        trainer(tmp_path)
