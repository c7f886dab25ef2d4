"""Weights of perception networks: those of metrics, REPA's teacher and the text encoder."""
