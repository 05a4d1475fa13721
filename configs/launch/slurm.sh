#!/bin/bash
# A run on two nodes of 8 GPUs under Slurm: sbatch configs/launch/slurm.sh configs/pretrain/nemotron-h-8b-bf16.yaml [--section.field value …]
# From the checkout, on a disk that all nodes share. A job that is cut off at its time limit goes on in the next one, bit for bit.
#SBATCH --job-name=hybridlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1  # one torchrun a node, which starts the ranks
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600  # to this script, ten minutes before the limit: the time that stopping and saving may take
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -uo pipefail
config=${1:?usage: sbatch configs/launch/slurm.sh CONFIG [--section.field value …]}
shift

export OMP_NUM_THREADS=8
# torchrun passes SIGTERM on to its ranks, which save, and kills them after 30 s unless told otherwise.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))  # two jobs on one node do not meet

# What a rank does wrong by itself (a device that fails) is tried three times more, from the newest checkpoint.
srun --output="slurm-%j-node-%n.log" --open-mode=append --kill-on-bad-exit=0 \
  torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --max-restarts 3 \
  --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv_backend c10d --rdzv_endpoint "$host:$port" \
  -m train --config "$config" "$@" &
step=$!

limit=
stop() {
  limit=yes
  scancel --signal=TERM "$SLURM_JOB_ID"  # to what srun started; srun itself answers SIGTERM by killing that at once
}
trap stop USR1

wait "$step"
status=$?
if [[ -n $limit ]]; then
  wait "$step"  # the signal ended the first wait, not the step
  status=$?
  echo "stopped near the time limit with status $status; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
