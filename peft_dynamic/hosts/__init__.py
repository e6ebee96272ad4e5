"""What we know of torch, PEFT, transformers, TRL, bitsandbytes and accelerate: one fact a function."""
