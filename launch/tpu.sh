#!/usr/bin/env bash
# Trains on a Cloud TPU, a VM or a slice: launch/tpu.sh COMMAND --name=NAME --zone=ZONE [SETTINGS] [-- ARGUMENTS]
#
#   create    make the TPU now (or fail)          status    what is there, and what it does
#   queue     ask for it, to come when it is free logs      follow the run of worker 0 (or --worker=N, all)
#   setup     send the code, install it           stop      SIGTERM, so that the run saves (--now: SIGKILL)
#   run       train: -- --config=… --workdir=…    ssh       a shell on worker 0, or -- COMMAND
#   watch     queue, setup and run, again after every preemption
#   delete    delete the TPU; its name must stand on the command line
#
# See docs/launchers.md. Every command may be repeated; --dry_run prints the calls of gcloud and makes none.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=${here%/*}

say() { echo "$*" >&2; }
fail() {
  say "error: $*"
  exit 1
}
misuse() {
  say "error: $*"
  exit 2
}
refuse() { # the command ends, but not what it may be a part of
  say "error: $*"
  return 1
}

# Settings: a flag, else the environment, else what stands here.
name=${FLEXTOK_TPU_NAME:-}
zone=${FLEXTOK_TPU_ZONE:-}
project=${FLEXTOK_TPU_PROJECT:-}                 # "": that of gcloud's configuration
accelerator=${FLEXTOK_TPU_ACCELERATOR:-}         # v4-32, v5litepod-16 (or v5e-16), v5p-64, v6e-256
runtime=${FLEXTOK_TPU_RUNTIME:-}                 # "": by the accelerator, see default_runtime
network=${FLEXTOK_TPU_NETWORK:-}                 # "": the project's default network
subnetwork=${FLEXTOK_TPU_SUBNETWORK:-}           # "": the network's own
service_account=${FLEXTOK_TPU_SERVICE_ACCOUNT:-} # "": the default account of Compute Engine
prepare=${FLEXTOK_TPU_PREPARE:-}                 # shell command that setup ends with on every worker: mounts, say
poll=${FLEXTOK_TPU_POLL:-60}                     # seconds between looks of watch
worker=0 spot=false reserved=false now=false dry_run=false
name_given=false command=${1:-} arguments=() packed=false

(($#)) || misuse "no command: one of create, queue, setup, run, watch, logs, status, stop, ssh, delete; or --help"
shift
if [[ $command == --help || $command == -h ]]; then
  sed -n '2,/^set /{/^#/p;}' "${BASH_SOURCE[0]}"
  exit
fi
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} name_given=true ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --network=*) network=${1#*=} ;;
    --subnetwork=*) subnetwork=${1#*=} ;;
    --service_account=*) service_account=${1#*=} ;;
    --prepare=*) prepare=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --spot) spot=true ;;
    --reserved) reserved=true ;;
    --now) now=true ;;
    -n | --dry_run | --dry-run) dry_run=true ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) misuse "unknown setting $1: settings are given as --name=value, what training is to be told stands behind --" ;;
  esac
  shift
done

