"""Files of the Hugging Face hub, through huggingface_hub with its cache, offline mode and tokens."""

import re

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
CONFIG = "config.json"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(source: str) -> bool:
  """Whether a string has the form of a repository id, "organisation/name"."""
  return bool(_REPOSITORY.fullmatch(source)) and not source.endswith(".safetensors")


def fetch_file(repository: str, *names: str, needed: str) -> str:
  """Returns the local path of the first of `names` that the repository has; downloads it if it is not cached.

  Args:
    repository: "organisation/name".
    *names: of files, the preferred one first.
    needed: files to download by hand, for the error message.

  Raises:
    FileNotFoundError: none can be downloaded; the message names the files to get by hand.
  """
  from huggingface_hub import hf_hub_download  # late: slow to import
  from huggingface_hub.utils import EntryNotFoundError

  try:
    for name in names[:-1]:
      try:
        return hf_hub_download(repository, name)
      except EntryNotFoundError:  # also raised offline if this name is not cached
        pass
    return hf_hub_download(repository, names[-1])
  except Exception as e:  # huggingface_hub and its client raise many kinds: network, authentication, offline mode
    reason = str(e).strip().partition("\n")[0].partition(". ")[0][:160]
    raise FileNotFoundError(
      f"{repository} is no file or folder here, nor could it be downloaded ({type(e).__name__}: {reason}). Download "
      f"{needed} from https://huggingface.co/{repository} into a folder and give that folder"
    ) from None
