"""Reading compiled programs: loops, matrix products, collectives and memory traffic, against counts by hand."""

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from flextok_jax.tools.compile import hlo, profile
from flextok_jax.tools.compile import traffic as hlo_traffic

# A shortened TPU program for 4 devices. The sharded weights of a layer are gathered in a loop of 7 iterations (its
# counter is read inside a fusion, its bound is part of the state); a kernel scatters the gradient; one collective runs
# concurrently with other work, in two kernels. S(1) is on-chip memory.
TPU = """
HloModule jit_f, is_scheduled=true, num_partitions=4

%slice_fusion (p0: bf16[7,256,1024], p1: s32[]) -> bf16[1,256,1024] {
  %p0 = bf16[7,256,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %ds = bf16[1,256,1024]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,256,1024}
}

%product_fusion (q0: bf16[512,1024], q1: bf16[1,1024,1024], q2: bf16[7,512,1024], q3: s32[]) -> (bf16[512,1024], bf16[7,512,1024]) {
  %q0 = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %q1 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %w = bf16[1024,1024]{1,0:T(8,128)(2,1)} bitcast(%q1)
  %y = bf16[512,1024]{1,0:T(8,128)(2,1)} convolution(%q0, %w), dim_labels=bf_io->bf
  %q2 = bf16[7,512,1024]{2,1,0:T(8,128)(2,1)} parameter(2)
  %q3 = s32[]{:T(128)S(6)} parameter(3)
  %zero.1 = s32[]{:T(128)} constant(0)
  %row = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} bitcast(%y)
  %dus = bf16[7,512,1024]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%q2, %row, %q3, %zero.1, %zero.1)
  ROOT %out = (bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[7,512,1024]{2,1,0:T(8,128)(2,1)}) tuple(%y, %dus)
}

%body (state: (s32[], bf16[512,1024], bf16[7,256,1024], bf16[7,512,1024], s32[])) -> (s32[], bf16[512,1024], bf16[7,256,1024], bf16[7,512,1024], s32[]) {
  %state = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[7,256,1024]{2,1,0:T(8,128)(2,1)}, bf16[7,512,1024]{2,1,0:T(8,128)(2,1)}, /*index=4*/s32[]{:T(128)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %i.1 = s32[]{:T(128)S(6)} copy(%i)
  %x = bf16[512,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %ws = bf16[7,256,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %ys = bf16[7,512,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=3
  %n = s32[]{:T(128)} get-tuple-element(%state), index=4
  %shard = bf16[1,256,1024]{2,1,0:T(8,128)(2,1)S(1)} fusion(%ws, %i.1), kind=kLoop, calls=%slice_fusion, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %gathered = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%shard), channel_id=1, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={1}, use_global_device_ids=true
  %both = (bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[7,512,1024]{2,1,0:T(8,128)(2,1)}) fusion(%x, %gathered, %ys, %i.1), kind=kOutput, calls=%product_fusion, metadata={op_name="jit(update)/jvp(Model)/decoder/transformer/last/mlp/dot_general"}, backend_config={"window_config":{"estimated_cycles":"20000"}}
  %x.1 = bf16[512,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%both), index=0
  %ys.1 = bf16[7,512,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%both), index=1
  %next = s32[]{:T(128)} add(%i.1, %one)
  ROOT %state.1 = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[7,256,1024]{2,1,0:T(8,128)(2,1)}, bf16[7,512,1024]{2,1,0:T(8,128)(2,1)}, /*index=4*/s32[]{:T(128)}) tuple(%next, %x.1, %ws, %ys.1, %n)
}

%less (l0: s32[], l1: s32[]) -> pred[] {
  %l0 = s32[]{:T(128)} parameter(0)
  %l1 = s32[]{:T(128)} parameter(1)
  ROOT %lt = pred[]{:T(512)} compare(%l0, %l1), direction=LT
}

%condition (c0: (s32[], bf16[512,1024], bf16[7,256,1024], bf16[7,512,1024], s32[])) -> pred[] {
  %c0 = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[7,256,1024]{2,1,0:T(8,128)(2,1)}, bf16[7,512,1024]{2,1,0:T(8,128)(2,1)}, /*index=4*/s32[]{:T(128)}) parameter(0)
  %ci = s32[]{:T(128)} get-tuple-element(%c0), index=0
  %cn = s32[]{:T(128)} get-tuple-element(%c0), index=4
  ROOT %go = pred[]{:T(512)} fusion(%ci, %cn), kind=kLoop, calls=%less
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%a, %b)
}

%all-reduce-scatter (g0: bf16[1024,1024]) -> bf16[256,1024] {
  %g0 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %reduced = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%g0), channel_id=2, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %place = s32[]{:T(128)} constant(0)
  ROOT %mine = bf16[256,1024]{1,0:T(8,128)(2,1)} dynamic-slice(%reduced, %place, %place), dynamic_slice_sizes={256,1024}
}

%start (s0: bf16[64,64]) -> (bf16[64,64], bf16[256,64], u32[]) {
  %s0 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  %ag.0 = bf16[256,64]{1,0:T(8,128)(2,1)} all-gather(%s0), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true
  ROOT %started = (bf16[64,64]{1,0:T(8,128)(2,1)}, bf16[256,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%ag.0), custom_call_target="AsyncCollectiveStart"
}

%beside (t0: bf16[64,64], t1: bf16[256,64], t2: u32[], t3: f32[8]) -> (f32[8], bf16[64,64], bf16[256,64], u32[]) {
  %t0 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  %t1 = bf16[256,64]{1,0:T(8,128)(2,1)} parameter(1)
  %t2 = u32[]{:S(2)} parameter(2)
  %t3 = f32[8]{0:T(128)} parameter(3)
  %ag.1 = bf16[256,64]{1,0:T(8,128)(2,1)} all-gather(%t0), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true
  %twice = f32[8]{0:T(128)} add(%t3, %t3)
  ROOT %given = (f32[8]{0:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)}, bf16[256,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) tuple(%twice, %t0, %ag.1, %t2)
}

ENTRY %main (ws.0: bf16[7,256,1024], x.0: bf16[512,1024], g.0: bf16[1024,1024], v.0: bf16[64,64], f.0: f32[8]) -> bf16[512,1024] {
  %ws.0 = bf16[7,256,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x.0 = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %g.0 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(2)
  %v.0 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(3)
  %f.0 = f32[8]{0:T(128)} parameter(4)
  %start.0 = s32[]{:T(128)} constant(0)
  %seven = s32[]{:T(128)} constant(7)
  %room = bf16[7,512,1024]{2,1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %init = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[7,256,1024]{2,1,0:T(8,128)(2,1)}, bf16[7,512,1024]{2,1,0:T(8,128)(2,1)}, /*index=4*/s32[]{:T(128)}) tuple(%start.0, %x.0, %ws.0, %room, %seven)
  %loop = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[7,256,1024]{2,1,0:T(8,128)(2,1)}, bf16[7,512,1024]{2,1,0:T(8,128)(2,1)}, /*index=4*/s32[]{:T(128)}) while(%init), condition=%condition, body=%body
  %scattered = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%g.0), kind=kCustom, calls=%all-reduce-scatter
  %begun = (bf16[64,64]{1,0:T(8,128)(2,1)}, bf16[256,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%v.0), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %b0 = bf16[64,64]{1,0:T(8,128)(2,1)} get-tuple-element(%begun), index=0
  %b1 = bf16[256,64]{1,0:T(8,128)(2,1)} get-tuple-element(%begun), index=1
  %b2 = u32[]{:S(2)} get-tuple-element(%begun), index=2
  %going = (f32[8]{0:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)}, bf16[256,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%b0, %b1, %b2, %f.0), kind=kCustom, calls=%beside
  ROOT %result = bf16[512,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def tpu():
  return hlo.Module(TPU)


def test_loops_of_a_saved_program_are_multiplied_out(tpu):
  assert hlo.matmul_flops(tpu) == 7 * 2 * 512 * 1024 * 1024
  assert sum(kernel.cycles for kernel in profile.kernels(tpu)) == 7 * 21_000
  assert tpu.unknown_loops == 0


def test_cycles_by_kind_of_kernel(tpu):
  """A fused product counts as a product, with its FLOPs; a kernel that only cuts out a part, as a move."""
  product, move = profile.kernels(tpu)
  assert product == profile.Kernel(
    profile.PRODUCTS,
    "jit(update)/jvp(Model)/decoder/transformer/last/mlp/dot_general",
    runs=7,
    cycles=7 * 20_000,
    flops=hlo.matmul_flops(tpu),
  )
  assert move == profile.Kernel(profile.MOVES, "fusion", runs=7, cycles=7_000, flops=0)
  assert [row["kind"] for row in profile.by_kind([move, product])] == [profile.PRODUCTS, profile.MOVES]


@pytest.mark.parametrize(
  "opcode, source, kind",
  [
    ("dot", "jit(update)/jvp(M)/decoder/transformer/last/attention/attention._attend/vmap()/dot_general", "ATTENTION"),
    ("dot", "jit(update)/jvp(M)/decoder/transformer/last/attention/attention._attend/out/dot_general", "PRODUCTS"),
    ("reduce", "jit(update)/jvp(M)/decoder/transformer/last/attention/attention._attend/reduce_max", "SOFTMAX"),
    ("rsqrt", "jit(update)/jvp(M)/decoder/transformer/last/attention/attention._norm_q/rsqrt", "HEAD_NORMS"),
    ("multiply", "jit(update)/transpose(jvp(M))/decoder/transformer/last/mul", "BLOCKS"),
    ("multiply", "jit(update)/mul", "OPTIMIZER"),
    ("multiply", "jit(update)/jvp()/mul", "REST"),
    ("all-reduce", "jit(update)/transpose(jvp(M))/decoder/transformer/last/dot_general", "WAITS"),
    ("transpose", "jit(update)/jvp(M)/decoder/transformer/last/attention/attention._attend/transpose", "MOVES"),
  ],
)
def test_kinds_of_kernels(opcode, source, kind):
  """By what a kernel computes and where in the model it comes from."""
  metadata = f'metadata={{op_name="{source}"}}, backend_config={{"estimated_cycles":"5"}}'
  program = f"""HloModule m

