"""FlexTok in JAX: images as 1 to 256 ordered discrete tokens, coarse to fine (arXiv 2502.13967)."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["ARGenerator", "FlexTok", "__version__", "load", "load_ar"]


def __getattr__(name: str) -> Any:
  # Imported at the first use: commands set up jax before it starts.
  if name in ("FlexTok", "load"):
    from flextok_jax.inference import tokenizer as api

    return getattr(api, name)
  if name in ("ARGenerator", "load_ar"):
    from flextok_jax.inference import generator as generation

    return getattr(generation, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
