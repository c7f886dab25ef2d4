"""What a step of fine-tuning costs: FLOPs, and bytes of the state and the gradients, by what is trained.

python -m experiments.finetuning finetune:d18_d28_dfn

By shapes: nothing is allocated or run. FLOPs are those of the products and convolutions of an update (core/flops.py)
per image, without what config.remat recomputes. docs/training.md has the table.
"""

from flax.core.meta import unbox
import jax

from flextok_jax import cli
from flextok_jax.config import load_config, with_fields
from flextok_jax.core.tables import markdown_table
from flextok_jax.stages import make_stage
from flextok_jax.training import goodput, optim
from flextok_jax.training.state import init_state

RANK = 16
WAYS = {
  "encoder and decoder": {"train.parts": ("encoder", "decoder")},
  "decoder": {"train.parts": ("decoder",)},
  f"LoRA of rank {RANK}, both": {"train.parts": ("encoder", "decoder"), "lora.rank": RANK},
  f"LoRA of rank {RANK}, decoder": {"train.parts": ("decoder",), "lora.rank": RANK},
}


def gigabytes(tree) -> str:
  """Returns the size of a tree of arrays or shapes in GB (1e9 bytes)."""
  return f"{sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e9:.2f}"


def main(spec: str):
  """Prints a Markdown table of all ways."""
  header = "trained", "parameters", "TFLOP per image", "model, GB", "gradients", "average", "optimizer", "sum"
  rows = []
  for name, fields in WAYS.items():
    config = with_fields(load_config(spec), fields | {"remat": "none"})
    stage, optimizer = make_stage(config), optim.make_optimizer(config.optim, config.train.num_steps)
    make = lambda key: init_state(stage, optimizer, key)  # noqa: B023
    state = unbox(jax.eval_shape(make, jax.random.key(0)))
    columns = state.joined(), state.params, state.ema, state.opt_state
    count = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
    per_image = goodput.update_flops(config) / config.data.global_batch / 1e12
    rows.append([name, f"{count:,.1f}M", f"{per_image:.3g}", *map(gigabytes, (*columns, columns))])
  print(markdown_table(header, rows))


if __name__ == "__main__":
  cli.run(main, ["CONFIG"])
