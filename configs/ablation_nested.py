"""What nested dropout does: a tokenizer of 32 px scenes and photographs, trained with each distribution of lengths.

  bash launch/sweep.sh ablation_nested runs/ablation_nested

Four runs of six or seven minutes each on a shared CPU core, 2.3M parameters; results and how far to trust them:
docs/sweeps.md.
"""

from flextok_jax.configs import shapes


def get_config():
  c = shapes.get_config()
  c.update(
    encoder=dict(depth=3),
    tokens=dict(levels=(8, 8, 8, 5, 5, 5), nested_dropout="pow2"),
    flow=dict(t_shift=20.0),  # in so short a run all tokens would otherwise learn the mean colour
    sampler=dict(num_steps=10),
    data=dict(sources=dict(synthetic=dict(weight=0.75, style="scenes"), photos=dict(weight=0.25))),
    optim=dict(warmup_steps=20, ema_decay=0.98),
    train=dict(num_steps=360, log_every=20, checkpoint_every=180, eval_every=360, tensorboard=False),
    eval=dict(sources=("synthetic", "photos"), num_images=32, batch_size=32),
  )
  return c


def get_sweep():
  return {mode: {"tokens.nested_dropout": mode} for mode in ("uniform", "pow2", "uniform_pow2", "none")}
