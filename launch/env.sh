# shellcheck shell=bash disable=SC2034
# Sourced by every script here, from the repository's root: what depends on the site.
# Each line to look at is marked EDIT; what the submitting shell has exported goes before.

[[ -d .venv/bin ]] && export PATH="$PWD/.venv/bin:$PATH"   # EDIT: or `conda activate`
# module load cuda gcc                                     # EDIT where these are modules

# Network.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0     # EDIT where the first one found is wrong
# export NCCL_IB_HCA=mlx5                                  # EDIT
# export HF_HUB_OFFLINE=1                                  # EDIT where nodes have no internet

# Caches. Per job, on the node's own disk: streaming keeps its locks in TMPDIR, and a compiler's
# cache on a shared disk is slow. What DeepSpeed builds lasts; in a job train.sbatch gives each node
# a folder of its own for it.
caches=$PWD/.cache
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
  caches=${SLURM_TMPDIR:-/tmp}/avfulldit-$SLURM_JOB_ID     # EDIT: where the node-local disk is
  export TMPDIR=$caches
else
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$caches/torch_extensions}
fi
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton}
# export HF_HOME=/scratch/$USER/huggingface                # EDIT where home is small

# In a container: one of the two, with the image that holds the environment of constraints.txt.
container=() srun_options=()
# container=(apptainer exec --nv --bind "$PWD" avfulldit.sif)                          # EDIT
# srun_options=(--container-image=avfulldit.sqsh --container-mounts="$PWD")            # EDIT: pyxis
once() {  # one process in it, next to the ranks: the node itself need not have the environment
  if [[ ${#srun_options[@]} == 0 ]]; then "${container[@]}" "$@"; return; fi
  srun --quiet --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "${srun_options[@]}" "$@"
}

export PYTHONFAULTHANDLER=1 TOKENIZERS_PARALLELISM=false NCCL_DEBUG=${NCCL_DEBUG:-WARN}
