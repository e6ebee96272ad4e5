"""One folder per method, each in PEFT's own shape: config, layer, model."""
