#!/bin/bash
# Two nodes of four GPUs, one process a GPU: sbatch configs/launch/slurm.sh
# JAX reads the coordinator, the number of processes and each one's number from SLURM by itself.
#SBATCH --job-name=moejax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=00:30:00
srun python -m moejax.generate --model mistralai/Mixtral-8x7B-v0.1 --mesh ep=4,tp=2 --prompt "Once upon a time" --json
