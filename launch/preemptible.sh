#!/usr/bin/env bash
# Runs a command and makes interruptions visible in the exit code: launch/preemptible.sh COMMAND [ARGUMENTS].
# On SIGTERM, training saves and exits with 0, as it does when finished, so a scheduler cannot tell the two apart.
# This script passes SIGTERM on and then exits with 143; without a SIGTERM it exits with the code of the command.
set -uom pipefail # m: gives the child its own process group, so that a signal to ours does not end its data workers
if (($# == 0)); then
  echo "error: no command: launch/preemptible.sh COMMAND [ARGUMENTS]" >&2
  exit 2
fi

interrupted=false child=
trap 'interrupted=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM
trap '[[ -z $child ]] || kill -INT "$child" 2>/dev/null' INT # Ctrl-C reaches the group of this script alone
"$@" &
child=$!
if $interrupted; then kill -TERM "$child" 2>/dev/null; fi # the signal arrived before the child started

# The trap interrupts wait, and the child may take minutes to save.
while
  wait "$child"
  code=$?
  kill -0 "$child" 2>/dev/null
do :; done
if $interrupted && ((code == 0)); then code=143; fi
exit "$code"
