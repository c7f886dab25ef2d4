"""Vision transformers (Dosovitskiy et al. 2021) as DINO, DINOv2 and CLIP have them, to look at images through.

Their parameters are meant to be loaded (weights/perception/vit.py): the initial values are those of our other models.
"""

import dataclasses

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.attention import Attention
from flextok_jax.models.transformer import MLP
from flextok_jax.ops import layout, posemb

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of red, green and blue


def preprocess(
  images: jax.Array,
  resize: int = 256,
  crop: int = 224,
  mean: tuple[float, ...] = IMAGENET[0],
  std: tuple[float, ...] = IMAGENET[1],
) -> jax.Array:
  """Resizes, crops and normalises images, by default as DINO and DINOv2 are evaluated.

  The kernel is Pillow's bicubic one. Its results are clipped as Pillow's are, but not rounded to 8 bits.

  Args:
    images: float [b, h, w, 3] in [0, 1].
    resize: pixels of the shorter side.
    crop: pixels of both sides of the middle that is kept, at most `resize`.
    mean: of the channels.
    std: of the channels.

  Returns:
    float32 [b, crop, crop, 3].
  """
  batch, old, width, _ = images.shape
  short = min(old, width)
  height, width = int(resize * old / short), int(resize * width / short)
  images = images.astype(jnp.float32)
  for shape in ((batch, old, width, 3), (batch, height, width, 3)):  # one side after the other, as Pillow clips
    images = jax.image.resize(images, shape, "cubic", antialias=True).clip(0, 1)
  top, left = (height - crop) // 2, (width - crop) // 2
  return (images[:, top : top + crop, left : left + crop] - jnp.asarray(mean)) / jnp.asarray(std)


@dataclasses.dataclass(frozen=True)
class BlockChoices:
  """What all blocks of a stack have in common."""

  head_dim: int
  mlp_hidden: int
  gated_mlp: bool
  activation: str  # a key of layers.ACTIVATIONS
  qkv_bias: bool
  layer_scale: bool  # learned factors of what a block adds
  norm_epsilon: float
  dtype: jnp.dtype
  attention: str  # one of ops/attention.py's IMPLEMENTATIONS


class Block(nn.Module):
  """Attention and MLP, each of the normed stream and added to it; the stream is float32, the products in dtype."""

  choices: BlockChoices

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
    """x float32 [b, l, d], mask boolean [l, l] (query, key) or None -> x; the None is for the scan."""
    c = self.choices
    x = layout.constrain(x, "batch", None, None)
    attention = Attention(
      c.head_dim, False, c.qkv_bias, True, c.dtype, c.attention, scale=c.head_dim**-0.5, name="attention"
    )
    x = self._add(x, attention(norm(c.norm_epsilon, c.dtype, "norm_1")(x), mask), "scale_1")
    mlp = MLP(c.mlp_hidden, c.gated_mlp, c.activation, True, c.dtype, name="mlp")
    return self._add(x, mlp(norm(c.norm_epsilon, c.dtype, "norm_2")(x)), "scale_2"), None

  def _add(self, x: jax.Array, y: jax.Array, name: str) -> jax.Array:
    y = y.astype(jnp.float32)
    if self.choices.layer_scale:
      ones = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
      y = y * self.param(name, ones, x.shape[-1:]).astype(jnp.float32)
    return x + y


def blocks(depth: int, choices: BlockChoices) -> nn.Module:
  """Returns a stack of blocks, scanned, as the child "blocks" of the module that asks: see Block."""
  stack = nn.scan(
    Block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=nn.broadcast,
    length=depth,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return stack(choices, name="blocks")


class ViT(nn.Module, kw_only=True):
  """Images to features."""

  patch_size: int
  grid: int  # the table of positions is for grid x grid patches, and interpolated for others
  width: int
  depth: int
  head_dim: int
  mlp_hidden: int
  gated_mlp: bool = False
  activation: str = "gelu"
  qkv_bias: bool = True
  patch_bias: bool = True
  pre_norm: bool = False  # a norm before the blocks
  layer_scale: bool = False
  num_registers: int = 0
  num_classes: int = 0  # of the linear head of DINOv2; 0: no head
  norm_epsilon: float = 1e-6
  antialias: bool = False  # of the table of positions, as its offset: see posemb.resize_bicubic
  offset: float = 0.0
  dtype: jnp.dtype = jnp.float32
  attention: str = "auto"

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    """Looks at images.

    Args:
      images: [b, h, w, 3], normalised (see preprocess), of sides that are multiples of the patch size.

    Returns:
      "cls" [b, d], "registers" [b, num_registers, d] and "patches" [b, h/p * w/p, d], row by row, of dtype, after the
      last norm; with a head "logits" float32 [b, num_classes].

    Raises:
      ValueError: images of other sides.
    """
    batch, height, width, _ = images.shape
    p, norms = self.patch_size, (self.norm_epsilon, self.dtype)
    if height % p or width % p:
      raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {p}: resize or crop them")
    x = rearrange(images, "b (h p) (w q) c -> b (h w) p q c", p=p, q=p)
    x = nn.DenseGeneral(
      self.width,
      axis=(-3, -2, -1),
      use_bias=self.patch_bias,
      dtype=self.dtype,
      kernel_init=layers.xavier_uniform(self.width, (None, None, None, "embed")),
      bias_init=layers.zeros("embed"),
      name="patch_embed",
    )(x)
    cls = self.param("cls", layers.normal(0.02, "embed"), (self.width,))
    positions = self.param("positions", layers.normal(0.02, None, "embed"), (1 + self.grid**2, self.width))
    cls = jnp.broadcast_to(cls + positions[0], (batch, 1, self.width))
    parts = [cls, x + self._patch_positions(positions[1:], height // p, width // p)]
    if self.num_registers:
      registers = self.param("registers", layers.normal(0.02, None, "embed"), (self.num_registers, self.width))
      parts.insert(1, jnp.broadcast_to(registers, (batch, *registers.shape)))
    x = jnp.concatenate([x.astype(jnp.float32) for x in parts], 1)
    if self.pre_norm:
      x = norm(self.norm_epsilon, jnp.float32, "pre_norm")(x)
    fields = [field.name for field in dataclasses.fields(BlockChoices)]
    x, _ = blocks(self.depth, BlockChoices(**{name: getattr(self, name) for name in fields}))(x, None)
    x = norm(*norms, "norm")(x)
    registers, patches = jnp.split(x[:, 1:], [self.num_registers], 1)
    found = {"cls": x[:, 0], "registers": registers, "patches": patches}
    if self.num_classes:
      pooled = jnp.concatenate([found["cls"], patches.astype(jnp.float32).mean(1)], -1)
      found["logits"] = layers.dense(self.num_classes, ("embed", None), "head", jnp.float32)(pooled)
    return found

  def _patch_positions(self, table: jax.Array, height: int, width: int) -> jax.Array:
    """Returns the positions [height * width, d] of patches, from a table [grid * grid, d]."""
    if (height, width) == (self.grid, self.grid):
      return table
    table = table.reshape(self.grid, self.grid, self.width)
    table = posemb.resize_bicubic(table, height, width, antialias=self.antialias, offset=self.offset)
    return table.reshape(height * width, self.width)


def norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
  """Returns a layer norm that computes in float32 and answers in dtype."""
  ones = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
  return nn.LayerNorm(
    epsilon, dtype=dtype, scale_init=ones, bias_init=layers.zeros("embed"), use_fast_variance=False, name=name
  )
