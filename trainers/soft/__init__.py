"""SoFT: one fine-tuning run for many depths, and leaving the model early.

The modules are imported one by one, by `peft_dynamic.trainers`: only training needs TRL.
"""
