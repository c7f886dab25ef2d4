"""Weights: reading, writing, formats of others."""
