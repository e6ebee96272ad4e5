"""Finished LoRA adapters as products: cut to any rank or budget, summed and averaged. No base model is loaded."""

from peft_dynamic.algebra.merge import average_adapters, merge_adapters
from peft_dynamic.algebra.resize import resize_adapter
from peft_dynamic.algebra.scales import learn_scales
from peft_dynamic.tuners.moments import AdapterMoments, adapter_moments

__all__ = ["AdapterMoments", "adapter_moments", "average_adapters", "learn_scales", "merge_adapters", "resize_adapter"]
