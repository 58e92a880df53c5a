"""One claim or study by its name, at a budget."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from phased_dmd.reproduce.claims import CLAIMS, FULL, QUICK, STUDIES
from phased_dmd.reproduce.decide import decide
from phased_dmd.reproduce.fig2 import fig2
from phased_dmd.reproduce.memory import memory
from phased_dmd.reproduce.study import study


def reproduce(
    name: str, budget: Literal["quick", "full"], seeds: int | None, samples: int | None, runs: Path, results: Path
) -> Path:
    """Runs what is not done yet and writes the results; returns the table's path.

    name: one of NAMES. seeds and samples replace the budget's. Raises UserError where a folder holds another run.
    """
    if name == "memory":
        return memory(results)
    if name == "fig2":
        return fig2(range(seeds or {"quick": 1, "full": 3}[budget]), results)
    chosen = {"quick": QUICK, "full": FULL}[budget]
    budgets = {
        recipe: replace(found, seeds=seeds or found.seeds, samples=samples or found.samples)
        for recipe, found in chosen.items()
    }
    flags = {"--budget": budget if budget == "quick" else None, "--seeds": seeds, "--samples": samples}
    command = " ".join(
        [f"phased-dmd reproduce {name}", *(f"{flag} {value}" for flag, value in flags.items() if value is not None)]
    )
    if name in STUDIES:
        return study(name, STUDIES[name], budgets[name], runs, results, command)
    return decide(name, CLAIMS[name], budgets, runs, results, command)
