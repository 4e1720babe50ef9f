# shellcheck shell=bash
# The body of the sbatch scripts of this folder, which source it after they have set what is theirs. docs/slurm.md
# explains.
#
# --dry-run after a script's name prints what would be done, also outside of Slurm. As they are, they run on the demo
# models that `make demo` makes, with or without GPUs. Every stage is left out when what it makes is there already, so a
# job that is put back in the queue goes on where it was. Variables, set here, in the script or in the environment:
: "${STUDENT:=demo/hf/student}"           # Hugging Face folder, or converted checkpoint
: "${BENCHMARKS:=data/minervamath.jsonl}" # files with 'problem' and 'answer'; set to ' ' for none
: "${RUN_DIR:=}"                          # the run's folder; empty takes the recipe's run.dir
: "${OVERRIDES:=}"                        # more recipe keys: "run.steps=100 optimizer.lr=1e-6"
: "${CONVERTED:=checkpoints}"             # where Hugging Face folders are converted to
: "${PROCESSES_PER_NODE:=}"               # empty: one a GPU, or one where there is none
: "${EVALUATE_ARGS:=}"                    # more arguments of fire_megatron.evaluate: "--samples 8 --tensor 2"
: "${SRUN_ARGS:=}"                        # more arguments of every srun: "--container-image=..."
: "${PYTHON:=}"                           # empty takes .venv/bin/python where it is, or python3

STOPPED=75 # exit code of slurm/node.sh: the job was asked to stop
DRY_RUN=
ASKED= # whether this script itself was
SRUN_PID= # process id of the srun in progress

say() { echo "[$(date +%H:%M:%S)] $*"; }

fail() {
  echo "error: $*" >&2
  exit 2
}

# The signal before the time limit comes to this script alone, which passes it on; more than once, since processes that
# are still being started do not hear it.
pass_on() {
  ASKED=1
  say "asked to stop"
  local running=$SRUN_PID
  while [[ -n $running ]] && kill -0 "$running" 2>/dev/null; do
    scancel --signal=USR1 "$SLURM_JOB_ID" || true
    sleep 20
  done &
}

# Put the job back in the queue; not where a process has told of a mistake, which would only come again.
requeue() {
  [[ ! -s ${FIRE_MEGATRON_MISTAKE:-} ]] || fail "$(cat "$FIRE_MEGATRON_MISTAKE")"
  say "the job goes back into the queue to continue"
  scontrol requeue "$SLURM_JOB_ID" || fail "this job may not be put back in the queue; sbatch it again to continue"
  sleep 600 # Slurm ends this script
  exit "$STOPPED"
}

# Run an srun, or print it, and leave its exit code in CODE; does not come back when the job was asked to stop. srun runs
# in the background, since bash hears signals only between commands.
run_srun() {
  if [[ -n $DRY_RUN ]]; then
    printf '%q ' srun "$@"
    echo
    CODE=0
    return
  fi
  srun "$@" &
  SRUN_PID=$!
  local again
  while true; do
    CODE=0
    wait "$SRUN_PID" || CODE=$?
    kill -0 "$SRUN_PID" 2>/dev/null || break
  done
  # A signal may have ended the last wait, and not srun.
  again=0
  wait "$SRUN_PID" 2>/dev/null || again=$?
  [[ $again -eq 127 ]] || CODE=$again
  SRUN_PID=
  if [[ $CODE -eq $STOPPED || (-n $ASKED && $CODE -ne 0) ]]; then
    requeue
  fi
}

# One process on the first node.
on_one_node() {
  run_srun --nodes=1 --ntasks=1 $SRUN_ARGS bash slurm/node.sh "$@"
  [[ $CODE -eq 0 ]] || exit "$CODE"
}

