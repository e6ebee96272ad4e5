"""What is scored is what was sampled: rollouts and scores against plain computations."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    set_seed,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from peft_dynamic.trainers.ppo.completions import Completions, Draw, Generator
from peft_dynamic.trainers.ppo.scoring import Scorer, Sequences
from peft_dynamic.trainers.ppo.value_head import NAME, ValueFunction
from tests.trainers.ppo.adapters import ADAPTERS
from tests.trainers.ppo.common import EOS, tiny_policy, tokenizer

# PEFT, at each token that an adapter with virtual tokens generates
pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")

PROMPTS = [[0, 1, 2], [3], [4, 5]]


def shaken(model: Any) -> Any:
    """With every trained weight moved, so that an adapter does something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def with_value(policy: Any, width: int = 32) -> Any:
    policy.add_module(NAME, ValueFunction(width, torch.device("cpu")))
    with torch.no_grad():
        getattr(policy, NAME).head.weight.copy_(torch.linspace(-1, 1, width)[None])
        getattr(policy, NAME).head.bias.fill_(0.5)
    return policy


def generator(**settings: Any) -> Generator:
    defaults = {"stop_ids": [EOS], "stop_strings": [], "max_length": 6, "temperature": 1.0, "context": 64}
    return Generator(tokenizer(), **(defaults | settings))


def sequences(done: Completions) -> Sequences:
    return Sequences(done.ids, done.prompt_lengths, done.lengths)


@pytest.mark.parametrize("name", ADAPTERS)
def test_scores_are_the_probabilities_that_were_sampled_from(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's score is the log-probability that `generate` had for it, behind left padding and with a cache."""
    model = shaken(get_peft_model(tiny_policy(), ADAPTERS[name]()))
    policy = with_value(model.get_base_model())
    sampled: list[torch.Tensor] = []
    real = Draw.__call__

    def record(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = real(self, input_ids, scores)
        sampled.append(torch.log_softmax(scores / 0.7, dim=1).gather(1, chosen.argmax(1)[:, None])[:, 0])
        return chosen

    monkeypatch.setattr(Draw, "__call__", record)
    set_seed(3)
    for prompts in [[p] for p in PROMPTS] if model.active_peft_config.is_prompt_learning else [PROMPTS]:
        sampled.clear()
        done = generator(temperature=0.7)(model, policy, prompts, True, 8)
        logprobs, _ = Scorer(policy, 0.7)(model, sequences(done), int(done.lengths.max()))
        for row, n in enumerate(done.lengths.tolist()):
            wanted = torch.stack(sampled, dim=1)[row, :n]
            torch.testing.assert_close(logprobs[row, :n], wanted, rtol=1e-4, atol=1e-5)


def test_virtual_tokens_stay_next_to_prompts_of_other_lengths() -> None:
    model = shaken(get_peft_model(tiny_policy(), ADAPTERS["prompt-tuning"]()))
    together = generator(equal_lengths=True)(model, model.get_base_model(), PROMPTS, False, 8)
    for row, prompt in enumerate(PROMPTS):
        alone = generator()(model, model.get_base_model(), [prompt], False, 8)
        assert together.completion_ids()[row] == alone.completion_ids()[0]


def plain_scores(policy: Any, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """(n,) from the full logits of one unpadded row."""
    logits = policy(torch.tensor([prompt + completion])).logits[0].float() / temperature
    places = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return torch.log_softmax(logits[places], dim=-1)[torch.arange(len(completion)), torch.tensor(completion)]


def gpt2() -> Any:
    set_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=EOS))


def granite() -> Any:
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GraniteForCausalLM(GraniteConfig(vocab_size=17, logits_scaling=8.0, num_key_value_heads=2, **shape))


def gemma2() -> Any:
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=17, final_logit_softcapping=0.1, eos_token_id=EOS, **shape))


