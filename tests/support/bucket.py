"""A bucket of Google Cloud Storage on this machine: gs://NAME leads to a folder for epath, fsspec and tensorstore."""

from pathlib import Path

from etils.epath import gpath
import fsspec
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils
import pytest

from flextok_jax.core import workdirs


def mount(monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
  """Makes gs:// lead to a folder for this test, as epath and orbax use it, and returns the folder."""

  class Bucket(LocalFileSystem):
    protocol = ("gcs", "gs")
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
      path = str(path)
      name = path.removeprefix("gcs://").removeprefix("gs://")
      return f"{root}/{name}".rstrip("/") if path != name else super()._strip_protocol(path)

    def glob(self, path, **kwargs):
      return [found.removeprefix(f"{root}/") for found in super().glob(path, **kwargs)]  # BUCKET/..., as gcsfs

    def open(self, path, mode="rb", **kwargs):
      assert mode in ("r", "rb", "w", "wb"), mode  # objects cannot be appended to
      if "w" in mode:
        Path(self._strip_protocol(path)).parent.mkdir(parents=True, exist_ok=True)
      return super().open(path, mode, **kwargs)

  filesystem = Bucket(auto_mkdir=True)
  monkeypatch.setattr(fsspec, "filesystem", lambda name, **kwargs: filesystem)
  monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
  monkeypatch.setattr(gpath.backend_lib.fsspec_backend, "_get_filesystem", lambda name: filesystem)
  monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
  monkeypatch.setattr(tensorstore_utils, "_normalize_path", Bucket._strip_protocol)  # tensorstore writes to the folder
  monkeypatch.setattr(workdirs, "_is_installed", lambda module: True)
  return root
