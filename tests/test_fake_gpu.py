"""Updates of the real training loop on a pretended GPU: shapes, devices and bytes without data, on any machine.

A worker (fake_gpu/worker.py) does what `plan --simulate` does, on tensors that say they are on cuda: it calls
`train_step` at the real width of each recipe's networks, with few blocks and with one more; all further ones cost as
much as that. FSDP2 is torch's own, over a group whose other processes do nothing.
`FAKE_GPU=all pytest tests/test_fake_gpu.py` runs every recipe, fake, phase and number of GPUs: some ten minutes.

What is caught, and by what, is in `FAULTS`. What cannot be: numbers, since there are none; races, and the order of
streams; NCCL; fragments of memory, and what cuBLAS takes for itself; whether a kernel exists; and a role that is
switched late where nothing but the result depends on it, as in a full fake, or without checkpointing.
"""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from phased_dmd.cli.flags import assignment
from phased_dmd.config import Config
from phased_dmd.models.loader import adapter_of
from phased_dmd.plan.measure import meta_model, plan_of
from phased_dmd.plan.memory import RESERVE, network_bytes, phase_memory, score_calls
from phased_dmd.plan.simulate import extrapolated, simulated
from phased_dmd.plan.work import mean_flops, phase_work
from phased_dmd.recipes import resolve

FOLDER = Path(__file__).parent / "fake_gpu"
RECIPES = ("wan22-t2v", "wan21-t2i", "qwen-image")
TOLERANCE = 0.1  # between what is planned and what is simulated
SAME = 0.03  # between what is simulated on cuda tensors and, by `plan --simulate`, on a CPU's
FITS = 76e9  # bytes of a GPU of 80 GB
MOST_WAITS = 2  # of the host for the GPU in an update of one micro-batch: for its loss and its norm
SIZES = {
    "480p": {"teacher.sizes": [{"num_frames": 81, "height": 480, "width": 832}]},
    "720p": {"teacher.sizes": [{"num_frames": 81, "height": 720, "width": 1280}]},
    "square": {"teacher.sizes": [{"height": 1328, "width": 1328}], "teacher.max_tokens": 192},
    "720p picture": {},
}
ALWAYS = {"engine.activation_checkpointing": True, "sample_every": None}
Case = dict[str, Any]


def make(recipe: str, weights: str, phase: int, gpus: int, **more: Any) -> Case:
    """Makes a case of a sample on each GPU; more: changes of the config, `__` for each dot."""
    clip = "720p" if gpus == 64 else "480p"
    size = {"wan22-t2v": clip, "wan21-t2i": "720p picture", "qwen-image": "square"}[recipe]
    changes = {key.replace("__", "."): value for key, value in more.items()}
    changes = SIZES[size] | ALWAYS | {"batch_size": gpus, "fake.weights": weights} | changes
    return {"recipe": recipe, "changes": changes, "phase": phase, "gpus": gpus}


def config_of(case: Case) -> Config:
    return resolve(case["recipe"], case["changes"])


def lengths(case: Case) -> tuple[int, int]:
    """The blocks of the short networks."""
    few = adapter_of(config_of(case).teacher).alike  # type: ignore[arg-type] of a pipeline
    return few, few + 1


NAMES = [
    ("wan22-t2v", "full", 2, 64),
    ("wan22-t2v", "lora", 1, 8),
    ("qwen-image", "full", 1, 1),
]
if os.environ.get("FAKE_GPU") == "all":
    NAMES = list(itertools.product(RECIPES, ("full", "lora"), (1, 2), (1, 8, 64)))
CASES = {" ".join(map(str, name)): make(*name) for name in NAMES}
# Attention is called once more in backward there, outside of autocast, which made norms float32 on cuda alone.
SHARED = "wan22-t2v lora 1 8, samples shared"
CASES[SHARED] = make("wan22-t2v", "lora", 1, 8, batch_size=2, engine__sequence_parallel=4)
PAPER = "wan22-t2v full 2 64"  # the paper's clips on its number of GPUs, where a phase has two networks

