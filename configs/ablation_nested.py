"""What nested dropout does: the quickstart's tokenizer, trained from scratch under each law of kept lengths.

bash launch/sweep.sh configs/ablation_nested.py runs/ablation_nested
"""

from configs import quickstart
from flextok_jax.ops import nested


def get_config():
  c = quickstart.get_config("scratch")
  c.update(
      flow=dict(t_shift=20.0),  # as in quickstart:coarse: so short a run else teaches all tokens the mean colour
      train=dict(num_steps=500, log_every=25, checkpoint_every=250),
      eval=dict(num_images=32, batch_size=32),
  )
  return c


def get_sweep():
  return {mode: {"tokens.nested_dropout": mode} for mode in nested.MODES}
