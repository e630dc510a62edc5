#!/usr/bin/env bash
# Indexes a data set on many machines: an array job reads the shards, and one job that waits for it writes the index.
#
#     DATA=/scratch/mm1_data bash examples/prepare_index.sh [--chat-template vicuna ...]
#
# Options after the script's name go to `megatron-mm prepare index` and `prepare merge` alike. Submit the same line again after a failure or
# when shards were added: shards that are read and unchanged are not read again. PARTS is the number of jobs, SBATCH_OPTIONS go to sbatch.
set -euo pipefail
: "${DATA:?set DATA to the data set}"
PARTS=${PARTS:-16}
CPUS=${CPUS:-32}
PROGRAM=${PROGRAM:-.venv/bin/megatron-mm}
read -ra sbatch_options <<<"${SBATCH_OPTIONS:-}"
options=$(printf ' %q' "$DATA" "$@")

submit() { # prints the job's number; with DRY_RUN=1 shows what it would submit
    if [ -z "${DRY_RUN:-}" ]; then sbatch --parsable "$@"; else echo "sbatch --parsable$(printf ' %q' "$@")" >&2; echo JOB; fi
}

array=$(submit "${sbatch_options[@]}" --job-name=index --array="0-$((PARTS - 1))" --nodes=1 --ntasks=1 --cpus-per-task="$CPUS" \
    --wrap="exec $PROGRAM prepare index$options --workers $CPUS --shards \$SLURM_ARRAY_TASK_ID/$PARTS")
merge=$(submit "${sbatch_options[@]}" --job-name=merge --dependency="afterok:${array%%;*}" --nodes=1 --ntasks=1 \
    --wrap="exec $PROGRAM prepare merge$options")
[ -z "${DRY_RUN:-}" ] || exit 0
echo "array job ${array%%;*} reads $PARTS parts, job ${merge%%;*} merges them"