# The words of what refuses each fault that is seeded in the fake's update. FakeTensorMode sees tensors of the host,
# torch's checkpointing a role that is left too early, the learner one that is another's, and the worker's own
# `check_devices` the rest. Nothing refuses float64: the worker counts it.
FAULTS = {
    "noise_on_the_host": "all tensors to be on the same device",
    "text_on_the_host": "all tensors to be on the same device",
    "times_on_the_host": "all tensors to be on the same device",
    "role_left_before_backward": "different number of tensors was saved",
    "role_of_another": "no gradient reached any parameter",
    "generator_of_the_host": "a generator on cpu draws on the device",
    "steps_on_the_host": "lists of tensors on several devices",
    "noise_in_float64": "",
}


class Update(NamedTuple):
    """What one update took, of all blocks: see the worker's `Watch`. left: bytes that were not there before it."""

    peak: float
    flops: float
    waits: int
    uploads: int
    float64: int
    left: int


@pytest.fixture(scope="session")
def hooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiles the device that does nothing."""
    if shutil.which("g++") is None:
        pytest.skip("the pretended GPU is compiled by g++, which is not there")
    if torch.version.cuda is not None:
        pytest.skip("this build of torch has a CUDA device of its own")
    assert torch.__file__ is not None
    library, torch_folder = tmp_path_factory.mktemp("hooks") / "hooks.so", Path(torch.__file__).parent
    paths = ["-I", torch_folder / "include", "-L", torch_folder / "lib"]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-O1", FOLDER / "hooks.cpp", "-o", library, *paths]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    return library


@pytest.fixture(scope="session")
def found(hooks: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns what the worker makes of each case with fewer blocks and with more, of the faults and of none, of the
    paper's with both networks in an update, with fewer blocks, and of each card's case.
    """
    seeded: Case = make("wan21-t2i", "lora", 1, 1) | {"blocks": 1, "updates": ["fake"]}
    both = make("wan22-t2v", "full", 2, 64, renoise__network="sample")
    of_cards = {script: of_script(script) for script, _ in CARDS}
    groups = {name: [case | {"blocks": n} for n in lengths(case)] for name, case in (CASES | of_cards).items()}
    groups["faults"] = [seeded, *(seeded | {"fault": fault} for fault in FAULTS)]
    groups["both networks"] = [both | {"blocks": lengths(both)[0]}]
    answers = iter(answered(hooks, [case for cases in groups.values() for case in cases]))
    return {name: list(itertools.islice(answers, len(cases))) for name, cases in groups.items()}


