"""A plan as text and as JSON."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from phased_dmd.plan import Needs, size


def as_json(plan: Needs) -> str:
    return json.dumps(asdict(plan), indent=2)


def show(plan: Needs, console: Console) -> None:
    """Prints tables of parameters, memory and work, then what to mind."""
    console.print(
        f"{plan.recipe}, {plan.method}: {_gpus(plan.gpus)} of {size(plan.gpu_memory)}, micro-batch {plan.micro_batch}, "
        f"largest size {plan.largest_bucket}",
        highlight=False,
    )
    for table in (_parameters(plan), _memory(plan), _work(plan)):
        console.print(table)
    forwards = ", ".join(f"{name} {flops / 1e15:.3g}" for name, flops in plan.forward_flops.items())
    lines = [
        f"PFLOP a forward: {forwards}",
        f"{plan.hours:.3g} hours in all, without encoding and checkpoints; and {plan.preview_hours:.2g} of "
        f"{sum(phase.previews for phase in plan.phases)} previews",
        f"prompt cache: {plan.prompts} prompts, at most {size(plan.prompt_cache)} on disk",
        *plan.remarks,
        *(f"warning: {warning}" for warning in plan.warnings),
        *_verdict(plan),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _verdict(plan: Needs) -> list[str]:
    most = size(max(phase.memory.gpu for phase in plan.phases))
    if plan.fits:
        return [f"it fits: {most} of the {size(plan.usable)} that can be used on each GPU"]
    lines = [f"it does not fit: {most} on each GPU, of which {size(plan.usable)} can be used"]
    if plan.options is not None:
        lines += [f"it would with {plan.options}", *(f"  {note}" for note in plan.option_notes)]
    if plan.enough_gpus is not None:
        lines.append(f"or on {_gpus(plan.enough_gpus)}, with micro-batches of 1 and activation checkpointing")
    return lines if len(lines) > 1 else [*lines, "no option and no number of GPUs makes it fit"]


def _parameters(plan: Needs) -> Table:
    table = Table("role", "parameters", "", title="Parameters", title_justify="left")
    for role, count in plan.parameters.items():
        table.add_row(role, f"{count:,}", "frozen" if role == "teacher" else "trained")
    return table


def _memory(plan: Needs) -> Table:
    numbers = (f"phase {phase.phase}" for phase in plan.phases)
    table = Table("", *numbers, title="Memory on each GPU", title_justify="left")
    memories = [phase.memory for phase in plan.phases]
    for part in ("weights", "gradients", "optimiser", "gathered", "activations", "preview"):
        held = [size(asdict(memory)[part]) for memory in memories]
        away = part in ("weights", "gradients", "optimiser") and memories[0].host > 0
        table.add_row(part, *(f"({each})" if away else each for each in held))
    table.add_row("in all", *(size(memory.gpu) for memory in memories))
    if memories[0].host:
        table.add_row("on the host", *(size(memory.host) for memory in memories))
    return table


def _work(plan: Needs) -> Table:
    table = Table(
        "phase", "ends at", "iterations", "calls", "forwards", "PFLOP", "s", "hours",
        title="Work of an iteration: calls and forwards a sample, PFLOP, seconds", title_justify="left",
    )  # fmt: skip
    for phase in plan.phases:
        table.add_row(
            str(phase.phase), f"{phase.boundary:.4g}", str(phase.iterations),
            f"{phase.work.calls:g}", f"{phase.work.forwards:g}",
            f"{phase.iteration_flops / 1e15:.3g}", f"{phase.iteration_seconds:.3g}", f"{phase.hours:.3g}",
        )  # fmt: skip
    return table


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"
