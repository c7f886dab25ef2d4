"""Attention kernels of Pallas in compiled programs: found with their shapes, counted with their simulated cycles."""

import importlib.util

import pytest

from flextok_jax.tools.compile import hlo, kernels, profile

PROGRAM = """HloModule m

ENTRY %main (q: bf16[2,4,64,256], k: bf16[2,4,64,384], bias: f32[2,384,1], mask: bf16[384,256]) -> bf16[2,4,64,256] {{
  %q = bf16[2,4,64,256]{{3,2,1,0}} parameter(0)
  %k = bf16[2,4,64,384]{{3,2,1,0}} parameter(1)
  %bias = f32[2,384,1]{{2,1,0}} parameter(2)
  %mask = bf16[384,256]{{1,0}} parameter(3)
  ROOT %y = bf16[2,4,64,256]{{3,2,1,0}} custom-call({operands}), custom_call_target="{target}", metadata={{op_name="jit(f)/jit(attend)/{name}/pallas_call"}}
}}
"""  # noqa: E501


def found(operands, name, target="tpu_custom_call"):
  module = hlo.Module(PROGRAM.format(operands=operands, name=name, target=target))
  return module, [kernel for run in module.runs() if (kernel := kernels.find(run))]


@pytest.mark.parametrize(
  "name, operands, masked, products",
  [
    ("attention", "%q, %k, %k, %bias", False, 2),
    ("normalised_attention", "%q, %k, %k, %bias", False, 2),
    ("attention", "%q, %k, %k, %bias, %mask", True, 2),
    ("attention_gradient", "%q, %k, %k, %bias, %q", False, 5),
    ("attention_gradient", "%q, %k, %k, %bias, %mask, %q", True, 5),
  ],
)
def test_kernels_are_found_and_counted(name, operands, masked, products):
  module, (kernel,) = found(operands, name)
  name, layer_norm = name.removeprefix("normalised_"), "normalised" in name
  assert kernel == kernels.Kernel(name, "bf16", (2, 4, 64, 256), 384, masked, layer_norm)
  assert kernel.flops == products * 2 * 2 * 4 * 64 * 256 * 384
  (row,) = profile.kernels(module, {kernel: 700})
  assert (row.kind, row.cycles, row.flops, row.runs) == (profile.ATTENTION, 700, kernel.flops, 1)
  assert profile.kernels(module) == []


def test_other_calls_are_no_kernels():
  assert found("%q, %k, %k, %bias", "other")[1] == []
  assert found("%q, %k, %k, %bias", "attention", "AllocateBuffer")[1] == []
  assert kernels.cycles([], "v5e:2x2") == {}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed")
def test_the_compiler_simulates_kernels(monkeypatch):
  """A gradient takes longer than the attention itself, and more samples in proportion."""
  monkeypatch.delenv("XLA_FLAGS", raising=False)  # libtpu refuses flags of other backends
  shape = lambda name, samples: kernels.Kernel(name, "bf16", (samples, 4, 64, 128), 128, False, True)
  asked = [shape("attention", 2), shape("attention_gradient", 2), shape("attention", 4)]
  cycles = kernels.cycles(asked, "v5e:2x2")
  assert 0 < cycles[asked[0]] < min(cycles[asked[1]], cycles[asked[2]])
  assert cycles[asked[2]] < 2.1 * cycles[asked[0]]
