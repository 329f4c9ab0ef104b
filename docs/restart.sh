#!/bin/bash
# Runs a command until the run in LOG_DIR is trained, after failures TIMES times more at most:
#     docs/restart.sh 10 runs/resnet50 mpiexec -np 8 python launch/train.py --log_dir=runs/resnet50 ...
# Each time training goes on from the last checkpoint. Exit code 2, bad usage or input, ends it the first time; later it
# may be a port or a lock that the try before still holds. Exit code 0 counts with the last step's checkpoint alone:
# mpiexec may end with 0 when it has lost a machine. SIGTERM and Ctrl-C become SIGUSR1, on which mpiexec has its ranks
# save (with torchrun: STOP=TERM docs/restart.sh ...).
times=$1 log_dir=$2 stopped=''
shift 2
trap 'stopped=yes; kill -s "${STOP:-USR1}" "$child" 2>/dev/null' TERM INT

trained() {
  steps=$(grep -o '"steps": [0-9]*' "$log_dir/metrics.jsonl" 2>/dev/null | tail -n 1)
  [ -n "$steps" ] && [ -e "$log_dir/checkpoint-$(printf %08d "${steps##* }").pt" ]
}

for ((failures = 0; ; failures++)); do
  "$@" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal ends `wait` before the command
  wait "$child"
  code=$?
  if [ "$code" -eq 0 ] && trained; then exit 0; fi
  if [ "$code$failures" = 20 ] || [ -n "$stopped" ] || [ "$failures" -ge "$times" ]; then
    echo "restart.sh: ended with $code, $failures times started again" >&2
    exit $((code ? code : 1))
  fi
  echo "restart.sh: ended with $code: starting again, $((times - failures)) times more at most" >&2
  sleep "${PAUSE:-10}"
  if [ -n "$stopped" ]; then exit 1; fi
done
