"""Self-speculative decoding, ours and transformers', against greedy decoding of the whole model."""

from typing import Any

import pytest
import torch

from peft_dynamic.exits.layers import exit_at
from peft_dynamic.exits.speculative import assisted_exit, generate_speculative
from tests.trainers.soft.families import DEPTH, FAMILIES, VOCABULARY, build, layers_of, tokens
from tests.trainers.soft.test_adaptive import prompts
from tests.trainers.soft.test_exits import adapted, generated, state


def agreeing(family: str) -> Any:
    """A model whose layers from the fourth on change little, so that drafts of three layers are often right."""
    model = build(family)
    with torch.no_grad():
        for layer in list(layers_of(model))[3:]:
            for parameter in layer.parameters():
                parameter.mul_(0.45 if parameter.dim() > 1 and family != "gemma" else 1)
    return model


@pytest.mark.parametrize("confidence", [0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_greedy_decoding(family: str, confidence: float) -> None:
    model = agreeing(family)
    before = state(model)
    ids, mask, texts = prompts([7, 4, 5])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False)
    output = generate_speculative(model, ids, mask, exit=3, max_new_tokens=15, draft_confidence=confidence)
    assert torch.equal(output.sequences, expected)
    assert 0 < output.acceptance < 1, "drafts must be both kept and thrown away"
    assert state(model) == before
    one = generate_speculative(model, torch.tensor([texts[1]]), exit=3, max_new_tokens=15, draft_confidence=confidence)
    assert one.sequences[0, 4:].tolist() == expected[1, 7:].tolist()


def test_rows_without_padding_get_it_when_they_keep_different_numbers_of_drafts() -> None:
    model, ids = agreeing("llama"), tokens(6, 5)
    expected = model.generate(ids, max_new_tokens=15, do_sample=False)
    output = generate_speculative(model, ids, exit=3, max_new_tokens=15, draft_confidence=0)
    assert torch.equal(output.sequences, expected)
    assert 0 < output.acceptance < 1


def test_perfect_drafts_are_all_kept_and_useless_ones_cost_one_check_a_token() -> None:
    model, ids = build("llama"), tokens(2, 5)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    perfect = generate_speculative(model, ids, exit=2, max_new_tokens=10, draft_tokens=4, draft_confidence=0)
    assert torch.equal(perfect.sequences, model.generate(ids, max_new_tokens=10, do_sample=False))
    assert (perfect.drafted, perfect.accepted, perfect.checks) == (20, 20, 2)  # 4 tokens, then 6
    unsure = generate_speculative(model, ids, exit=2, max_new_tokens=10, draft_tokens=4, draft_confidence=1)
    assert (unsure.drafted, unsure.accepted, unsure.checks) == (20, 20, 10)  # no token is that sure

    model = build("llama")
    plain = model.generate(ids, max_new_tokens=10, do_sample=False)
    poor = generate_speculative(model, ids, exit=1, max_new_tokens=10, draft_tokens=1, draft_confidence=0)
    assert torch.equal(poor.sequences, plain)
    assert poor.drafted >= poor.checks
    assert poor.checks <= 10


def test_each_layer_runs_once_for_each_token_that_it_checks() -> None:
    model, ids = agreeing("llama"), tokens(1, 5)
    generate_speculative(model, ids, exit=3, max_new_tokens=2)  # tries the model out
    seen = [0] * DEPTH
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda module, args, output, n=number: seen.__setitem__(n, seen[n] + args[0].shape[1])
        )
    output = generate_speculative(model, ids, exit=3, max_new_tokens=12, draft_confidence=0)
    assert seen == [5 - 1 + output.drafted] * DEPTH, "the prompt's last token is the first that drafts"


def test_sequences_end_at_their_end_tokens() -> None:
    model = agreeing("llama")
    ids, mask, _ = prompts([7, 4, 5])
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False)
    eos = int(plain[1, 7 + 4])
    kwargs = {"eos_token_id": eos, "pad_token_id": VOCABULARY - 1}
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False, **kwargs)
    output = generate_speculative(model, ids, mask, exit=3, max_new_tokens=15, **kwargs)
    assert (expected == VOCABULARY - 1).any()
    assert torch.equal(output.sequences, expected)


def test_with_an_adapter() -> None:
    model, ids = adapted("lora"), tokens(2, 5)
    output = generate_speculative(model, ids, exit=4, max_new_tokens=6)
    assert torch.equal(output.sequences, generated(model, ids))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gemma3", "phi", "olmo2"])
def test_transformers_own_way_is_exact_and_leaves_nothing_behind(family: str) -> None:
    model, ids = agreeing(family), tokens(1, 7)
    before, settings = state(model), model.generation_config.to_dict()
    with assisted_exit(model, 3, draft_tokens=2) as how:
        assert how == {"assistant_early_exit": 3}
        text = generated(model, ids, **how)
    assert torch.equal(text, generated(model, ids))
    assert state(model) == before
    assert model.generation_config.to_dict() == settings

    def fail(module: Any, args: Any) -> None:
        if model.config.num_hidden_layers == 3:
            raise RuntimeError("mine")

    handle = layers_of(model)[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mine"), assisted_exit(model, 3) as how:
        generated(model, ids, **how)
    handle.remove()
    assert state(model) == before


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "falcon", "bloom", "mpt", "gptj"])
def test_families_that_do_not_heed_their_configuration_are_refused_by_transformers_way_alone(family: str) -> None:
    model, ids = build(family), tokens(1, 7)
    before = state(model)
    with pytest.raises(ValueError, match=r"does not run 3 layers.*Use generate_speculative"), assisted_exit(model, 3):
        pass
    assert state(model) == before
    with exit_at(model, 3):
        generated(model, ids)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"exit": 6}, ValueError, "exit=6 is the last layer"),
        ({"exit": 0}, ValueError, "exit=0: the model has 6 layers"),
        ({"exit": "2"}, TypeError, "exit='2': must be a whole number"),
        ({"draft_tokens": 0}, ValueError, "draft_tokens=0"),
        ({"draft_tokens": 1.5}, ValueError, "draft_tokens=1.5"),
        ({"draft_confidence": 2}, ValueError, "draft_confidence=2"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens=-1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate_speculative(build("llama"), tokens(1, 3), **{"exit": 2, **arguments})
