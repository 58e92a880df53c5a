#!/bin/bash
# Distils Wan2.1 14B, text-to-image, on one machine with eight GPUs of 80 GB; what stands behind the script's name goes to
# `phased-dmd distill`:
#
#   bash examples/one_node.sh --output runs/wan --cache encoded
#
# After SIGTERM torchrun waits five minutes for the update in progress to end and the run to be saved; a kill costs
# `checkpoint_minutes` of work.
set -euo pipefail

exec torchrun --nproc-per-node "${GPUS:-8}" --shutdown-timeout 300 -m phased_dmd distill wan21-t2i \
    --set engine.micro_batch=1 --set engine.activation_checkpointing=true "$@"
