#!/usr/bin/env bash
# Trains on a Cloud TPU, a VM or a slice: launch/tpu.sh COMMAND --name=NAME --zone=ZONE [SETTINGS] [-- ARGUMENTS]
#
#   create    create the TPU now, or fail           status    show the request, the TPU and its workers
#   queue     request it; created when available    logs      follow the log of worker 0 (or --worker=N, --worker=all)
#   setup     copy and install the code             stop      SIGTERM: the run saves and ends (--now: SIGKILL)
#   run       train: -- --config=… --workdir=…      ssh       open a shell on worker 0, or run -- COMMAND
#   watch     queue, setup and run, repeated after every preemption
#   delete    delete the TPU; requires --name on the command line
#
# All commands are safe to repeat. --dry_run prints the gcloud calls without making them. See docs/launchers.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=${here%/*}

info() { echo "$*" >&2; }
fail() {
  info "error: $*"
  exit 1
}
usage_error() {
  info "error: $*"
  exit 2
}
print_error() { # returns 1 instead of exiting, so that watch can try again
  info "error: $*"
  return 1
}

# Settings: the flag, else the environment variable, else the default below.
name=${FLEXTOK_TPU_NAME:-}
zone=${FLEXTOK_TPU_ZONE:-}
project=${FLEXTOK_TPU_PROJECT:-}                 # "": the project of gcloud's configuration
accelerator=${FLEXTOK_TPU_ACCELERATOR:-}         # such as v4-32, v5litepod-16 (or v5e-16), v5p-64, v6e-256
runtime=${FLEXTOK_TPU_RUNTIME:-}                 # "": depends on the accelerator, see default_runtime
network=${FLEXTOK_TPU_NETWORK:-}                 # "": the project's default network
subnetwork=${FLEXTOK_TPU_SUBNETWORK:-}           # "": the default of the network
service_account=${FLEXTOK_TPU_SERVICE_ACCOUNT:-} # "": Compute Engine's default account
prepare=${FLEXTOK_TPU_PREPARE:-}                 # shell command that setup runs last on every worker, such as a mount
poll=${FLEXTOK_TPU_POLL:-60}                     # seconds between the polls of watch
worker=0 spot=false reserved=false now=false dry_run=false
name_given=false command=${1:-} arguments=() packed=false