check_settings() {
  local word='^[a-z]([-a-z0-9]*[a-z0-9])?$'
  case $command in
    create | queue | setup | run | watch | logs | status | stop | ssh | delete) ;;
    *) misuse "unknown command $command: create, queue, setup, run, watch, logs, status, stop, ssh or delete" ;;
  esac
  [[ -n $name ]] || misuse "no name of the TPU: give --name=NAME or set FLEXTOK_TPU_NAME"
  [[ $name =~ $word ]] || misuse "--name=$name: a TPU's name has lower-case letters, digits and hyphens only"
  [[ -n $zone ]] || misuse "no zone: give --zone=ZONE or set FLEXTOK_TPU_ZONE"
  [[ $worker == all || $worker =~ ^[0-9]+$ ]] || misuse "--worker=$worker: a number, or all"
  [[ $poll =~ ^[0-9.]+$ ]] || misuse "--poll=$poll: a number of seconds"
  if $spot && $reserved; then misuse "--spot and --reserved exclude each other"; fi
  $name_given || [[ $command != delete ]] || misuse "delete wants the name on the command line: --name=$name"
  case $command in
    run | watch)
      ((${#arguments[@]})) || misuse "nothing to run: give -- --config=NAME --workdir=DIR" ;;
    ssh) ;;
    *) ((${#arguments[@]} == 0)) || misuse "$command takes no arguments behind --: ${arguments[0]}" ;;
  esac
  case $command in create | queue | watch) default_runtime ;; esac
  command -v gcloud >/dev/null || $dry_run || fail "no gcloud in PATH: install the Google Cloud CLI"
}

# Runtime versions by generation: https://cloud.google.com/tpu/docs/runtimes
default_runtime() {
  [[ -n $accelerator ]] || misuse "no accelerator: give --accelerator=v5litepod-16, or set FLEXTOK_TPU_ACCELERATOR"
  accelerator=${accelerator/#v5e-/v5litepod-} # the name that Cloud TPU has for v5e
  [[ -z $runtime ]] || return 0
  case $accelerator in
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    tpu7x-*) misuse "--accelerator=$accelerator: Cloud offers tpu7x through Kubernetes only: launch/gke.yaml" ;;
    *) misuse "--accelerator=$accelerator: no default runtime for it; give --runtime=VERSION" ;;
  esac
}

# quote WORDS: the words as one line for a shell.
quote() {
  printf '%q' "$1"
  shift
  (($# == 0)) || printf ' %q' "$@"
}

# call WORDS: runs a command, or prints it under --dry_run.
exec 3>&1 # where a dry run prints, also from within $(…)
call() {
  if $dry_run; then
    { quote "$@" && echo; } >&3
  else
    "$@"
  fi
}

tpu() { call gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"} --quiet; }

# state tpu-vm|queued-resources ASSUMED: prints the state of the TPU VM or request called $name, or "absent"; a dry run
# goes by ASSUMED. Listing tells absence from an error, which describing does not.
state() {
  local field=state rows
  if [[ $1 == queued-resources ]]; then field='state.state,tpu.nodeSpec[0].nodeId,state.stateInitiator'; fi
  rows=$(tpu "$1" list --format="value(name.basename(),$field)") || return
  if $dry_run; then rows="$name $2 $name"; fi
  rows=$(awk -v name="$name" '$1 == name { $1 = ""; print substr($0, 2) }' <<<"$rows")
  if [[ -z $rows || $rows == absent* ]]; then rows=absent; fi
  echo "$rows"
}

# on WORKERS WORDS: has launch/tpu_worker.sh of workers do something; where it is not yet, prints "unprepared".
on() {
  local workers=$1 script=flextok_jax/code/launch/tpu_worker.sh
  shift
  tpu tpu-vm ssh "$name" --worker="$workers" \
    --command="if [ -e $script ]; then bash $script $(quote "$@"); else echo unprepared; fi"
}

remedy() { echo "launch/tpu.sh $1 --name=$name --zone=$zone"; }

creation_flags() {
  flags=(--accelerator-type="$accelerator")
  if $spot; then flags+=(--spot); fi
  if $reserved; then flags+=(--reserved); fi
  if [[ -n $network ]]; then flags+=(--network="$network"); fi
  if [[ -n $subnetwork ]]; then flags+=(--subnetwork="$subnetwork"); fi
  if [[ -n $service_account ]]; then flags+=(--service-account="$service_account"); fi
}

create() {
  local found flags
  found=$(state tpu-vm absent) || refuse "cannot list the TPUs of zone $zone: see above" || return
  case $found in
    absent) ;;
    CREATING | READY | STARTING | RESTARTING | REIMAGING | REPAIRING)
      say "$name is there already: $found"
      return
      ;;
    *) refuse "there is a TPU $name already, but it is $found: $(remedy delete), then create it anew" || return ;;
  esac
  creation_flags
  tpu tpu-vm create "$name" "${flags[@]}" --version="$runtime" || refuse "the TPU $name was not created: see above"
}

queue() {
  local found flags
  found=$(state queued-resources absent) || refuse "cannot list the requests of zone $zone: see above" || return
  found=${found%% *}
  case $found in
    absent) ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING)
      refuse "there is a request $name already, but it is $found: $(remedy delete), then queue it anew" || return ;;
    *)
      say "$name is requested already: $found"
      return
      ;;
  esac
  creation_flags
  tpu queued-resources create "$name" --node-id="$name" "${flags[@]}" --runtime-version="$runtime" ||
    refuse "the request $name was not made: see above"
}

