#!/usr/bin/env bash
# What each worker of a TPU does for launch/tpu.sh, which sends this file along with the code and calls it over ssh.
#
# ~/flextok_jax of a worker:
#   code/     the repository's tracked files       venv/   Python and its packages
#   ready     the revision of code/, once all is installed
#   run/      of the newest run: log, lock (held as long as it lives), pid, session, outcome; asked_to_stop
set -euo pipefail
base=$HOME/flextok_jax
run=$base/run
mkdir -p "$run"

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

idle() { flock --nonblock "$run/lock" true; } # a lock cannot go stale, as a pid file would after a reboot

# setup REVISION PREPARE: installs what was sent to code.new and runs the shell command PREPARE, if it is not empty.
setup() {
  local revision=$1 prepare=$2
  idle || fail "a run is going on: stop it before you change its code"
  rm -f "$base/ready"
  rm -rf "$base/code"
  mv "$base/code.new" "$base/code"
  cd "$base/code"
  install
  if [[ -n $prepare ]]; then
    bash -c "$prepare" || fail "the command of --prepare failed: $prepare"
  fi
  echo "$revision" >"$base/ready"
}

# The images of TPU VMs have older Pythons than 3.11: uv brings one. The pins make all workers alike, today and after
# a preemption.
install() {
  local wanted uv
  wanted=$(cat requirements.txt setup.py | cksum)
  if [[ -r $base/venv/installed && $(<"$base/venv/installed") == "$wanted" ]]; then return; fi
  if ! uv=$(command -v uv); then
    uv=$base/uv/bin/uv
    [[ -x $uv ]] || python3 -m pip install --quiet --target="$base/uv" uv
  fi
  "$uv" venv --quiet --clear --python 3.11 "$base/venv"
  "$uv" pip install --quiet --python "$base/venv/bin/python" --constraints requirements.txt --editable '.[tpu]'
  echo "$wanted" >"$base/venv/installed"
}

# start ARGUMENTS: starts training so that it outlives this connection.
start() {
  [[ -r $base/ready ]] || fail "not set up"
  idle || fail "a run is going on"
  rm -f "$run/pid" "$run/session" "$run/outcome" "$run/asked_to_stop"
  setsid --fork bash "$base/code/launch/tpu_worker.sh" supervise "$@" </dev/null >>"$run/log" 2>&1
  for _ in {1..300}; do
    if [[ -s $run/pid ]]; then return; fi
    sleep 0.1
  done
  fail "training did not start within 30 seconds: see $run/log"
}

# supervise ARGUMENTS: trains, and leaves a record of how it ended.
supervise() {
  local code=0 outcome
  exec 9>"$run/lock" # the children hold it too: as long as one of them lives, no other run begins
  flock --nonblock 9 || fail "a run is going on"
  echo $$ >"$run/session" # setsid made this process the leader of one
  trap : TERM # a machine that shuts down signals every process; this one has the record to write
  cd "$base/code"
  printf '=== %s, code %s: python -m flextok_jax.train' "$(date -u +%FT%TZ)" "$(<"$base/ready")"
  printf ' %q' "$@"
  echo
  # shellcheck disable=SC2016 # the inner shell's own $$ stays the process's through exec
  bash -c 'echo $$ >"$0"; exec "$@"' "$run/pid" \
    bash launch/preemptible.sh "$base/venv/bin/python" -m flextok_jax.train "$@" || code=$?
  case $code in
    0) outcome=finished ;;
    143) outcome=interrupted ;;
    *) outcome=failed:$code ;;
  esac
  echo "$outcome" >"$run/outcome"
}

# Prints "unprepared", or one of idle, running, finished, stopped, interrupted, failed:CODE, and the code's revision.
state() {
  local state=idle
  if [[ ! -r $base/ready ]]; then
    echo unprepared
    return
  fi
  if ! idle; then
    state=running
  elif [[ -e $run/outcome ]]; then
    state=$(<"$run/outcome")
  elif [[ -e $run/pid ]]; then
    state=interrupted # killed, or rebooted
  fi
  if [[ $state == interrupted && -e $run/asked_to_stop ]]; then state=stopped; fi
  echo "$state $(<"$base/ready")"
}

status() { echo "$(hostname): $(state)"; }

# stop [now]: SIGTERM, at which training saves, and waits for its end; with `now` SIGKILL, at which it does not.
stop() {
  if idle; then
    echo "$(hostname): no run is going on"
    return
  fi
  touch "$run/asked_to_stop"
  if [[ ${1:-} == now ]]; then
    pkill -KILL --session "$(<"$run/session")" || true
  else
    kill -TERM "$(<"$run/pid")" || true # it may just have ended by itself
  fi
  flock --timeout 900 "$run/lock" true || fail "still running after 15 minutes; stop it with --now, without saving"
  status
}

# Follows the log until the run ends; of a run that has ended, its last lines.
logs() {
  [[ -e $run/log ]] || fail "there was no run yet"
  if idle; then
    tail -n 100 "$run/log"
  else
    exec tail -n 100 --follow=name --pid="$(<"$run/session")" "$run/log"
  fi
}

"$@"
