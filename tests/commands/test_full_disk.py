"""Commands that fill the disk: one line that names the path, and no half-written file under the name of a whole one."""

import pytest

from flextok_jax import evaluate, sample, tokenize
from flextok_jax.stages import make_stage
from flextok_jax.weights import saving
from tests.support import tiny_generators
from tests.support.commands import config_file, run
from tests.support.tiny import make_params, tiny_config
from tests.support.token_shards import make_pictures

PAGE = 4096  # bytes: each file of the disk takes a multiple of it


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
  """Returns functions of the output by name."""
  root = tmp_path_factory.mktemp("inputs")
  models, pictures = tiny_generators.save(root / "models"), make_pictures(root / "pictures")
  config = tiny_config(eval=dict(sources=("synthetic",), num_images=3, batch_size=2, grid_images=2))
  params = make_params(make_stage(config))
  tokenizer = f"--checkpoint={models['tokenizer']}"
  folder = dict(weight=1.0, path=str(pictures), val_path=str(pictures.parent / "validation"))
  data = config_file(root / "data.py", data=dict(sources=dict(tfds=dict(weight=0.0), folder=folder)))
  saving.save_weights(root / "evaluated", config, params)

  def job(command, *args):
    return lambda out: run(command, *args, f"--out={out}")

  generator = f"--checkpoint={models['class']}", f"--tokenizer={models['tokenizer']}"
  return {
    "shards": job(tokenize, tokenizer, f"--config={data}", "--shards=2", "--batch_size=8"),
    "tokens.json": job(tokenize, tokenizer, f"--images={pictures}"),
    "tokens.npz": job(tokenize, tokenizer, f"--images={pictures}"),
    "samples": job(sample, *generator, "--classes=3,0"),
    "evaluation": job(evaluate, f"--checkpoint={root / 'evaluated'}"),
    "weights.safetensors": lambda out: saving.save_weights(out, config, params),
  }


@pytest.mark.parametrize(
  "name, failed, whole",
  [
    ("shards", "/train/tokens-00000-of-00002.array_record", ["plan.json"]),
    ("tokens.json", "", ["tokens.json.part"]),
    ("tokens.npz", "", ["tokens.npz.part"]),
    ("samples", "/00001_class_0.png", ["00000_class_3.png"]),
    ("evaluation", "/so_far/synthetic.npz", []),
    ("weights.safetensors", "", []),
  ],
)
def test_a_full_disk_is_one_line(jobs, small_disk, capfd, name, failed, whole):
  disk, fill = small_disk
  fill(PAGE)
  out = disk / name
  with pytest.raises(ValueError) as caught:
    jobs[name](out)
  message = str(caught.value)
  assert message.startswith(f"cannot write {out}{failed}: ") and "No space left on device" in message
  assert "\n" not in message and len(message) < 600
  assert not capfd.readouterr().err
  (disk / "filler").unlink()
  assert sorted(path.name for path in disk.rglob("*") if path.is_file()) == whole