(($#)) || usage_error "no command: use create, queue, setup, run, watch, logs, status, stop, ssh, delete or --help"
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
    *) usage_error "unknown setting $1: settings are given as --name=value; training arguments follow --" ;;
  esac
  shift
done

check_settings() {
  local word='^[a-z]([-a-z0-9]*[a-z0-9])?$'
  case $command in
    create | queue | setup | run | watch | logs | status | stop | ssh | delete) ;;
    *) usage_error "unknown command $command: see launch/tpu.sh --help" ;;
  esac
  [[ -n $name ]] || usage_error "no TPU name: use --name=NAME or set FLEXTOK_TPU_NAME"
  [[ $name =~ $word ]] ||
    usage_error "--name=$name: must start with a letter and contain only lower-case letters, digits and hyphens"
  [[ -n $zone ]] || usage_error "no zone: use --zone=ZONE or set FLEXTOK_TPU_ZONE"
  [[ $worker == all || $worker =~ ^[0-9]+$ ]] || usage_error "--worker=$worker: must be a number or all"
  [[ $poll =~ ^[0-9.]+$ ]] || usage_error "--poll=$poll: must be a number of seconds"
  if $spot && $reserved; then usage_error "--spot and --reserved are mutually exclusive"; fi
  $name_given || [[ $command != delete ]] || usage_error "delete requires the name on the command line: --name=$name"
  case $command in
    run | watch)
      ((${#arguments[@]})) || usage_error "no arguments for training: add -- --config=NAME --workdir=DIR" ;;
    ssh) ;;
    *) ((${#arguments[@]} == 0)) || usage_error "$command takes no arguments after --: ${arguments[0]}" ;;
  esac
  case $command in create | queue | watch) default_runtime ;; esac
  command -v gcloud >/dev/null || $dry_run || fail "gcloud is not in PATH: install the Google Cloud CLI"
}

# Runtime versions by generation: https://cloud.google.com/tpu/docs/runtimes
default_runtime() {
  [[ -n $accelerator ]] ||
    usage_error "no accelerator: use --accelerator=TYPE, such as v5litepod-16, or set FLEXTOK_TPU_ACCELERATOR"
  accelerator=${accelerator/#v5e-/v5litepod-} # Cloud TPU's name for v5e
  [[ -z $runtime ]] || return 0
  case $accelerator in
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    tpu7x-*) usage_error "--accelerator=$accelerator: tpu7x is only available on Kubernetes: use launch/gke.yaml" ;;
    *) usage_error "--accelerator=$accelerator: there is no default runtime version; set --runtime=VERSION" ;;
  esac
}

# quote WORDS: prints the words as one line, quoted for a shell.
quote() {
  printf '%q' "$1"
  shift
  (($# == 0)) || printf ' %q' "$@"
}

# call WORDS: runs a command, or prints it with --dry_run.
exec 3>&1 # a dry run prints here, so that its output is not captured by $(…)
call() {
  if $dry_run; then
    { quote "$@" && echo; } >&3
  else
    "$@"
  fi
}

tpu() { call gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"} --quiet; }

# state tpu-vm|queued-resources ASSUMED: prints the state of the TPU VM or request called $name, or "absent"; a dry run
# prints ASSUMED. `list` distinguishes a missing resource from an error, which `describe` does not.
state() {
  local field=state rows
  if [[ $1 == queued-resources ]]; then field='state.state,tpu.nodeSpec[0].nodeId,state.stateInitiator'; fi
  rows=$(tpu "$1" list --format="value(name.basename(),$field)") || return
  if $dry_run; then rows="$name $2 $name"; fi
  rows=$(awk -v name="$name" '$1 == name { $1 = ""; print substr($0, 2) }' <<<"$rows")
  if [[ -z $rows || $rows == absent* ]]; then rows=absent; fi
  echo "$rows"
}

# on_workers WORKERS WORDS: runs launch/tpu_worker.sh WORDS on the workers; prints "unprepared" where it does not exist.
on_workers() {
  local workers=$1 script=flextok_jax/code/launch/tpu_worker.sh
  shift
  tpu tpu-vm ssh "$name" --worker="$workers" \
    --command="if [ -e $script ]; then bash $script $(quote "$@"); else echo unprepared; fi"
}

# hint COMMAND: prints the command line for a message.
hint() { echo "launch/tpu.sh $1 --name=$name --zone=$zone"; }

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
  found=$(state tpu-vm absent) || print_error "cannot list the TPUs of zone $zone: see above" || return
  case $found in
    absent) ;;
    CREATING | READY | STARTING | RESTARTING | REIMAGING | REPAIRING)
      info "$name already exists: $found"
      return
      ;;
    *)
      print_error "the TPU $name already exists, but it is $found: run $(hint delete), then create it again" || return
      ;;
  esac
  creation_flags
  tpu tpu-vm create "$name" "${flags[@]}" --version="$runtime" || print_error "the TPU $name was not created: see above"
}

queue() {
  local found flags
  found=$(state queued-resources absent) || print_error "cannot list the requests of zone $zone: see above" || return
  found=${found%% *}
  case $found in
    absent) ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING)
      print_error "the request $name already exists, but it is $found: run $(hint delete), then queue it again" ||
        return
      ;;
    *)
      info "$name is already requested: $found"
      return
      ;;
  esac
  creation_flags
  tpu queued-resources create "$name" --node-id="$name" "${flags[@]}" --runtime-version="$runtime" ||
    print_error "the request $name was not created: see above"
}