def adapted_head() -> Any:
    """The head is adapted too, so it is no plain matrix."""
    model = get_peft_model(tiny_policy(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    return shaken(model).get_base_model()


POLICIES = {
    "llama": (tiny_policy, True),
    "gpt2": (gpt2, True),
    "granite": (granite, True),
    "gemma2": (gemma2, False),
    "adapted head": (adapted_head, False),
}


@pytest.mark.parametrize("name", POLICIES)
def test_scores_and_values_are_those_of_unpadded_rows(name: str) -> None:
    make, direct = POLICIES[name]
    policy = with_value(make().eval())
    scorer = Scorer(policy, 0.7)
    assert scorer.direct == direct
    completions = [[7, EOS], [1, 2, 3, 4], [EOS]]
    rows = [prompt + completion for prompt, completion in zip(PROMPTS, completions, strict=True)]
    ids = torch.full((3, 9), 11)  # behind the rows stands a token that means something
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    batch = Sequences(ids, torch.tensor([3, 1, 2]), torch.tensor([2, 4, 1]))
    logprobs, values = scorer(policy, batch, 4)
    assert values is not None
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        n = len(completion)
        torch.testing.assert_close(
            logprobs[row, :n], plain_scores(policy, prompt, completion, 0.7), rtol=1e-4, atol=1e-5
        )
        assert not logprobs[row, n:].any()
        hidden = policy.base_model(torch.tensor([prompt + completion]))[0][0, len(prompt) - 1 :]
        wanted = hidden @ torch.linspace(-1, 1, 32) + 0.5
        torch.testing.assert_close(values[row, : n + 1], wanted, rtol=1e-4, atol=1e-4)
        assert not values[row, n + 1 :].any()
    assert "forward" not in policy.__dict__  # and the policy is as it was


def test_gradients_are_those_of_the_full_logits() -> None:
    model, plain = (get_peft_model(tiny_policy(), ADAPTERS["lora"]()) for _ in range(2))
    for one in (model, plain):
        shaken(one).train()
    with_value(model.get_base_model())
    batch = Sequences(torch.tensor([[0, 1, 2, 7, EOS]]), torch.tensor([3]), torch.tensor([2]))
    logprobs, _ = Scorer(model.get_base_model(), 0.7)(model, batch, 2)
    logprobs.sum().backward()
    plain_scores(plain, [0, 1, 2], [7, EOS], 0.7).sum().backward()
    other = dict(plain.named_parameters())
    compared = 0
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, other[name].grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == 12  # A and B of three layers in two blocks


def test_only_tokens_of_completions_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head sees as many positions as there are sampled tokens: no prompt, no padding."""
    from peft_dynamic.trainers.ppo import scoring

    seen: list[int] = []
    real = scoring.token_logprobs
    monkeypatch.setattr(scoring, "token_logprobs", lambda h, *args: seen.append(len(h)) or real(h, *args))
    policy = with_value(tiny_policy().eval())
    scorer = Scorer(policy, 1.0)
    policy.lm_head.register_forward_pre_hook(lambda *args: seen.append(-1))
    scorer(policy, Sequences(torch.zeros(2, 40, dtype=torch.long), torch.tensor([30, 5]), torch.tensor([2, 4])), 4)
    assert seen == [6]


def greedy_ends(ids: list[list[int]], **settings: Any) -> Completions:
    """Completions of a policy that says what stands in `ids`, whatever it is asked."""
    policy = tiny_policy()
    told = iter(range(100))

    def forward(input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        step = next(told)
        logits = torch.zeros(len(ids), input_ids.shape[1], 17)
        for row, tokens in enumerate(ids):
            logits[row, -1, tokens[step]] = 9.0
        return CausalLMOutputWithPast(logits=logits)

    policy.forward = forward
    return generator(**settings)(policy, policy, [[0]] * len(ids), False, 8)


def test_a_completion_ends_with_its_stop_token_whatever_padding_is() -> None:
    done = greedy_ends([[3, EOS, 5, 5], [EOS, 1, 1, 1], [1, 2, 3, 4]], max_length=4)
    assert done.completion_ids() == [[3, EOS], [EOS], [1, 2, 3, 4]]
    assert done.ended.tolist() == [True, True, False]


def test_the_last_possible_token_may_be_the_end() -> None:
    done = greedy_ends([[1, 2, EOS]], max_length=3)
    assert (done.lengths.tolist(), done.ended.tolist()) == ([3], [True])


def test_stop_token_id_and_stop_strings() -> None:
    done = greedy_ends([[EOS, 4, 5, 6], [1, 2, 3, 1]], stop_ids=[4], stop_strings=["cd"], max_length=4)
    assert done.completion_ids() == [[EOS, 4], [1, 2, 3]]  # letters bcd: 1, 2, 3
    assert done.ended.tolist() == [True, True]


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -1.0, 0.5]])
    set_seed(0)
    drawn = Draw(0.5)(logits, logits.expand(40_000, 5)).argmax(1)
    wanted = torch.softmax(logits[0] / 0.5, 0)
    frequency = torch.bincount(drawn, minlength=5) / 40_000
    assert frequency[2] == 0
    torch.testing.assert_close(frequency, wanted, atol=0.01, rtol=0.0)  # standard deviation up to 0.0025
    only = Draw(1.0)(logits, logits)
    assert only.exp().sum() == 1.0


def test_sampling_uses_the_whole_vocabulary_whatever_the_model_would_like() -> None:
    policy = tiny_policy(initializer_range=0.001)  # all tokens equally likely
    policy.generation_config.update(do_sample=True, top_k=1, top_p=0.1, repetition_penalty=5.0, temperature=0.01)
    before = policy.generation_config
    set_seed(0)
    done = generator(stop_ids=[], max_length=60)(policy, policy, [[0]] * 8, True, 3)
    counts = torch.bincount(torch.tensor([i for ids in done.completion_ids() for i in ids]), minlength=17)
    assert counts.sum() == 480
    assert counts.min() >= 10  # 28 on average
    assert counts.max() <= 55
    assert policy.generation_config is before


def test_conversations_and_prefilled_answers() -> None:
    made = generator()
    user = {"role": "user", "content": "ab"}
    assert made.tokenize([[user]]) == [
        [20 - 4, 0, 1, 0]
    ]  # "u" is no letter of ours: unknown; then the "a" of the answer
    assert made.tokenize([[user, {"role": "assistant", "content": "cd"}]]) == [[16, 0, 1, 0, 2, 3]]


def test_prompts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"60 tokens and max_completion_length=6 .* 64 positions.*aaaa"):
        generator().tokenize(["a", "a" * 60])
    assert len(generator().tokenize(["a" * 58])[0]) == 58
    with pytest.raises(ValueError, match="no tokens"):
        generator().tokenize([""])
