"""`reproduce memory`: what one generator update must keep for its backward, plain DMD against Phased DMD (Sec. 2.3)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from phased_dmd.conditions import Conditions
from phased_dmd.config import Config
from phased_dmd.engine.randomness import seed_of
from phased_dmd.engine.world import split_batch
from phased_dmd.lab.metrics.formats import markdown_table
from phased_dmd.lab.reproduce.figure import style_panel
from phased_dmd.lab.reproduce.results import write_page
from phased_dmd.networks.build import add_expert, build_system, load_teacher
from phased_dmd.networks.roles import FAKE, expert_role
from phased_dmd.prompts import read_prompts
from phased_dmd.recipes import resolve
from phased_dmd.step import EXPERT_UPDATE, draw, expert_loss

STEPS = (1, 2, 4, 8)
RECIPE = "nano-t2i"
GROWTH, FLAT = 0.9, 1.1  # of one step's bytes: plain DMD needs at least .9 N times them, a phase at most 1.1 times


class SavedBytes(saved_tensors_hooks):
    """A context that counts the bytes which autograd saves in it: each storage once, `parameters` not at all.

    Storages are told apart by their address, which no other tensor gets while the graph lives.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._storages: dict[int, int] = {}
        self._excluded = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._excluded:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self._storages.values())


def update_bytes(config: Config) -> list[int]:
    """Returns the bytes that autograd saves for one generator update of `distill`, by phase of a text-to-image run."""
    assert config.prompts is not None
    model, codec = load_teacher(config)
    samples, totals = split_batch(config.batch_size, config.engine)[0][0], []
    with TemporaryDirectory() as folder:
        prompts = read_prompts(config.prompts)
        conditions = Conditions(codec, prompts, config.teacher.negative_prompt, Path(folder))
        system = build_system(config, model, conditions.negative)
        roles, plan = system.roles, system.plan
        for phase in range(1, plan.num_phases + 1):
            role = expert_role(phase)
            add_expert(system, phase, trainable=True)
            roles.add(FAKE, plan.fakes(phase), None, seed=seed_of(config.seed, phase))
            batch = draw(system, phase, 0, EXPERT_UPDATE, samples, [1.0], conditions)
            shared = [p for network in (*model.networks, *model.students) for p in network.parameters()]
            saved = SavedBytes([*shared, *roles.parameters(role).values()])
            with roles.active(role), saved:
                expert_loss(batch, {})[0].backward()
            totals.append(saved.total)
            roles.freeze(role)
            roles.remove(FAKE)
    return totals


SAYS = (
    "The graph of few-step DMD's generator update grows with the steps; in Phased DMD, with a phase a step, memory "
    "stays that of one step."
)


def memory(results: Path, about: Mapping[str, Any], steps: Sequence[int] = STEPS) -> Path:
    """Writes results/memory.{json,md,png}: saved bytes of an update by the number of steps, and the verdict."""
    plain = {n: update_bytes(resolve(RECIPE, {"plan.steps": n}, "dmd"))[0] for n in steps}
    phased = {n: update_bytes(resolve(RECIPE, {"plan.steps": n}, "phased")) for n in steps if n > 1}
    return write_memory(results, about, plain, phased)


def write_memory(
    results: Path, about: Mapping[str, Any], plain: Mapping[int, int], phased: Mapping[int, Sequence[int]]
) -> Path:
    """Writes the results from the bytes of plain DMD by steps, and those of Phased DMD by steps and phase."""
    most = max(plain)
    body = {
        "claim": "memory", "says": SAYS, "source": "Fig. 1, Sec. 2.2 and 2.3", **about,
        "verdict": judge_memory(plain, phased),
        "decides": f"saved bytes at {most} steps over those at one: DMD {plain[most] / plain[1]:.2f}, Phased at most "
        f"{max(phased[most]) / plain[1]:.2f} (a count, without an interval)",
        "plain": plain, "phased": phased,
    }  # fmt: skip
    _draw_bytes(plain, phased, results / "memory.png")
    return write_page(results, "memory", memory_page(body), body)


def judge_memory(plain: Mapping[int, int], phased: Mapping[int, Sequence[int]]) -> str:
    """Returns `holds`, `holds partly` or `does not hold`; plain[1] are the bytes of one step."""
    one = plain[1]
    grows = all(total >= GROWTH * n * one for n, total in plain.items())
    flat = all(total <= FLAT * one for totals in phased.values() for total in totals)
    return ("does not hold", "holds partly", "holds")[grows + flat]


def memory_page(body: Mapping[str, Any]) -> list[str]:
    """Returns the parts of results/memory.md from its JSON."""
    plain, phased = body["plain"], body["phased"]
    one = next(iter(plain.values()))

    def cell(total: int) -> str:
        return f"{total / 2**20:.1f} MiB ({total / one:.2f})"

    rows = [
        [f"{n}", cell(total), f"{cell(min(phased[n]))}, {cell(max(phased[n]))}" if n in phased else "the same"]
        for n, total in plain.items()
    ]
    return [
        "# memory", f"{body['source']}: {SAYS}", "The evidence there: by argument. No figures.",
        f"Verdict: **{body['verdict']}**. It holds if few-step DMD saves at least {GROWTH:g} N times one step's "
        f"bytes and every phase at most {FLAT:g} times. The same count in every run: there is no interval.",
        "![memory](memory.png)",
        f"`{body['command']}`, {body['date']}: bytes that autograd saves for the backward of one generator update "
        f"of {RECIPE}, each storage once, weights left out (a further expert adds its own); in brackets the ratio "
        "to one step.",
        markdown_table(["steps", "few-step DMD", "Phased DMD, least and most of the phases"], rows),
    ]  # fmt: skip


def _draw_bytes(plain: Mapping[int, int], phased: Mapping[int, Sequence[int]], path: Path) -> None:
    figure = Figure((5, 3.2), layout="constrained", dpi=150)
    panel = figure.subplots()
    panel.plot([*plain], [total / 2**20 for total in plain.values()], "o-", label="DMD")
    most = {1: plain[1]} | {n: max(totals) for n, totals in phased.items()}
    panel.plot([*most], [total / 2**20 for total in most.values()], "s--", label="Phased, a phase a step: the most")
    panel.set_xticks([*plain])
    panel.set_ylim(0)
    panel.set_xlabel("steps", fontsize=8)
    style_panel(panel, "saved for the backward of a generator update, MiB")
    panel.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