# Of the tracked files as they are, uncommitted edits included: $tree and what to call it, $revision.
look_at_code() {
  local edited untracked
  git -C "$repo" rev-parse --git-dir >/dev/null 2>&1 ||
    fail "$repo is no git repository, of which the tracked files would be sent"
  git -C "$repo" update-index -q --refresh || true # else files that were touched, but not changed, make stash fail
  edited=$(git -C "$repo" stash create)
  tree=$(git -C "$repo" rev-parse "${edited:-HEAD}^{tree}")
  revision=$(git -C "$repo" rev-parse --short HEAD)
  if [[ -n $edited ]]; then revision+=+$(git -C "$repo" rev-parse --short "$tree"); fi
  untracked=$(git -C "$repo" ls-files --others --exclude-standard | wc -l)
  ((untracked == 0)) || say "files that git does not track ($((untracked))) are not sent: git add what is needed"
}

setup() {
  local archive=${XDG_CACHE_HOME:-$HOME/.cache}/flextok_jax/$name.tar.gz
  local new=flextok_jax/code.new install
  need_ready || return
  say "sending code $revision to all workers of $name"
  if ! $packed; then # once: a watch sends the same code after every preemption
    $dry_run || mkdir -p "$(dirname "$archive")" || return
    call git -C "$repo" archive --format=tar.gz --output="$archive" "$tree" || return
    packed=true
  fi
  tpu tpu-vm scp "$archive" "$name:flextok_jax.tar.gz" --worker=all || return
  install="bash $new/launch/tpu_worker.sh setup $(quote "$revision" "$prepare")"
  tpu tpu-vm ssh "$name" --worker=all \
    --command="rm -rf $new && mkdir -p $new && tar -xzf flextok_jax.tar.gz -C $new && $install" ||
    refuse "setup failed on a worker of $name at least, see above; repeat it when that is mended"
}

need_ready() {
  local found
  found=$(state tpu-vm READY) || return
  case ${found%% *} in
    READY) ;;
    absent) refuse "there is no TPU $name in zone $zone: $(remedy create), or queue" ;;
    *) refuse "the TPU $name is ${found%% *}, not READY: see $(remedy status)" ;;
  esac
}

# worker_states: one line of each worker, as `state` of launch/tpu_worker.sh prints it.
worker_states() {
  on all state || return
  if $dry_run; then echo "idle $revision"; fi
}

run() {
  local states
  need_ready || return
  states=$(worker_states) || return
  # Nothing starts anywhere unless it can start everywhere: the workers that start would wait for the others.
  case $states in
    *unprepared*) refuse "$name is not set up on every worker, nothing was started: $(remedy setup)" || return ;;
    *running*) refuse "a run is going on on $name, nothing was started: $(remedy stop), or logs" || return ;;
  esac
  if [[ $(awk '{ print $2 }' <<<"$states" | sort -u | wc -l) -ne 1 ]]; then
    refuse "the workers of $name have different code, nothing was started: $(remedy setup)" || return
  fi
  if ! on all start "${arguments[@]}"; then
    on all stop now || true
    refuse "training did not start on every worker of $name, and was stopped on the others: see above" || return
  fi
  say "training on $name; $(remedy logs)"
}

