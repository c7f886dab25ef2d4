"""Files of the Hugging Face hub, through huggingface_hub: its cache, its offline mode, its tokens."""

import re

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
CONFIG = "config.json"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(source: str) -> bool:
  """Whether a string has the form of a repository's id, "organisation/name"."""
  return bool(_REPOSITORY.fullmatch(source)) and not source.endswith(".safetensors")


def fetch(repository: str) -> tuple[str, str]:
  """Returns the local paths (config.json, weights) of a repository, downloading what the cache does not hold.

  Raises:
    FileNotFoundError: it cannot be had, with what to download and where to put it.
  """
  try:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError
  except ImportError:
    raise FileNotFoundError(
        f"{repository} is no file or folder here, and without huggingface_hub it cannot be downloaded: "
        "pip install huggingface_hub, or give a folder with its config.json and weights"
    ) from None
  try:
    config = hf_hub_download(repository, CONFIG)
    try:
      return config, hf_hub_download(repository, WEIGHTS[0])
    except EntryNotFoundError:  # also when offline; then neither name is cached, or the second is
      return config, hf_hub_download(repository, WEIGHTS[1])
  except Exception as e:  # network, authentication, offline mode: huggingface_hub and its client raise many kinds
    reason = str(e).strip().partition("\n")[0].partition(". ")[0][:160]
    raise FileNotFoundError(
        f"{repository} is no file or folder here, nor could it be downloaded ({type(e).__name__}: {reason}). Download "
        f"{CONFIG} and {WEIGHTS[0]} (of a VAE {WEIGHTS[1]}) from https://huggingface.co/{repository} into a folder "
        "and give that folder"
    ) from None
