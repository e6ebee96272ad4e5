"""Fusion-in-Decoder around any checkpoint of the T5 family: passages are encoded apart and meet in the decoder.

Notable: the model is a T5 with the same weights and names, and is saved as one. What differs is the shape of its
inputs. With (batch, passages, tokens) it encodes each passage by itself and gives the decoder all of them side by side.
With (batch, tokens) it is the T5 that it was. Passages that a row lacks are not encoded at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput


class FiDForConditionalGeneration:
    """A T5, Flan-T5, mT5 or umT5 that reads many passages: H = [Enc(x_1); ...; Enc(x_N)], answer ~ Dec(. | H).

        model = FiDForConditionalGeneration.from_pretrained("google/flan-t5-small")
        batch = FiDDataCollator(tokenizer)(rows)          # (batch, passages, tokens)
        loss = model(**batch).loss
        answers = model.generate(**batch, max_new_tokens=200, num_beams=5)

    The cost of the encoder grows with the number of passages, not with its square, as no passage attends to another.
    Relative positions are counted within a passage, so the number of a passage has to stand in its text, where
    `FiDDataCollator` puts it. On one passage it is the T5, bit for bit.

    `forward` and `generate` take what T5's take, with `input_ids` and `attention_mask` of (batch, passages, tokens). A
    passage whose mask is all 0 counts as absent. PEFT adapters go on as on any T5; prompt learning, which makes
    embeddings of its own, does not.

    Attributes:
        passages_per_pass: how many passages go through the encoder at once, None for all of the batch's. See
            `checkpoint_passages`.

    Source: G. Izacard, E. Grave: Leveraging Passage Retrieval with Generative Models for Open Domain Question
    Answering, EACL 2021, arXiv 2007.01282, section 3; used for citations by M. Tahaei et al.: Efficient Citer, NAACL
    2024 Findings. Theirs wraps the encoder's class; here the encoder's output is made before T5's own forward.
    """

    passages_per_pass: int | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint of the T5 family, one that was saved by this class or any other.

        Raises:
            ValueError: it is of another family.
        """
        if cls is not FiDForConditionalGeneration:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]  # T5's
        config = kwargs.get("config") or AutoConfig.from_pretrained(pretrained_model_name_or_path)
        return _family(config).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def from_model(model: PreTrainedModel) -> Any:
        """A loaded T5 as an FiD model: the very same module with the same weights, changed in place.

        Raises:
            ValueError: it is of another family.
        """
        if not isinstance(model, FiDForConditionalGeneration):
            family = _family(model.config)
            if type(model) is not family.__mro__[2]:
                raise ValueError(f"{type(model).__name__} has no decoder to fuse in, or one of its own: {_RULE}")
            model.__class__ = family
        return model

    def checkpoint_passages(self, passages_per_pass: int | None = 1) -> None:
        """Encode so many passages at a time, and keep only their output: the backward pass encodes them again.

        The memory of the encoder's activations is then that of one such group, however many passages there are. Without
        gradients the groups alone save memory. None turns it off. `gradient_checkpointing_enable`, which is by layer,
        can be on as well.

        Raises:
            ValueError: the number is not positive.
        """
        if passages_per_pass is not None and (not isinstance(passages_per_pass, int) or passages_per_pass < 1):
            raise ValueError(f"passages_per_pass={passages_per_pass!r}: a positive int, or None for all at once.")
        self.passages_per_pass = passages_per_pass

    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # (batch, passages, tokens)
        attention_mask: torch.Tensor | None = None,  # (batch, passages, tokens)
        *,
        labels: torch.Tensor | None = None,  # (batch, answer tokens)
        encoder_outputs: Any = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """T5's forward over all passages; the loss is the answer tokens' mean, or their sum by `num_items_in_batch`."""
        if encoder_outputs is None:
            encoder_outputs, input_ids, attention_mask = self._encode(input_ids, attention_mask, kwargs)
        outputs = super().forward(  # type: ignore[misc]  # T5's
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            encoder_outputs=encoder_outputs,
            **kwargs,
        )
        if num_items_in_batch is not None and labels is not None:
            # Trainer asks for this under gradient accumulation; T5 would ignore it.
            outputs.loss = outputs.loss * ((labels != -100).sum() / num_items_in_batch)
        return outputs

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """T5's generate over all passages, with any way of decoding that it has."""
        given = kwargs.pop("input_ids", None)
        inputs = given if inputs is None else inputs
        if kwargs.get("encoder_outputs") is None and inputs is not None and inputs.dim() == 3:
            encoded, _, mask = self._encode(inputs, kwargs.pop("attention_mask", None), kwargs)
            kwargs |= {"encoder_outputs": encoded, "attention_mask": mask}
            inputs = None
        return super().generate(inputs, **kwargs)  # type: ignore[misc]  # T5's

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Save as an ordinary T5: its config names T5's class."""
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # T5's
        path = Path(save_directory) / "config.json"
        if path.is_file() and kwargs.get("is_main_process", True):
            config = json.loads(path.read_text(encoding="utf-8"))
            config["architectures"] = [type(self).__mro__[2].__name__]
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return result

    def _encode(
        self, ids: torch.Tensor | None, mask: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
        """Encoder output, ids and mask for T5's forward: with ids of two dimensions as they came."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None and (embeds.dim() == 4 or (mask is not None and mask.dim() == 3)):
            raise ValueError(
                "passages have to come as input_ids: inputs_embeds, and prompt learning, do not work here."
            )
        if ids is None or ids.dim() == 2:
            return None, ids, mask
        batch, passages, tokens = _check_shapes(ids, mask)
        if mask is None:
            states = self._passes(ids.flatten(0, 1), None)
            return BaseModelOutput(last_hidden_state=states.view(batch, passages * tokens, -1)), None, None
        real = mask.flatten(0, 1).any(-1)
        if bool((~mask.flatten(1).any(1)).any()):
            raise ValueError("a row of the batch has no passage at all: its attention_mask is 0 throughout. Drop it.")
        if bool(real.all()):
            states = self._passes(ids.flatten(0, 1), mask.flatten(0, 1))
        else:
            states = self._passes(ids.flatten(0, 1)[real], mask.flatten(0, 1)[real])
            states = states.new_zeros(batch * passages, *states.shape[1:]).masked_scatter(real[:, None, None], states)
        return BaseModelOutput(last_hidden_state=states.view(batch, passages * tokens, -1)), None, mask.flatten(1)

    def _passes(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Hidden states (rows, tokens, d) of encoder inputs (rows, tokens), in one pass or several."""
        encoder = self.get_encoder()  # type: ignore[attr-defined]  # T5's

        def encode(some: torch.Tensor, its_mask: torch.Tensor | None) -> torch.Tensor:
            states: torch.Tensor = encoder(input_ids=some, attention_mask=its_mask).last_hidden_state
            return states

        if self.passages_per_pass is None:
            return encode(ids, mask)
        done = []
        for start in range(0, len(ids), self.passages_per_pass):
            part = slice(start, start + self.passages_per_pass)
            group = (ids[part], None if mask is None else mask[part])
            keeps = torch.is_grad_enabled() and self.training  # type: ignore[attr-defined]  # T5's
            done.append(checkpoint(encode, *group, use_reentrant=False) if keeps else encode(*group))
        return torch.cat(done)


def _check_shapes(ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[int, int, int]:
    if ids.dim() != 3:
        raise ValueError(f"input_ids have the shape {tuple(ids.shape)}: the rule is (batch, passages, tokens).")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has the shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: make them one."
        )
    batch, passages, tokens = ids.shape
    if not passages:
        raise ValueError("input_ids have no passages: there is nothing to read.")
    return batch, passages, tokens


class _FiDT5(FiDForConditionalGeneration, T5ForConditionalGeneration):
    pass


class _FiDMT5(FiDForConditionalGeneration, MT5ForConditionalGeneration):
    pass


class _FiDUMT5(FiDForConditionalGeneration, UMT5ForConditionalGeneration):
    pass


_FAMILIES: dict[str, type[Any]] = {"t5": _FiDT5, "mt5": _FiDMT5, "umt5": _FiDUMT5}
_RULE = f"FiD goes around checkpoints of these model types: {sorted(_FAMILIES)}."


def _family(config: Any) -> type[Any]:
    if config.model_type not in _FAMILIES:
        raise ValueError(f"the checkpoint is of the model type {config.model_type!r}. {_RULE}")
    return _FAMILIES[config.model_type]
