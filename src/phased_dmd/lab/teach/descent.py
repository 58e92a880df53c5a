"""How every network of the lab is trained: AdamW with a cosine, which goes on where it was stopped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

SAVED_EVERY = 200  # steps


class Descent:
    """AdamW whose learning rate warms up over a hundred steps and falls to zero by a cosine, with clipped gradients."""

    def __init__(
        self, network: nn.Module, steps: int, lr: float, weight_decay: float = 0.01, clip: float = 1.0,
        average: AveragedModel | None = None, matrices: Sequence[nn.Parameter] = (),
    ) -> None:  # fmt: skip
        """Begins a descent.

        average: of the network, which is kept with it. matrices: those of its parameters that descend by Muon, whose
        updates are as large as AdamW's.
        """

        def factor(step: int) -> float:
            ramp = min(1.0, (step + 1) / 100)
            return ramp * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps))))

        self.network, self.clip, self.steps, self.average = network, clip, steps, average
        chosen = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in network.parameters() if id(parameter) not in chosen]
        self.optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay)]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.optimisers.append(muon)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, factor) for optimiser in self.optimisers]

    def step(self, loss: Tensor) -> None:
        """Makes one step down the gradient of the loss."""
        self.network.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        for part in (*self.optimisers, *self.schedules):
            part.step()
        if self.average is not None:
            self.average.update_parameters(self.network)

    def save(self, path: Path, generator: torch.Generator, step: int) -> None:
        """Writes all that the descent goes on from after a step, now and then and at the end."""
        if (step + 1) % SAVED_EVERY and step + 1 < self.steps:
            return
        state = {name: part.state_dict() for name, part in self._parts().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"generator": generator.get_state(), "next": step + 1}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path, generator: torch.Generator) -> int:
        """Reads what `save` wrote, if it is there; returns the step to go on with."""
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        return state["next"]

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"network": self.network}
        for i, (optimiser, schedule) in enumerate(zip(self.optimisers, self.schedules, strict=True)):
            parts |= {f"optimiser-{i}": optimiser, f"schedule-{i}": schedule}
        return parts if self.average is None else parts | {"average": self.average}
