#!/bin/bash
# chain.sh NAME "STAGE ..." [train options ...]: what a *.slurm script of several stages runs, in place of launch.sh.
#
# Its job is one stage, the recipe NAME_STAGE, and hands over to launch.sh for it. Before that it submits a job for every later stage, each
# to begin, and to begin with the weights of the one before, when that one is done. README.md lists the variables.
set -Eeuo pipefail
trap 'echo "chain.sh: error: line $LINENO failed: $BASH_COMMAND" >&2' ERR

say() { echo "chain.sh: $*"; }
fail() { echo "chain.sh: error: $*" >&2; exit 2; }

# ---------------------------------------------------------------------------------------------------------- what was asked for

[ $# -ge 2 ] || fail "no name and stages given: chain.sh NAME \"STAGE ...\" [train options ...]"
name=$1
read -ra all <<<"$2"
shift 2
[ -n "${SLURM_JOB_ID:-}${DRY_RUN:-}" ] || fail "this is not a Slurm job: submit it, sbatch examples/$name.slurm, or look at it with DRY_RUN=1"

STAGE=${STAGE:-${all[0]}}
before="" stages=() # the stage before this one; this one and those after it
for stage in "${all[@]}"; do
    if [ "$stage" = "$STAGE" ] || [ ${#stages[@]} -gt 0 ]; then stages+=("$stage"); else before=$stage; fi
done
[ ${#stages[@]} -gt 0 ] || fail "STAGE=$STAGE is not a stage of $name: choose one of ${all[*]}"
case ${CHAIN:-yes} in
    yes) ;;
    no) stages=("$STAGE") ;;
    *) fail "CHAIN=$CHAIN is neither yes nor no" ;;
esac

[ -n "${RUN_DIR:-}" ] || fail "RUN_DIR is not set: the folder of the stages' run directories, seen by every node: export RUN_DIR=/scratch/runs/$name"
RUN_DIR=$(realpath -m "$RUN_DIR")
for stage in "${stages[@]}"; do
    data=DATA_${stage^^}
    [ -n "${!data:-}" ] || fail "$data is not set: the data set of stage $stage, seen by every node: export $data=/scratch/$stage"
    [ -d "${!data}" ] || say "note: $data=${!data} is not there yet, and must be when stage $stage starts"
done

from=${before:+$RUN_DIR/$before}
shared=() # what every stage is given; --init-from is for this one alone
while [ $# -gt 0 ]; do
    case $1 in
        --init[-_]from=*) from=${1#*=} ;;
        --init[-_]from)
            [ $# -ge 2 ] || fail "$1 needs a checkpoint or a run directory"
            from=$2
            shift
            ;;
        *) shared+=("$1") ;;
    esac
    shift
done
[ -n "$from" ] || fail "stage $STAGE begins with other weights: add --init-from DIR, as \`megatron-mm convert from-hf\` has made it"

root=$(realpath "${MEGATRON_MM_HOME:-${SLURM_SUBMIT_DIR:-.}}")
data=DATA_${STAGE^^}
# One recipe for all stages differs between them in its freeze policy, which has the stage's name.
train=("${RECIPE:-${name}_$STAGE}" --init-from "$from" ${RECIPE:+--train.freeze-policy "$STAGE"} "${shared[@]}")

# ------------------------------------------------------------------------------------------------------------ the other stages

alike=() # what this job was given, on its command line perhaps, and the others ask for too
if [ -n "${SLURM_JOB_ID:-}" ]; then
    alike=(--nodes="$SLURM_JOB_NUM_NODES" --time="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%l)")
    alike+=(${SLURM_GPUS_PER_NODE:+--gpus-per-node="$SLURM_GPUS_PER_NODE"} ${SLURM_JOB_PARTITION:+--partition="$SLURM_JOB_PARTITION"})
    alike+=(${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"})
fi

sbatch_of() { # stage, the job that it waits for: sets `submission`
    local data=DATA_${1^^}
    submission=(
        env STAGE="$1" CHAIN=no RUN_DIR="$RUN_DIR" "$data=$(realpath -m "${!data}")"
        # A stage that can never start, because the one before it failed or was cancelled, leaves the queue.
        sbatch --parsable --dependency="afterok:$2" --kill-on-invalid-dep=yes
        --job-name="${name}_$1" --output="$RUN_DIR/$1/logs/slurm-%j.out" "${alike[@]}"
        "$root/examples/$name.slurm" "${shared[@]}"
    )
}

submit() { # as sbatch_of: prints the new job's number
    local submission
    sbatch_of "$1" "$2"
    mkdir -p "$RUN_DIR/$1/logs"
    ( # without what describes this job, which the new one would inherit
        cd "$root"
        conf=${SLURM_CONF:-}
        unset "${!SLURM_@}"
        [ -z "$conf" ] || export SLURM_CONF="$conf"
        "${submission[@]}"
    ) | cut -d ';' -f 1 # a federation's name follows
}

if [ -n "${DRY_RUN:-}" ]; then
    echo "stage $STAGE runs: DATA=${!data} RUN_DIR=$RUN_DIR/$STAGE examples/launch.sh$(printf ' %q' "${train[@]}")"
    for ((number = 1; number < ${#stages[@]}; number++)); do
        sbatch_of "${stages[number]}" "JOB_OF_${stages[number - 1]^^}"
        echo "and submits:$(printf ' %q' "${submission[@]}")"
    done
    exit 0
fi

# A job that is requeued starts here again, so it writes down what it has submitted.
submitted=$RUN_DIR/$STAGE/logs/job-$SLURM_JOB_ID-submitted.txt
mkdir -p "${submitted%/*}"
touch "$submitted"
previous=$SLURM_JOB_ID
for stage in "${stages[@]:1}"; do
    job=$(sed -n "s/^$stage //p" "$submitted")
    if [ -z "$job" ]; then
        job=$(submit "$stage" "$previous") || fail "stage $stage cannot be submitted from here: use CHAIN=no, and submit what DRY_RUN=1 prints"
        echo "$stage $job" >>"$submitted"
        say "stage $stage is job $job and begins when job $previous is done"
    fi
    previous=$job
done

export DATA=${!data} RUN_DIR=$RUN_DIR/$STAGE
exec "$root/examples/launch.sh" "${train[@]}"
