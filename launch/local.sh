#!/usr/bin/env bash
# Runs a command as N processes on this machine, connected by JAX's CPU collectives, as on N machines:
#
#   launch/local.sh N python -m flextok_jax.train --config=... --workdir=DIR
#   launch/local.sh N --config=... --workdir=DIR          the same
#
# Each process has one device, or M with XLA_FLAGS=--xla_force_host_platform_device_count=M. If a process fails, the
# script kills the others and exits. Ctrl-C and SIGTERM are sent to all processes. Paths are relative to the current
# folder.
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "error: expected launch/local.sh N COMMAND..., N the number of processes, got '$*'" >&2
  exit 2
fi
count=$1
shift
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("jax") is None)' 2>/dev/null; then
  here=$PWD
  # shellcheck source-path=SCRIPTDIR
  source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
  cd "$here"
fi
[[ $1 != --* ]] || set -- python -m flextok_jax.train "$@"

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

declare -A processes=()
send_signal() { # to the process group of each process
  local process
  for process in "${!processes[@]}"; do
    kill -s "$1" -- "-$process" 2>/dev/null || true
  done
}
trap 'send_signal TERM' TERM
trap 'send_signal INT' INT
trap 'send_signal KILL' EXIT

set -m # one process group per process
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i "$@" </dev/null &
  processes[$!]=$i
done
set +m

while ((${#processes[@]})); do
  code=0 ended=""
  wait -n -p ended "${!processes[@]}" || code=$?
  if [[ -n ${ended:-} ]]; then # otherwise a signal arrived, which the trap passes on
    i=${processes[$ended]}
    unset "processes[$ended]"
    if ((code)); then
      ((${#processes[@]} == 0)) || echo "process $i ended with code $code: stopping the others" >&2
      exit "$code"
    fi
  fi
done
