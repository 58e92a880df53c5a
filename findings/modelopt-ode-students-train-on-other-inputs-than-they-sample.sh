#!/usr/bin/env bash
# nvidia-modelopt 0.47.0: a DMD2 student that is sampled as an ODE is trained on inputs that its ODE never meets.
#
# Expected: with `backward_simulation=True` and `student_sample_type="ode"` ("integrator used when unrolling the student ...
# consumed by inference samplers and by DMDPipeline when backward_simulation is enabled") the student's input at a step has the
# law of what the ODE sampler brings there: x_r = (1 - r) x0 + r eps with the eps that x0 and x_t imply, as the shipped recipe's
# four steps and its inference script have it.
# Seen: the transitions before the last keep the implied noise; the last one always draws new noise, as "sde" does. In two steps
# "ode" and "sde" train alike. Of a student that predicts x0 = x the ODE keeps the variance 1; the pipeline trains its second
# step at (1 - r)^2 + r^2, half of it at r = .5. Sample such a student with new noise (`sample_type="sde"`), or the steps after
# the first see inputs that they were not trained on.
# (requests and huggingface_hub are imported by it, and are no dependencies that it states.)
# Passes while that is so; fails once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 nvidia-modelopt==0.47.0 omegaconf==2.4.0 pulp==3.3.2 numpy requests huggingface_hub
"$folder/venv/bin/python" - <<'PYTHON'
import modelopt.torch.fastgen as fastgen
import torch
from modelopt.torch.fastgen.flow_matching import add_noise, x0_to_eps

R, COUNT = 0.5, 100_000


class Student(torch.nn.Module):
    """Predicts x0 = x: as a flow, 0. Keeps the variance of its inputs, by their time."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, hidden_states, timestep):
        self.seen[timestep[0].item()] = hidden_states.var().item()
        return torch.zeros_like(hidden_states)


def second_input(sample_type: str) -> float:
    """Returns the variance of what the second of two steps is trained on."""
    times = fastgen.SampleTimestepConfig(t_list=[1.0, R, 0.0])
    config = fastgen.DMDConfig(
        student_sample_steps=2, student_sample_type=sample_type, backward_simulation=True, sample_t_cfg=times
    )
    student, noise = Student(), torch.randn(COUNT, 1)
    pipeline = fastgen.DMDPipeline(student, Student(), Student(), config)
    while R not in student.seen:  # until the second step is the one drawn
        pipeline.compute_student_loss(noise, noise)
    return student.seen[R]


torch.manual_seed(0)
x = torch.randn(COUNT, 1)
start, end = torch.ones(COUNT), torch.full((COUNT,), R)
sampled = add_noise(x, x0_to_eps(x, x, start), end).var().item()  # what the ODE sampler brings there
trained = {kind: second_input(kind) for kind in ("ode", "sde")}
print("variance of the second step's input: sampled by ODE", sampled, "trained", trained)
assert abs(sampled - 1) < 0.02 and all(abs(v - (R**2 + (1 - R) ** 2)) < 0.02 for v in trained.values()), trained
PYTHON
