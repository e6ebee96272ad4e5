"""`python -m peft_dynamic.cli` is `peft-dynamic`."""

from peft_dynamic.cli import main

main()
