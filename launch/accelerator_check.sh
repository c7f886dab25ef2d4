#!/usr/bin/env bash
# Checks the first GPU or TPU of this machine in under eight minutes: its results against those of the CPU, and time and
# memory of training steps and of sampling.
#   bash launch/accelerator_check.sh OUT          d12-d12 at 256 px, and ar:49m
#   bash launch/accelerator_check.sh --tiny OUT   tiny models, on a CPU too: a test of this script
# Run it in the repository's folder with the `python` of an environment that has jax for the accelerator. OUT receives
# table.md, ready for docs/performance.md, and for each step its JSON lines and its log. A step that fails or takes too
# long is reported, and the others still run; the exit code is then 1.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

tiny=
if [[ ${1:-} == --tiny ]]; then
  tiny=1
  shift
fi
(($# == 1)) || fail "give a folder: bash launch/accelerator_check.sh [--tiny] OUT"
out=$1
platform=$(python -c 'import jax; print(jax.default_backend())') || fail "python cannot start jax: activate an environment"
[[ $tiny || $platform != cpu ]] || fail "jax sees no GPU or TPU here: use --tiny to test the script on a CPU"
mkdir -p "$out"
rm -f "$out"/*.jsonl "$out"/*.log "$out/table.md"

limit=${FLEXTOK_CHECK_SECONDS:-450} # for all steps together
failed=()
# step NAME ARGUMENTS: runs the benchmark in the time that is left.
step() {
  local name=$1 left=$((limit - SECONDS)) code=0
  shift
  if ((left > 0)); then
    echo "$name"
    timeout --kill-after=5 "$left" python -m flextok_jax.benchmark --out="$out/$name.jsonl" "$@" >"$out/$name.log" 2>&1 ||
      code=$?
    ((code == 0)) || tail -n 3 "$out/$name.log"
  else
    code=124
  fi
  if ((code == 124)); then echo "$name: out of time"; fi
  if ((code != 0)); then failed+=("$name"); fi
}

if [[ $tiny ]]; then
  tokenizer=(--config=debug)
  generator=(--config=shapes_ar --config.ar.depth=1)
  shallow=() few=2 all=4 rows=2 dtype=float32 compared=train timed=train timed_ar=ar timing=(--repeats=1)
else
  tokenizer=(--config=flextok:d12_d12_in1k --config.repa.weight=0)
  generator=(--config=ar:49m)
  # The CPU computes the reference.
  shallow=(--config.encoder.depth=2 --config.decoder.depth=2 --config.sampler.num_steps=3)
  few=32 all=256 rows=32 dtype=bfloat16
  compared=tokenize,detokenize,train timed=train,detokenize timed_ar=train,ar
  timing=(--repeats=20 --seconds=15)
fi
# The fastest first, and what matters most: a step that is cut short costs only itself.
kernels=(auto) # cuDNN's, or that of Pallas on TPUs
if [[ $platform != cpu ]]; then kernels+=(xla); fi

step parity_float32 "${tokenizer[@]}" "${shallow[@]}" --parity --dtype=float32 --num_tokens=$few --batch_size=4 \
  --jobs=$compared
for kernel in "${kernels[@]}"; do
  if [[ ! $tiny ]]; then
    step "parity_bfloat16_$kernel" "${tokenizer[@]}" "${shallow[@]}" --parity --dtype=bfloat16 --num_tokens=$few \
      --batch_size=4 --paths=fast --jobs=$compared --config.attention="$kernel"
  fi
  step "tokenizer_$kernel" "${tokenizer[@]}" --dtype=$dtype --paths=fast --num_tokens=$all --batch_size=$rows \
    --jobs=$timed --config.attention="$kernel" "${timing[@]}"
done
if [[ ! $tiny ]]; then
  step parity_generator "${generator[@]}" --config.ar.depth=2 --parity --dtype=float32 --paths=fast --num_tokens=$few \
    --batch_size=2 --jobs=ar,train
fi
step generator "${generator[@]}" --dtype=$dtype --paths=fast --batch_size=$rows --jobs=$timed_ar "${timing[@]}"

python -m flextok_jax.benchmark --table="$out" | tee "$out/table.md"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}; see their logs in $out" >&2
  exit 1
fi
