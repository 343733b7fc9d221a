#!/bin/bash
# Slurm: a recipe on several nodes, DDP with the profile two_node. Set the lines of #SBATCH to your
# cluster's; a node starts one process for each of its GPUs.
#
#   pulseopt-hf cp launch/slurm.sh slurm.sh
#   sbatch --nodes 4 slurm.sh glue/mnli --output_dir /shared/mnli
#   sbatch --nodes 4 slurm.sh glue/mnli --output_dir /shared/mnli --resume
#
# What follows slurm.sh goes to `pulseopt-hf train`. The run folder must be on a disk that all nodes
# share. Five minutes before the time is up the run saves a checkpoint and ends; the third line goes
# on from it.
#SBATCH --job-name=pulseopt-hf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail

NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_NODE=${NODES%%$'\n'*}  # the first line
# Jobs that share a node need ports of their own.
MAIN_PORT=${MAIN_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export MAIN_NODE MAIN_PORT

srun bash -c 'exec pulseopt-hf train "$@" --accelerate_config two_node \
  --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_NODE" --main_process_port "$MAIN_PORT"
' slurm.sh "$@"
