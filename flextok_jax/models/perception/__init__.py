"""Networks of others that evaluation and training read."""