# One torchrun a node, a log file a node:  on_all_nodes STAGE ATTEMPT -m MODULE...
# torchrun's own restarts are not used: over several nodes its agents count them differently, and the workers then look
# for one another under different numbers.
on_all_nodes() {
  local stage=$1 attempt=$2
  shift 2
  # Which node holds the rendezvous is said, not guessed: a node's name in Slurm need not be its host name. Nothing but
  # a node's own srun task knows its number, hence the inner shell.
  local launch='exec bash slurm/node.sh "$0" -m torch.distributed.run --rdzv-conf "is_host=$((SLURM_NODEID == 0))" "$@"'
  run_srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --output="$LOGS/$stage-node%n-%N.log" --open-mode=append $SRUN_ARGS \
    bash -c "$launch" "$PYTHON" \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$PROCESSES_PER_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST_NODE:$((20000 + SLURM_JOB_ID % 12000))" \
    --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$stage.$attempt" "$@"
}

run_status() { cat "$RUN_DIR/status.json" 2>/dev/null || true; }

newest_checkpoint() { ls -d "$CHECKPOINTS"/step_* 2>/dev/null | tail -n 1 || true; }

# Run a stage until it succeeds. What fails is started again from its last checkpoint, as long as there is a new one at
# least every so many times:  stage NAME RESTARTS -m MODULE...
stage() {
  local name=$1 restarts=$2 failures=0 count=0 before now status
  shift 2
  say "$name: see $LOGS/$name-*.log"
  before=$(newest_checkpoint)
  # Written by a process that fails for a mistake, which another start would only repeat.
  export FIRE_MEGATRON_MISTAKE=$LOGS/mistake
  while true; do
    rm -f "$FIRE_MEGATRON_MISTAKE"
    status=$(run_status)
    on_all_nodes "$name" "$count" "$@"
    [[ $CODE -ne 0 ]] || return 0
    count=$((count + 1))
    tail -n 20 "$LOGS/$name"-*.log >&2 || true
    say "$name failed with code $CODE"
    if [[ -s $FIRE_MEGATRON_MISTAKE ]]; then
      fail "$name: $(cat "$FIRE_MEGATRON_MISTAKE")"
    fi
    # At preemption Slurm signals the processes, not this script. A run writes its status with the time, so one that is
    # as it was before this start is of an earlier one.
    if [[ $name == train && $(run_status) != "$status" && $(run_status) == *'"state": "stopped"'* ]]; then
      requeue
    fi
    now=$(newest_checkpoint)
    [[ $now == "$before" ]] || failures=0
    before=$now
    failures=$((failures + 1))
    if [[ $failures -gt $restarts ]]; then
      echo "error: $name failed $failures times in a row without a new checkpoint; logs are in $LOGS" >&2
      exit "$CODE"
    fi
    say "$name: starting again from ${now:-the beginning}, $failures of $restarts without a new checkpoint"
    export FIRE_MEGATRON_RESTART=$failures
  done
}

# A key of the recipe, with all overrides.
recipe_key() {
  local inside=()
  # Where the package is in a container only, so is Python.
  [[ -z $SRUN_ARGS || -n $DRY_RUN ]] || inside=(srun --nodes=1 --ntasks=1 $SRUN_ARGS)
  ${inside[@]+"${inside[@]}"} "$PYTHON" -m fire_megatron recipe "$RECIPE" --key "$1" ${KEYS[@]+"${KEYS[@]}"}
}

