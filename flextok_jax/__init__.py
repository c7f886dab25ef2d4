"""FlexTok in JAX: images as 1 to 256 ordered discrete tokens, coarse to fine (arXiv 2502.13967)."""

__version__ = "0.1.0"
