"""Fine-tunes the decoder of released tokenizers on your own images (docs/training.md).

  d12_d12_in1k, d18_d18_in1k, d18_d28_in1k, d18_d28_dfn    at 256 px, from the weights on the Hugging Face hub
  glyphs                                                   at 64 px, from the tokenizer that ships, on a CPU

  python -m flextok_jax.train --config=finetune:d18_d28_dfn --workdir=DIR --data=IMAGES

The encoder stays as it is, and token ids keep their meaning; --config.train.parts="('encoder', 'decoder')" trains both.
LoRA: --config.lora.rank=16 --config.optim.learning_rate=1.5e-4. Other weights: --config.init_from=WEIGHTS. A sweep
compares the three on the same pictures:

  bash launch/sweep.sh finetune:glyphs DIR --data=IMAGES

Hardware: one GPU of 80 GB for d18_d28, two CPU cores for glyphs. Only glyphs was trained (docs/training.md).
"""

from flextok_jax import config as common
from flextok_jax.configs import flextok, glyphs

RELEASED = ("d12_d12_in1k", "d18_d18_in1k", "d18_d28_in1k", "d18_d28_dfn")
MODELS = (*RELEASED, "glyphs")


def get_config(model: str = ""):
  """Returns the config of fine-tuning one of MODELS."""
  common.check_argument("finetune", model, MODELS)
  c = glyphs.get_config() if model == "glyphs" else flextok.get_config(model)
  c.update(train=dict(parts=("decoder",)), eval=dict(sources=("folder",)))
  c.data.sources.update({name: dict(weight=float(name == "folder")) for name in c.data.sources})
  if model == "glyphs":
    c.update(
      init_from="glyphs",
      optim=dict(learning_rate=1e-3, warmup_steps=20, ema_decay=0.99),
      train=dict(num_steps=600, checkpoint_every=200, eval_every=200),
      eval=dict(num_images=64),
    )
    return c
  c.update(
    init_from=f"EPFL-VILAB/flextok_{model}",
    vae=dict(scaling_factor=0.0),  # that of the released weights
    repa=dict(weight=0.0),
    remat="full",
    tokens=dict(bucket_rows=8),  # eight devices hold whole groups
    data=dict(global_batch=64),
    # [ours] about a tenth of the rate of training; 640,000 images.
    optim=dict(learning_rate=3e-5, warmup_steps=500, ema_decay=0.999),
    train=dict(num_steps=10_000, log_every=50, checkpoint_every=1_000, keep_period=0, eval_every=1_000),
  )
  return c


def get_sweep(model: str = ""):
  """Returns {run: {dotted field: value}}: what is trained."""
  rate = get_config(model).optim.learning_rate
  return {
    "decoder": {},
    "both": {"train.parts": ("encoder", "decoder")},
    "lora": {"lora.rank": 16, "optim.learning_rate": 5 * rate},
  }
