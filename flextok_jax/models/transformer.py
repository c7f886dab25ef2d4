"""The pre-norm transformer of encoder and decoder: a scanned stack of blocks over one or more segments."""

from collections.abc import Callable
import dataclasses
import itertools

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.attention import Attention
from flextok_jax.ops import posemb

Segments = tuple[jax.Array, ...]  # parts [b, l_i, d] of one sequence
MODULATIONS = ("per_segment", "shared")


@dataclasses.dataclass(frozen=True)
class BlockChoices:
  """What all blocks of a stack have in common; configs/common.py explains the fields."""

  head_dim: int
  mlp_ratio: float
  gated_mlp: bool
  activation: str
  qk_norm: bool
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  dtype: jnp.dtype
  modulation: str = "per_segment"


def mlp_hidden(width: int, ratio: float, gated: bool) -> int:
  """Returns the hidden width of an MLP; a gated one has 3 matrices for 2, so two thirds of it (Shazeer 2020)."""
  hidden = int(ratio * width)
  return int(2 * hidden / 3) if gated else hidden


class MLP(nn.Module):
  """W2(act(W1 x) * W3 x), or without gate W2(act(W1 x))."""

  choices: BlockChoices

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c, width = self.choices, x.shape[-1]
    hidden = mlp_hidden(width, c.mlp_ratio, c.gated_mlp)
    x = nn.DenseGeneral(
        (2 if c.gated_mlp else 1, hidden),
        use_bias=c.mlp_bias,
        dtype=c.dtype,
        kernel_init=layers.xavier_uniform(hidden, ("embed", None, "mlp")),
        bias_init=layers.zeros(None, "mlp"),
        name="in",
    )(x)  # [b, l, n, hidden]
    h = layers.ACTIVATIONS[c.activation](x[..., 0, :])
    if c.gated_mlp:
      h = h * x[..., 1, :]
    return layers.dense(width, ("mlp", "embed"), "out", c.dtype, use_bias=c.mlp_bias)(h)


def _residual(
    fn: Callable[[jax.Array], jax.Array],
    segments: Segments,
    modulation: list[tuple[jax.Array, jax.Array, jax.Array]] | None,
) -> Segments:
  """x + gate * fn(LN(x) * (1 + scale) + shift), fn seeing all segments as one sequence.

  Each segment has its own (gate, shift, scale), each [b, 1, d] and broadcast: never expanded to every token.
  """
  h = [layers.layer_norm(x) for x in segments]
  if modulation is not None:
    h = [x * (1 + scale) + shift for x, (_, shift, scale) in zip(h, modulation)]
  ends = list(itertools.accumulate(x.shape[1] for x in segments))
  y = jnp.split(fn(jnp.concatenate(h, 1)), ends[:-1], axis=1)
  if modulation is not None:
    y = [gate * x for x, (gate, _, _) in zip(y, modulation)]
  return tuple(x + dx for x, dx in zip(segments, y))


class Block(nn.Module):
  """Attention and MLP, adaLN-zero modulated (Peebles & Xie 2023) when a condition is given."""

  choices: BlockChoices

  @nn.compact
  def __call__(
      self, segments: Segments, cond: jax.Array | None, mask: jax.Array | None, key_bias: jax.Array | None
  ) -> tuple[Segments, None]:
    """See Transformer; the None is for the scan."""
    c = self.choices
    attn = mlp = None
    if cond is not None:
      width, count = segments[0].shape[-1], len(segments)
      sets = 1 if c.modulation == "shared" else count
      mod = layers.dense(sets * 6 * width, ("embed", "modulation"), "modulation", c.dtype, zero=True)(nn.silu(cond))
      mod = rearrange(mod, "b (s n d) -> s n b 1 d", s=sets, n=6)
      mod = jnp.broadcast_to(mod, (count, *mod.shape[1:]))
      attn = [(gate, shift, scale) for gate, _, shift, scale, _, _ in mod]
      mlp = [(gate, shift, scale) for _, gate, _, _, shift, scale in mod]
    attention = Attention(c.head_dim, c.qk_norm, c.qkv_bias, c.out_bias, c.dtype, name="attention")
    segments = _residual(lambda x: attention(x, mask, key_bias), segments, attn)
    segments = _residual(MLP(c, name="mlp"), segments, mlp)
    return segments, None


