"""Optional packages, which the extras of setup.py install."""

import importlib
import importlib.util
from types import ModuleType

_DISTRIBUTIONS = {
  "fontTools": "fonttools",
  "skimage": "scikit-image",
  "sklearn": "scikit-learn",
  "tensorflow_datasets": "tensorflow-datasets",
}


class MissingPackageError(ImportError):
  """A package of an extra is not installed."""

  def __init__(self, module: str, extra: str, what: str):
    package = module.partition(".")[0]
    package = _DISTRIBUTIONS.get(package, package)
    super().__init__(f"{what} needs {package}: pip install 'flextok-jax[{extra}]'")


def require(module: str, extra: str, what: str) -> ModuleType:
  """Imports a module of an optional package.

  Args:
    module: dotted name, like "sklearn.metrics".
    extra: the extra of flextok-jax that has the package.
    what: what needs it, for the message.

  Raises:
    MissingPackageError: it is not installed.
  """
  if importlib.util.find_spec(module.partition(".")[0]) is None:
    raise MissingPackageError(module, extra, what)
  return importlib.import_module(module)
