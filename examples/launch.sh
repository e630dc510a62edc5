#!/bin/bash
# launch.sh RECIPE [train options ...]: what every *.slurm script of this folder runs once Slurm has given it its nodes.
#
# It starts one torchrun on each node (srun), tells them where to meet, asks the run to stop with a checkpoint when Slurm says
# that time is nearly up, and puts the job back into the queue while steps remain. Where the job has more nodes than the run
# takes (NODES), it looks at all of them first, leaves out what is unfit, and after a failure starts the run again on those
# that are left, within the job. README.md lists the variables.
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
[ -n "${SLURM_JOB_ID:-}${DRY_RUN:-}" ] ||
    fail "this is not a Slurm job: submit it, for example: sbatch examples/$recipe.slurm, or look at it with DRY_RUN=1"
require DATA "the folder that \`megatron-mm prepare index\` has indexed, seen by every node" /scratch/data
require RUN_DIR "the run's folder, seen by every node" "/scratch/runs/$recipe"

if [ -n "${DRY_RUN:-}" ]; then # also within a job, which somebody who asks for this does not want to run
    asked() { sed -n "s/^#SBATCH --$1=//p" "$(dirname "$0")/$recipe.slurm" 2>/dev/null || true; } # the script's; a job knows its own
    train=(train "$recipe" --run-dir "$(realpath -m "$RUN_DIR")" --data.path "$(realpath -m "$DATA")" "$@")
    nodes=${NODES:-${SLURM_JOB_NUM_NODES:-$(asked nodes)}}
    processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(asked gpus-per-node)}}
    say "dry run: nothing is started"
    [ -d "$DATA" ] || say "note: DATA=$DATA is not a folder on $(hostname)"
    echo "${nodes:-all} nodes x ${processes:-1} processes of: megatron-mm$(printf ' %q' "${train[@]}")"
    echo "to see its configuration, its stages and its first batches: megatron-mm$(printf ' %q' "${train[@]}") --dry-run"
    exit 0
fi

[ -d "$DATA" ] || fail "DATA=$DATA is not a folder on $(hostname)"
[ -d "$RUN_DIR" ] || (umask 077 && mkdir -p "$RUN_DIR") || fail "RUN_DIR=$RUN_DIR cannot be made on $(hostname)"
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

nodes=${NODES:-$SLURM_JOB_NUM_NODES}
[[ $nodes =~ ^[1-9][0-9]*$ && $nodes -le $SLURM_JOB_NUM_NODES ]] || fail "NODES=$nodes, but the job has $SLURM_JOB_NUM_NODES nodes"
spare=$((SLURM_JOB_NUM_NODES - nodes))
# Times that a failed run is started again within the job; with spare nodes, since the next attempt may do without the one that failed.
restarts=${RESTARTS:-$((spare > 0 ? 3 : 0))}
check=${CHECK_NODES:-$([ "$spare" = 0 ] && echo no || echo yes)}
# One process for each GPU of a node; SLURM_GPUS_ON_NODE is not set where none were asked for.
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES_PER_NODE=$processes is not a positive number"
mapfile -t all_nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
given_address=${MASTER_ADDR:-} given_port=${MASTER_PORT:-}

meeting_point() { # sets MASTER_ADDR and MASTER_PORT for a start on the nodes "$@"
    local address=
    if [ -n "${NETWORK_INTERFACE:-}" ]; then
        address=$(srun --nodes=1 --ntasks=1 --nodelist="$1" --overlap ip -4 -o addr show dev "$NETWORK_INTERFACE" |
            sed -n 's/.* inet \([0-9.]*\).*/\1/p' | sed -n 1p) || true
        [ -n "$address" ] || fail "NETWORK_INTERFACE=$NETWORK_INTERFACE has no address on $1"
    else # by which Slurm itself reaches the first node: a node's name need not resolve everywhere
        address=$(scontrol show node "$1" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2) || true
    fi
    export MASTER_ADDR=${given_address:-${address:-$1}}
    # Differs between jobs that share a node and between starts, and lies below the ports that the kernel hands out by itself (32768 and up).
    export MASTER_PORT=${given_port:-$((15000 + (SLURM_JOB_ID + 7919 * starts) % 15000))}
}

# -------------------------------------------------------------------------------------------------------- environment, with why

