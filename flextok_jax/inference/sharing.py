"""What models share: saving, a model card, and uploads to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
import os
from pathlib import Path
import re
import tempfile
from typing import Any

import jax
from ml_collections import ConfigDict, FrozenConfigDict
import numpy as np

from flextok_jax.core import files, hub
from flextok_jax.core.tables import markdown_table
from flextok_jax.inference import validation
from flextok_jax.weights import saving

CARD = "README.md"
_SECTIONS = {  # of a config that describe a model, by its stage
  "tokenizer": ("encoder", "decoder", "tokens", "vae"),
  "distill": ("encoder", "decoder", "tokens", "vae"),
  "vae": ("vae",),
  "ar": ("ar", "text"),
}


class SharedModel:
  """A model with `params` and `config`."""

  params: Any
  config: FrozenConfigDict

  def save(self, folder: str | os.PathLike) -> None:
    """Writes a folder that can be loaded: weights.safetensors (each array in its type) and config.json."""
    saving.save_folder(validation.path("folder", folder), self.config, self.params)

  def save_pretrained(
    self,
    folder: str | os.PathLike,
    *,
    license: str = "",  # noqa: A002 the hub's name of the field
    figures: Mapping[str, Any] | None = None,
    push_to_hub: str = "",
  ) -> None:
    """Writes what save writes, and a model card README.md, unless the folder has one.

    Args:
      folder: to write to, made if missing.
      license: the hub's identifier of the licence of the weights, such as "mit"; "": the card states none.
      figures: measured values by name, which the card lists.
      push_to_hub: repository to upload the folder's files to, see push_to_hub; "": none.

    Raises:
      ValueError: an argument that is not as described.
      OSError: the folder cannot be written, or the upload failed.
    """
    folder = Path(validation.path("folder", folder))
    repository = _repository(push_to_hub) if push_to_hub else ""
    text = card(self, repository or folder.resolve().name, license, figures or {})
    self.save(folder)
    if not (folder / CARD).exists():
      files.write_file(folder / CARD, text.encode())
    if repository:
      hub.upload_folder(folder, repository)

  def push_to_hub(
    self,
    repository: str,
    *,
    license: str = "",  # noqa: A002
    figures: Mapping[str, Any] | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload model",
  ) -> str:
    """Uploads the model, with a model card, to a repository of the Hugging Face hub, which is made if missing.

    The account is that of the hub's own tools: HF_TOKEN, or `hf auth login`.

    Args:
      repository: "organisation/name".
      license, figures: see save_pretrained.
      private: whether a new repository is private.
      revision: branch to upload to, made if missing; default: the main branch.
      message: of the commit.

    Returns:
      The address of the commit.

    Raises:
      ValueError: an argument that is not as described.
      OSError: the upload failed.
    """
    repository = _repository(repository)
    with tempfile.TemporaryDirectory(prefix="flextok_jax.") as folder:
      named = Path(folder) / repository.rpartition("/")[2]
      self.save(named)
      files.write_file(named / CARD, card(self, repository, license, figures or {}).encode())
      return hub.upload_folder(named, repository, private=private, revision=revision, message=message)


def card(model: SharedModel, name: str, license: str, figures: Mapping[str, Any]) -> str:  # noqa: A002
  """Returns a model card as Markdown, with the metadata that the hub reads.

  Args:
    model: to describe.
    name: of the model, or the repository that it is loaded from.
    license, figures: see SharedModel.save_pretrained.
  """
  if license and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", license):
    raise ValueError(f"license={license!r:.80} must be an identifier such as 'mit' or 'apache-2.0'")
  config = ConfigDict(model.config)
  loader = "load_ar" if config.stage == "ar" else "load"
  lines = ["---", "library_name: flextok_jax", *([f"license: {license}"] if license else [])]
  lines += ["tags:", "- flextok", "- jax", f"- {config.stage}", "---", f"# {name.rpartition('/')[2]}", ""]
  lines += [f"`{model!r}`", "", "```python", "import flextok_jax", "", f'model = flextok_jax.{loader}("{name}")', "```"]
  if figures:
    rows = [(_cell(key), _cell(value)) for key, value in figures.items()]
    lines += ["", "## Figures", "", markdown_table(("figure", "value"), rows)]
  sections = {"": {"image_size": config.image_size, "dtype": config.dtype}}
  sections |= {f"{section}.": config[section].to_dict() for section in _SECTIONS[config.stage]}
  rows = [
    (prefix + key, _cell(value))
    for prefix, fields in sections.items()
    for key, value in fields.items()
    if value not in ("", None, ())
  ]
  if config.stage != "ar":
    rows.append(("training data", ", ".join(key for key, source in config.data.sources.items() if source.weight)))
  lines += ["", "## Settings", "", markdown_table(("setting", "value"), rows), "", "config.json has all of them."]
  return "\n".join(lines) + "\n"


def describe(model: Any) -> str:
  """Returns size and type of a model's parameters: "2.5M parameters, bfloat16"."""
  leaves = jax.tree.leaves(model.params)
  types = dict.fromkeys(str(x.dtype) for x in leaves if hasattr(x, "dtype"))
  return f"{sum(np.size(x) for x in leaves) / 1e6:.1f}M parameters, {' and '.join(types)}"


def _repository(name: Any) -> str:
  if not isinstance(name, str) or not hub.is_repository(name):
    raise ValueError(f"repository={name!r:.80} must be the name of a repository, such as 'organisation/name'")
  return name


def _cell(value: Any) -> str:
  value = f"{value:.4g}" if isinstance(value, float) else str(value)
  return value.replace("\n", " ")
