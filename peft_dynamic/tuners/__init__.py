"""PEFT tuners: one folder per method, and beside them what methods share. Importing this registers all with PEFT."""

from peft_dynamic.hosts.registry import register
from peft_dynamic.methods import METHODS

for method in METHODS.values():
    register(method.name.lower(), method.config, method.model)
