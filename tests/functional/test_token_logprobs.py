"""Log-probabilities in chunks, against the plain computation."""

import pytest
import torch

from peft_dynamic.functional import token_logprobs as module
from peft_dynamic.functional.token_logprobs import token_logprobs

FEATURES, VOCABULARY, TOKENS = 6, 11, 7


def inputs(bias: bool, dtype: torch.dtype = torch.float64) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, FEATURES), (VOCABULARY, FEATURES), (VOCABULARY,)]
    made = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return [*made[:2], made[2] if bias else None]


def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [2, 7, 128])
def test_values_and_gradients(bias: bool, scale: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    mine, plain = inputs(bias), inputs(bias)
    upstream = torch.linspace(-1, 2, TOKENS)
    found = token_logprobs(*mine, ids(), scale)
    wanted = torch.log_softmax(scale * torch.nn.functional.linear(*plain), dim=1)[torch.arange(TOKENS), ids()].float()
    torch.testing.assert_close(found, wanted)
    (found * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    for one, other in zip(mine, plain, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_is_computed_once_and_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = inputs(False)
    assert weight is not None
    weight.requires_grad_(False)
    calls = []
    real = module._logits
    monkeypatch.setattr(module, "_logits", lambda *args: calls.append(1) or real(*args))
    token_logprobs(hidden, weight, None, ids()).sum().backward()
    assert len(calls) == 1
    assert weight.grad is None


def test_nothing_of_the_size_of_tokens_times_vocabulary_is_made() -> None:
    sizes: list[int] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # as torch calls it
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    sizes.append(tensor.numel())
            return out

    tokens, vocabulary = 3 * module.CHUNK, 1000
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    with Record():
        token_logprobs(hidden, weight, None, torch.zeros(tokens, dtype=torch.long)).sum().backward()
    assert max(sizes) == module.CHUNK * vocabulary


def test_bfloat16_heads_take_any_hidden_state() -> None:
    hidden, weight, _ = inputs(False, torch.float32)
    assert hidden is not None
    assert weight is not None
    low = weight.detach().bfloat16()
    found = token_logprobs(hidden, low, None, ids())
    wanted = torch.log_softmax((hidden.bfloat16() @ low.T).float(), dim=1)[torch.arange(TOKENS), ids()]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