delete() {
  local request node
  request=$(state queued-resources ACTIVE) || fail "cannot list the requests of zone $zone: see above"
  node=$(state tpu-vm READY) || fail "cannot list the TPUs of zone $zone: see above"
  if [[ $request == absent && $node == absent ]]; then
    say "there is no TPU $name in zone $zone, and no request for one"
    return
  fi
  if [[ $request == absent ]]; then
    say "deleting the TPU $name in zone $zone"
    tpu tpu-vm delete "$name"
    return
  fi
  if [[ $(awk '{ print $2 }' <<<"$request") != "$name" ]]; then
    fail "the request $name is for TPUs of other names: delete it by gcloud compute tpus queued-resources delete"
  fi
  say "deleting the request $name in zone $zone and its TPU ($node)"
  tpu queued-resources delete "$name" --force # --force: its TPU with it
}

status() {
  local request node
  request=$(state queued-resources ACTIVE) || fail "cannot list the requests of zone $zone: see above"
  node=$(state tpu-vm READY) || fail "cannot list the TPUs of zone $zone: see above"
  $dry_run || printf 'request: %s\nTPU: %s\n' "${request%% *}" "${node%% *}"
  if [[ $node == READY* ]]; then on all status; fi
}

# watch: keeps one run going on a spot TPU until it ends. What it asks for anew is only what was taken away: a TPU that
# someone deleted, a run that someone stopped or that failed, stays so.
watch() {
  local last="" attempts=0 wanted=true # wanted: there is nothing yet, or no more, and that is for us to change
  if $dry_run; then
    queue && setup && run
    say "and so on; after a preemption: delete, queue, setup, run"
    return
  fi
  while :; do
    look
    sleep "$poll"
  done
}

# look: at what there is, and does what is next. A look that fails is tried again.
look() {
  local request node
  request=$(state queued-resources) || return 0
  case ${request%% *} in
    absent)
      $wanted || fail "the request $name was deleted by someone else: ending"
      if again queue; then wanted=false; fi
      ;;
    SUSPENDED)
      [[ $request != *USER ]] || fail "the request $name was suspended by a user: ending"
      renew
      ;;
    FAILED) fail "the request $name failed; gcloud compute tpus queued-resources describe $name tells why" ;;
    ACTIVE)
      wanted=false
      node=$(state tpu-vm) || return 0
      case $node in
        READY) tend ;;
        PREEMPTED | TERMINATED) renew ;;
      esac
      ;;
    *)
      [[ $request == "$last" ]] || say "waiting for $name: ${request%% *}"
      last=$request
      ;;
  esac
}

renew() {
  say "$name was preempted: asking for it anew"
  last="" attempts=0 wanted=true
  tpu queued-resources delete "$name" --force || true # the next look finds it gone, or does this again
}

# tend: looks after the run on a TPU that is there. An end other than `finished` is believed when two looks in a row
# show it: a TPU about to be taken away shows it too.
tend() {
  local states
  states=$(worker_states | sort -u) || return 0
  case $(awk '{ print $1 }' <<<"$states" | sort -u | tr '\n' ' ') in
    "finished ")
      say "the run has finished; $name still costs: $(remedy delete)"
      exit 0
      ;;
    *running*) attempts=0 ;;
    *stopped*)
      say "the run was stopped; $name still costs: $(remedy delete)"
      exit 0
      ;;
    *unprepared*) if again setup; then again run || true; fi ;;
    *interrupted*) if [[ $states == "$last" ]]; then again run || true; fi ;;
    *failed*)
      [[ $states != "$last" ]] || fail "the run failed, see $(remedy logs); $name still costs: $(remedy delete)"
      ;;
    *) again run || true ;;
  esac
  last=$states
}

# again COMMAND: does it; the third failure in a row ends the watch, as a TPU costs meanwhile.
again() {
  if "$1"; then return; fi
  ((++attempts < 3)) || fail "$1 failed three times in a row, see above; if there is a TPU, it costs: $(remedy status)"
  return 1
}

stop() { if $now; then on all stop now; else on all stop; fi; }

logs() { on "$worker" logs; }

ssh() {
  if ((${#arguments[@]})); then
    tpu tpu-vm ssh "$name" --worker="$worker" --command="$(quote "${arguments[@]}")"
  else
    tpu tpu-vm ssh "$name" --worker="$worker"
  fi
}

check_settings
case $command in setup | run | watch) look_at_code ;; esac
"$command"
