#!/bin/bash
# A study on Slurm: `sbatch docs/clusters/slurm.sh STUDY RESULTS [setting=value ...]`, where RESULTS is a directory that all
# nodes see, or a bucket. The job starts Ray on its nodes, launches, and ends Ray. Taken back by the scheduler, or out of
# time, it goes to the queue again and goes on where it was; `scancel` ends it for good.
#
# Once, where the nodes see it too:
#     python3 -m venv ~/flatmin-venv && ~/flatmin-venv/bin/pip install "ray[default,tune]==2.60.0" ./flatmin-sweep
#
# CHANGE what your cluster wants otherwise: partition, account, GPUs, times.
#SBATCH --job-name=flatmin-sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

budget=23h # under --time, by what the last checkpoint and the end of Ray take
gpus=${SLURM_GPUS_ON_NODE:-0}
study=${1:?sbatch slurm.sh STUDY RESULTS [setting=value ...]}
results=${2:?sbatch slurm.sh STUDY RESULTS [setting=value ...]}

if ((${SLURM_RESTART_COUNT:-0} > 0)); then
  sleep 30 # until the lease on the results of a driver that was killed has run out
fi
export PATH="$HOME/flatmin-venv/bin:$PATH"
export FLATMIN_DATA="${FLATMIN_DATA:-$HOME/data}" # shared, so that a data set is downloaded once
# Others can reach these nodes' ports, and who reaches Ray's may run anything as you: only those with the token may.
export RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null

# This script runs on the job's first node, which leads. The port is the job's own, for a node may hold several.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ip=$(hostname -I | cut -d ' ' -f 1)
address=$ip:$((20000 + SLURM_JOB_ID % 20000))
own=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="$gpus" --block)
step=(srun --overlap --ntasks-per-node=1)

trap 'kill $(jobs -p) 2> /dev/null || true; wait; rm -rf "/tmp/ray-$SLURM_JOB_ID"' EXIT # no `ray stop`: it would end other jobs' Ray too
"${step[@]}" --nodes=1 --nodelist="${nodes[0]}" \
  ray start --head --node-ip-address="$ip" --port="${address##*:}" --include-dashboard=false \
  --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${own[@]}" &
until ray health-check --address "$address" > /dev/null 2>&1; do
  kill -0 $! || exit 1 # Ray has ended, and said why above
  sleep 2
done
if ((${#nodes[@]} > 1)); then
  "${step[@]}" --nodes=$((${#nodes[@]} - 1)) --exclude="${nodes[0]}" ray start --address="$address" "${own[@]}" &
fi

code=0
flatmin-sweep launch "$study" --results "$results" --address "$address" --gpus-per-trial $((gpus > 0)) \
  --max-failures 20 --time-budget "$budget" "${@:3}" || code=$?
if ((code == 3)); then # the budget is spent and models remain
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
