"""Learning rates by width (muP): those found for a narrow model serve a wide one.

Yang et al. 2022, "Tensor Programs V" (arXiv 2203.03466), table 8: under Adam the updates of a matrix from width to
width are divided by the width, and all others stay; what a readout reads is divided by the width too, which is the
models' field readout_multiplier. Everything is relative to a base width, where muP changes nothing. Attention is as it
should be: the tokenizer's logits scale with 1 / head_dim, and a generator grows by the number of its heads.

An orthogonalised update (Muon at Adam's root mean square) has all its singular values at 0.2 sqrt(max(fan-in,
fan-out)), which grow with the root of the width. They ought to stay (Yang, Simon & Bernstein 2023, arXiv 2310.17813,
condition 1), so there the divisor is that root.

REPA's projector has sizes of its own but for what its first matrix reads, the decoder's width: its updates are divided
by that as a hidden matrix's are, and not as a readout's, as a cosine undoes any factor of what it reads.

Initialisation is untouched. It is that of table 8 but for the matrices into the width: Xavier's variance, 2 / (fan-in +
width), falls with the width, where the table keeps it.
"""

from collections.abc import Callable, Sequence

import jax
import optax

# "hidden": a matrix from width to width; "readout": out of the width; "input": from sizes that do not follow it, into
# it or elsewhere; "vector": biases, norms, embeddings, registers, tables; "vae": the autoencoder, which has no width.
GROUPS = ("hidden", "readout", "input", "vector", "vae")


def names_of(path: Sequence) -> list[str]:
  """Returns the dict keys of a path in the tree of parameters, boxed or not."""
  return [key.key for key in path if hasattr(key, "key")]


def group(names: Sequence[str]) -> str:
  """Returns which of GROUPS the parameter at these keys belongs to."""
  if names[0] == "vae":
    return "vae"
  if names[-1] != "kernel":
    return "vector"
  module = names[-2]
  if names[0] == "repa":
    return "hidden" if module == "in" else "input"
  if module == "readout" or (module == "head" and "adaln" not in names):
    return "readout"
  if module in ("patch_embed", "code_embed") or names[0] == "text_mlp" or ("time_embed" in names and module == "in"):
    return "input"
  return "hidden"


def width(names: Sequence[str], shape: Sequence[int]) -> int:
  """Returns the width of the model of a hidden matrix: its fan-in is that, or (an MLP's output) a fixed multiple."""
  if names[-2] == "out":
    return shape[-1]
  return shape[1 if "blocks" in names or names[-2] == "adaln" else 0]  # those are stacked along the layers


def scale_gradients(base_width: int) -> optax.GradientTransformation:
  """Multiplies gradients by width / base_width of their part of the model, to undo that they fall with its width.

  For what follows the size of gradients means nothing but for Adam's eps, which so has the same effect at all widths
  (Everett et al. 2024, arXiv 2407.05872): those of an encoder whose heads start at zero are at first as small as that.
  """

  def scale(updates, params):
    widths = {}
    for path, x in jax.tree.leaves_with_path(updates):
      names = names_of(path)
      if group(names) == "hidden" and names[0] != "repa":  # a cosine's gradients do not fall
        widths[names[0]] = width(names, x.shape)
    factors = {part: widths.get(part, base_width) / base_width for part in updates}
    return {part: jax.tree.map(lambda x, part=part: x * factors[part], tree) for part, tree in updates.items()}

  return optax.stateless(scale)


def scale_by_width(base_width: int, orthogonalised: Callable[[Sequence[str]], bool]) -> optax.GradientTransformation:
  """Multiplies the updates of hidden matrices by base_width / width, or where they are orthogonalised by its root.

  Args:
    orthogonalised: tells it from the keys of a parameter.
  """

  def scale(path, update):
    names = names_of(path)
    if group(names) != "hidden":
      return update
    ratio = base_width / width(names, update.shape)
    return update * (ratio**0.5 if orthogonalised(names) else ratio)

  return optax.stateless(lambda updates, params: jax.tree.map_with_path(scale, updates))
