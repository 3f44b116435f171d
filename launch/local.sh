#!/usr/bin/env bash
# launch/local.sh N FLAGS...: N processes of main.py on this machine, to try a multi-host run where there is one host.
#   launch/local.sh 2 --config=configs/stage1.py --config.run.steps=20
# Signals go to all of them. When one fails, the others are ended, and its exit code is this script's. bash 5.1 or later.
# On CPU each process has one device (XLA_FLAGS=--xla_force_host_platform_device_count=4: four); with GPUs, process i takes GPU i.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

count=${1:-}
if [[ ! $count =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N FLAGS...   (N processes of main.py FLAGS)" >&2
  exit 2
fi
shift

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# One collective after the other on CPU, see README.md.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_cpu_enable_concurrency_optimized_scheduler=false"
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count
gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi --list-gpus | wc -l); fi

set -m # a process group each: Ctrl-C reaches them through the trap only, once
alive=()
for ((i = 0; i < count; i++)); do
  if ((gpus >= count && count > 1)); then export JAX_LOCAL_DEVICE_IDS=$i; fi
  JAX_PROCESS_ID=$i "$PYTHON" main.py "$@" &
  alive+=("$!")
done

tell() { kill "-$1" "${alive[@]}" 2>/dev/null || true; }
trap 'tell TERM' TERM
trap 'tell INT' INT

code=0 killer=''
while ((${#alive[@]})); do
  ended='' status=0
  wait -n -p ended "${alive[@]}" || status=$?
  [[ -n ${ended:-} ]] || continue # a signal interrupted the wait
  rest=()
  for one in "${alive[@]}"; do [[ $one == "$ended" ]] || rest+=("$one"); done
  alive=(${rest[@]+"${rest[@]}"})
  ((status != 0 && code == 0)) || continue
  code=$status
  ((code == 75)) && continue # stopped by a signal after saving: the others are about to do the same
  tell TERM
  (sleep 10 && kill -KILL "${alive[@]}") 2>/dev/null & # blocked in a collective, it does not hear SIGTERM
  killer=$!
done
if [[ -n $killer ]]; then kill -- "-$killer" 2>/dev/null || true; fi # else it may hit whoever has their numbers next
exit "$code"
