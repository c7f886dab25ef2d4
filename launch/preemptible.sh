#!/usr/bin/env bash
# Runs a command and tells an interruption from an end: launch/preemptible.sh COMMAND [ARGUMENTS].
# Training saves at SIGTERM and exits with 0, as if it had come to its end; whoever is to start it again cannot tell.
# This hands SIGTERM on and then exits with 143; without a SIGTERM it exits with the command's own code.
set -uom pipefail # m: the child gets a process group of its own, so that a signal to ours does not end its data workers
if (($# == 0)); then
  echo "error: no command: launch/preemptible.sh COMMAND [ARGUMENTS]" >&2
  exit 2
fi

interrupted=false child=
trap 'interrupted=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM
"$@" &
child=$!
if $interrupted; then kill -TERM "$child" 2>/dev/null; fi # it came before there was a child to hand it to

# The trap ends wait early; the child may take minutes to save.
while
  wait "$child"
  code=$?
  kill -0 "$child" 2>/dev/null
do :; done
if $interrupted && ((code == 0)); then code=143; fi
exit "$code"
