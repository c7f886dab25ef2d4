"""Generators of token ids by size: class-conditional ones of the paper, text-conditional ones as released (FlexAR).

The files configs/ar_SIZE.py name the sizes. All train on token shards (python -m flextok_jax.tokenize --config), which
--config.data.tokens=DIR names. What the public record does not give is ours: a LLaMA-like block (see common.py), and
AdamW at 3e-4 in batches of 1,024 sequences.
"""

from flextok_jax import config as common

CLASS = {  # name: blocks of 12 width^2; width = 64 * depth [paper]
  "49m": 10,
  "85m": 12,
  "201m": 16,
  "393m": 20,
  "679m": 24,
  "1b3": 30,
}
TEXT = {  # name: (width, depth), blocks of 16 width^2 with cross-attention [code]
  "113m": (768, 12),
  "382m": (1152, 18),
  "1b": (1664, 26),
  "3b": (2304, 36),
}


def get_config(size: str = "85m"):
  """Returns the configuration of a size: a key of CLASS or of TEXT."""
  if size not in CLASS and size not in TEXT:
    raise ValueError(f"configs/ar.py takes a size, one of {', '.join([*CLASS, *TEXT])}, got {size!r}")
  text = size in TEXT
  width, depth = TEXT[size] if text else (64 * CLASS[size], CLASS[size])
  return common.derive(
    stage="ar",
    remat="full" if depth >= 24 else "none",
    ar=dict(
      width=width,
      depth=depth,
      condition="text" if text else "class",
      loss_chunk=64 if depth >= 24 else 16,  # the readout's gradient is summed over devices at every chunk
      guidance_scale=3.0 if text else 1.5,  # [paper]
    ),
    optim=dict(learning_rate=3e-4, warmup_steps=5_000, b2=0.95, weight_decay=0.05),
    train=dict(num_steps=300_000),
    eval=dict(num_images=4096, batch_size=256),
  )
