"""Settings and prompts that would change the text without a word: honoured, or refused by name."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from peft_dynamic.exits.prompts import check_generation_config
from peft_dynamic.trainers import generate_adaptive, generate_speculative
from tests.trainers.soft.families import build

WAYS: dict[str, Any] = {
    "speculative": lambda model, ids, **kw: generate_speculative(model, ids, exit=3, max_new_tokens=4, **kw).sequences,
    "adaptive": lambda model, ids, **kw: (
        generate_adaptive(model, ids, thresholds={3: 2.0}, max_new_tokens=4, **kw).sequences
    ),
}
CHANGES = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[5]],
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "forced_eos_token_id": 1,
    "forced_bos_token_id": 1,
    "min_length": 9,
    "min_new_tokens": 3,
    "num_beams": 4,
    "penalty_alpha": 0.6,
    "exponential_decay_length_penalty": [5, 1.1],
    "guidance_scale": 1.5,
    "encoder_repetition_penalty": 1.2,
    "stop_strings": ["x"],
    "max_time": 1.0,
    "sequence_bias": [[[5], 1.0]],
    "remove_invalid_values": True,
    "token_healing": True,
}
HARMLESS = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "do_sample": True, "max_length": 99, "use_cache": True}
HARMLESS |= {"repetition_penalty": 1.0, "num_beams": 1, "min_length": 0, "no_repeat_ngram_size": 0}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("way", WAYS)
def test_what_would_change_the_text_is_refused(way: str, name: str) -> None:
    model, ids = build("llama"), torch.tensor([[4, 5, 6]])
    setattr(model.generation_config, name, CHANGES[name])
    with pytest.raises(ValueError, match=f"the model's generation config has {name}="):
        WAYS[way](model, ids)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_in_greedy_decoding_is_taken(name: str) -> None:
    config = GenerationConfig()
    setattr(config, name, HARMLESS[name])
    check_generation_config(config, "")


def test_a_field_that_nobody_knows_is_refused() -> None:
    config = GenerationConfig()
    config.some_new_penalty = 0.5
    with pytest.raises(ValueError, match=r"some_new_penalty=0\.5.*Do this\."):
        check_generation_config(config, "Do this.")


def test_the_fields_of_generation_configs_are_those_that_we_know() -> None:
    """A new one is refused where it is set. This test says that it is time to read what it does."""
    known = {*CHANGES, *HARMLESS, "use_mtp", "early_stopping", "max_new_tokens", "cache_implementation", "cache_config"}
    known |= {"max_cache_len", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "length_penalty"}
    known |= {"renormalize_logits", "watermarking_config", "num_return_sequences", "output_attentions"}
    known |= {"output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id"}
    known |= {"bos_token_id", "eos_token_id", "encoder_no_repeat_ngram_size", "decoder_start_token_id", "is_assistant"}
    known |= {"num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"}
    known |= {"prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"}
    known |= {"target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config"}
    known |= {"disable_compile", "continuous_batching_config", "low_memory", "dola_layers", "diversity_penalty"}
    known |= {"num_beam_groups", "constraints", "force_words_ids", "prefill_chunk_size", "_from_model_config"}
    assert set(GenerationConfig().to_dict()) - {"transformers_version"} == known


def test_a_processor_of_the_users_own_takes_the_place_of_the_setting() -> None:
    model, ids = build("llama"), torch.tensor([[4, 5, 6]])
    model.generation_config.repetition_penalty = 1.3
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    processor = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    assert torch.equal(WAYS["adaptive"](model, ids, logits_processor=processor), expected)


@pytest.mark.parametrize("pad_is_end", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_padding_without_a_mask_is_refused(way: str, pad_is_end: bool) -> None:
    model = build("llama")
    pad = 2
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = pad, 1
    model.generation_config.eos_token_id = pad if pad_is_end else 3
    padded = torch.tensor([[pad, pad, 5, 6], [4, 5, 6, 7]])
    with pytest.raises(ValueError, match="attention_mask=None: the prompts begin with padding"):
        WAYS[way](model, padded)
    with pytest.raises(ValueError, match="attention_mask=None: the prompts begin with padding"):
        WAYS[way](model, padded[:1])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(WAYS[way](model, padded, attention_mask=mask)[:, :5], expected[:, :5])
    assert WAYS[way](model, padded, attention_mask=torch.ones_like(padded)).shape[0] == 2  # it is text, they say


@pytest.mark.parametrize("way", WAYS)
def test_a_beginning_that_is_also_the_padding_is_a_beginning(way: str) -> None:
    """GPT-2's one special token: in front of every prompt it is text, twice or in front of some it is padding."""
    model = build("llama")
    config = model.generation_config
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 2
    text = torch.tensor([[2, 5, 6, 7], [2, 4, 5, 6]])
    expected = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=4, do_sample=False)
    assert torch.equal(WAYS[way](model, text), expected)
    for padded in ([[2, 5, 6, 7], [4, 4, 5, 6]], [[2, 2, 6, 7], [2, 4, 5, 6]]):
        with pytest.raises(ValueError, match="the prompts begin with padding"):
            WAYS[way](model, torch.tensor(padded))
