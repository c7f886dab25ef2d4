"""Vision transformers against transformers and DINO's own code under the same random weights; their files, sharding."""

import json

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file

from flextok_jax.models.perception.vit import IMAGENET, ViT, preprocess
from flextok_jax.parallel import sharding
from flextok_jax.weights.perception import vit as vit_files
from flextok_jax.weights.perception.vit import load_vit
from tests.support import vit_reference
from tests.support.vit_reference import CASES, STORED


@pytest.fixture(scope="module", params=CASES)
def case(request):
  return request.param


@pytest.fixture(scope="module")
def source(case, tmp_path_factory):
  return vit_reference.write(case, tmp_path_factory.mktemp(case))


def run(sizes, params, images, **fields):
  """Returns the features [b, 1 + r + n, d], and everything."""
  found = jax.jit(ViT(**sizes, **fields).apply)({"params": params}, images)
  return jnp.concatenate([found["cls"][:, None], found["registers"], found["patches"]], 1), found


@pytest.mark.parametrize("live", [False, True], ids=["stored", "live"])
def test_features_equal_the_original(case, source, live):
  sizes, params = load_vit(source)
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
  features, found = run(sizes, params, vit_reference.images(case))
  if live:
    pytest.importorskip("transformers", exc_type=ImportError)
    want = vit_reference.outputs(case, source)
  else:
    with np.load(STORED) as file:
      want = {name.partition("/")[2]: file[name] for name in file.files if name.startswith(f"{case}/")}
    features = features[:, ::3, ::2] if case == "dino" else features
  np.testing.assert_allclose(features, want.pop("features"), atol=2e-5)
  if case == "dino":
    same = run(sizes, params, vit_reference.images(case, True))[1]["cls"]
    np.testing.assert_allclose(same, want.pop("same"), atol=2e-5)
  assert sorted(want) == (["logits"] if case in ("giant", "registers") else [])
  for name, x in want.items():
    np.testing.assert_allclose(found[name], x, atol=2e-5)


@pytest.mark.parametrize("case", ["giant", "registers"], indirect=True)
def test_bfloat16_is_close(case, source):
  sizes, params = load_vit(source)
  images = vit_reference.images(case)
  want, _ = run(sizes, params, images)
  got, _ = run(sizes, params, images, dtype=jnp.bfloat16)
  assert got.dtype == jnp.bfloat16
  assert np.abs(got - want).mean() < 0.02 * want.std()


@pytest.mark.parametrize("case", ["dinov2", "giant", "registers"], indirect=True)
def test_authors_names(case, source, tmp_path, monkeypatch):
  """What a folder holds is the same by the names of facebookresearch; only positions off the table differ."""
  sizes, params = load_vit(source)
  sizes = dict(num_registers=0, antialias=False, offset=0.0 if case == "registers" else 0.1) | sizes
  sizes.pop("num_classes", None)
  params.pop("head", None)
  flat = flatten_dict(params, sep="/")
  found = {"mask_token": np.zeros((1, 32), np.float32)}
  entries = vit_files.entries({path: x.shape for path, x in flat.items()}, "facebook")
  for e in sorted(entries, key=lambda e: e.share):  # parts of a tensor in their order
    for i, name in enumerate(e.names):
      part = e.to_official(flat[e.path], i)
      found[name] = np.concatenate([found[name], part]) if e.share[0] else np.ascontiguousarray(part)
  save_file(found, tmp_path / "dinov2.safetensors")
  np.savez(tmp_path / "dinov2.npz", **found)
  monkeypatch.setattr(vit_files, "_HEAD_DIM", 16)
  for name in ("dinov2.safetensors", "dinov2.npz"):
    again_sizes, again = load_vit(tmp_path / name)
    assert again_sizes == sizes
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("case", ["giant", "registers"], indirect=True)
def test_sharded(case, source):
  """Parameters sharded over devices give the same features."""
  sizes, params = load_vit(source)
  images = np.tile(vit_reference.images(case), (2, 1, 1, 1))
  want, _ = run(sizes, params, images)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  abstract = jax.eval_shape(ViT(**sizes).init, jax.random.key(0), images)["params"]
  placed = jax.device_put(params, sharding.tree_shardings(abstract, mesh))
  assert len(placed["blocks"]["mlp"]["in"]["kernel"].sharding.spec) == 3
  got, _ = run(sizes, placed, jax.device_put(images, sharding.batch_sharding(mesh)))
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_preprocess():
  """As Pillow resizes, which rounds to 8 bits after each of the two sides."""
  rng = np.random.default_rng(0)
  for shape in ((40, 52), (70, 64), (20, 20)):
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    short = min(shape)
    size = [int(32 * side / short) for side in shape]
    want = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)) / 255
    top, left = (size[0] - 28) // 2, (size[1] - 28) // 2
    want = want[top : top + 28, left : left + 28]
    got = preprocess(jnp.asarray(image[None] / 255), 32, 28)[0] * np.array(IMAGENET[1]) + np.array(IMAGENET[0])
    np.testing.assert_allclose(got, want, atol=1.3 / 255)
  with pytest.raises(ValueError, match="images of 15 x 28 pixels do not divide into patches of 14"):
    tiny = ViT(patch_size=14, grid=2, width=8, depth=1, head_dim=4, mlp_hidden=8)
    tiny.init(jax.random.key(0), jnp.zeros((1, 15, 28, 3)))


