# Sourced by the *.slurm files beside it, inside a Slurm job: starts torchrun on every node and keeps the run going.
#
#   DATA                 data set, as `megatron-mm prepare index` left it (required)
#   RUN_DIR              run directory, on storage that all nodes share (default: runs/RECIPE under the submit directory)
#   PYTHON               interpreter that has megatron_mm (default: .venv/bin/python of the submit directory, else python)
#   PROCESSES_PER_NODE   processes of a node (default: its GPUs)
#   CONTAINER_IMAGE      run inside this image with pyxis; CONTAINER_MOUNTS lists what it sees (default: submit, data and run directory)
#
# Arguments after the script's name go to `megatron-mm train`: sbatch examples/mm1_1b.slurm --train.steps 100
set -euo pipefail

fail() {
  echo "launch.sh: error: $*" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is not inside a Slurm job: submit a script with sbatch, for example sbatch examples/mm1_1b.slurm"
[[ -n ${DATA:-} ]] || fail "DATA is not set: DATA=/path/to/data sbatch ..."
[[ -d $DATA ]] || fail "DATA is $DATA, which is no directory on this node"
root=${SLURM_SUBMIT_DIR:-$PWD}
RUN_DIR=${RUN_DIR:-$root/runs/$RECIPE}
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python
  [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python
fi
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
[[ -n $processes ]] || fail "this job has no GPUs: set PROCESSES_PER_NODE to run on CPUs"

# Ranks follow Slurm's order of the nodes, so that neighbours in a tensor- or pipeline-parallel group are neighbours in the network; a
# dynamic rendezvous would number nodes as they arrive. The port is the job's own, so that two jobs on a node do not meet.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$head_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                            # processes share the node's cores, and decoding has threads of its own
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}    # keeps communication kernels in order with the compute they overlap
export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}  # frees communication buffers as soon as they are done
export PYTHONUNBUFFERED=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

container=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
  mkdir -p "$RUN_DIR"
  container=(--container-image="$CONTAINER_IMAGE" --container-mounts="${CONTAINER_MOUNTS:-$root,$DATA,$RUN_DIR}" --container-workdir="$root")
fi

# Some minutes before the time limit Slurm signals this shell (#SBATCH --signal). The training processes then finish their step, agree to
# stop, and save; torchrun itself must not be killed by the signal, so it is started with the signal ignored.
stopping=
stop() {
  stopping=yes
  echo "launch.sh: the time limit is near: asking the run to save and stop"
  scancel --signal=USR1 "$SLURM_JOB_ID.0"
}
trap stop USR1

echo "launch.sh: $RECIPE on $SLURM_NNODES nodes x $processes processes, start ${SLURM_RESTART_COUNT:-0}, run directory $RUN_DIR"
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 "${container[@]}" \
  bash -c 'trap "" USR1; exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"' "$PYTHON" \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$processes" --master-addr "$address" --master-port "$port" \
  -m megatron_mm train "$RECIPE" --run-dir "$RUN_DIR" --data.path "$DATA" "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a trapped signal ends `wait`, not the step
  code=0
  wait "$step" || code=$?
done

if [[ -n $stopping && $code == 0 ]]; then
  echo "launch.sh: stopped with a checkpoint; the job goes back into the queue and resumes from it"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
