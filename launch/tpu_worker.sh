#!/usr/bin/env bash
# The part of launch/tpu.sh that runs on each worker of a TPU: copied there with the code and called over ssh.
#
# ~/flextok_jax on a worker:
#   code/     the repository's tracked files       venv/   Python and its packages
#   ready     the revision of code/, written when everything is installed
#   run/      of the newest run: log, lock (held while it runs), pid, session, outcome, stop_requested
set -euo pipefail
base=$HOME/flextok_jax
run=$base/run
mkdir -p "$run"

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

is_idle() { flock --nonblock "$run/lock" true; } # unlike a pid file, a lock does not become stale after a reboot

# setup REVISION PREPARE: installs the code copied to code.new, then runs the shell command PREPARE unless it is empty.
setup() {
  local revision=$1 prepare=$2
  is_idle || fail "a run is in progress: stop it before changing its code"
  rm -f "$base/ready"
  rm -rf "$base/code"
  mv "$base/code.new" "$base/code"
  cd "$base/code"
  install_packages
  if [[ -n $prepare ]]; then
    bash -c "$prepare" || fail "the command of --prepare failed: $prepare"
  fi
  echo "$revision" >"$base/ready"
}

# The images of TPU VMs have Python versions older than 3.11, so uv installs one. requirements.txt pins the versions, so
# that all workers have the same packages, also after a preemption.
install_packages() {
  local expected uv
  expected=$(cat requirements.txt setup.py | cksum)
  if [[ -r $base/venv/installed && $(<"$base/venv/installed") == "$expected" ]]; then return; fi
  if ! uv=$(command -v uv); then
    uv=$base/uv/bin/uv
    [[ -x $uv ]] || python3 -m pip install --quiet --target="$base/uv" uv
  fi
  "$uv" venv --quiet --clear --python 3.11 "$base/venv"
  "$uv" pip install --quiet --python "$base/venv/bin/python" --constraints requirements.txt --editable '.[tpu]'
  echo "$expected" >"$base/venv/installed"
}

# start ARGUMENTS: starts training in a new session, so that it continues when the connection ends.
start() {
  [[ -r $base/ready ]] || fail "not set up"
  is_idle || fail "a run is in progress"
  rm -f "$run/pid" "$run/session" "$run/outcome" "$run/stop_requested"
  setsid --fork bash "$base/code/launch/tpu_worker.sh" supervise "$@" </dev/null >>"$run/log" 2>&1
  for _ in {1..300}; do
    if [[ -s $run/pid ]]; then return; fi
    sleep 0.1
  done
  fail "training did not start within 30 seconds: see $run/log"
}

# supervise ARGUMENTS: trains and records how the run ended.
supervise() {
  local code=0 outcome
  exec 9>"$run/lock" # inherited by the children: while any of them runs, no other run can start
  flock --nonblock 9 || fail "a run is in progress"
  echo $$ >"$run/session" # setsid made this process its leader
  trap : TERM # a shutdown signals every process; this one must still record the outcome
  cd "$base/code"
  printf '=== %s, code %s: python -m flextok_jax.train' "$(date -u +%FT%TZ)" "$(<"$base/ready")"
  printf ' %q' "$@"
  echo
  # shellcheck disable=SC2016 # the inner shell's $$, which exec keeps
  bash -c 'echo $$ >"$0"; exec "$@"' "$run/pid" \
    bash launch/preemptible.sh "$base/venv/bin/python" -m flextok_jax.train "$@" || code=$?
  case $code in
    0) outcome=finished ;;
    143) outcome=interrupted ;;
    *) outcome=failed:$code ;;
  esac
  echo "$outcome" >"$run/outcome"
}

# Prints "unprepared", or idle, running, finished, stopped, interrupted or failed:CODE, followed by the code's revision.
state() {
  local state=idle
  if [[ ! -r $base/ready ]]; then
    echo unprepared
    return
  fi
  if ! is_idle; then
    state=running
  elif [[ -e $run/outcome ]]; then
    state=$(<"$run/outcome")
  elif [[ -e $run/pid ]]; then
    state=interrupted # the run was killed, or the worker was rebooted
  fi
  if [[ $state == interrupted && -e $run/stop_requested ]]; then state=stopped; fi
  echo "$state $(<"$base/ready")"
}

status() { echo "$(hostname): $(state)"; }

# stop [now]: sends SIGTERM, on which training saves, or with `now` SIGKILL, and waits until the run has ended.
stop() {
  if is_idle; then
    echo "$(hostname): no run is in progress"
    return
  fi
  touch "$run/stop_requested"
  if [[ ${1:-} == now ]]; then
    pkill -KILL --session "$(<"$run/session")" || true
  else
    kill -TERM "$(<"$run/pid")" || true # the run may have ended in the meantime
  fi
  flock --timeout 900 "$run/lock" true || fail "still running after 15 minutes; --now stops it without saving"
  status
}

# Follows the log until the run ends; prints the last lines if it has ended.
logs() {
  [[ -e $run/log ]] || fail "there is no run yet"
  if is_idle; then
    tail -n 100 "$run/log"
  else
    exec tail -n 100 --follow=name --pid="$(<"$run/session")" "$run/log"
  fi
}

"$@"
