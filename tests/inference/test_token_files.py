"""Token files: reading, and one-line errors."""

import json

import numpy as np
import pytest

from flextok_jax.inference import token_files

NUM_CODES = 8 * 5 * 5


def write(path, **fields):
  path.write_text(json.dumps(fields))
  return path


@pytest.mark.parametrize(
  "pattern, fields",
  [
    (r"token_ids\[1\]\[2\] is 200, this model's ids are 0 to 199", dict(token_ids=[[0], [1, 2, 200]])),
    (r"token_ids\[0\]\[0\] is -1,", dict(token_ids=[[-1]])),
    (r"token_ids\[0\]\[0\] is 1.0,", dict(token_ids=[[1.0]])),
    (r"token_ids\[0\]\[0\] is True,", dict(token_ids=[[True]])),
    (r"token_ids\[0\]\[0\] is '1',", dict(token_ids=[["1"]])),
    (r"token_ids\[1\] has 0 tokens, this model takes 1 to 4", dict(token_ids=[[1], []])),
    (r"token_ids\[0\] has 5 tokens, this model takes 1 to 4", dict(token_ids=[[1, 2, 3, 4, 5]])),
    ("must be a list of one or more lists", dict(token_ids=[])),
    ("must be a list of one or more lists", dict(token_ids=[1, 2])),
    ("has no 'token_ids'", dict(ids=[[1]])),
    ("2 names for 1 token", dict(token_ids=[[1]], names=["a", "b"])),
    ("'names' must be a list of strings", dict(token_ids=[[1]], names=[3])),
    ("tokens of 32 px images, but this checkpoint makes 16 px", dict(token_ids=[[1]], image_size=32)),
  ],
)
def test_invalid_token_files(pattern, fields, tmp_path):
  with pytest.raises(ValueError, match=pattern):
    token_files.read_tokens(write(tmp_path / "t.json", **fields), 16, 4, NUM_CODES)


def test_damaged_token_files(tmp_path):
  def read(path):
    return token_files.read_tokens(path, 16, 4, NUM_CODES)

  bad, whole = tmp_path / "t.json", token_files.to_json(16, 4, ["a", "b"], [[1, 2, 3, 4], [5, 6]])
  for content in (b"", b"{", b"\xff\xfe", whole[:-20], b"[" * 100_000):
    bad.write_bytes(content)
    with pytest.raises(ValueError, match="not a complete .json token file"):
      read(bad)
  bad.write_text("[[1, 2]]")
  with pytest.raises(ValueError, match="must hold an object"):
    read(bad)

  archive = tmp_path / "t.npz"
  token_files.write_tokens(archive, 16, ["a", "b"], np.array([[1, 2], [3, 4]]))
  assert read(archive) == (["a", "b"], [[1, 2], [3, 4]])
  whole = archive.read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(100):  # truncated, or one wrong byte: a one-line error or, if the byte has no effect, the same tokens
    if rng.random() < 0.5:
      archive.write_bytes(whole[: rng.integers(len(whole))])
    else:
      place = rng.integers(len(whole))
      archive.write_bytes(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
    try:
      assert read(archive)[1] == [[1, 2], [3, 4]]
    except ValueError as e:
      assert len(str(e).splitlines()) == 1
  np.savez(archive, token_ids=np.array([[1], [2, 3]], object))
  with pytest.raises(ValueError, match="not a complete .npz token file"):
    read(archive)