ENTRY %main (a: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8]{{1,0}} parameter(0)
  ROOT %y = f32[8,8]{{1,0}} {opcode}(%a, %a), {metadata}
}}
"""
  (kernel,) = profile.kernels(hlo.Module(program))
  assert (kernel.kind, kernel.cycles, kernel.source) == (getattr(profile, kind), 5, source)


def test_collectives_of_a_saved_program(tpu):
  found = hlo_traffic.collectives(tpu, 4)
  assert [(c.kind, c.times, c.sent) for c in found] == [
    ("all-gather", 7, 3 * 2 * 256 * 1024),
    ("reduce-scatter", 1, 3 * 2 * 1024 * 1024 // 4),  # an all-reduce of which each device keeps its slice
    ("all-gather", 1, 3 * 2 * 64 * 64),  # in two kernels, but on one channel
  ]
  assert all(c.group == (0, 1, 2, 3) for c in found)


def test_an_asynchronous_collective_is_counted_once(tpu):
  """It starts before the loop and continues in the loop's kernels: seven times in the program, once on the network."""
  kinds = "bf16[64,64]{1,0}", "bf16[256,64]{1,0}", "u32[]", "f32[8]{0}"
  constants = "\n".join(f"  %v.{i} = {kind} constant(0)" for i, kind in enumerate(kinds, 1))
  within = f"""
{constants}
  %during = ({", ".join(kinds)}) fusion(%v.1, %v.2, %v.3, %v.4), kind=kCustom, calls=%beside
"""
  place = "  %next = s32[]{:T(128)} add("
  text = TPU.replace(place, within + place, 1)
  assert text != TPU
  assert hlo_traffic.collectives(hlo.Module(text), 4) == hlo_traffic.collectives(tpu, 4)


