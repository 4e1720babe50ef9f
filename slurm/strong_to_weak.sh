#!/usr/bin/env bash
# Distil a large general model into a small one of its family on prompts of every label, score it, and export it to
# Hugging Face:
#
#   sbatch slurm/strong_to_weak.sh
#   STUDENT=/models/Qwen3-4B TEACHERS=strong=/models/Qwen3-32B sbatch --nodes=8 slurm/strong_to_weak.sh
#
#SBATCH --job-name=strong_to_weak --nodes=2 --ntasks-per-node=1 --exclusive --mem=0 --time=24:00:00
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append --output=%x-%j.out

: "${RECIPE:=recipes/smollm2_strong_to_weak.yaml}"
: "${TEACHERS:=strong=demo/hf/math}" # NAME=FOLDER of each teacher of the recipe
# sbatch runs a copy of this file from a folder of its own.
cd "${FIRE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}" && source slurm/common.sh ||
  { echo "error: submit this from the project's folder, or set FIRE_ROOT" >&2; exit 2; }
main "$@"
