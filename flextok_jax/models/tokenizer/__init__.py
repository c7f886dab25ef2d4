"""The tokenizer's networks."""
