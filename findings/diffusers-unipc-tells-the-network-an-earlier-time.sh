#!/usr/bin/env bash
# diffusers 0.42.1: UniPCMultistepScheduler with flow sigmas, the scheduler of Wan's pipelines, tells the network an earlier time
# than the noise of the sample that it is given.
#
# Expected: a flow model, which learnt t = 1000 sigma, is asked at 1000 sigma, as FlowMatchEulerDiscreteScheduler does.
# Seen: the timesteps are cut down to whole numbers. The first step's sample is pure noise, and the network is told 999; over 50
# steps at shift 3 the time is .5 early in the mean, and by up to .7 % of itself.
# Passes while that is so; fails once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 accelerate safetensors==0.8.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
for steps in (4, 40, 50):
    unipc.set_timesteps(steps)
    noise = 1000 * unipc.sigmas[:-1].double()
    early = noise - unipc.timesteps
    print(
        f"{steps} steps: noise {noise[0]:.3f}, told {unipc.timesteps[0]}; in the mean {early.mean():.3f} early, at most "
        f"{early.max():.3f}, or {(early / noise).max():.2%}"
    )
    assert not unipc.timesteps.is_floating_point()
    assert torch.equal(unipc.timesteps, noise.long()), "cut down to whole numbers"
    assert noise[0] > 999.99 and unipc.timesteps[0] == 999
assert 0.3 < early.mean() < 0.7 and (early / noise).max() > 0.005

euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
euler.set_timesteps(50)
assert (1000 * euler.sigmas[:-1] - euler.timesteps).abs().max() < 1e-3
print("FlowMatchEulerDiscreteScheduler: none of its times is early")
PYTHON
