#!/usr/bin/env bash
# Distil several specialists into one student, score it on Minerva math, and export it to Hugging Face:
#
#   sbatch slurm/multi_teacher_miner.sh
#   RECIPE=recipes/qwen3_math_code.yaml STUDENT=/models/Qwen3-4B TEACHERS="math=/models/math code=/models/code" \
#       sbatch --nodes=4 slurm/multi_teacher_miner.sh
#
# --dry-run after the script's name prints what would be done, also outside of Slurm. As it is, it runs on the demo
# models that `make demo` makes, with or without GPUs. Variables are set here or in the environment; slurm/common.sh has
# more of them, docs/slurm.md explains.
#SBATCH --job-name=multi_teacher_miner
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

: "${RECIPE:=recipes/smollm2_two_teachers.yaml}"
: "${STUDENT:=demo/hf/student}"                          # Hugging Face folder, or converted checkpoint
: "${TEACHERS:=math=demo/hf/math code=demo/hf/code}" # NAME=FOLDER of each teacher of the recipe
: "${BENCHMARKS:=data/minervamath.jsonl}"                # files with 'problem' and 'answer'; set to ' ' for none

# sbatch runs a copy of this file from a folder of its own.
cd "${FIRE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}" || exit 2
source slurm/common.sh || { echo "error: submit this from the project's folder, or set FIRE_ROOT" >&2; exit 2; }
main "$@"
