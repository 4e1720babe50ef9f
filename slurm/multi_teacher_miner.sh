#!/usr/bin/env bash
# Distil several specialists into one student, score it on Minerva math, and export it to Hugging Face:
#
#   sbatch slurm/multi_teacher_miner.sh
#   RECIPE=recipes/qwen3_math_code.yaml STUDENT=/models/Qwen3-4B TEACHERS="math=/models/math code=/models/code" \
#       sbatch --nodes=4 slurm/multi_teacher_miner.sh
#
#SBATCH --job-name=multi_teacher_miner --nodes=2 --ntasks-per-node=1 --exclusive --mem=0 --time=24:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append --output=%x-%j.out

: "${RECIPE:=recipes/smollm2_two_teachers.yaml}"
: "${TEACHERS:=math=demo/hf/math code=demo/hf/code}" # NAME=FOLDER of each teacher of the recipe
# sbatch runs a copy of this file from a folder of its own.
cd "${FIRE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}" && source slurm/common.sh ||
  { echo "error: submit this from the project's folder, or set FIRE_ROOT" >&2; exit 2; }
main "$@"
