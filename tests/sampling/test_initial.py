"""Runs start from one adapter the same, whichever file or folder it is in: a run, our export, every public layout."""

import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pipelines
import pytest
import torch
from runs import finished_run
from safetensors.torch import save_file
from test_lora_files import LAYOUTS, original, same, written
from tiny import newest_checkpoint
from torch import Tensor

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config
from phased_dmd.config.overrides import changed
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.export import export
from phased_dmd.inputs import contents
from phased_dmd.models.loader import load_model
from phased_dmd.networks.build import add_adapters, add_expert, add_fake, build_system, load_expert
from phased_dmd.networks.roles import FAKE, System, expert_role
from phased_dmd.recipes import resolve
from phased_dmd.sampling.initial import check_initial, initial_expert
from phased_dmd.sampling.loading import read_expert
from phased_dmd.train import distill

KINDS = {"two networks": "wan22_t2v", "Qwen-Image": "qwen_image"}
OWN = {"generator.lora": {"rank": 4, "alpha": 6.0}, "plan.phases": 2, "prompts": "default-t2v"}


class Trained(NamedTuple):
    """A finished run of two phases on a tiny base, each on a network of its own or both on one.

    expected, plain: what its experts, and the base, predict at each phase's begin.
    """

    folder: Path
    expected: dict[int, Tensor]
    plain: dict[int, Tensor]

    @property
    def config(self) -> Config:
        return RunFolder(self.folder).config()


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("warm")
    base = pipelines.teacher(KINDS[request.param], pipelines.build(KINDS[request.param], folder / "base"))
    config = changed(resolve("nano-t2i"), OWN | {"teacher": base.model_dump(mode="json")})
    finished_run(folder / "run", config)
    return Trained(folder / "run", trained(folder / "run"), starts(config))


def system_of(config: Config) -> System:
    model, codec = load_model(config.teacher, 0)
    return build_system(config, model, codec.encode_text([""])[0])


def predictions(system: System, role: str, phase: int) -> Tensor:
    """What a role predicts at the phase's begin, on its network."""
    model, t, network = system.model, system.plan.begin(phase), system.plan.experts(phase)[0].network
    x = torch.randn(1, *model.sample_shapes[0], generator=torch.Generator().manual_seed(phase)).to(device())
    with torch.no_grad():
        t = torch.tensor([t], device=device())
        return system.roles.predict(role, network, x, t, model.batch([system.negative]))


def starts(config: Config) -> dict[int, Tensor]:
    """What each expert of a run predicts at its phase's begin, before any training."""
    system, found = system_of(config), {}
    for phase in range(1, config.plan.phases + 1):
        add_expert(system, phase, trainable=False)
        if config.init_experts:
            start = initial_expert(config, system.model, phase, system.roles.state(expert_role(phase)))
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


def check(found: dict[int, Tensor], run: Trained) -> None:
    for phase, prediction in found.items():
        assert (run.expected[phase] - run.plain[phase]).abs().max() > 0.01
        torch.testing.assert_close(prediction, run.expected[phase], rtol=0, atol=1e-6)


WARM: dict[str, dict[str, Any]] = {
    "as it was": {}, "of another alpha": {"generator.lora.alpha": 1.5}, "of a higher rank": {"generator.lora.rank": 6},
    "full": {"generator.weights": "full"},
}  # fmt: skip


@pytest.mark.parametrize("size", WARM)
@pytest.mark.parametrize("source", ["run", "export"])
def test_a_run_starts_from_a_run_and_from_its_export_alike(
    source: str, size: str, run: Trained, tmp_path: Path
) -> None:  # fmt: skip
    place = run.folder
    if source != "run":
        place = tmp_path / "export"
        export(run.folder, place)
    config = changed(run.config, WARM[size] | {"init_experts": str(place)})
    check(starts(config), run)


def public_files(run: Trained, layout: str, folder: Path, rank: int | None = None) -> list[str]:
    """A run's experts in a public layout, one file a network; rank: of the files, filled up with zeros."""
    prefix, halves, name, alpha = LAYOUTS[layout]
    wan, files = run.config.teacher.kind == "wan", []
    for phase in (1, 2) if wan else (1,):
        pairs, size = adapter(run.folder, phase), rank or 4
        scale = 1.0 if alpha is None else alpha / size  # the file's own
        pairs = {
            layer: (torch.cat([a, a.new_zeros(size - 4, a.shape[1])]), torch.cat([b, b[:, : size - 4]], 1) / scale)
            for layer, (a, b) in pairs.items()
        }
        tensors = written(pairs, prefix, halves, same if name is original and not wan else name, alpha)
        files.append(str(folder / f"{phase}.safetensors"))
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, files[-1])
    return files


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_starts_from_every_public_layout_alike(layout: str, run: Trained, tmp_path: Path) -> None:
    """One file a network; where there is one network, its phases all start from the one file."""
    files = public_files(run, layout, tmp_path)
    found = starts(changed(run.config, {"init_experts": files}))
    check({phase: found[phase] for phase in range(1, len(files) + 1)}, run)


