#!/bin/bash
# Distils Wan2.2 A14B, text-to-video at 480p, on one card of 80 GB; what stands behind the script's name goes to
# `phased-dmd distill`:
#
#   bash examples/one_large_card.sh --prompts my-prompts.txt --output runs/wan22
#
# Both networks are packed into 8 bits (pip install bitsandbytes) and stay on the card. Fake and experts are adapters of
# rank 8, so a checkpoint is .9 GB; they train at the rate of adapters, as the fake of docs/results/fake-lora.md did. Two
# updates of the fake a cycle, one path of the generator for all of them, and four clips a batch make it two days by
# `phased-dmd plan` (an H100's dense bfloat16). How good the result is was not measured: docs/models.md says what 8 bits
# change of a small teacher, and docs/speed.md what each other setting costs there.
set -euo pipefail

exec phased-dmd distill wan22-t2v \
    --set teacher.quantise=int8 \
    --set 'teacher.sizes=[{num_frames: 81, height: 480, width: 832}, {num_frames: 81, height: 832, width: 480}]' \
    --set engine.micro_batch=1 --set engine.activation_checkpointing=true \
    --set fake.weights=lora --set fake.lora.rank=8 --set fake.lora.alpha=1 --set fake.lr=5e-5 \
    --set generator.lora.rank=8 --set generator.lora.alpha=1 \
    --set rollouts.reuse=true --set fake.updates=2 --set batch_size=4 --set iterations=300 "$@"
