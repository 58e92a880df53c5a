"""Runs start from one adapter the same, whichever file or folder it is in: a run, our export, every public layout."""

from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from runs import finished_run
from safetensors.torch import save_file
from test_lora_files import LAYOUTS, original, same, written
from torch import Tensor

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config
from phased_dmd.config.overrides import changed
from phased_dmd.export import export
from phased_dmd.models.loader import load_model
from phased_dmd.networks.build import add_expert, build_system, load_expert, lora_of
from phased_dmd.networks.roles import System, expert_role
from phased_dmd.recipes import resolve
from phased_dmd.sampling.initial import check_initial, initial_state
from phased_dmd.sampling.loading import read_expert

KINDS = {"two networks": "wan22_t2v", "Qwen-Image": "qwen_image"}
OWN = {"generator.lora": {"rank": 4, "alpha": 6.0}, "plan.phases": 2, "prompts": "default-t2v"}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two phases on a tiny base: each on a network of its own, or both on one."""
    folder = tmp_path_factory.mktemp("warm")
    base = pipelines.teacher(KINDS[request.param], pipelines.build(KINDS[request.param], folder / "base"))
    config = changed(resolve("nano-t2i"), OWN | {"teacher": base.model_dump(mode="json")})
    return finished_run(folder / "run", config)


def system_of(config: Config) -> System:
    model, codec = load_model(config.teacher, 0)
    return build_system(config, model, codec.encode_text([""])[0])


def predictions(system: System, role: str, phase: int) -> Tensor:
    """What a role predicts at the phase's begin, on its network."""
    model, t, network = system.model, system.plan.begin(phase), system.plan.experts(phase)[0].network
    x = torch.randn(1, *model.sample_shapes[0], generator=torch.Generator().manual_seed(phase))
    with torch.no_grad():
        return system.roles.predict(role, network, x, torch.tensor([t]), model.batch([system.negative]))


def starts(config: Config) -> dict[int, Tensor]:
    """What each expert of a run predicts at its phase's begin, before any training."""
    system, found = system_of(config), {}
    for phase in range(1, config.plan.phases + 1):
        add_expert(system, phase, trainable=False)
        if config.init_experts:
            role, lora = expert_role(phase), lora_of(config.generator)
            start = initial_state(config, system.model, phase, system.roles.state(role), lora)
            load_expert(system, phase, start, "init_experts")
        found[phase] = predictions(system, expert_role(phase), phase)
    return found


def trained(run: Path) -> dict[int, Tensor]:
    """The same of the run's own experts."""
    folder = RunFolder(run)
    system, found = system_of(folder.config()), {}
    for phase in (1, 2):
        add_expert(system, phase, trainable=False)
        load_expert(system, phase, read_expert(folder, phase)[0], "")
        found[phase] = predictions(system, expert_role(phase), phase)
    return found


def adapter(run: Path, phase: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A phase's expert by its layers, its scale of 6 / 4 folded into B."""
    halves = {name.partition(".")[2]: tensor for name, tensor in read_expert(RunFolder(run), phase)[0].items()}
    layers = [name.removesuffix(".lora_A.weight") for name in halves if ".lora_A." in name]
    return {each: (halves[f"{each}.lora_A.weight"], 1.5 * halves[f"{each}.lora_B.weight"]) for each in layers}


def check(found: dict[int, Tensor], expected: dict[int, Tensor], config: Config) -> None:
    plain = starts(changed(config, {"init_experts": None}))
    for phase, prediction in found.items():
        assert (expected[phase] - plain[phase]).abs().max() > 0.01
        torch.testing.assert_close(prediction, expected[phase], rtol=0, atol=1e-6)


WARM: dict[str, dict[str, Any]] = {
    "as it was": {}, "of another alpha": {"generator.lora.alpha": 1.5}, "of a higher rank": {"generator.lora.rank": 6},
    "full": {"generator.weights": "full"},
}  # fmt: skip


@pytest.mark.parametrize("size", WARM)
@pytest.mark.parametrize("source", ["run", "diffusers", "comfyui"])
def test_a_run_starts_from_a_run_and_from_its_exports_alike(source: str, size: str, run: Path, tmp_path: Path) -> None:
    place = run
    if source != "run":
        place = tmp_path / "export"
        export(run, source, place)  # type: ignore[arg-type] one of its formats
    config = changed(RunFolder(run).config(), WARM[size] | {"init_experts": str(place)})
    check_initial(config, system_of(config).model)
    check(starts(config), trained(run), config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_starts_from_every_public_layout_alike(layout: str, run: Path, tmp_path: Path) -> None:
    """One file a network; where there is one network, both phases start from the first phase's."""
    config, (prefix, halves, name, alpha) = RunFolder(run).config(), LAYOUTS[layout]
    networks = (1, 2) if config.teacher.kind == "wan" else (1,)
    files = []
    for phase in networks:
        scale = 1.0 if alpha is None else alpha / 4  # the file's own
        pairs = {layer: (a, b / scale) for layer, (a, b) in adapter(run, phase).items()}
        if name is original and config.teacher.kind != "wan":
            name = same
        files.append(str(tmp_path / f"{phase}.safetensors"))
        save_file({key: t.contiguous() for key, t in written(pairs, prefix, halves, name, alpha).items()}, files[-1])
    config = changed(config, {"init_experts": files})
    found, expected = starts(config), trained(run)
    if len(files) == 1:
        found.pop(2)
    check(found, expected, config)