def answered(hooks: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Returns what the worker makes of cases, in one process: torch takes long to import."""
    asked = [json.dumps(case | {"config": config_of(case).model_dump(mode="json")}) for case in cases]
    command = [sys.executable, FOLDER / "worker.py", hooks]
    done = subprocess.run(command, input="\n".join(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def counted(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Update]]:
    """Returns for each case what an update of the fake and of the expert takes with all blocks."""
    assert not [error for name in CASES for each in found[name] if (error := each.get("error"))]
    return {
        name: {role: whole(case, found[name][0], found[name][1], role) for role in ("fake", "expert")}
        for name, case in CASES.items()
    }


def whole(case: Case, few: dict[str, Any], more: dict[str, Any], role: str) -> Update:
    model = meta_model(config_of(case).teacher)
    rest = len(model.blocks(model.networks[0])) - lengths(case)[0]
    flops = few[role]["flops"] + rest * (more[role]["flops"] - few[role]["flops"])
    same = {key: more[role][key] for key in ("waits", "uploads", "float64")}
    peak = extrapolated(few[role]["laps"], more[role]["laps"], rest)
    return Update(peak, flops, **same, left=more[role]["now"] - more["held"])


@pytest.mark.parametrize("name", CASES)
def test_an_update_holds_the_memory_that_is_planned(name: str, counted: dict[str, dict[str, Update]]) -> None:
    case, updates = CASES[name], counted[name].values()
    planned = phase_memory(config_of(case), case["phase"], case["gpus"]).gpu
    assert planned == pytest.approx(max(each.peak for each in updates), rel=TOLERANCE)


@pytest.mark.parametrize("name", [PAPER, SHARED])
def test_a_plan_simulates_what_the_pretended_gpu_holds(name: str, counted: dict[str, dict[str, Update]]) -> None:
    """Without a compiler: on tensors that say they are on a CPU, and without the rollouts, which hold less."""
    (peaks,) = simulated(config_of(CASES[name]), CASES[name]["gpus"], [CASES[name]["phase"]])
    assert peaks == pytest.approx([each.peak for each in counted[name].values()], rel=SAME)


@pytest.mark.parametrize("name", [name for name in CASES if name != SHARED])
def test_an_iteration_takes_the_flops_that_are_planned(name: str, counted: dict[str, dict[str, Update]]) -> None:
    """Shared samples take a sixth more: attention runs once more in backward, and each has all of the text."""
    case, (fake, expert) = CASES[name], counted[name].values()
    config = config_of(case)
    forward, attention = mean_flops(config.teacher)
    calls = score_calls(config, case["phase"], case["gpus"])
    plan = plan_of(config)
    work, exits = phase_work(config, plan, case["phase"], True, calls, attention), len(plan.steps(case["phase"]))
    longest = work.generator_forwards + (exits - 1) / 2  # the worker's exit is the last, and the plan's the mean
    assert work.fake_forwards * forward == pytest.approx(config.fake.updates * fake.flops, rel=TOLERANCE)
    assert longest * forward == pytest.approx(expert.flops, rel=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_an_update_waits_seldom_and_leaves_nothing(name: str, counted: dict[str, dict[str, Update]]) -> None:
    """Of float64 there are times alone, one a sample; and what stays is a table of positions that Qwen-Image keeps."""
    for update in counted[name].values():
        assert update.waits <= MOST_WAITS
        assert update.float64 <= 1
        assert update.left < 2e7


def test_scoring_an_update_by_one_network_saves_a_quarter_and_fits(
    counted: dict[str, dict[str, Update]], found: dict[str, list[dict[str, Any]]]
) -> None:
    """At 64 GPUs and 81 x 720 x 1280, with full fakes: the FLOPs of an iteration's five updates of the fake and one of
    the expert, and what a GPU holds.
    """
    cases = found[PAPER][0], found["both networks"][0]
    one, both = (5 * each["fake"]["flops"] + each["expert"]["flops"] for each in cases)
    assert one < 0.75 * both
    assert max(update.peak for update in counted[PAPER].values()) < FITS


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_seen(fault: str, found: dict[str, list[dict[str, Any]]]) -> None:
    none, *seeded = found["faults"]
    assert "error" not in none and none["fake"]["float64"] == 1
    seen = seeded[list(FAULTS).index(fault)]
    if fault == "noise_in_float64":
        assert seen["fake"]["float64"] > 1e5
    else:
        assert FAULTS[fault] in seen["error"]


# ---------------------------------------------------------------- one card, as the scripts of `examples` use it

EXAMPLES = Path(__file__).parents[1] / "examples"
CARDS = [("one_card.sh", 24e9), ("one_large_card.sh", 80e9)]


def of_script(script: str, phase: int = 2) -> Case:
    """Makes the case of a script's command, with two of its micro-batches: more hold no more. Phase 2 has all roles.

    Without rollouts, which hold less, as `test_a_plan_simulates_what_the_pretended_gpu_holds` shows.
    """
    words = shlex.split((EXAMPLES / script).read_text(), comments=True)
    changes = dict(assignment(value) for flag, value in itertools.pairwise(words) if flag == "--set")
    recipe = words[words.index("distill") + 1]
    changes |= {"batch_size": 2}
    return {"recipe": recipe, "changes": changes, "phase": phase, "gpus": 1, "rollouts": False}


@pytest.mark.parametrize(("script", "memory"), CARDS)
def test_the_updates_of_one_card_fit_on_it(script: str, memory: float, found: dict[str, list[dict[str, Any]]]) -> None:
    """The worker's networks are not packed: their bytes are replaced by those that are planned of packed ones. What a
    kernel unpacks, one layer at a time, is not in it.
    """
    case, (few, more) = of_script(script), found[script]
    config = config_of(case)
    full = config.teacher.model_copy(update={"quantise": None})
    simulated = max(whole(case, few, more, role).peak for role in ("fake", "expert"))
    simulated -= len(meta_model(full).networks) * (network_bytes(full) - network_bytes(config.teacher))
    planned = phase_memory(config, 2, 1)
    assert planned.weights + planned.optimiser + planned.training == pytest.approx(simulated, rel=TOLERANCE)
    assert simulated < (1 - RESERVE) * memory and planned.gpu < (1 - RESERVE) * memory
