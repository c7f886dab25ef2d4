"""Vision transformers (Dosovitskiy et al. 2021) in the variants of DINO, DINOv2 and CLIP, for features of images.

Their parameters are meant to be loaded (weights/perception/vit.py); their initialisation is that of the other models
here, not the original one.
"""

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.attention import SelfAttention
from flextok_jax.ops import layout, posemb

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of red, green and blue


def preprocess(
  images: jax.Array,
  resize: int = 256,
  crop: int = 224,
  mean: tuple[float, ...] = IMAGENET[0],
  std: tuple[float, ...] = IMAGENET[1],
) -> jax.Array:
  """Resizes, crops and normalises images, by default as for the evaluation of DINO and DINOv2.

  The kernel is the bicubic one of Pillow. Results are clipped as in Pillow, but not rounded to 8 bits.

  Args:
    images: float [b, h, w, 3] in [0, 1].
    resize: pixels of the shorter side.
    crop: pixels of each side of the centre crop, at most `resize`.
    mean: of the channels.
    std: of the channels.

  Returns:
    float32 [b, crop, crop, 3].
  """
  batch, old, width, _ = images.shape
  short = min(old, width)
  height, width = int(resize * old / short), int(resize * width / short)
  images = images.astype(jnp.float32)
  for shape in ((batch, old, width, 3), (batch, height, width, 3)):  # one axis at a time, as Pillow clips after each
    images = jax.image.resize(images, shape, "cubic", antialias=True).clip(0, 1)
  top, left = (height - crop) // 2, (width - crop) // 2
  return (images[:, top : top + crop, left : left + crop] - jnp.asarray(mean)) / jnp.asarray(std)


class ViTBlock(nn.Module):
  """Pre-norm attention and MLP. The stream is float32; products are computed in dtype."""

  choices: layers.BlockChoices

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x float32 [b, l, d], mask boolean [l, l] (query, key) or None -> [b, l, d] float32."""
    c = self.choices
    norm = lambda name: layers.norm(c.norm, c.norm_eps, c.dtype, name)
    x = layout.constrain(x, "batch", None, None)
    x = self._add(x, SelfAttention(c, name="attention")(norm("norm_1")(x), mask)[0], "scale_1")
    return self._add(x, layers.MLP(c, name="mlp")(norm("norm_2")(x)), "scale_2")

  def _add(self, x: jax.Array, y: jax.Array, name: str) -> jax.Array:
    y = y.astype(jnp.float32)
    if self.choices.layer_scale:
      ones = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
      y = y * jnp.asarray(self.param(name, ones, x.shape[-1:]), jnp.float32)
    return x + y


def run_blocks(x: jax.Array, mask: jax.Array | None, depth: int, choices: layers.BlockChoices) -> jax.Array:
  """Runs a scanned stack of ViTBlocks, the child "blocks" of the calling module, on x [b, l, d]."""
  step = lambda block, x, _, mask: block(x, mask)
  return layers.scan_blocks(step, depth, ViTBlock(choices, name="blocks"), x, None, mask)


class ViT(nn.Module, kw_only=True):
  """Images to features."""

  patch_size: int
  grid: int  # the position table has grid x grid patches and is interpolated for others
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
  antialias: bool = False  # interpolation of the position table: see posemb.resize_bicubic
  offset: float = 0.0
  dtype: jnp.dtype = jnp.float32
  attention: str = "auto"

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    """Computes features of images.

    Args:
      images: [b, h, w, 3], normalised (see preprocess), sides multiples of the patch size.

    Returns:
      {"cls": [b, d], "registers": [b, num_registers, d], "patches": [b, h/p * w/p, d] (row by row)} of dtype, after the
      last norm; with a head also "logits", float32 [b, num_classes].

    Raises:
      ValueError: the sides are no multiples of the patch size.
    """
    batch, height, width, _ = images.shape
    p = self.patch_size
    if height % p or width % p:
      raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {p}: resize or crop them")
    # [b, h, w, 3] -> [b, h/p * w/p, p, p, 3] -> [b, h/p * w/p, d]
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
    # [b, 1 + num_registers + h/p * w/p, d]
    x = jnp.concatenate([x.astype(jnp.float32) for x in parts], 1)
    if self.pre_norm:
      x = layers.norm("layernorm", self.norm_epsilon, jnp.float32, "pre_norm")(x)
    choices = layers.BlockChoices(
      width=self.width,
      head_dim=self.head_dim,
      mlp_hidden=self.mlp_hidden,
      logit_scale=self.head_dim**-0.5,
      gated_mlp=self.gated_mlp,
      activation=self.activation,
      norm_eps=self.norm_epsilon,
      qkv_bias=self.qkv_bias,
      out_bias=True,
      mlp_bias=True,
      layer_scale=self.layer_scale,
      dtype=self.dtype,
      attention=self.attention,
    )
    x = run_blocks(x, None, self.depth, choices)
    x = layers.norm("layernorm", self.norm_epsilon, self.dtype, "norm")(x)
    registers, patches = jnp.split(x[:, 1:], [self.num_registers], 1)
    features = {"cls": x[:, 0], "registers": registers, "patches": patches}
    if self.num_classes:
      # [b, 2 * d]
      pooled = jnp.concatenate([features["cls"], patches.astype(jnp.float32).mean(1)], -1)
      features["logits"] = layers.dense(self.num_classes, ("embed", None), "head", jnp.float32)(pooled)
    return features

  def _patch_positions(self, table: jax.Array, height: int, width: int) -> jax.Array:
    """Returns the positions [height * width, d] of patches, from a table [grid * grid, d]."""
    if (height, width) == (self.grid, self.grid):
      return table
    table = table.reshape(self.grid, self.grid, self.width)
    table = posemb.resize_bicubic(table, height, width, antialias=self.antialias, offset=self.offset)
    return table.reshape(height * width, self.width)
