"""Image sources, transforms and the batch pipeline."""
