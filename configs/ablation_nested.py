"""What nested dropout does: the quickstart's tokenizer (2.3M parameters), trained with each distribution of lengths.

  bash launch/sweep.sh ablation_nested runs/ablation_nested

Four runs of six or seven minutes each on a shared CPU core; results and how far to trust them: docs/sweeps.md.
"""

from flextok_jax.configs import quickstart


def get_config():
  c = quickstart.get_config()
  c.update(
    # In so short a run all tokens would otherwise learn the mean colour: hence the noise of quickstart:coarse, and an
    # optimizer that gets past it in a quarter of AdamW's steps (configs/shapes.py).
    flow=dict(t_shift=20.0),
    optim=dict(name="muon", learning_rate=3e-3, warmup_steps=20, ema_decay=0.98),
    sampler=dict(num_steps=10),
    data=dict(sources=dict(synthetic=dict(weight=0.75), emoji=dict(weight=0.0), photos=dict(weight=0.25))),
    train=dict(num_steps=360, log_every=20, checkpoint_every=180, eval_every=360, tensorboard=False),
    eval=dict(sources=("synthetic", "photos"), num_images=32, batch_size=32),
  )
  return c


def get_sweep():
  return {mode: {"tokens.nested_dropout": mode} for mode in ("uniform", "pow2", "uniform_pow2", "none")}
