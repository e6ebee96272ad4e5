"""Pure tensor mathematics of the methods: no `nn.Module`, no PEFT, no TRL."""
