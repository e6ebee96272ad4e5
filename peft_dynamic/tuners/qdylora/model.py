"""QDyLoRA's tuner: DyLoRA's, which refuses a base model without quantised weights."""

from typing import Any

from torch import nn

from peft_dynamic.hosts.quantization import quantized_layers
from peft_dynamic.tuners.dylora.model import DyLoRAModel


class QDyLoRAModel(DyLoRAModel):
    """A quantised model with DyLoRA adapters, made by `get_peft_model(model, QDyLoRAConfig(...))`.

    Raises:
        ValueError: the base model has no quantised layer.

    Source: Rajabzadeh et al., EMNLP 2024 industry track, arXiv 2402.10462.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not quantized_layers(model):
            del self.peft_config[adapter_name]
            raise ValueError(
                "QDyLoRAConfig needs a quantised base model, and this one has no quantised layer. Load it with "
                "from_pretrained(..., quantization_config=QDyLoRAConfig.quantization_config()), or use DyLoRAConfig."
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)
