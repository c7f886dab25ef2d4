"""Shards: what is written once and trained on."""