def test_memory_traffic_of_a_saved_program(tpu):
  shard, rows = 2 * 256 * 1024, 2 * 512 * 1024
  loop = shard + rows + rows + rows  # reads a layer's weights and x; writes x, and x again as a row of the history
  scattered = 2 * 1024 * 1024  # is read; the result stays on the chip
  gathered = 2 * 64 * 64 + 2 * 256 * 64
  counter = 4 + 4 + 4 + 1  # add and compare access single numbers; the copy on the chip is free
  beside = 2 * 8 * 4
  total = hlo_traffic.memory_bytes(tpu)
  by_hand = 7 * loop + scattered + gathered + beside
  assert by_hand <= total <= by_hand + 7 * 2 * counter


def test_unknown_trip_counts_use_the_given_number():
  text = TPU.replace("direction=LT", "direction=NE")
  program = hlo.Module(text, unknown_trips=40)
  assert hlo.matmul_flops(program) == 40 * 2 * 512 * 1024 * 1024
  assert program.unknown_loops == 1


@pytest.mark.parametrize(
  ("start", "bound", "direction", "step", "trips"),
  [
    (0, 7, "LT", 1, 7),
    (2, 7, "LT", 1, 5),
    (0, 7, "LE", 1, 8),
    (0, 7, "LT", 2, 4),
    (7, 0, "GT", -1, 7),
    (6, 0, "GE", -1, 7),
    (7, 7, "LT", 1, 0),
  ],
)
def test_trips_by_start_bound_and_step(start, bound, direction, step, trips):
  text = TPU.replace("%start.0 = s32[]{:T(128)} constant(0)", f"%start.0 = s32[]{{:T(128)}} constant({start})")
  text = text.replace("%seven = s32[]{:T(128)} constant(7)", f"%seven = s32[]{{:T(128)}} constant({bound})")
  text = text.replace("direction=LT", f"direction={direction}")
  text = text.replace("%one = s32[]{:T(128)} constant(1)", f"%one = s32[]{{:T(128)}} constant({step})")
  assert hlo.matmul_flops(hlo.Module(text)) == trips * 2 * 512 * 1024 * 1024


