"""What nested dropout does: the tokenizer of configs/digits.py, trained with each distribution of kept lengths.

  python launch/pictures.py digits DIGITS
  bash launch/sweep.sh ablation_nested runs/ablation_nested --data=DIGITS

Four runs of about three minutes each on two CPU cores; results and how far to trust them: docs/sweeps.md.
"""

from flextok_jax.configs import digits


def get_config():
  return digits.get_config()


def get_sweep():
  return {mode: {"tokens.nested_dropout": mode} for mode in ("uniform", "pow2", "uniform_pow2", "none")}
