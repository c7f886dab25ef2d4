"""Nested dropout: lengths, merged registers, masks; its distributions are in tests/models/test_reference.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.ops import nested


def normals(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("num, expected", [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (16, (1, 2, 4, 8, 16))])
def test_lengths(num, expected):
  assert nested.powers_of_two(num) == expected


@pytest.mark.parametrize("mode", nested.MODES)
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_kept_lengths_are_stratified(mode, rows):
  """A row drawn at random has the mode's law; in a group every length comes floor or ceil of its expected times."""
  n, null_prob, groups = 16, 0.2, 60_000 // rows
  keep_k, drop = (np.asarray(x) for x in nested.sample_keep_k(jax.random.key(1), groups, rows, n, mode, null_prob))
  assert keep_k.shape == drop.shape == (groups, rows) and keep_k.dtype == np.int32
  values = np.where(drop, 0, keep_k)
  law = np.concatenate([[null_prob], (1 - null_prob) * nested.length_distribution(mode, n)])
  error = np.sqrt(law * (1 - law) / groups)  # no larger than that of independent draws
  assert (np.abs(np.bincount(values.ravel(), minlength=n + 1) / values.size - law) <= 5 * error + 1e-6).all()
  counts = (values[:, :, None] == np.arange(n + 1)).sum(1)
  expected = rows * law
  assert (counts >= np.floor(expected - 1e-6)).all() and (counts <= np.ceil(expected + 1e-6)).all()
  bounds = nested.row_bounds(mode, n, null_prob, rows)
  assert (values <= bounds).all() and (values.max(0) == bounds).all()  # reached, too


def test_every_row_may_be_null_or_none():
  keep_k, drop = nested.sample_keep_k(jax.random.key(0), 3, 4, 8, "pow2", 1.0)
  assert drop.all() and (keep_k >= 1).all() and (nested.row_bounds("pow2", 8, 1.0, 4) == 0).all()
  assert not nested.sample_keep_k(jax.random.key(0), 3, 4, 8, "pow2", 0.0)[1].any()


@pytest.mark.parametrize("num", [1, 2, 5, 8, 9, 16, 100, 256])
def test_slots(num):
  """There are few sizes, with room for every kept register and, if any is masked, for one masked register."""
  sizes = nested.padded_lengths(num)
  assert sizes[-1] == num and list(sizes) == sorted(set(sizes)) and len(sizes) <= 2 + num.bit_length()
  for k in range(1, num + 1):
    slots = nested.padded_length(k, num)
    assert slots in sizes and (slots > k or slots == k == num)
    assert slots == min(size for size in sizes if size > k or size == num)


@pytest.mark.parametrize("lengths", [[0, 0, 8, 8, 8, 16, 24, 256], [8, 16, 24, 40, 72, 136], [0, 0, 0], [4]])
@pytest.mark.parametrize("overhead", [0.0, 60.0, 300.0, 1e9])
def test_buckets_have_the_least_cost(lengths, overhead):
  """Against all ways to cut the rows, in which rows of length 0 stay by themselves."""
  cost = lambda length: 100.0 + length
  found = nested.merge_buckets(lengths, cost, overhead)

  def total(buckets):
    return sum((end - first) * cost(length) + overhead for first, end, length in buckets)

  rows, ways = len(lengths), []
  for cuts in itertools.product((False, True), repeat=rows - 1):
    edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), rows]
    buckets = [(a, b, lengths[b - 1]) for a, b in zip(edges, edges[1:])]
    if all(lengths[a] or not length for a, _, length in buckets):
      ways.append(buckets)
  assert total(found) == min(map(total, ways)) and found in ways
  if not overhead:
    assert [length for first, end, length in found for _ in range(first, end)] == lengths
  if overhead == 1e9:
    assert len(found) == len({bool(length) for length in lengths})


def test_weights_of_slots_add_up_to_all_registers():
  keep_k, drop = jnp.array([1, 5, 7, 16, 3]), jnp.array([False, False, False, False, True])
  for slots in (8, 12, 16):
    weights = np.exp(nested.key_log_counts(jnp.minimum(keep_k, slots), drop, slots, 16))
    rows = [0, 1, 2, 4] + [3] * (slots == 16)  # all 16 kept need 16 slots
    np.testing.assert_allclose(weights.sum(1)[rows], 16, rtol=1e-6)
    np.testing.assert_allclose(weights[1, :5], 1)
    np.testing.assert_allclose(np.exp(nested.key_log_counts(keep_k, drop, slots, 16, True))[4].sum(), 1, rtol=1e-6)
  np.testing.assert_array_equal(nested.key_log_counts(keep_k, drop, 16, 16), 0)  # nothing is merged


def test_unknown_nested_dropout():
  with pytest.raises(ValueError, match="'pow3'.*uniform, pow2, uniform_pow2"):
    nested.length_distribution("pow3", 4)


def test_no_gradient_reaches_masked_positions():
  keep_k = jnp.array([0, 2, 5])
  grad = jax.grad(lambda x: jnp.square(nested.mask_tail(x, jnp.ones(4), keep_k)).sum())(jnp.asarray(normals(3, 5, 4)))
  kept = np.arange(5) < np.array([0, 2, 5])[:, None]
  np.testing.assert_array_equal((grad != 0).any(-1), kept)
  # The fill receives the gradients of all positions that it replaces.
  fill_grad = jax.grad(lambda f: nested.mask_tail(jnp.zeros((3, 5, 4)), f, keep_k).sum())(jnp.ones(4))
  np.testing.assert_array_equal(fill_grad, [(~kept).sum()] * 4)