# Sets $tree to the git tree of the tracked files, including uncommitted edits, and $revision to its name.
snapshot_code() {
  local edited untracked
  git -C "$repo" rev-parse --git-dir >/dev/null 2>&1 ||
    fail "$repo is not a git repository: only files tracked by git are copied"
  git -C "$repo" update-index -q --refresh || true # otherwise stash fails on files that were touched but not changed
  edited=$(git -C "$repo" stash create)
  tree=$(git -C "$repo" rev-parse "${edited:-HEAD}^{tree}")
  revision=$(git -C "$repo" rev-parse --short HEAD)
  if [[ -n $edited ]]; then revision+=+$(git -C "$repo" rev-parse --short "$tree"); fi
  untracked=$(git -C "$repo" ls-files --others --exclude-standard | wc -l)
  ((untracked == 0)) || info "untracked files ($((untracked))) are not copied: git add those that are needed"
}

setup() {
  local archive=${XDG_CACHE_HOME:-$HOME/.cache}/flextok_jax/$name.tar.gz
  local new=flextok_jax/code.new install
  require_ready || return
  info "copying code $revision to all workers of $name"
  if ! $packed; then # only once: watch sends the same code after every preemption
    $dry_run || mkdir -p "$(dirname "$archive")" || return
    call git -C "$repo" archive --format=tar.gz --output="$archive" "$tree" || return
    packed=true
  fi
  tpu tpu-vm scp "$archive" "$name:flextok_jax.tar.gz" --worker=all || return
  install="bash $new/launch/tpu_worker.sh setup $(quote "$revision" "$prepare")"
  tpu tpu-vm ssh "$name" --worker=all \
    --command="rm -rf $new && mkdir -p $new && tar -xzf flextok_jax.tar.gz -C $new && $install" ||
    print_error "setup failed on at least one worker of $name, see above; fix the cause and run it again"
}

require_ready() {
  local found
  found=$(state tpu-vm READY) || return
  case ${found%% *} in
    READY) ;;
    absent) print_error "there is no TPU $name in zone $zone: run $(hint create), or queue" ;;
    *) print_error "the TPU $name is ${found%% *}, not READY: see $(hint status)" ;;
  esac
}

# worker_states: prints one line per worker, the output of `launch/tpu_worker.sh state`.
worker_states() {
  on_workers all state || return
  if $dry_run; then echo "idle $revision"; fi
}

run() {
  local states
  require_ready || return
  states=$(worker_states) || return
  # Start nothing unless all workers can start: those that start would wait for the others.
  case $states in
    *unprepared*)
      print_error "$name is not set up on every worker, nothing was started: run $(hint setup)" || return
      ;;
    *running*)
      print_error "a run is in progress on $name, nothing was started: run $(hint stop), or logs" || return
      ;;
  esac
  if [[ $(awk '{ print $2 }' <<<"$states" | sort -u | wc -l) -ne 1 ]]; then
    print_error "the workers of $name have different code versions, nothing was started: run $(hint setup)" || return
  fi
  if ! on_workers all start "${arguments[@]}"; then
    on_workers all stop now || true
    print_error "training did not start on every worker of $name and was stopped on the others: see above" || return
  fi
  info "training on $name; to follow the log, run $(hint logs)"
}

delete() {
  local request node
  request=$(state queued-resources ACTIVE) || fail "cannot list the requests of zone $zone: see above"
  node=$(state tpu-vm READY) || fail "cannot list the TPUs of zone $zone: see above"
  if [[ $request == absent && $node == absent ]]; then
    info "there is no TPU $name in zone $zone, and no request for one"
    return
  fi
  if [[ $request == absent ]]; then
    info "deleting the TPU $name in zone $zone"
    tpu tpu-vm delete "$name"
    return
  fi
  if [[ $(awk '{ print $2 }' <<<"$request") != "$name" ]]; then
    fail "the request $name is for TPUs with other names: delete it with gcloud compute tpus queued-resources delete"
  fi
  info "deleting the request $name in zone $zone and its TPU ($node)"
  tpu queued-resources delete "$name" --force # --force: deletes its TPU too
}