@pytest.mark.parametrize(
  ("text", "group"),
  [
    ("replica_groups={}", tuple(range(8))),
    ("channel_id=3, replica_groups={{0,2},{4,6},{1,3},{5,7}}, use_global_device_ids=true", (0, 2)),
    ("replica_groups=[2,4]<=[8], dimensions={1}", (0, 1, 2, 3)),
    ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}", (0, 2, 4, 6)),
    ("replica_groups=[4,2]<=[2,2,2]T(2,1,0)", (0, 4)),
    ("replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={1}", tuple(range(8))),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x=y", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x=y", (0, 1, 2, 3)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x=y", (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, x=y", (0, 1)),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
    ("source_target_pairs={{3,5},{5,3}}", (3, 5)),
  ],
)
def test_groups_in_every_notation(text, group):
  assert hlo_traffic.first_group(text, 8) == group


def test_unknown_group_notation_is_refused():
  with pytest.raises(ValueError, match="unknown groups"):
    hlo_traffic.first_group("replica_groups=@mesh", 8)


def mesh_of(**axes):
  shape = tuple(axes.values())
  devices = mesh_utils.create_device_mesh(shape, jax.devices()[: np.prod(shape)])
  return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compile_for(mesh, fn, out, *args):
  """Compiles fn for arguments (shape, spec), with its result sharded as `out`."""
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in args]
  return jax.jit(fn, out_shardings=NamedSharding(mesh, out)).lower(*shapes).compile()


def program_of(*args):
  return hlo.Module(compile_for(*args).as_text())


def sent(program, devices=8):
  totals = {}
  for c in hlo_traffic.collectives(program, devices):
    totals[c.kind] = totals.get(c.kind, 0) + c.times * c.sent
  return totals


