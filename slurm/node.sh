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
trap : TERM # a trap ends with the subshell, so the launcher has its own way with the signal

(
  trap '' USR1
  exec "$@"
) &
launcher=$!
# Ignored from here on: bash 5.2 may lose the exit code of a process that ends while a trap interrupts `wait`.
trap '' TERM
while true; do
  wait "$launcher"
  code=$?
  kill -0 "$launcher" 2>/dev/null || break # USR1 ends `wait`, not the launcher
done
if [[ -n $asked ]]; then
  echo "node $(hostname -s): asked to stop by $asked; the launcher has left"
  exit 75
fi
exit "$code"
