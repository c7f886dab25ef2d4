#!/usr/bin/env bash
# Trains the runs that the sweep of a config lists (get_sweep), each in DIR/NAME, and compares them in one table:
#
#   bash launch/sweep.sh CONFIG DIR [--only=a,b] [--dry_run] [flags of flextok_jax.train]
#   bash launch/sweep.sh CONFIG DIR --launcher='sbatch --job-name={name} launch/slurm.sh' [...]
#
# One after another on this machine; the same command goes on where it was. A run that fails is told of, the others are
# trained, and the exit code is 1. --launcher hands each run to a cluster instead: its words, with the run's name in place
# of {name} (lower case, hyphens), before the run's flags. --dry_run (or -n) prints the commands and runs none.
# See docs/sweeps.md.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

if (($# < 2)) || [[ $1 == -* || $2 == -* ]]; then fail "launch/sweep.sh CONFIG DIR [flags], got '$*'"; fi
config=$1 dir=${2%/}
shift 2
only=() launcher="" dry_run=false given=()
for word; do
  case $word in
    --only=*) only=("$word") ;;
    --launcher=*) launcher=${word#*=} ;;
    -n | --dry_run | --dry-run) dry_run=true ;;
    --config=* | --workdir=*) fail "$word: the config comes first, then the folder of the runs" ;;
    *) given+=("$word") ;;
  esac
done

here=$PWD
if ! python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("jax") is None)' 2>/dev/null; then
  # shellcheck source-path=SCRIPTDIR source=env.sh
  source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
fi
cd "$here"
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

listed=$(python -m flextok_jax.sweep --config="$config" --list "${only[@]}" "${given[@]}") || exit 2
mapfile -t lines <<<"$listed"
submit=() words=()
eval "submit=($launcher)" # split into words as a shell does, with quotes

# The run is in the background, so that a signal to this script is passed on at once: SIGTERM makes it save.
child="" stopped=false
trap 'stopped=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
run() {
  local code=0
  "$@" </dev/null &
  child=$!
  if $stopped; then kill -TERM "$child" 2>/dev/null || true; fi # it came before the child started
  while
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null
  do :; done
  child=""
  return "$code"
}

failed=() trained=()
for line in "${lines[@]}"; do
  eval "words=($line)" # quoted by shlex
  name=${words[0]}
  command=(--config="$config" --workdir="$dir/$name" "${words[@]:1}" "${given[@]}")
  if [[ -z $launcher ]]; then
    command=(python -m flextok_jax.train "${command[@]}")
  else
    label=$(tr '[:upper:]' '[:lower:]' <<<"$name" | tr -cs 'a-z0-9\n' -)
    command=("${submit[@]//'{name}'/$label}" "${command[@]}")
  fi
  if $dry_run; then
    printf '%q ' "${command[@]}" | sed 's/ $/\n/'
    continue
  fi
  echo "=== $name: ${words[*]:1}"
  if run "${command[@]}"; then
    trained+=("$name")
  elif ! $stopped; then
    echo "error: run $name failed, see above" >&2
    failed+=("$name")
  fi
  if $stopped; then
    echo "stopped; the same command resumes" >&2
    exit 143
  fi
done
if $dry_run; then exit; fi

table=(python -m flextok_jax.sweep --dir="$dir")
if [[ -n $launcher ]]; then
  printf 'once they have run: %s\n' "${table[*]}"
elif ((${#trained[@]})); then
  "${table[@]}" --only="$(IFS=,; echo "${trained[*]}")"
fi
if ((${#failed[@]})); then
  echo "error: failed: ${failed[*]}" >&2
  exit 1
fi
