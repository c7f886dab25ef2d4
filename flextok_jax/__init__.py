"""FlexTok in JAX: images as 1 to 256 ordered discrete tokens, coarse to fine (arXiv 2502.13967)."""

import importlib
import importlib.util
from pathlib import Path
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from flextok_jax.evals.pictures import show_grid, to_pil
  from flextok_jax.inference.generator import ARGenerator, load_ar
  from flextok_jax.inference.search import UniformPrior
  from flextok_jax.inference.tokenizer import FlexTok, load

__version__ = "0.1.0"
__all__ = ["ARGenerator", "FlexTok", "UniformPrior", "__version__", "load", "load_ar", "show_grid", "to_pil"]


_MODULES = {
  "FlexTok": "inference.tokenizer",
  "load": "inference.tokenizer",
  "ARGenerator": "inference.generator",
  "load_ar": "inference.generator",
  "UniformPrior": "inference.search",
  "to_pil": "evals.pictures",
  "show_grid": "evals.pictures",
}


def __dir__() -> list[str]:
  return sorted(__all__)


def __getattr__(name: str) -> Any:
  # Imported at the first use: commands set up jax before it starts.
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def _add_configs() -> None:
  """Makes configs/ of a source checkout importable as flextok_jax.configs, where an installed package has it."""
  folder = Path(__file__).parents[1] / "configs"
  if Path(__file__).with_name("configs").is_dir() or not folder.is_dir():
    return
  spec = importlib.util.spec_from_file_location(
    f"{__name__}.configs", folder / "__init__.py", submodule_search_locations=[str(folder)]
  )
  assert spec is not None
  sys.modules[spec.name] = importlib.util.module_from_spec(spec)


_add_configs()

if sys.argv and Path(sys.argv[0]).name in ("-m", "flextok-jax"):  # a command, not a program that imports this package
  from flextok_jax.core import interrupts

  interrupts.end_at_once()
