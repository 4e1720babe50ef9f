#!/usr/bin/env bash
# Runs a launcher on one node, as srun's only task there:  node.sh COMMAND...
#
# A signal reaches every process of the step. USR1 asks the job to stop, before a time limit: the trainer's own processes
# catch it, save and leave; torchrun does not know it and would die of it, so here it is shielded. Exit code 75 then says
# to the batch script that what it does is to be continued. TERM comes at preemption, and from srun when another node has
# failed: torchrun passes it on, and its exit code counts.
set -u
asked=
trap 'asked=USR1' USR1
trap : TERM

(
  trap '' USR1
  exec "$@"
) &
launcher=$!
# A signal ends `wait`, not the launcher. Should that end too at this moment, its own code is still to be had.
while true; do
  wait "$launcher"
  code=$?
  kill -0 "$launcher" 2>/dev/null && continue
  if [[ $code -gt 128 ]]; then
    wait "$launcher" 2>/dev/null
    again=$?
    [[ $again -eq 127 ]] || code=$again
  fi
  break
done
if [[ -n $asked ]]; then
  echo "node $(hostname -s): asked to stop by $asked; the launcher left with code $code"
  exit 75
fi
exit "$code"