def test_a_rank_that_is_not_used_is_reduced_without_a_loss_and_one_that_is_used_with_one(
    run: Trained, tmp_path: Path
) -> None:  # fmt: skip
    files = public_files(run, "lightning", tmp_path, rank=6)
    config = changed(run.config, {"init_experts": files})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="init_experts")
        check_initial(config, system_of(config).model)
    found = starts(config)
    check({phase: found[phase] for phase in range(1, len(files) + 1)}, run)

    smaller = changed(config, {"generator.lora.rank": 2})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_initial(smaller, system_of(smaller).model)
    texts = [str(each.message) for each in said if "init_experts" in str(each.message)]
    assert len(texts) == len(files)  # once for each network, whatever the number of phases
    kept, all_ = 0.0, 0.0
    for a, b in adapter(run.folder, 1).values():
        s = torch.linalg.svdvals(b.double() @ a.double())
        kept, all_ = kept + s[:2].square().sum().item(), all_ + s.square().sum().item()
    assert f"{(1 - kept / all_) ** 0.5:.2%} as rank 6 becomes 2" in texts[0]
    assert texts[0].startswith("init_experts: lost of the change of network 0, by its norm: ")
    assert (starts(smaller)[1] - run.expected[1]).abs().max() > 1e-4


def test_a_phase_takes_each_networks_expert_from_the_step_nearest_to_its_own_first_one(
    run: Trained, tmp_path: Path
) -> None:  # fmt: skip
    """A plan of one phase on both networks starts each from the phase that trained it."""
    if run.config.teacher.kind != "wan":
        return
    config = changed(run.config, {"plan.phases": 1, "init_experts": str(run.folder)})
    system = system_of(config)
    add_expert(system, 1, trainable=False)
    state = initial_expert(config, system.model, 1, system.roles.state(expert_role(1)))
    for phase in (1, 2):
        tensors = read_expert(RunFolder(run.folder), phase)[0]
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_files_are_one_a_network_and_no_run_stands_beside_them(run: Trained, tmp_path: Path) -> None:
    files = public_files(run, "ours", tmp_path)
    model = system_of(run.config).model
    wrong = {
        f"1.safetensors: {len(files) + 1} for {len(files)} networks; one LoRA file each": [*files, files[0]],
        "2 places; a run, or an export, holds the experts of all networks by itself": [str(run.folder), files[0]],
        "nowhere: is not there": ["nowhere"],
    }
    for message, places in wrong.items():
        with pytest.raises(UserError, match=f"^init_experts: .*{message}"):
            check_initial(changed(run.config, {"init_experts": places}), model)


def test_what_a_run_starts_from_is_known_again_by_its_bytes_wherever_it_lies(run: Trained, tmp_path: Path) -> None:
    (files := tmp_path / "files").mkdir()
    export(run.folder, tmp_path / "export")
    shutil.copytree(run.folder, tmp_path / "run")
    places = [[str(tmp_path / "run")], [str(tmp_path / "export")], public_files(run, "ours", files)]
    known = [initial_hash(run, each) for each in places]
    assert len(set(known)) == 3
    moved = Path(shutil.copytree(tmp_path / "export", tmp_path / "moved"))
    assert initial_hash(run, [str(moved)]) == known[1]
    changed_files = [
        tmp_path / "run" / "experts" / "phase-1.safetensors", sorted((tmp_path / "export").glob("*.safetensors"))[0],
        Path(places[2][0]),
    ]  # fmt: skip
    for place, before, file in zip(places, known, changed_files, strict=True):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert initial_hash(run, place) != before


def initial_hash(run: Trained, places: list[str]) -> str:
    return contents(changed(run.config, {"init_experts": places}), [])["init_experts"][1]


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_a_run_trains_on_from_there_and_its_fake_from_the_base(weights: str, run: Trained, tmp_path: Path) -> None:
    """Its steps are too small to move anything, so that it ends as it started; a checkpoint has its fake."""
    settings = {
        "fake.weights": weights, "fake.lr": 1e-30, "fake.updates": 1, "generator.lr": 1e-30, "iterations": 1,
        "batch_size": 1, "checkpoint_every": 1, "keep_last": "all", "sample_every": None,
        "init_experts": str(run.folder),
        "prompts": str(tmp_path / "prompts.txt"),
    }  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a red fox in the snow\n")
    config = changed(run.config, settings)
    folder = distill(config, tmp_path / "out", quiet=True)
    check(trained(folder), run)
    system = system_of(config)
    add_fake(system, 1, add_adapters(system).get(1))
    state = newest_checkpoint(folder, 1)[1]
    system.roles.load(FAKE, {name: state[f"fake/weights/{name}"] for name in system.roles.parameters(FAKE)})
    torch.testing.assert_close(predictions(system, FAKE, 1), run.plain[1], rtol=0, atol=1e-6)
