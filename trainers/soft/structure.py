"""Moved to `peft_dynamic.hosts.decoder`; the names of before are still here."""

from peft_dynamic.exits.layers import PAPER_EXITS, evenly_spaced
from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.hosts.decoder import Decoder, check_decoder, find_decoder, layer_state

__all__ = ["PAPER_EXITS", "Decoder", "base_model", "check_decoder", "evenly_spaced", "find_decoder", "layer_state"]
