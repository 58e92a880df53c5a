"""Your own model: FluxTransformer2DModel, with packed latents and embedded guidance; see docs/extending.md."""

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from phased_dmd import FlowSchedule, distill, load
from phased_dmd.config import Config, Plan
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.models.analytic import PlainCodec
from phased_dmd.testing import check_model


class FluxModel:
    """`VelocityModel` of a FluxPipeline's transformer: samples are latents [b, c, h, w], tokens 2 x 2 of them."""

    schedule, prediction, switches, guidance = FlowSchedule(), "flow", (), (1.0,)  # this teacher's is an input of it
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp")

    def __init__(self, pipeline: FluxPipeline, sizes: list[tuple[int, int]], embedded: float = 3.5) -> None:
        self.networks = self.students = [pipeline.transformer.eval().requires_grad_(False)]
        channels, stride = pipeline.transformer.config.in_channels // 4, pipeline.vae_scale_factor
        self.sample_shapes = [(channels, height // stride, width // stride) for height, width in sizes]
        self.embedded, self.device, self.dtype = embedded, pipeline.device, pipeline.transformer.dtype

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]

    def batch(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in rows]).to(self.device, self.dtype) for name in rows[0]}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        (b, c, h, w), text, pooled = x.shape, condition["text"], condition["pooled"]
        tokens = FluxPipeline._pack_latents(x, b, c, h, w).to(self.dtype)
        ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, x.device, x.dtype)
        guidance = torch.full((b,), self.embedded, device=x.device) if network.config.guidance_embeds else None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            velocity = network(tokens, text, pooled, t.to(x), ids, ids.new_zeros(text.shape[1], 3), guidance).sample
        return FluxPipeline._unpack_latents(velocity, h, w, 1)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        return unconditional + guidance * (conditional - unconditional)


class FluxCodec(PlainCodec):
    """`Codec` through the pipeline's own encode_prompt and VAE. T5's padding is unmasked here: it is kept."""

    def __init__(self, pipeline: FluxPipeline, max_tokens: int) -> None:
        self.pipeline, self.vae, self.max_tokens = pipeline, pipeline.vae, max_tokens
        self.fingerprint = f"{pipeline.name_or_path} {max_tokens}"

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        self.pipeline.text_encoder_2.to(self.pipeline.device)
        text, pooled, _ = self.pipeline.encode_prompt(list(prompts), max_sequence_length=self.max_tokens)
        return [{"text": a.cpu(), "pooled": b.cpu()} for a, b in zip(text, pooled, strict=True)]

    def free(self) -> None:
        self.pipeline.text_encoder_2.to("cpu")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        z = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(z).sample.float().permute(0, 2, 3, 1)[:, None] / 2 + 0.5


def main(pipeline: FluxPipeline, size: tuple[int, int], config: Config, output: str, max_tokens: int = 512) -> Tensor:
    """Checks the model on latents from its stock pipeline and distils it; returns pictures of the result."""
    model, codec, texts = FluxModel(pipeline, [size]), FluxCodec(pipeline, max_tokens), ["a red fox", "two grey cats"]
    tokens = pipeline(texts, height=size[0], width=size[1], max_sequence_length=max_tokens, output_type="latent")[0]
    latents = FluxPipeline._unpack_latents(tokens, *model.sample_shapes[0][1:], 1)
    check_model(model, codec, latents, codec.encode_text(texts))
    sampler = load(distill(config, output, own=(model, codec)), own=(model, codec))
    return sampler.decode(sampler(texts, seeds=[0, 1]))


if __name__ == "__main__":
    flux = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
    recipe = Config(recipe="own-flux", teacher=OwnTeacher(), plan=Plan(shift=3.0), prompts="default-t2i")
    main(flux, (1024, 1024), recipe, "runs/own-flux")
