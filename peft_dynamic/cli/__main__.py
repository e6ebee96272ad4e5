"""`python -m peft_dynamic.cli` is `peft-dynamic`."""

from . import main

main()
