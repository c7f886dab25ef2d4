"""Weights of the networks of others."""
