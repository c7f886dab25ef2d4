"""Checkpoints and configurations of other implementations, read and written without them."""
