"""Evaluations of trained models: image metrics, reconstruction reports, and their pictures."""
