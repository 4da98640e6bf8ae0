#!/bin/bash
# Train under Slurm, one task per GPU, through preemption, node failures and time limits:
#
#     sbatch scripts/slurm_train.sh pretrain/train_mdm_rl.py --model 1028 --flops 1600. --ssl_ratio 0.01
#     sbatch --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 scripts/slurm_train.sh sft/finetune_mdm.py ...
#
# The code, the data and workdir/ lie on a disk that all nodes see. Five minutes before the time limit, and when the job is
# preempted, the run saves and the job is queued again; it goes on from its newest checkpoint. A mistake in the flags
# (code 2) ends the job.
#SBATCH --job-name=smdm
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue --open-mode=append
set -uo pipefail

# 24 hours each; a run that fails again and again ends at last.
most_restarts=30
python=${SMDM_VENV:-.venv}/bin/python

# The tasks get the signal; this script outlives it to queue the job again.
trap : TERM
srun --kill-on-bad-exit=1 "$python" "$@" &
wait $!
code=$?
while kill -0 $! 2>/dev/null; do  # the signal came to this script too, and ended its waiting
    wait $!
    code=$?
done

if ((code != 0 && code != 2 && ${SLURM_RESTART_COUNT:-0} < most_restarts)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
