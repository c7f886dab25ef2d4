"""muP: learning rates found with a narrow model transfer to a wide one.

Yang et al. 2022, "Tensor Programs V" (arXiv 2203.03466), table 8: under Adam the updates of a matrix from width to
width are divided by the width, and all others are unchanged; the input of a readout is divided by the width too, by the
models' field readout_multiplier. Everything is relative to a base width, at which muP changes nothing. Attention needs
no change: the tokenizer's logits scale with 1 / head_dim, and a wider generator has more heads of the same size.

An orthogonalised update (Muon at Adam's root mean square) has all its singular values at 0.2 sqrt(max(fan-in,
fan-out)), which grow with the square root of the width. They should not (Yang, Simon & Bernstein 2023, arXiv
2310.17813, condition 1), so those updates are divided by the square root.

Of the sizes of REPA's projector only the input of its first matrix follows the decoder's width. The updates of that
matrix are divided as a hidden matrix's; its input is not divided as a readout's, as a cosine is invariant to any
factor.

Initialisation is unchanged. It agrees with table 8 except for matrices into the width: their Xavier variance, 2 /
(fan-in + width), falls with the width, and is constant in the table.
"""

from collections.abc import Callable, Sequence

import jax
import optax

# "hidden": matrices from width to width; "readout": from the width to a fixed size; "input": from a fixed size;
# "vector": biases, norms, embeddings, registers, tables; "vae": the autoencoder, which has no width.
_TIMES = ("time_embed", "interval_embed")
GROUPS = ("hidden", "readout", "input", "vector", "vae")


def names_of(path: Sequence) -> list[str]:
  """Returns the dict keys of a path in the tree of parameters, boxed or not."""
  return [key.key for key in path if hasattr(key, "key")]


def group(names: Sequence[str]) -> str:
  """Returns the group, one of GROUPS, of the parameter at these keys."""
  if names[0] == "vae":
    return "vae"
  if names[-1] != "kernel":
    return "vector"
  module = names[-2]
  if names[0] == "repa":
    return "hidden" if module == "in" else "input"
  if module == "readout" or (module == "head" and "adaln" not in names):
    return "readout"
  if module in ("patch_embed", "code_embed") or names[0] == "text_mlp" or (module == "in" and names[-3] in _TIMES):
    return "input"
  return "hidden"


def width(names: Sequence[str], shape: Sequence[int]) -> int:
  """Returns the model's width from a hidden matrix's shape: its fan-in is that, or a fixed multiple (in MLPs)."""
  if names[-2] in ("out", "adaln"):
    return shape[-1]
  return shape[1 if "blocks" in names else 0]  # these are stacked along the layers


def scale_gradients(base_width: int) -> optax.GradientTransformation:
  """Multiplies gradients by width / base_width of their part of the model, as gradients are proportional to 1 / width.

  The optimisers are invariant to the scale of gradients except for Adam's eps, which then has the same effect at all
  widths (Everett et al. 2024, arXiv 2407.05872): gradients of an encoder whose head starts at zero are at first as
  small as eps.
  """

  def scale(updates, params):
    widths = {}
    for path, x in jax.tree.leaves_with_path(updates):
      names = names_of(path)
      if group(names) == "hidden" and names[0] != "repa":  # a cosine's gradients do not depend on the width
        widths[names[0]] = width(names, x.shape)
    factors = {part: widths.get(part, base_width) / base_width for part in updates}
    return {part: jax.tree.map(lambda x, part=part: x * factors[part], tree) for part, tree in updates.items()}

  return optax.stateless(scale)


def scale_by_width(base_width: int, orthogonalised: Callable[[Sequence[str]], bool]) -> optax.GradientTransformation:
  """Multiplies the updates of hidden matrices by base_width / width, or its square root if they are orthogonalised.

  Args:
    base_width: the width at which nothing changes.
    orthogonalised: whether the updates of the parameter at these keys are.
  """

  def scale(path, update):
    names = names_of(path)
    if group(names) != "hidden":
      return update
    ratio = base_width / width(names, update.shape)
    return update * (ratio**0.5 if orthogonalised(names) else ratio)

  return optax.stateless(lambda updates, params: jax.tree.map_with_path(scale, updates))