# The converted checkpoint of a role, in CHECKPOINT; converts a Hugging Face folder the first time:  converted ROLE FOLDER
converted() {
  local role=$1 folder=$2
  if [[ -f $folder/fire_checkpoint.json ]]; then
    CHECKPOINT=$folder
    return
  fi
  [[ -f $folder/config.json ]] || fail "$role: $folder is neither a Hugging Face folder nor a converted checkpoint"
  local name
  name=$(realpath "$folder")
  name=${name#/}
  CHECKPOINT=$CONVERTED/${name//\//--}
  if [[ -f $CHECKPOINT/fire_checkpoint.json ]]; then
    say "$role: $folder is converted already"
  else
    say "$role: converting $folder"
    on_one_node "$PYTHON" -m fire_megatron convert hf-to-megatron --hf "$folder" --out "$CHECKPOINT"
  fi
}

check_settings() {
  [[ -f $RECIPE ]] || fail "RECIPE: $RECIPE does not exist in $PWD"
  local file pair
  for file in $BENCHMARKS; do
    [[ -f $file ]] || fail "BENCHMARKS: $file does not exist; name JSON Lines files with 'problem' and 'answer', or ' ' for none"
  done
  for pair in $TEACHERS; do
    [[ $pair == *=* ]] || fail "TEACHERS: '$pair' is not NAME=FOLDER"
  done
  if [[ -z $PYTHON ]]; then
    PYTHON=python3
    [[ ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
  fi
  [[ -n $SRUN_ARGS ]] || command -v "$PYTHON" >/dev/null || fail "PYTHON: there is no $PYTHON"
  [[ -n $DRY_RUN || -n ${SLURM_JOB_ID:-} ]] || fail "start this with sbatch, or with --dry-run"
  : "${SLURM_JOB_ID:=0}" "${SLURM_JOB_NUM_NODES:=1}"
  if [[ -z $PROCESSES_PER_NODE ]]; then
    PROCESSES_PER_NODE=${SLURM_GPUS_ON_NODE:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
    [[ $PROCESSES_PER_NODE -gt 0 ]] || PROCESSES_PER_NODE=1
  fi
  FIRST_NODE=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null | head -n 1) || FIRST_NODE=$(hostname -s)
}

main() {
  set -euo pipefail
  case "${1:-}" in
    --dry-run) DRY_RUN=1 ;;
    "") ;;
    *) fail "unknown argument $1; --dry-run prints what would be done" ;;
  esac
  check_settings
  trap pass_on USR1
  # How long torchrun lets its processes save when it is told to end (30 s otherwise); Slurm's own limits come before.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}
  KEYS=($OVERRIDES)
  [[ -z $RUN_DIR ]] || KEYS+=("run.dir=$RUN_DIR")
  RUN_DIR=$(recipe_key run.dir) || exit 2 # also finds what is wrong with the recipe, before anything is converted
  local pair steps restarts last
  converted student "$STUDENT"
  KEYS+=("student.checkpoint=$CHECKPOINT")
  for pair in $TEACHERS; do
    converted "teachers.${pair%%=*}" "${pair#*=}"
    KEYS+=("teachers.${pair%%=*}.checkpoint=$CHECKPOINT")
  done
  CHECKPOINTS=$(recipe_key checkpoint.dir)
  [[ $CHECKPOINTS != null ]] || CHECKPOINTS=$RUN_DIR/checkpoints
  steps=$(recipe_key run.steps)
  restarts=$(recipe_key run.max_restarts)
  printf -v last '%s/step_%06d' "$CHECKPOINTS" "$steps"
  LOGS=$RUN_DIR/logs/$SLURM_JOB_ID
  [[ -n $DRY_RUN ]] || mkdir -p "$LOGS"
  say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $SLURM_JOB_NUM_NODES nodes x $PROCESSES_PER_NODE processes, run in $RUN_DIR"

  if [[ -f $last/fire_checkpoint.json ]]; then
    say "train: step $steps is done"
  else
    stage train "$restarts" -m fire_megatron.train --recipe "$RECIPE" "${KEYS[@]}"
  fi
  [[ -n $DRY_RUN || -f $last/fire_checkpoint.json ]] ||
    fail "$last is not there; leave checkpoint.final of the recipe on, so that the last step is saved"
  if [[ -n ${BENCHMARKS// /} ]]; then
    stage evaluate "$restarts" -m fire_megatron.evaluate --checkpoint "$last" --benchmark $BENCHMARKS \
      --out "$RUN_DIR/evaluation/final" $EVALUATE_ARGS
  fi
  local exported=$RUN_DIR/hf/${last##*/}
  if [[ -f $exported/config.json ]]; then
    say "export: $exported is there"
  else
    say "export: $exported"
    on_one_node "$PYTHON" -m fire_megatron convert megatron-to-hf --checkpoint "$last" --out "$exported"
  fi
  say "done: $exported"
}
