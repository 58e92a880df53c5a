"""Your own model: a diffusers UNet2DModel with eps prediction on a DDPM's noise levels; see docs/extending.md."""

from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
from torch import Tensor, nn

from phased_dmd import VPSchedule, distill, load
from phased_dmd.config import Config, Plan
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.engine.world import device
from phased_dmd.models.analytic import PlainCodec
from phased_dmd.testing import check_model

START = 0.98  # eps prediction says next to nothing of x_0 where alpha is next to 0, so the first step is below t = 1


class DDPMSchedule(VPSchedule):
    """Timestep i of the training at t = (i + 1) / 1000, clean samples at t = 0, log alpha linear in between."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.log_alpha = torch.cat([torch.zeros(1), alphas_cumprod.log() / 2]).double()

    def alpha(self, t: Tensor) -> Tensor:
        log_alpha, place = self.log_alpha.to(t.device), t.double() * (len(self.log_alpha) - 1)
        i = place.long().clamp(max=len(log_alpha) - 2)
        return log_alpha[i].lerp(log_alpha[i + 1], place - i).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t) ** 2).sqrt()


class EpsUNet:
    """`VelocityModel` of a network without conditions that is called as a UNet2DModel is."""

    prediction, switches, guidance = "eps", (), (1.0,)
    lora_targets = ("conv1", "conv2", "to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, network: nn.Module, alphas_cumprod: Tensor, shape: tuple[int, ...]) -> None:
        self.networks = self.students = [network.eval().requires_grad_(False).to(device())]
        self.schedule, self.sample_shapes, self.timesteps = DDPMSchedule(alphas_cumprod), [shape], len(alphas_cumprod)

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]

    def batch(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(x, (self.timesteps * t - 1).to(x.dtype)).sample  # 1/1000 .. 1 are the timesteps 0 .. 999

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        return unconditional + guidance * (conditional - unconditional)


class PixelCodec(PlainCodec):
    """`Codec` of a model without prompts, on pixels: [b, c, h, w] in [-1, 1] are one-frame clips."""

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / 2 + 0.5).permute(0, 2, 3, 1)[:, None].expand(-1, -1, -1, -1, 3)


def main(pipeline: DDPMPipeline, config: Config, output: Path) -> Tensor:
    """Checks the model on pictures from its stock pipeline and distils it; returns pictures of the result."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    shape = unet.config.in_channels, unet.config.sample_size, unet.config.sample_size
    model, codec = EpsUNet(unet, scheduler.alphas_cumprod, shape), PixelCodec()
    stock = DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config))
    pictures = torch.from_numpy(stock(16, num_inference_steps=50, output_type="np").images)
    check_model(model, codec, pictures.permute(0, 3, 1, 2) * 2 - 1, start=START)
    sampler = load(distill(config, output, own=(model, codec)), own=(model, codec))
    return sampler.decode(sampler([""] * 16, seeds=range(16)))


if __name__ == "__main__":
    recipe = Config(recipe="own-unet", teacher=OwnTeacher(), plan=Plan(shift=1.0, start=START))
    main(DDPMPipeline.from_pretrained("google/ddpm-cifar10-32"), recipe, Path("runs/own-unet"))
