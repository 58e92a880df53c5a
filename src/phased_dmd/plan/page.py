"""A plan, or the proposals for a recipe, as text and as JSON."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from phased_dmd.plan import Needs, Proposal, Stage, peak, size


def as_json(plan: Needs | Sequence[Proposal]) -> str:
    """Returns all figures of a plan, or of proposals."""
    if isinstance(plan, Needs):
        named = {"stages": [stage._asdict() for stage in plan.stages], "pool": plan.pool and plan.pool._asdict()}
        return json.dumps(asdict(plan) | named, indent=2)
    return json.dumps([each._asdict() | {"peak": each.peak._asdict()} for each in plan], indent=2)


def show_proposals(proposals: Iterable[Proposal], console: Console) -> None:
    """Prints a line for each proposal as it comes: what runs, for how long, with which flags, or what does not fit."""
    for memory, gpus, options, hours, most, host in proposals:
        held = f"{size(most.gpu)} in {_place(most)}"
        line = f"{_gpus(gpus)} of {memory} GB: "
        if options is None:
            line += f"nothing runs: {held}, with all that saves memory"
        else:
            line += f"{hours:.3g} hours; {held}, {size(host)} on the host for each: {options or 'as it is'}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _place(stage: Stage) -> str:
    """Returns where in a run a stage is."""
    return stage.name if stage.phase is None else f"{stage.name} of phase {stage.phase}"


def show(plan: Needs, console: Console) -> None:
    """Prints tables of parameters, memory and work, then what to mind."""
    console.print(
        f"{plan.recipe}, {plan.method}: {_gpus(plan.gpus)} of {size(plan.gpu_memory)}, micro-batch {plan.micro_batch}, "
        f"largest size {plan.largest_bucket}",
        highlight=False,
    )
    for title, (header, *rows) in _tables(plan).items():
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    forwards = ", ".join(f"{name} {flops / 1e15:.3g}" for name, flops in plan.forward_flops.items())
    lines = [
        f"PFLOP a forward: {forwards}",
        f"{plan.hours:.3g} hours in all, without encoding and checkpoints; and {plan.preview_hours:.2g} of "
        f"{sum(phase.previews for phase in plan.phases)} previews",
        *_once(plan),
        f"prompt cache: {plan.prompts} prompts, at most {size(plan.prompt_cache)} on disk",
        *plan.remarks,
        *(f"warning: {warning}" for warning in plan.warnings),
        *verdict(plan),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _once(plan: Needs) -> Iterator[str]:
    """Yields what the teacher's trajectories cost, and what they spare."""
    if plan.pool is not None:
        calls, hours, disk = plan.pool
        yield f"pool of the teacher's trajectories: {calls:,} calls and {hours:.3g} hours, once; {size(disk)} on disk"
    if anchored := [f"{each.anchored} of phase {each.phase}" for each in plan.phases if each.anchored]:
        yield f"anchored iterations, without a fake: {', '.join(anchored)}"
    if plan.side_by_side is not None:
        count = len(plan.phases)
        yield (
            f"{plan.side_by_side:.3g} hours side by side, a job a phase (--only-phase) on {_gpus(count * plan.gpus)}: "
            "those of the longest phase and of its share of the pool"
        )


def _tables(plan: Needs) -> dict[str, list[list[str]]]:
    """Returns the rows of each table by its title, the header first."""
    counts = [[role, f"{n:,}", "frozen" if role == "teacher" else "trained"] for role, n in plan.parameters.items()]
    memory = [list(row) for row in zip(*_memory_columns(plan), strict=True)]
    work = [
        [
            str(each.phase), f"{each.boundary:.4g}", str(each.iterations), f"{each.work.calls:g}",
            f"{each.work.forwards:g}", f"{each.iteration_flops / 1e15:.3g}", f"{each.iteration_seconds:.3g}",
            f"{each.hours:.3g}",
        ]
        for each in plan.phases
    ]  # fmt: skip
    held = [[_place(each), size(each.gpu), size(each.host), size(each.disk)] for each in plan.stages]
    return {
        "Parameters": [["role", "parameters", ""], *counts],
        "Memory on each GPU": memory,
        "What each stage holds": [["stage", "each GPU", "host, for each GPU", "disk"], *held],
        "Work of an iteration: calls and forwards a sample, PFLOP, seconds": [
            ["phase", "ends at", "iterations", "calls", "forwards", "PFLOP", "s", "hours"], *work,
        ],
    }  # fmt: skip


def _memory_columns(plan: Needs) -> Iterator[list[str]]:
    """Yields the names of the parts of the memory, then their sizes in each phase; those on the host in brackets."""
    states, rest = ["weights", "gradients", "optimiser"], ["gathered", "activations", "training", "preview"]
    away = plan.phases[0].memory.host > 0
    yield ["", *states, *rest, "in all", *(["on the host"] if away else [])]
    for phase in plan.phases:
        sizes = {part: size(count) for part, count in asdict(phase.memory).items()}
        held = [f"({sizes[part]})" if away else sizes[part] for part in states] + [sizes[part] for part in rest]
        yield [f"phase {phase.phase}", *held, size(phase.memory.gpu), *([sizes["host"]] if away else [])]


def verdict(plan: Needs) -> list[str]:
    """Says whether it fits, and if not, what would make it fit."""
    highest = peak(plan.stages)
    most, where = size(highest.gpu), _place(highest)
    if plan.fits:
        return [f"it fits: {most} of the {size(plan.usable)} that can be used on each GPU, at most in {where}"]
    lines = [f"it does not fit: {most} on each GPU in {where}, and {size(plan.usable)} can be used"]
    if plan.options is not None:
        lines += [f"it would with {plan.options}", *(f"  {note}" for note in plan.option_notes)]
    if plan.enough_gpus is not None:
        lines.append(f"or on {_gpus(plan.enough_gpus)}, with micro-batches of 1 and activation checkpointing")
    return lines if len(lines) > 1 else [*lines, "no option and no number of GPUs makes it fit"]


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"
