#!/bin/bash
# launch.sh RECIPE [train options ...]: what every *.slurm script of this folder runs once Slurm has given it its nodes.
#
# It starts one torchrun on each node (srun), tells them where to meet, asks the run to stop with a checkpoint when Slurm says
# that time is nearly up, and puts the job back into the queue while steps remain. README.md lists the variables.
set -Eeuo pipefail
trap 'echo "launch.sh: error: line $LINENO failed: $BASH_COMMAND" >&2' ERR

say() { echo "launch.sh: $(date '+%F %T') $*"; }
fail() { echo "launch.sh: error: $*" >&2; exit 2; }

require() { # name, what it is
    [ -n "${!1:-}" ] || fail "$1 is not set: $2, for example: export $1=$3"
}

# ---------------------------------------------------------------------------------------------------------- what was asked for

[ $# -ge 1 ] || fail "no recipe given: launch.sh RECIPE [train options ...]"
recipe=$1
shift
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is not a Slurm job: submit it, for example: sbatch examples/$recipe.slurm"
require DATA "the folder that \`megatron-mm prepare index\` has indexed, seen by every node" /scratch/data
require RUN_DIR "the run's folder, seen by every node" "/scratch/runs/$recipe"
[ -d "$DATA" ] || fail "DATA=$DATA is not a folder on $(hostname)"
mkdir -p "$RUN_DIR/logs" || fail "RUN_DIR=$RUN_DIR cannot be made on $(hostname)"
DATA=$(realpath "$DATA")
RUN_DIR=$(realpath "$RUN_DIR")

# Slurm runs a copy of the batch script from its spool folder, so the script's own path says nothing of where the code is.
root=$(realpath "${MEGATRON_MM_HOME:-$SLURM_SUBMIT_DIR}")
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -n "${CONTAINER_IMAGE:-}" ] || [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi

# --------------------------------------------------------------------------------------------------------- nodes and processes

nodes=$SLURM_JOB_NUM_NODES
# One process for each GPU of a node; SLURM_GPUS_ON_NODE is not set where none were asked for.
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES_PER_NODE=$processes is not a positive number"

# The address by which Slurm itself reaches the first node: a node's name need not resolve everywhere.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2) || true
export MASTER_ADDR=${MASTER_ADDR:-${address:-$first}}
# Differs between jobs that share a node, and lies below the ports that the kernel hands out by itself (32768 and up).
export MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}

# -------------------------------------------------------------------------------------------------------- environment, with why

# The processes of a node share its cores, and reading and decoding have threads of their own.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Kernels start in the order of their launch: tensor-parallel communication must precede the matrix product that hides it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Sequences hold different numbers of images, so block sizes vary; growing segments keep that from fragmenting the memory.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Names the link, the rank and the reason when a collective fails, and is silent otherwise.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A failed or overdue collective ends the process instead of leaving all others waiting for it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# What the last collectives were, written out when one times out: tells a slow rank from a dead one.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# After a SIGTERM torchrun kills its processes when this many seconds have passed: time to finish the step and the checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# Compiled kernels go to the node's own disk: hundreds of processes would write them to one home folder at once.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$(id -u)}
# Text reaches the log when it is written, not when a buffer is full: a killed process takes its buffer with it.
export PYTHONUNBUFFERED=1

# ----------------------------------------------------------------------------------------------------------------------- start

attempt=$((${SLURM_RESTART_COUNT:-0} + 1)) # Slurm sets the count from the first restart on
logs=$RUN_DIR/logs/job-$SLURM_JOB_ID-attempt-$attempt-node
step_options=(
    --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1
    # srun takes neither from the job by itself (Slurm 22.05): without them a node's processes would share one core.
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --cpu-bind=none
    # One node's failure ends the step on all; the others would wait for its messages.
    --kill-on-bad-exit=1 --wait=60
    --output="$logs-%t.log" --unbuffered
)
if [ -n "${CONTAINER_IMAGE:-}" ]; then # needs Slurm's pyxis plugin (enroot)
    step_options+=(
        --container-image="$CONTAINER_IMAGE" --container-workdir="$root" --no-container-mount-home
        --container-mounts="$root:$root,$DATA:$DATA,$RUN_DIR:$RUN_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    )
fi
# Ranks follow Slurm's order of the nodes, so that neighbours in the pipeline are neighbours in the network.
torchrun=(
    "$PYTHON" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$processes"
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0
)
train=(-m megatron_mm train "$recipe" --run-dir "$RUN_DIR" --data.path "$DATA" "$@")

newest_checkpoint() { # its folder's name; only complete checkpoints are named step_*
    find "$RUN_DIR" -maxdepth 2 -path '*/checkpoints/step_*' | sort | tail -n 1
}

requeue() {
    say "$1: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || fail "this cluster does not requeue job $SLURM_JOB_ID: submit the same command again to resume"
    exit 0
}

# A signal to a job step reaches all its processes. It is sent again until they have ended, because those that still load ignore it.
stopping=
# shellcheck disable=SC2317 # the trap calls it
ask_to_stop() {
    [ -z "$stopping" ] || return 0
    say "asking the run to stop with a checkpoint"
    while scancel --signal=USR1 "$SLURM_JOB_ID.0" 2>/dev/null; do sleep "${RESEND_SECONDS:-20}"; done &
    stopping=$!
}
trap ask_to_stop USR1

say "job $SLURM_JOB_ID, attempt $attempt: $recipe on $nodes nodes x $processes processes, meeting at $MASTER_ADDR:$MASTER_PORT"
say "run directory $RUN_DIR, logs in $logs-*.log"
cd "$root"
before=$(newest_checkpoint)
# torchrun would die of the USR1 that is meant for the trainers; an ignored signal stays ignored across exec.
# shellcheck disable=SC2016 # SLURM_NODEID is that of each node
srun "${step_options[@]}" bash -c 'trap "" USR1; launcher=("${@:2:$1}"); exec "${launcher[@]}" --node-rank="$SLURM_NODEID" "${@:$1 + 2}"' \
    launch "${#torchrun[@]}" "${torchrun[@]}" "${train[@]}" &
step=$!
status=0
while true; do # a trapped signal interrupts wait
    wait "$step" && status=0 || status=$?
    kill -0 "$step" 2>/dev/null || break
done
[ -z "$stopping" ] || kill "$stopping" 2>/dev/null || true

# -------------------------------------------------------------------------------------------------------------- what comes next

if [ "$status" = 0 ]; then
    [ ! -f "$RUN_DIR/stopped_early.txt" ] || requeue "$(head -n 1 "$RUN_DIR/stopped_early.txt")"
    say "the run is done"
    exit 0
fi
# What explains the failure stands in some node's log, above torchrun's own account of it.
cause=$(cat "$logs"-*.log 2>/dev/null | grep -E '(megatron-mm: error|Error): .' | sed -n 1p) || true
say "exit code $status: ${cause:-no reason in the logs}" >&2
# A failure after progress is a node's or the network's, and worth another try; one without would only be repeated.
[ "$(newest_checkpoint)" = "$before" ] || requeue "the run failed, but has made checkpoints since it started"
say "the run failed before its first new checkpoint: see $logs-*.log" >&2
exit "$status"
