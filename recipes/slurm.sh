#!/bin/bash
# One job on one node or many that survives its time limit, preemption and dead processes:
#   sbatch --nodes=1 --gpus-per-node=8 recipes/slurm.sh strategy=ddp name=mine data=local ...
#   sbatch --nodes=4 --gpus-per-node=8 recipes/slurm.sh strategy=ddp name=mine data=local ...
# Five minutes before the limit it saves, and queues itself again; --time and --partition as usual.
#SBATCH --job-name=mamba2
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

# The batch shell alone hears USR1; it asks torchrun to stop, which asks its ranks: each ends its
# step, they save one checkpoint, and resume=auto goes on from it in the same folder.
asked=0
stop() { asked=1; kill -TERM "$step"; }
trap stop USR1 TERM

nodes=${SLURM_JOB_NUM_NODES:-1}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# restarted processes must not find the keys of the dead ones in a store that outlives them
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$nodes" --nproc-per-node="${SLURM_GPUS_ON_NODE:-${NPROC_PER_NODE:-1}}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --max-restarts=3 --shutdown-timeout=240 \
    -m mamba2_train callbacks.saving.every_minutes=30 "$@" \
    run_dir="runs/$SLURM_JOB_NAME-$SLURM_JOB_ID" resume=auto &
step=$!
code=0
# a trapped signal ends a wait
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
if [ "$asked" = 1 ] && [ "$code" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
