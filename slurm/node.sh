#!/usr/bin/env bash
# Runs a launcher on one node, as srun's only task there:  node.sh COMMAND...
#
# A signal that asks the job to stop (USR1 before a time limit, TERM at preemption) reaches every process of the step.
# The trainer's own processes catch it, save and leave; torchrun does not know USR1 and would die of it, so here it is
# shielded. Exit code 75 says to the batch script that the job was asked to stop: what it does is to be continued.
set -u
asked=
trap 'asked=USR1' USR1
trap 'asked=TERM' TERM

(
  trap '' USR1
  exec "$@"
) &
launcher=$!
# A signal ends `wait`, not the launcher.
while true; do
  wait "$launcher"
  code=$?
  kill -0 "$launcher" 2>/dev/null || break
done
if [[ -n $asked ]]; then
  echo "node $(hostname -s): asked to stop by $asked; the launcher left with code $code"
  exit 75
fi
exit "$code"
