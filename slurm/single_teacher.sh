#!/usr/bin/env bash
# Distil one teacher into a student, score it, and export it to Hugging Face:
#
#   sbatch slurm/single_teacher.sh
#   STUDENT=/models/Qwen3-4B TEACHERS=math=/models/math sbatch --nodes=2 slurm/single_teacher.sh
#
#SBATCH --job-name=single_teacher --nodes=2 --ntasks-per-node=1 --exclusive --mem=0 --time=24:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append --output=%x-%j.out

: "${RECIPE:=recipes/smollm2_single_teacher.yaml}"
: "${TEACHERS:=math=demo/hf/math}" # NAME=FOLDER of each teacher of the recipe
# sbatch runs a copy of this file from a folder of its own.
cd "${FIRE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}" && source slurm/common.sh ||
  { echo "error: submit this from the project's folder, or set FIRE_ROOT" >&2; exit 2; }
main "$@"