# The processes of a node share its cores, and reading and decoding have threads of their own.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Messages stay on one network, where one is named.
if [ -n "${NETWORK_INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE
fi
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
# Compiled kernels go to the node's own disk: hundreds of processes would write them to one home folder at once. They are code that is
# run, so a folder that somebody else made under that name is not used.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$(id -u)}
# Text reaches the log when it is written, not when a buffer is full: a killed process takes its buffer with it.
export PYTHONUNBUFFERED=1

# ----------------------------------------------------------------------------------------------------------------------- start

attempt=$((${SLURM_RESTART_COUNT:-0} + 1)) # Slurm sets the count from the first restart on
prefix=$RUN_DIR/logs/job-$SLURM_JOB_ID-attempt-$attempt
logs=$prefix-node
common_options=(
    --ntasks-per-node=1
    # srun takes neither from the job by itself (Slurm 22.05): without them a node's processes would share one core.
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --cpu-bind=none
)
if [ -n "${CONTAINER_IMAGE:-}" ]; then # needs Slurm's pyxis plugin (enroot)
    common_options+=(
        --container-image="$CONTAINER_IMAGE" --container-workdir="$root" --no-container-mount-home
        --container-mounts="$root:$root,$DATA:$DATA,$RUN_DIR:$RUN_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    )
fi
train=(-m megatron_mm train "$recipe" --run-dir "$RUN_DIR" --data.path "$DATA" "$@")

newest_checkpoint() { # its folder's name; only complete checkpoints are named step_*
    find "$RUN_DIR" -maxdepth 2 -path '*/checkpoints/step_*' | sort | tail -n 1
}

requeue() {
    say "$1: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || fail "this cluster does not requeue job $SLURM_JOB_ID: submit the same command again to resume"
    exit 0
}

fit_nodes() { # prints the nodes on which `doctor --node` finds nothing wrong, in Slurm's order
    local node answers=$prefix-start-$starts-nodes
    mkdir -p "$answers"
    for node in "${all_nodes[@]}"; do
        timeout "${CHECK_SECONDS:-180}" srun "${common_options[@]}" --nodes=1 --ntasks=1 --nodelist="$node" --output="$answers/$node.txt" \
            "$PYTHON" -m megatron_mm doctor --node --path "$RUN_DIR" ${SLURM_GPUS_ON_NODE:+--gpus "$SLURM_GPUS_ON_NODE"} \
            ${MIN_GB_PER_S:+--min-gb-per-s "$MIN_GB_PER_S"} 2>>"$answers/$node.txt" && touch "$answers/$node.fit" &
    done
    wait
    for node in "${all_nodes[@]}"; do [ ! -f "$answers/$node.fit" ] || echo "$node"; done
}

choose_nodes() { # sets `chosen`
    chosen=("${all_nodes[@]:0:nodes}")
    [ "$check" != no ] || return 0
    local fit node
    mapfile -t fit < <(fit_nodes)
    for node in "${all_nodes[@]}"; do
        [[ " ${fit[*]} " == *" $node "* ]] || say "node $node is left out: see $prefix-start-$starts-nodes/$node.txt"
    done
    [ "${#fit[@]}" -ge "$nodes" ] || return 1
    chosen=("${fit[@]:0:nodes}")
}

# A signal to a job step reaches all its processes. It is sent again until they have ended, because those that still load ignore it.
stopping=
# shellcheck disable=SC2317 # the trap calls it
ask_to_stop() {
    [ -z "$stopping" ] || return 0
    say "asking the run to stop with a checkpoint"
    while true; do
        if [ ! -f "$prefix-step" ]; then # it has not begun yet
            sleep 0.2
        elif scancel --signal=USR1 "$SLURM_JOB_ID.$(cat "$prefix-step")" 2>/dev/null; then
            sleep "${RESEND_SECONDS:-20}"
        else
            break
        fi
    done &
    stopping=$!
}
trap ask_to_stop USR1

start() { # one attempt at the run; sets `status`
    rm -f "$prefix-step"
    choose_nodes || { say "only some of $nodes nodes are fit"; status=1; return; }
    meeting_point "${chosen[@]}"
    [ "$starts" = 0 ] || logs=$prefix-start-$starts-node
    # Ranks follow Slurm's order of the nodes, so that neighbours in the pipeline are neighbours in the network.
    local torchrun=(
        "$PYTHON" -m megatron_mm.run.launcher --nnodes="$nodes" --nproc-per-node="$processes"
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0
    )
    local step_options=(
        --nodes="$nodes" --ntasks="$nodes" "${common_options[@]}"
        # One node's failure ends the step on all; the others would wait for its messages.
        --kill-on-bad-exit=1 --wait=60
        --output="$logs-%t.log" --unbuffered
    )
    [ "$spare" = 0 ] || step_options+=(--nodelist="$(IFS=,; echo "${chosen[*]}")")
    say "job $SLURM_JOB_ID, attempt $attempt: $recipe on $nodes nodes x $processes processes, meeting at $MASTER_ADDR:$MASTER_PORT"
    [ "$spare" = 0 ] || say "on ${chosen[*]}"
    say "run directory $RUN_DIR, logs in $logs-*.log"
    # torchrun would die of the USR1 that is meant for the trainers; an ignored signal stays ignored across exec.
    # shellcheck disable=SC2016 # SLURM_NODEID and SLURM_STEP_ID are those of each node
    srun "${step_options[@]}" bash -c 'trap "" USR1; echo "${SLURM_STEP_ID:-0}" >"$1"
        (umask 077 && mkdir -p "$TRITON_CACHE_DIR") && [ -O "$TRITON_CACHE_DIR" ] || TRITON_CACHE_DIR=$(mktemp -d)
        launcher=("${@:3:$2}"); exec "${launcher[@]}" --node-rank="$SLURM_NODEID" "${@:$2 + 3}"' \
        launch "$prefix-step" "${#torchrun[@]}" "${torchrun[@]}" "${train[@]}" &
    local step=$!
    status=0
    while true; do # a trapped signal interrupts wait
        wait "$step" && status=0 || status=$?
        kill -0 "$step" 2>/dev/null || break
    done
}

cd "$root"
first_checkpoint=$(newest_checkpoint)
for ((starts = 0; ; starts++)); do
    before=$(newest_checkpoint)
    start
    [ "$status" != 0 ] && [ -z "$stopping" ] && [ "$starts" -lt "$restarts" ] || break
    # What failed twice at the same place, without a checkpoint in between, would fail again.
    [ "$starts" = 0 ] || [ "$(newest_checkpoint)" != "$before" ] || break
    say "exit code $status: starting again within the job, $((starts + 1)) of $restarts"
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
[ "$(newest_checkpoint)" = "$first_checkpoint" ] || requeue "the run failed, but has made checkpoints since it started"
say "the run failed before its first new checkpoint: see $logs-*.log" >&2
exit "$status"
