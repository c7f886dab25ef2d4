"""Converts a PyTorch file to .safetensors, from which the networks of metrics are read.

python -m flextok_jax.convert_torch SOURCE.pth TARGET.safetensors

This is the only command that needs PyTorch. It unpickles only tensors and plain values. TARGET must not exist.
Floating-point tensors are written as float32 under their names; keys of nested dictionaries are joined by dots, and a
dictionary that alone holds the tensors ("state_dict", "model", ...) is not part of the names.
"""

from flextok_jax import cli
from flextok_jax.tools import convert_torch


def main(source: str, target: str):
  """Converts `source` to `target`."""
  count, others = convert_torch.convert(source, target)
  left = f", without {len(others)} others such as {others[0]!r:.80}" if others else ""
  print(f"wrote {count} tensors to {target}{left}")


if __name__ == "__main__":
  cli.run(main, ("SOURCE", "TARGET"))
