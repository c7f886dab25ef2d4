#!/usr/bin/env bash
# Trains on the GPUs of one or more nodes under Slurm; from the repository's folder, which all nodes must see:
#   bash launch/slurm.sh install      # once, where there is a network; a job does it otherwise
#   sbatch [--nodes=4 --gpus-per-node=8 --time=… …] launch/slurm.sh --config=NAME --workdir=DIR
# sbatch's own options override these; see docs/launchers.md.
#
#SBATCH --job-name=flextok
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# The whole node: its cores and memory feed its GPUs.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# Two minutes before the time limit (and at a preemption, as the cluster has it) the steps get SIGTERM: training saves.
#SBATCH --signal=TERM@120
# After a preemption or the failure of a node the job waits in the queue again, and writes on in the same log.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

# sbatch runs a copy of this file: the repository is where it was called.
repo=${SLURM_SUBMIT_DIR:-$PWD}
[[ -r $repo/launch/env.sh ]] || fail "$repo is not the repository: call sbatch in its folder"
(($#)) || fail "nothing to run: sbatch launch/slurm.sh --config=NAME --workdir=DIR"
[[ $1 == install || -n ${SLURM_JOB_ID:-} ]] || fail "this is a job: sbatch launch/slurm.sh $*"

# The environment of launch/env.sh and CUDA's packages, in the same pinned versions; one job at a time installs.
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

# One process a GPU: each feeds its own, and NCCL talks between processes everywhere. FLEXTOK_PROCESSES=node: one a
# node, with a single reader of the data, for hosts with little memory.
processes=${FLEXTOK_PROCESSES:-gpu}
nodes=$SLURM_JOB_NUM_NODES gpus=${SLURM_GPUS_ON_NODE:-0}
((gpus > 0)) || fail "this job has no GPUs: sbatch --gpus-per-node=N"
case $processes in
  gpu) tasks=$gpus ;; # jax gives the task of local number i the GPU i
  node)
    tasks=1
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1))) # else the one task of a node would take its first GPU alone
    export JAX_LOCAL_DEVICE_IDS
    ;;
  *) fail "FLEXTOK_PROCESSES=$processes: gpu (a process for each) or node" ;;
esac

# What is set already stays; of a flag that stands twice, XLA takes the later one.
flags=(
  # Gathers of sharded parameters and sums of gradients run beside the computation, not in between. Off by default.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # A broken link ends the run, which its nodes are paid for, where it would otherwise wait without end. Off by default.
  --xla_gpu_nccl_terminate_on_error=true
)
export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"
# Nothing else runs on these GPUs: jax takes 90% of their memory rather than 75%; the rest is NCCL's and cuDNN's.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
# When NCCL fails, it says where.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# --gpu-bind=none: every task sees all GPUs of its node, of which jax takes its own.
# No --kill-on-bad-exit: it would send SIGTERM to the others, and a failure would look like a preemption. jax ends the
# others itself when one of them is gone.
code=0
srun --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" \
  --cpus-per-task=$((SLURM_CPUS_ON_NODE / tasks)) --gpu-bind=none \
  bash launch/preemptible.sh python -m flextok_jax.train "$@" || code=$?

# 143: SIGTERM came and the run has saved. Slurm itself requeues neither at the time limit nor a job that ends within
# its grace. A job that is being cancelled, or whose Requeue was set to 0, ends here; so does a run that failed.
if ((code == 143)); then
  job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
  if [[ " $job " == *" JobState=RUNNING "* && " $job " == *" Requeue=1 "* ]]; then
    echo "interrupted: back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
