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
  needed = f"{CONFIG} and {WEIGHTS[0]} (of a VAE {WEIGHTS[1]})"
  return fetch_file(repository, CONFIG, needed=needed), fetch_file(repository, *WEIGHTS, needed=needed)


def fetch_file(repository: str, *names: str, needed: str) -> str:
  """Returns the local path of the first of `names` that the repository has, downloading what the cache does not hold.

  Args:
    repository: "organisation/name".
    names: of files, the best first.
    needed: the files to download by hand, for the error.

  Raises:
    FileNotFoundError: none can be had, with what to download and where to put it.
  """
  from huggingface_hub import hf_hub_download  # late: slow to import
  from huggingface_hub.utils import EntryNotFoundError

  try:
    for name in names[:-1]:
      try:
        return hf_hub_download(repository, name)
      except EntryNotFoundError:  # also when offline; then no name is cached, or a later one is
        pass
    return hf_hub_download(repository, names[-1])
  except Exception as e:  # network, authentication, offline mode: huggingface_hub and its client raise many kinds
    reason = str(e).strip().partition("\n")[0].partition(". ")[0][:160]
    raise FileNotFoundError(
      f"{repository} is no file or folder here, nor could it be downloaded ({type(e).__name__}: {reason}). Download "
      f"{needed} from https://huggingface.co/{repository} into a folder and give that folder"
    ) from None
