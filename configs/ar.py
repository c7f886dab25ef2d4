"""Generators of token ids by size, the millions of parameters in the blocks.

  49m 85m 201m 393m 679m 1b3  class-conditional, the sizes of the paper
  113m 382m 1b 3b             text-conditional on the features of FLAN-T5-XL, the sizes of the released FlexAR

They train on the shards that python -m flextok_jax.tokenize --config writes:

  python -m flextok_jax.train --config=ar:85m --workdir=DIR --config.data.tokens=SHARDS

What the public record does not give is ours: a LLaMA-like block (flextok_jax/config), and AdamW at 3e-4 in batches
of 1,024 sequences.

Hardware: 49m to 393m are meant for one host of accelerators, 1b3 and 3b for a slice: state and gradients of 3b take
67 GB, which training shards as far as the devices need it. 3b was compiled for 256 chips of TPU v5e (docs/scaling.md);
none was trained.
"""

from flextok_jax import config as common

CLASS = {  # name: depth, blocks of 12 width^2 parameters; width = 64 * depth [paper]
  "49m": 10,
  "85m": 12,
  "201m": 16,
  "393m": 20,
  "679m": 24,
  "1b3": 30,
}
TEXT = {  # name: (width, depth), blocks of 16 width^2 parameters, with cross-attention [code]
  "113m": (768, 12),
  "382m": (1152, 18),
  "1b": (1664, 26),
  "3b": (2304, 36),
}


def get_config(size: str = ""):
  """Returns the config of a size, a key of CLASS or of TEXT."""
  common.check_argument("ar", size, (*CLASS, *TEXT))
  text = size in TEXT
  width, depth = TEXT[size] if text else (64 * CLASS[size], CLASS[size])
  return common.derive(
    stage="ar",
    remat="full" if depth >= 24 else "dots" if depth >= 16 else "none",  # [ours] so that 128 sequences fit a device
    ar=dict(
      width=width,
      depth=depth,
      condition="text" if text else "class",
      loss_chunk=64 if depth >= 24 else 16,  # devices sum the gradient of the readout once per chunk
      guidance_scale=3.0 if text else 1.5,  # [paper]
    ),
    optim=dict(learning_rate=3e-4, warmup_steps=5_000, b2=0.95, weight_decay=0.05),
    train=dict(num_steps=300_000),
    eval=dict(num_images=4096, batch_size=256),
  )
