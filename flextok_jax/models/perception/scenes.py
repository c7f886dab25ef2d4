"""A small convolutional network that answers questions about procedural scenes."""

import flax.linen as nn
import jax


class SceneClassifier(nn.Module):
  """Convolutions, four of them with stride 2, and a linear layer for each question.

  Attributes:
    heads: (question, number of answers) of each.
  """

  heads: tuple[tuple[str, int], ...]

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    """images [b, h, w, 3] in [-1, 1] -> {question: logits [b, answers]}."""
    x = images
    for width in (16, 32, 64, 128):
      x = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
      x = nn.relu(nn.Conv(width, (3, 3), 2)(x))
    x = nn.relu(nn.Dense(256)(x.reshape(len(x), -1)))
    return {name: nn.Dense(size)(x) for name, size in self.heads}
