"""Fine-tunes the decoder of released tokenizers on your own images (docs/training.md).

  d12_d12_in1k, d18_d18_in1k, d18_d28_in1k, d18_d28_dfn    at 256 px, from the weights on the Hugging Face hub
  quickstart                                               the tokenizer that ships, 32 px, on photographs, on a CPU

  python -m flextok_jax.train --config=finetune:d18_d28_dfn --workdir=DIR --data=IMAGES

The encoder stays as it is, and token ids keep their meaning; --config.train.parts="('encoder', 'decoder')" trains both.
LoRA: --config.lora.rank=16 --config.optim.learning_rate=2e-4. Other weights: --config.init_from=WEIGHTS.

Hardware: one GPU of 80 GB for d18_d28. finetune:quickstart was run for 150 steps on two CPU cores that other work
shared, about five minutes (docs/training.md); the others were not trained.
"""

from flextok_jax import config as common
from flextok_jax.configs import flextok, quickstart

RELEASED = ("d12_d12_in1k", "d18_d18_in1k", "d18_d28_in1k", "d18_d28_dfn")
MODELS = (*RELEASED, "quickstart")


def get_config(model: str = ""):
  """Returns the config of fine-tuning one of MODELS."""
  common.check_argument("finetune", model, MODELS)
  c = quickstart.get_config() if model == "quickstart" else flextok.get_config(model)
  c.update(train=dict(parts=("decoder",)))
  if model == "quickstart":
    c.update(
      init_from="quickstart",
      data=dict(sources=dict(synthetic=dict(weight=0.0), emoji=dict(weight=0.0), photos=dict(weight=1.0))),
      optim=dict(learning_rate=3e-4, warmup_steps=10, ema_decay=0.98),
      train=dict(num_steps=150, log_every=25, checkpoint_every=150, eval_every=50),
      eval=dict(sources=("photos",), num_images=48, batch_size=48),
    )
    return c
  c.update(
    init_from=f"EPFL-VILAB/flextok_{model}",
    vae=dict(scaling_factor=0.0),  # that of the released weights
    repa=dict(weight=0.0),
    remat="full",
    data=dict(global_batch=64, sources=dict(tfds=dict(weight=0.0), folder=dict(weight=1.0))),
    # [ours] about a tenth of the rate of training; 640,000 images.
    optim=dict(learning_rate=3e-5, warmup_steps=500, ema_decay=0.999),
    train=dict(num_steps=10_000, log_every=50, checkpoint_every=1_000, keep_period=0, eval_every=1_000),
    eval=dict(sources=("folder",)),
  )
  return c
