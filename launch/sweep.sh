#!/usr/bin/env bash
# Trains the runs of a config's sweep (its get_sweep), each in DIR/NAME, and compares them in one table:
#
#   bash launch/sweep.sh CONFIG DIR [--only=a,b] [--dry_run] [flags of flextok_jax.train]
#   bash launch/sweep.sh CONFIG DIR --launcher='sbatch --job-name={name} launch/slurm.sh' [...]
#
# The runs are trained one after another on this machine; running the same command again resumes the sweep. If a run
# fails, the script reports it, trains the others and exits with 1. --launcher submits each run to a cluster instead: it
# is the command to which the run's flags are appended; {name} is replaced by the run's name in lower case with hyphens.
# --dry_run (or -n) only prints the commands. See docs/sweeps.md.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

if (($# < 2)) || [[ $1 == -* || $2 == -* ]]; then fail "expected launch/sweep.sh CONFIG DIR [flags], got '$*'"; fi
config=$1 dir=${2%/}
shift 2
only=() launcher="" dry_run=false flags=()
for word; do
  case $word in
    --only=*) only=("$word") ;;
    --launcher=*) launcher=${word#*=} ;;
    -n | --dry_run | --dry-run) dry_run=true ;;
    --config=* | --workdir=*) fail "$word: give the config and the folder of the runs as the first two arguments" ;;
    *) flags+=("$word") ;;
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

listing=$(python -m flextok_jax.sweep --config="$config" --list "${only[@]}" "${flags[@]}") || exit 2
mapfile -t lines <<<"$listing"
submit=() words=()
eval "submit=($launcher)" # split into words by the shell, so that quotes work

# Runs are started in the background, so that signals are passed on immediately: on SIGTERM, training saves.
child="" stopped=false
trap 'stopped=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
run() {
  local code=0
  "$@" </dev/null &
  child=$!
  if $stopped; then kill -TERM "$child" 2>/dev/null || true; fi # the signal arrived before the child started
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
  eval "words=($line)" # the words are quoted by shlex
  name=${words[0]}
  command=(--config="$config" --workdir="$dir/$name" "${words[@]:1}" "${flags[@]}")
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
    echo "error: the run $name failed, see above" >&2
    failed+=("$name")
  fi
  if $stopped; then
    echo "stopped; run the same command to resume" >&2
    exit 143
  fi
done
if $dry_run; then exit; fi

table=(python -m flextok_jax.sweep --dir="$dir")
if [[ -n $launcher ]]; then
  printf 'to compare the runs after training: %s\n' "${table[*]}"
elif ((${#trained[@]})); then
  "${table[@]}" --only="$(IFS=,; echo "${trained[*]}")"
fi
if ((${#failed[@]})); then
  echo "error: failed runs: ${failed[*]}" >&2
  exit 1
fi
