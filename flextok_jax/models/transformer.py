"""The pre-norm transformer of encoder and decoder: a scanned stack of blocks over one or more segments."""

from collections.abc import Callable
import itertools

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.attention import Attention

Segments = tuple[jax.Array, ...]  # parts [b, l_i, d] of one sequence


class SwiGLU(nn.Module):
  """W2(silu(W1 x) * W3 x) without biases, hidden width int(2 * (4 * width) / 3) (Shazeer 2020)."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    hidden = 2 * 4 * width // 3
    x = nn.DenseGeneral(
        (2, hidden),
        use_bias=False,
        dtype=self.dtype,
        kernel_init=layers.xavier_uniform(hidden, ("embed", None, "mlp")),
        name="in",
    )(x)
    x = nn.silu(x[..., 0, :]) * x[..., 1, :]
    return nn.Dense(
        width,
        use_bias=False,
        dtype=self.dtype,
        kernel_init=layers.xavier_uniform(width, ("mlp", "embed")),
        name="out",
    )(x)


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

  head_dim: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, segments: Segments, cond: jax.Array | None, mask: jax.Array | None) -> tuple[Segments, None]:
    """segments of [b, l_i, d], cond [b, d] or None, mask [l, l] or None -> segments (and None, for the scan)."""
    attn = mlp = None
    if cond is not None:
      width = segments[0].shape[-1]
      mod = nn.Dense(
          len(segments) * 6 * width,
          dtype=self.dtype,
          kernel_init=layers.zeros("embed", "modulation"),
          bias_init=layers.zeros("modulation"),
          name="modulation",
      )(nn.silu(cond))
      mod = rearrange(mod, "b (s n d) -> s n b 1 d", s=len(segments), n=6)
      attn = [(gate, shift, scale) for gate, _, shift, scale, _, _ in mod]
      mlp = [(gate, shift, scale) for _, gate, _, _, shift, scale in mod]
    attention = Attention(self.head_dim, self.dtype, name="attention")
    segments = _residual(lambda x: attention(x, mask), segments, attn)
    segments = _residual(SwiGLU(self.dtype, name="mlp"), segments, mlp)
    return segments, None


class Transformer(nn.Module):
  """`depth` blocks, scanned: parameters are stacked along a leading "layers" axis."""

  depth: int
  head_dim: int
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
      self, segments: Segments, cond: jax.Array | None = None, mask: jax.Array | None = None
  ) -> Segments:
    """segments of [b, l_i, d], cond [b, d] or None, mask [l, l] boolean or None -> segments of the same shapes."""
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    stack = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=self.depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    segments, _ = stack(self.head_dim, self.dtype, name="blocks")(segments, cond, mask)
    return segments