def test_data_parallel_product_reduces_its_gradient():
  mesh = mesh_of(data=8)
  grad = jax.grad(lambda w, x: jnp.square(x @ w).sum())
  program = program_of(mesh, grad, P(), ((64, 32), P()), ((80, 64), P("data")))
  assert sent(program) == {"all-reduce": 2 * 7 * 4 * 64 * 32 // 8}
  assert hlo.matmul_flops(program) == 2 * 2 * 10 * 64 * 32  # x w, and x^T times the output's gradient


def test_column_sharded_product_gathers():
  mesh = mesh_of(data=2, tensor=4)
  program = program_of(mesh, lambda x, w: x @ w, P("data"), ((16, 64), P("data")), ((64, 32), P(None, "tensor")))
  assert sent(program) == {"all-gather": 3 * 4 * 8 * 8}  # each device has 8 x 8 of the 8 x 32 that its group needs
  (gather,) = hlo_traffic.collectives(program, 8)
  assert gather.group == (0, 1, 2, 3)


def test_a_scan_counts_every_layer():
  mesh, layers = mesh_of(data=8), 5

  def fn(ws, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

  whole = NamedSharding(mesh, P())

  def gathered(ws, x):
    body = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None)
    return jax.lax.scan(body, x, ws)[0]

  rows = ((80, 64), P("data"))
  program = program_of(mesh, fn, P("data"), ((layers, 64, 64), P()), rows)
  assert hlo.matmul_flops(program) == layers * 2 * 10 * 64 * 64
  assert sent(program) == {}
  program = program_of(mesh, gathered, P("data"), ((layers, 64, 64), P(None, "data")), rows)
  assert hlo.matmul_flops(program) == layers * 2 * 10 * 64 * 64
  assert program.unknown_loops == 0
  assert sent(program) == {"all-gather": layers * 7 * 4 * 8 * 64}


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_flops_equal_xla(stride):
  fn = lambda x, w: jax.lax.conv_general_dilated(
    x, w, (stride, stride), ((1, 1), (1, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  compiled = compile_for(mesh_of(data=1), fn, P(), ((2, 12, 16, 4), P()), ((3, 3, 4, 8), P()))
  assert hlo.matmul_flops(hlo.Module(compiled.as_text())) == compiled.cost_analysis()["flops"]


def test_dilated_convolution_by_hand():
  """TPUs write 3 products of 2 rows with 5 columns over 4 numbers like this: the diagonal of a dilated convolution."""
  line = (
    "  ROOT %y = f32[3,2,5]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, "
    "dim_labels=0bf_0oi->0bf"
  )
  text = (
    "ENTRY %main (a: f32[3,2,4], b: f32[3,5,4]) -> f32[3,2,5] {\n  %a = f32[3,2,4]{2,1,0} parameter(0)\n"
    f"  %b = f32[3,5,4]{{2,1,0}} parameter(1)\n{line}\n}}\n"
  )
  assert hlo.matmul_flops(hlo.Module(text)) == 2 * 3 * 2 * 5 * 4


def test_products_of_gpu_libraries_by_hand():
  """A batched product of cuBLAS, 12 of 8 x 4 with 4 x 6, cuDNN's convolutions, and its attention, not counted."""
  product = (
    '  %p = (f32[12,8,6]{2,1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", '
    'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}'
  )
  call = (
    "  %c{0} = (f32[{1}]{{3,2,1,0}}, u8[0]{{0}}) custom-call({2}), window={{size=3x3 pad=1_1x1_1}}, "
    'dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$conv{0}"'
  )
  convolutions = [
    call.format("Forward", "2,5,5,7", "%x, %w"),
    call.format("BiasActivationForward", "2,5,5,7", "%x, %w, %bias"),
    call.format("BackwardInput", "2,5,5,3", "%y, %w"),
    call.format("BackwardFilter", "3,3,3,7", "%x, %y"),
  ]
  attention = '  ROOT %s = (f32[12,8,4]{2,1,0}, u8[0]{0}) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"'
  shapes = {
    "a": "f32[12,4,8]{2,1,0}",
    "b": "f32[12,4,6]{2,1,0}",
    "x": "f32[2,5,5,3]{3,2,1,0}",
    "w": "f32[3,3,3,7]{3,2,1,0}",
    "y": "f32[2,5,5,7]{3,2,1,0}",
    "bias": "f32[7]{0}",
  }
  lines = [f"  %{name} = {shape} parameter({i})" for i, (name, shape) in enumerate(shapes.items())]
  text = "\n".join(["ENTRY %main (a: f32[]) -> f32[] {", *lines, product, *convolutions, attention, "}", ""])
  module = hlo.Module(text)
  pairs = (3 * 5 - 2) ** 2  # of an input and an output that a kernel of 3 x 3 joins, padded by one on each side
  assert hlo.matmul_flops(module) == 2 * 12 * 8 * 4 * 6 + 4 * 2 * 2 * pairs * 3 * 7
  assert hlo.custom_kernels(module) == 1  # of cuDNN


def test_text_without_a_program_is_refused():
  with pytest.raises(ValueError, match="no HLO program"):
    hlo.Module("nothing")
