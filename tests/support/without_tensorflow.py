"""The train command in a process in which tensorflow cannot be imported, and has not been.

python -m tests.support.without_tensorflow FLAGS
"""

from importlib.machinery import PathFinder

from flextok_jax import cli, train

if __name__ == "__main__":
  find = PathFinder.find_spec
  PathFinder.find_spec = lambda name, *args: None if name.split(".")[0] == "tensorflow" else find(name, *args)
  cli.run(train.main)
