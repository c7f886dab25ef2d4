"""Studies of a tokenizer and of a generator."""
