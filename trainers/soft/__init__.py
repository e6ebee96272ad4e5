"""SoFT: one fine-tuning run for many depths, and leaving the model early."""

__all__: list[str] = []
