"""`generate_adaptive` against its definition: every exit of every token from models that are cut and have no cache."""

from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import LogitsProcessorList, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from transformers.generation import SuppressTokensLogitsProcessor, TemperatureLogitsWarper

from peft_dynamic.exits.adaptive import generate_adaptive, paper_thresholds
from peft_dynamic.exits.layers import exit_at
from peft_dynamic.exits.sections import in_sections
from tests.trainers.soft.families import DEPTH, FAMILIES, VOCABULARY, build, cut, layers_of, tokens
from tests.trainers.soft.test_exits import adapted, state

EXITS = [1, 2, 4]


class Reference:
    """The rule, written down: all exits of the whole text so far, each from a model of its own."""

    def __init__(self, family: str) -> None:
        self.models = {exit: cut(build(family), exit) for exit in [*EXITS, DEPTH]}

    def last(self, text: list[int]) -> dict[int, torch.Tensor]:
        with torch.no_grad():
            return {
                exit: model(torch.tensor([text]), use_cache=False).logits[0, -1] for exit, model in self.models.items()
            }

    def generate(
        self, prompt: list[int], thresholds: dict[int, float], count: int, eos: int | None = None
    ) -> tuple[list[int], list[int]]:
        text, exits = list(prompt), []
        for _ in range(count):
            for exit, logits in self.last(text).items():
                if exit == DEPTH or logits.softmax(-1).max() >= thresholds.get(exit, 2):
                    break
            text.append(int(logits.argmax()))
            exits.append(exit)
            if text[-1] == eos:
                break
        return text[len(prompt) :], exits

    def thresholds(self, prompt: list[int], count: int) -> dict[int, float]:
        """Some tokens of a greedy text leave at each exit, and none is close to its threshold."""
        text, seen = list(prompt), []
        for _ in range(count):
            seen.append(self.last(text))
            text.append(int(seen[-1][DEPTH].argmax()))
        found = {}
        for exit in EXITS:
            sure = sorted(float(logits[exit].softmax(-1).max()) for logits in seen)
            at = max(range(count // 2, count), key=lambda place: sure[place] - sure[place - 1])
            found[exit] = (sure[at - 1] + sure[at]) / 2
        return found


def prompts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Rows of different lengths, padded on the left."""
    texts = [tokens(length, seed=length).tolist() for length in lengths]
    longest = max(lengths)
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    return ids, (ids != 0).long(), texts


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_exits_are_those_of_the_definition(family: str) -> None:
    reference, model = Reference(family), build(family)
    before = state(model)
    ids, mask, texts = prompts([7, 4, 5])
    thresholds = reference.thresholds(texts[0], 12)
    output = generate_adaptive(model, ids, mask, thresholds=thresholds, max_new_tokens=12)
    for row, text in enumerate(texts):
        new, exits = reference.generate(text, thresholds, 12)
        assert output.sequences[row, 7:].tolist() == new
        assert output.exits[row].tolist() == exits
    assert (output.exits.diff(dim=1) > 0).any(), "a token must go deeper than the one before it"
    assert len(set(output.exits.flatten().tolist())) > 1
    assert torch.equal(output.sequences[:, :7], ids)
    assert output.mean_exit == pytest.approx(output.exits.float().mean().item())
    assert state(model) == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers_of(model))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom", "falcon-alibi"])
def test_states_that_are_filled_in_later_are_exact(family: str) -> None:
    model, ids = build(family), tokens(2, 12)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        early = cut(build(family), 2)(ids, use_cache=False).logits
        middle = cut(build(family), 4)(ids, use_cache=False).logits
    with in_sections(model, [2, 4, DEPTH], ids[:, :5]) as sections:
        torch.testing.assert_close(sections.run(0, keep=0), early[:, :5])
        for at in range(5, 9):
            sections.append(ids[:, at])
            torch.testing.assert_close(sections.run(0)[:, 0], early[:, at])
        torch.testing.assert_close(sections.run(1, keep=0), middle[:, :9])
        for at in range(9, 12):
            sections.append(ids[:, at])
            sections.run(0)
        torch.testing.assert_close(sections.run(1, keep=0), middle[:, 9:])
        torch.testing.assert_close(sections.run(2, keep=0), whole)


def test_a_token_that_leaves_early_runs_no_deeper_layer() -> None:
    model, ids = build("llama"), tokens(1, 5)
    calls = [0] * DEPTH
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, args, output, n=number: calls.__setitem__(n, calls[n] + 1))
    generate_adaptive(model, ids, thresholds={2: 0.0, 4: 0.5}, max_new_tokens=5)
    trial = calls[-1]
    calls[:] = [0] * DEPTH
    output = generate_adaptive(model, ids, thresholds={2: 0.0, 4: 0.5}, max_new_tokens=5)
    assert trial, "the first call tries the model out"
    assert calls == [5, 5, 0, 0, 0, 0]
    assert output.exits.tolist() == [[2] * 5]
    with exit_at(model, 2):
        assert torch.equal(output.sequences, model.generate(ids, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_without_exits_it_is_generate(family: str) -> None:
    model = build(family)
    ids, mask, _ = prompts([6, 3])
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    never = generate_adaptive(model, ids, mask, thresholds={2: 1.5, 3: 2}, max_new_tokens=8)
    assert torch.equal(never.sequences, plain)
    assert never.exits.eq(DEPTH).all()
    nothing = generate_adaptive(model, ids, mask, thresholds={}, max_new_tokens=8)
    assert torch.equal(nothing.sequences, plain)


def test_a_sequence_ends_at_its_end_token_and_needs_nothing_afterwards() -> None:
    reference, model = Reference("llama"), build("llama")
    ids, mask, texts = prompts([7, 4, 5])
    thresholds = reference.thresholds(texts[0], 12)
    new, _ = reference.generate(texts[1], thresholds, 12)
    eos = new[3]
    assert eos not in new[:3]
    output = generate_adaptive(
        model, ids, mask, thresholds=thresholds, max_new_tokens=12, eos_token_id=eos, pad_token_id=VOCABULARY - 1
    )
    for row, text in enumerate(texts):
        new, exits = reference.generate(text, thresholds, 12, eos)
        rest = output.exits.shape[1] - len(new)
        assert output.sequences[row, 7:].tolist() == new + [VOCABULARY - 1] * rest
        assert output.exits[row].tolist() == exits + [0] * rest
    alone = generate_adaptive(
        model, torch.tensor([texts[1]]), thresholds=thresholds, max_new_tokens=12, eos_token_id=[eos]
    )
    assert alone.sequences.shape[1] == 4 + 4, "it stops when all rows have ended"
    model.generation_config.eos_token_id = eos
    again = generate_adaptive(model, torch.tensor([texts[1]]), thresholds=thresholds, max_new_tokens=12)
    assert torch.equal(again.sequences, alone.sequences)
    on = generate_adaptive(model, torch.tensor([texts[1]]), thresholds=thresholds, max_new_tokens=6, eos_token_id=[])
    assert on.exits.shape == (1, 6)


def test_logits_processors_and_sampling() -> None:
    model, ids = build("llama"), tokens(1, 5)
    plain = generate_adaptive(model, ids, thresholds={2: 0.2}, max_new_tokens=1)
    suppressed = LogitsProcessorList([SuppressTokensLogitsProcessor([int(plain.sequences[0, -1])])])
    other = generate_adaptive(model, ids, thresholds={2: 0.2}, max_new_tokens=1, logits_processor=suppressed)
    assert other.sequences[0, -1] != plain.sequences[0, -1]
    assert torch.equal(other.exits, plain.exits), "the exit is chosen before"
    seen = []

    def note(before: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(before)
        return logits

    output = generate_adaptive(model, ids, thresholds={2: 0.2}, max_new_tokens=4, logits_processor=note)
    assert {each.shape[1] for each in seen} == {5, 6, 7, 8}, "a processor gets the new tokens too"
    assert all(torch.equal(each, output.sequences[:, : each.shape[1]]) for each in seen)
    cold = LogitsProcessorList([TemperatureLogitsWarper(1e-4)])
    drawn = generate_adaptive(model, ids, thresholds={2: 0.2}, max_new_tokens=6, do_sample=True, logits_processor=cold)
    greedy = generate_adaptive(model, ids, thresholds={2: 0.2}, max_new_tokens=6)
    assert torch.equal(drawn.sequences, greedy.sequences)
    many = ids.expand(500, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = generate_adaptive(model, many, thresholds={2: 0}, max_new_tokens=1, do_sample=True, generator=generator)
    with torch.no_grad(), exit_at(model, 2):
        expected = model(ids).logits[0, -1].softmax(-1)
    share = torch.bincount(drawn.sequences[:, -1], minlength=VOCABULARY) / 500
    assert (share - expected).abs().max() < 0.06


def test_an_exit_that_is_never_taken_costs_no_head() -> None:
    model, ids = build("llama"), tokens(1, 5)
    for threshold, calls in ((1.5, 3), (1.0, 6)):
        heads: list[int] = []
        handle = model.lm_head.register_forward_hook(lambda *_, heads=heads: heads.append(1))
        generate_adaptive(model, ids, thresholds={2: 0.2}, max_new_tokens=1)  # its trial runs are not counted
        heads.clear()
        output = generate_adaptive(model, ids, thresholds={2: threshold}, max_new_tokens=3)
        handle.remove()
        assert output.exits.tolist() == [[DEPTH] * 3]
        assert len(heads) == calls


def test_with_an_adapter() -> None:
    model, ids = adapted("dylora"), tokens(1, 5)
    with torch.no_grad():
        sure = model(ids).logits[0, -1].softmax(-1).max()
    assert sure < 0.9
    model.set_rank(2)
    never = generate_adaptive(model, ids, thresholds={2: 2}, max_new_tokens=6)
    assert torch.equal(never.sequences, model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))
    always = generate_adaptive(model, ids, thresholds={2: 0}, max_new_tokens=6)
    with exit_at(model, 2):
        assert torch.equal(always.sequences, model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))


def test_in_training_mode_dropout_stays_off_and_the_mode_is_put_back() -> None:
    model, ids = build("gpt2"), tokens(1, 5)
    expected = generate_adaptive(model, ids, thresholds={2: 0.2}, max_new_tokens=6)
    model.train()
    assert torch.equal(
        generate_adaptive(model, ids, thresholds={2: 0.2}, max_new_tokens=6).sequences, expected.sequences
    )
    assert model.training
    assert model.transformer.h[0].mlp.dropout.training


def test_after_an_error_the_model_is_what_it_was() -> None:
    model, ids = build("llama"), tokens(1, 5)
    before = state(model)

    def fail(ids: Any, logits: Any) -> Any:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        generate_adaptive(model, ids, thresholds={2: 0.2}, logits_processor=fail)
    assert state(model) == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)


def test_the_papers_thresholds_are_for_exits_at_its_depths() -> None:
    assert paper_thresholds(build("llama")) == {3: 0.9}  # of 6 layers only 0.5 is a whole number
    model = build("llama")
    config = model.config
    config.num_hidden_layers = 10
    ten = type(model)(config).eval()
    assert paper_thresholds(ten) == {3: 0.95, 4: 0.95, 5: 0.9, 6: 0.9, 7: 0.8, 8: 0.8, 9: 0.7}
    generate_adaptive(ten, tokens(1, 3), thresholds="paper", max_new_tokens=2)
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"thresholds='paper': none of the paper's depths"):
        generate_adaptive(type(model)(config), tokens(1, 3), thresholds="paper")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"thresholds": [0.5]}, TypeError, r"thresholds=\[0.5\]: must be a dict"),
        ({"thresholds": {7: 0.5}}, ValueError, "thresholds: exit=7: the model has 6 layers"),
        ({"thresholds": {6: 0.5}}, ValueError, "exit 6 is the last layer"),
        ({"thresholds": {2.0: 0.5}}, TypeError, "thresholds: exit=2.0: must be a whole number"),
        ({"thresholds": {2: -0.1}}, ValueError, r"thresholds\[2\]=-0.1: must be a probability"),
        ({"thresholds": {2: float("nan")}}, ValueError, r"thresholds\[2\]=nan"),
        ({"thresholds": {2: True}}, ValueError, r"thresholds\[2\]=True"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        ({"input_ids": [1, 2]}, TypeError, "input_ids=list"),
        ({"input_ids": torch.ones(1, 3)}, TypeError, "input_ids=Tensor"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, ValueError, r"input_ids: shape \(3,\)"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, ValueError, r"input_ids: shape \(1, 0\)"),
        ({"input_ids": torch.tensor([[0, 3]])}, ValueError, "attention_mask=None: the prompts begin with padding"),
        ({"attention_mask": torch.ones(1, 4)}, ValueError, r"attention_mask: shape \(1, 4\)"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, ValueError, "padded on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, ValueError, "padded on the left"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, ValueError, "padded on the left"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"input_ids": tokens(1, 3), "thresholds": {2: 0.5}}
    with pytest.raises(error, match=message):
        generate_adaptive(build("llama"), **{**good, **arguments})


def test_what_cannot_run_in_sections_is_refused() -> None:
    prompted = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="its adapter is a trained prompt"):
        generate_adaptive(prompted, tokens(1, 3), thresholds={2: 0.5})
    config = RecurrentGemmaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, lru_width=32
    )
    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    before = state(model)
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM cannot run its deeper layers later"):
        generate_adaptive(model, tokens(1, 3), thresholds={2: 0.5})
    assert state(model) == before