status() {
  local request node
  request=$(state queued-resources ACTIVE) || fail "cannot list the requests of zone $zone: see above"
  node=$(state tpu-vm READY) || fail "cannot list the TPUs of zone $zone: see above"
  $dry_run || printf 'request: %s\nTPU: %s\n' "${request%% *}" "${node%% *}"
  if [[ $node == READY* ]]; then on_workers all status; fi
}

# watch: keeps one run going on a spot TPU until the run ends. Replaces only TPUs that were preempted, not those that
# someone deleted; does not restart runs that failed or that someone stopped.
watch() {
  local last="" failures=0 may_request=true # may_request: false once a request exists, so that it can only be deleted
  if $dry_run; then
    queue && setup && run
    info "then polls the state; after a preemption: delete, queue, setup, run"
    return
  fi
  while :; do
    poll_once
    sleep "$poll"
  done
}

# poll_once: checks the current state and takes the next step. If the check fails, the next poll repeats it.
poll_once() {
  local request node
  request=$(state queued-resources) || return 0
  case ${request%% *} in
    absent)
      $may_request || fail "the request $name was deleted by someone else: exiting"
      if attempt queue; then may_request=false; fi
      ;;
    SUSPENDED)
      [[ $request != *USER ]] || fail "the request $name was suspended by a user: exiting"
      request_again
      ;;
    FAILED) fail "the request $name failed; gcloud compute tpus queued-resources describe $name shows why" ;;
    ACTIVE)
      may_request=false
      node=$(state tpu-vm) || return 0
      case $node in
        READY) check_run ;;
        PREEMPTED | TERMINATED) request_again ;;
      esac
      ;;
    *)
      [[ $request == "$last" ]] || info "waiting for $name: ${request%% *}"
      last=$request
      ;;
  esac
}

request_again() {
  info "$name was preempted: requesting it again"
  last="" failures=0 may_request=true
  tpu queued-resources delete "$name" --force || true # the next poll finds it deleted, or tries again
}

# check_run: starts, resumes or reports the run on an existing TPU. A failed or interrupted run counts only if two
# consecutive polls find it, because a TPU that is about to be preempted looks the same.
check_run() {
  local states
  states=$(worker_states | sort -u) || return 0
  case $(awk '{ print $1 }' <<<"$states" | sort -u | tr '\n' ' ') in
    "finished ")
      info "the run has finished; $name is billed until deleted: run $(hint delete)"
      exit 0
      ;;
    *running*) failures=0 ;;
    *stopped*)
      info "the run was stopped; $name is billed until deleted: run $(hint delete)"
      exit 0
      ;;
    *unprepared*) if attempt setup; then attempt run || true; fi ;;
    *interrupted*) if [[ $states == "$last" ]]; then attempt run || true; fi ;;
    *failed*)
      [[ $states != "$last" ]] ||
        fail "the run failed, see $(hint logs); $name is billed until deleted: run $(hint delete)"
      ;;
    *) attempt run || true ;;
  esac
  last=$states
}

# attempt COMMAND: runs it; exits after the third failure in a row, because an idle TPU costs money.
attempt() {
  if "$1"; then return; fi
  ((++failures < 3)) ||
    fail "$1 failed three times in a row, see above; a TPU that exists is still billed: see $(hint status)"
  return 1
}

stop() { if $now; then on_workers all stop now; else on_workers all stop; fi; }

logs() { on_workers "$worker" logs; }

ssh() {
  if ((${#arguments[@]})); then
    tpu tpu-vm ssh "$name" --worker="$worker" --command="$(quote "${arguments[@]}")"
  else
    tpu tpu-vm ssh "$name" --worker="$worker"
  fi
}

check_settings
case $command in setup | run | watch) snapshot_code ;; esac
"$command"
