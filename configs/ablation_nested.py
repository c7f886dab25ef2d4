"""What nested dropout does: the quickstart's tokenizer, trained from scratch under each law of kept lengths.

bash launch/sweep.sh configs/ablation_nested.py runs/ablation_nested
"""

from configs import quickstart
from flextok_jax.ops import nested


def get_config():
  c = quickstart.get_config("scratch")
  c.update(
    # So short a run else teaches all tokens the mean colour: noise as in quickstart:coarse, and an optimiser that is
    # past it in a quarter of AdamW's steps (see shapes.py).
    flow=dict(t_shift=20.0),
    optim=dict(name="muon", learning_rate=3e-3, warmup_steps=20, ema_decay=0.98),
    sampler=dict(num_steps=10),
    train=dict(num_steps=360, log_every=20, checkpoint_every=180, tensorboard=False),
    eval=dict(num_images=32, batch_size=32),
  )
  return c


def get_sweep():
  return {mode: {"tokens.nested_dropout": mode} for mode in nested.MODES}
