#!/bin/bash
# Distils Wan2.1 1.3B on one card of 24 GB; what stands behind the script's name goes to `phased-dmd distill`:
#
#   bash examples/one_card.sh --prompts my-prompts.txt --output runs/wan
#
# Fake and experts are adapters on one frozen base, so a checkpoint is .7 GB; both train at the rate of adapters, as the
# fake of docs/results/fake-lora.md did. Two updates of the fake a cycle, one path of the generator for all of them, and
# four clips a batch make it two days by `phased-dmd plan --tflops 165` (an RTX 4090's dense bfloat16). How good the
# result is was not measured: docs/speed.md says what each setting costs on a small teacher.
set -euo pipefail

exec phased-dmd distill wan21-t2v-1.3b \
    --set engine.micro_batch=1 --set engine.activation_checkpointing=true \
    --set fake.weights=lora --set fake.lora.rank=32 --set fake.lora.alpha=4 --set fake.lr=5e-5 \
    --set generator.lora.rank=32 --set generator.lora.alpha=4 \
    --set rollouts.reuse=true --set fake.updates=2 --set batch_size=4 --set iterations=300 "$@"
