#!/usr/bin/env bash
# A run on the hosts of a hostfile with DeepSpeed's launcher, which reaches them with pdsh.
#
#   launchers/pdsh.sh HOSTFILE run.yaml [key.path=value ...]
#
# DeepSpeed passes few environment variables: write the others into .deepspeed_env (README.md). SIGTERM, SIGUSR1 and
# Ctrl-C let the ranks save and end with 75. If deepspeed is killed, its pdsh ends too, and the ranks save and end.
set -euo pipefail

hostfile=${1:?usage: launchers/pdsh.sh HOSTFILE run.yaml [key.path=value ...]}
config=${2:?usage: launchers/pdsh.sh HOSTFILE run.yaml [key.path=value ...]}
shift 2
first=$(sed -n 's/#.*//; s/^[[:space:]]*\([^[:space:]]\{1,\}\)[[:space:]].*/\1/p' "$hostfile" | head -n 1)

set -m # deepspeed and its pdsh get a process group of their own, and no Ctrl-C
setpriv --pdeathsig TERM "${DEEPSPEED:-deepspeed}" --hostfile "$hostfile" --no_local_rank --module arc_ds.train \
  "$config" "$@" &
runner=$!
set +m

# A rank that is asked to stop tells all others.
pattern="-m arc_ds.train $(sed 's/[][\.*^$+?(){}|]/\\&/g' <<<"$config")"
trap 'PDSH_RCMD_TYPE=ssh pdsh -w "$first" "pkill -USR1 -f -- $(printf %q "$pattern")"' TERM USR1 INT

code=0
while kill -0 "$runner" 2>/dev/null; do
  code=0
  wait "$runner" || code=$?
done
# A pdsh that outlives deepspeed, and its ssh processes, which have process groups of their own.
for process in $(pgrep -g "$runner" || true); do
  pkill -TERM -P "$process" || true
  kill -TERM "$process" || true
done
exit "$code"
