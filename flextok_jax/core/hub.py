"""Files of the Hugging Face hub, through huggingface_hub with its cache, offline mode and tokens."""

import os
import re

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
CONFIG = "config.json"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(source: str) -> bool:
  """Whether a string has the form of a repository id, "organisation/name"."""
  return bool(_REPOSITORY.fullmatch(source)) and not source.endswith(".safetensors")


def fetch_file(repository: str, *names: str, needed: str, revision: str | None = None) -> str:
  """Returns the local path of the first of `names` that the repository has; downloads it if it is not cached.

  Args:
    repository: "organisation/name".
    *names: of files, the preferred one first.
    needed: files to download by hand, for the error message.
    revision: branch, tag or commit; None: the main branch.

  Raises:
    FileNotFoundError: none can be downloaded; the message names the files to get by hand.
  """
  from huggingface_hub import hf_hub_download  # late: slow to import
  from huggingface_hub.utils import EntryNotFoundError

  try:
    for name in names[:-1]:
      try:
        return hf_hub_download(repository, name, revision=revision)
      except EntryNotFoundError:  # also raised offline if this name is not cached
        pass
    return hf_hub_download(repository, names[-1], revision=revision)
  except Exception as e:  # huggingface_hub and its client raise many kinds: network, authentication, offline mode
    raise FileNotFoundError(
      f"{repository} is no file or folder here, nor could it be downloaded ({type(e).__name__}: {_reason(e)}). "
      f"Download {needed} from https://huggingface.co/{repository} into a folder and give that folder"
    ) from None


def upload_folder(
  folder: str | os.PathLike,
  repository: str,
  *,
  private: bool = False,
  revision: str | None = None,
  message: str = "Upload model",
) -> str:
  """Uploads the files of a folder in one commit; returns its address. The repository and branch are made if missing.

  Args:
    folder: whose files to upload.
    repository: "organisation/name".
    private: whether a new repository is private.
    revision: branch; None: the main branch.
    message: of the commit.

  Raises:
    OSError: the upload failed, in one line.
  """
  from huggingface_hub import HfApi  # late: slow to import

  try:
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    if revision is not None:
      api.create_branch(repository, branch=revision, exist_ok=True)
    info = api.upload_folder(
      repo_id=repository, folder_path=os.fspath(folder), revision=revision, commit_message=message
    )
  except Exception as e:  # many kinds, see fetch_file
    raise OSError(
      f"the upload to {repository} failed ({type(e).__name__}: {_reason(e)}): check the name, the network and the "
      "account (HF_TOKEN, or hf auth login)"
    ) from None
  return info.commit_url


def _reason(error: Exception) -> str:
  return str(error).strip().partition("\n")[0].partition(". ")[0][:160]