class Transformer(nn.Module):
  """`depth` blocks, scanned: parameters are stacked along a leading "layers" axis."""

  depth: int
  choices: BlockChoices
  remat: bool = False

  @nn.compact
  def __call__(
      self,
      segments: Segments,
      cond: jax.Array | None = None,
      mask: jax.Array | None = None,
      key_bias: jax.Array | None = None,
  ) -> Segments:
    """Runs the blocks over the segments as one sequence of length l.

    Args:
      segments: [b, l_i, d] each.
      cond: [b, d], or None for blocks without modulation.
      mask: boolean [l, l], see Attention.
      key_bias: float32 [b, l], see Attention.

    Returns:
      Segments of the same shapes.
    """
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    stack = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
        length=self.depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    segments, _ = stack(self.choices, name="blocks")(segments, cond, mask, key_bias)
    return segments


class Head(nn.Module):
  """LayerNorm, adaLN if modulated, projection; computes in dtype."""

  features: int
  use_bias: bool
  multiplier: float
  dtype: jnp.dtype
  modulated: bool = False
  modulation_bias: bool = True
  precision: jax.lax.Precision | None = None

  @nn.compact
  def __call__(self, x: jax.Array, cond: jax.Array | None = None) -> jax.Array:
    """x [b, l, d], cond [b, d] where modulated -> [b, l, features]."""
    x = layers.layer_norm(x.astype(self.dtype))
    if self.modulated:
      modulation = layers.dense(
          2 * x.shape[-1],
          ("embed", "modulation"),
          "head_modulation",
          self.dtype,
          use_bias=self.modulation_bias,
          zero=True,
      )
      shift, scale = jnp.split(modulation(nn.silu(cond))[:, None], 2, -1)
      x = x * (1 + scale) + shift
    dense = layers.dense(
        self.features, ("embed", None), "head", self.dtype, use_bias=self.use_bias, zero=True, precision=self.precision
    )
    return dense(self.multiplier * x)


class PatchTransformer(nn.Module, kw_only=True):
  """What encoder and decoder have in common: the sizes, and the choices that configs/common.py explains.

  max_grid must be a number here: that 0 means the grid of image_size is resolved where the modules are built.
  """

  width: int
  depth: int
  head_dim: int
  patch_size: int
  num_registers: int
  mlp_ratio: float = 4.0
  gated_mlp: bool = True
  activation: str = "silu"
  qk_norm: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  posemb: str = "sincos"
  posemb_scaling: str = "absolute"
  max_grid: int = 0
  head_bias: bool = True
  readout_multiplier: float = 1.0
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  def embed_patches(self, x: jax.Array) -> jax.Array:
    """Embeds the patches of x and adds their positions: [b, h, w, c] -> [b, h/p * w/p, width]."""
    x = layers.patchify(x, self.patch_size)
    batch, height, width, _ = x.shape
    x = layers.dense(self.width, (None, "embed"), "patch_embed", self.dtype)(x)
    if self.posemb == "sincos":
      axes = posemb.sincos_axes(self.max_grid, self.width)
    else:
      init = layers.normal(0.02, None, "grid", "embed")
      axes = self.param("positions", init, (2, self.max_grid, self.width))
    product = self.posemb == "learnable_prod"
    table = posemb.grid_table(axes, height, width, scaling=self.posemb_scaling, product=product)
    return (x + table.astype(self.dtype)).reshape(batch, height * width, self.width)

  def make_stack(self) -> Transformer:
    fields = [field.name for field in dataclasses.fields(BlockChoices)]
    choices = BlockChoices(**{name: getattr(self, name) for name in fields if hasattr(self, name)})
    return Transformer(self.depth, choices, self.remat, name="transformer")

  def make_head(self, features: int, **fields) -> Head:
    head = Head(features, self.head_bias, self.readout_multiplier, **fields)
    nn.share_scope(self, head)  # its parameters stand beside those of the other parts
    return head
