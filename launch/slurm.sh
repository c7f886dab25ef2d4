#!/usr/bin/env bash
# Trains on the GPUs of one or more nodes under Slurm. Run it in the repository's folder, which must be on a file system
# that all nodes see:
#   bash launch/slurm.sh install      # once, on a machine with network access; otherwise a job does it
#   sbatch [--nodes=4 --gpus-per-node=8 --time=… …] launch/slurm.sh --config=NAME --workdir=DIR
# Options on sbatch's command line override those below. See docs/launchers.md.
#
#SBATCH --job-name=flextok
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# Whole nodes: all cores and all memory are for loading the data of their GPUs.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# The job steps receive SIGTERM two minutes before the time limit (and at a preemption, if the cluster is configured
# that way), and training saves.
#SBATCH --signal=TERM@120
# After a preemption or a node failure, the job is requeued and appends to the same log.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

# sbatch runs a copy of this file, so the repository is the folder in which sbatch was called.
repo=${SLURM_SUBMIT_DIR:-$PWD}
[[ -r $repo/launch/env.sh ]] || fail "$repo is not the repository: call sbatch in the repository's folder"
(($#)) || fail "no arguments: use sbatch launch/slurm.sh --config=NAME --workdir=DIR"
[[ $1 == install || -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job: use sbatch launch/slurm.sh $*"

# The environment of launch/env.sh with the CUDA packages, at the same pinned versions. The lock lets one job at a time
# install.
export FLEXTOK_VENV=${FLEXTOK_VENV:-$repo/.venv-cuda}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/flextok_jax
mkdir -p "$cache"
exec 9>"$cache/install.lock"
flock 9
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$repo/launch/env.sh"
python -m pip --disable-pip-version-check install --quiet --constraint requirements.txt 'flextok-jax[cuda]'
exec 9>&-
if [[ $1 == install ]]; then exit; fi

# By default one process per GPU, each loading the data of its GPU; they communicate through NCCL, within a node too.
# FLEXTOK_PROCESSES=node: one process per node, with a single data loader, for hosts with little memory.
processes=${FLEXTOK_PROCESSES:-gpu}
nodes=$SLURM_JOB_NUM_NODES gpus=${SLURM_GPUS_ON_NODE:-0}
((gpus > 0)) || fail "this job has no GPUs: use sbatch --gpus-per-node=N"
case $processes in
  gpu) tasks=$gpus ;; # JAX assigns GPU i to the task with local ID i
  node)
    tasks=1
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1))) # otherwise the task would use only the first GPU of its node
    export JAX_LOCAL_DEVICE_IDS
    ;;
  *) fail "FLEXTOK_PROCESSES=$processes: must be gpu (one process per GPU) or node (one per node)" ;;
esac

# Values that are already set take precedence: if a flag is repeated, XLA uses the last one.
flags=(
  # Overlaps all-gathers of sharded parameters and reductions of gradients with computation. Off by default.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # Ends the run after an NCCL error, which would otherwise hang while the nodes are billed. Off by default.
  --xla_gpu_nccl_terminate_on_error=true
)
export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"
# Nothing else runs on these GPUs: JAX preallocates 90% of their memory, not 75%; NCCL and cuDNN use the rest.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
# NCCL reports where it fails.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# --gpu-bind=none: every task sees all GPUs of its node; JAX selects the task's own.
# No --kill-on-bad-exit: it sends SIGTERM to the other tasks, so that a failure would look like a preemption. JAX itself
# ends the other processes when one of them exits.
code=0
srun --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" \
  --cpus-per-task=$((SLURM_CPUS_ON_NODE / tasks)) --gpu-bind=none \
  bash launch/preemptible.sh python -m flextok_jax.train "$@" || code=$?

# 143: the run received SIGTERM and saved. Slurm does not requeue a job at its time limit, nor one that exits within the
# grace period. A job that is being cancelled or whose Requeue was set to 0 is not requeued, nor is a failed run.
if ((code == 143)); then
  job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
  if [[ " $job " == *" JobState=RUNNING "* && " $job " == *" Requeue=1 "* ]]; then
    echo "interrupted: requeueing the job"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