SIZES = {
  "small": (384, 12, 22_056_576),
  "base": (768, 12, 86_580_480),
  "large": (1024, 24, 304_368_640),
  "giant": (1536, 40, 1_136_480_768),
}  # width, depth, parameters of transformers' Dinov2Model


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("name", SIZES)
def test_released_sizes(name, registers, tmp_path):
  """The config.json of facebook/dinov2-* describes a network of as many parameters, the mask token among them."""
  width, depth, count = SIZES[name]
  kind = dict(model_type="dinov2_with_registers", num_register_tokens=4) if registers else {}
  released = dict(
    hidden_size=width,
    num_hidden_layers=depth,
    num_attention_heads=width // 64,
    image_size=518,
    use_swiglu_ffn=name == "giant",
  )
  (tmp_path / "config.json").write_text(json.dumps(vit_reference.DINOV2 | released | kind))
  _, sizes = vit_files._sizes(vit_files.Folder(tmp_path, "", ""))
  assert sum(np.prod(shape) for shape in vit_files.shapes(sizes).values()) + width == count + registers * width


QUERY = "encoder.layer.1.attention.attention.query.weight"
BAD_CONFIGS = [  # (change, part of the error)
  (dict(model_type="beit"), "model_type is 'beit', only 'vit', 'dinov2' and"),
  (dict(hidden_size=33), "hidden_size=33 is not a multiple of num_attention_heads=2"),
  (dict(hidden_size=64), "has shape .*, expected "),
  (dict(hidden_size=2**16, mlp_ratio=64), "has shape .*, expected "),
  (dict(num_hidden_layers=10**9), "num_hidden_layers must be a whole number from 1 to 1000, got 1000000000"),
  (dict(num_hidden_layers=3), "lacks the tensor encoder.layer.2"),
  (dict(num_hidden_layers=1), "has a tensor 'encoder.layer.1"),
  (dict(image_size=[126, 126]), "image_size must be a whole number"),
  (dict(image_size=7), "image_size=7 is less than patch_size=14"),
  (dict(num_channels=1), "num_channels must be 3, got 1"),
  (dict(hidden_act="swish"), "hidden_act 'swish' is not supported, only 'gelu'"),
  (dict(layer_norm_eps=0), "layer_norm_eps must lie between 0 and 1, got 0"),
  (dict(mlp_ratio="4"), "mlp_ratio must lie between 0 and 64, got '4'"),
]


@pytest.mark.parametrize("change,words", BAD_CONFIGS)
def test_unsupported_configs_are_refused(tmp_path, change, words):
  vit_reference.write("dinov2", tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(vit_reference.CONFIGS["dinov2"] | change))
  with pytest.raises(ValueError, match=words) as error:
    load_vit(tmp_path)
  assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_and_foreign_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such vision transformer: .*/none; give a folder or"):
    load_vit(tmp_path / "none")
  with pytest.raises(FileNotFoundError, match="no such file: "):
    load_vit(tmp_path / "none.safetensors")
  path = vit_reference.write("dino", tmp_path)
  found = load_file(path)
  for change, words in (
    ({"patch_embed.proj.weight": np.zeros(3, np.float32)}, "has no patch_embed.proj.weight with 4 axes: not a"),
    ({"patch_embed.proj.weight": np.zeros((100, 3, 16, 16), np.float32)}, "width 100, 2 blocks and 7 x 7 positions"),
    ({"pos_embed": np.zeros((1, 49, 128), np.float32)}, r"pos_embed has shape \[1, 49, 128\], expected \[1, 37, 128\]"),
    ({"head.weight": np.zeros(3, np.float32)}, "has a tensor 'head.weight' that"),
  ):
    save_file(found | change, path)
    with pytest.raises(ValueError, match=words) as error:
      load_vit(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
