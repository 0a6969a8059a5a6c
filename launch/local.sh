#!/usr/bin/env bash
# One node without Slurm: one process per GPU (or NPROC processes on a CPU).
#
#   bash launch/local.sh configs/alt_merge_t2av.yaml [key=value ...]
#   NPROC=2 bash launch/local.sh configs/playground.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
if [[ -z "${NPROC:-}" ]]; then
  NPROC=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
  [[ "$NPROC" -gt 0 ]] || NPROC=1
fi
if ! nvidia-smi --list-gpus >/dev/null 2>&1; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  cores=$(nproc)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
  # glibc would give every step's memory back to the kernel and take it again: a quarter of a step.
  export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-268435456}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-100000000000}
fi
# To stop it in order, with a checkpoint: touch RUN/STOP.
exec "${container[@]}" torchrun --standalone --nproc-per-node="$NPROC" train.py "$@"
