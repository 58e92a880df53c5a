"""A VAE with fewer latent channels than it was taught with: it loses little, and a transformer learns sooner."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

NO_NOISE = -30.0  # log variance of the narrowed posterior, the least that diffusers keeps


@torch.no_grad()
def narrow_vae(vae: AutoencoderKLWan, clips: Sequence[Tensor], channels: int) -> AutoencoderKLWan:
    """Returns a VAE whose latents are so many linear combinations of the VAE's, those of which its decoder reads most.

    They are the first singular vectors of what enters the decoder, so that with all of them nothing is lost; about zero
    and not the mean, since the decoder pads borders with zeros. A VAE that may use sixteen channels leaves most of them
    nearly empty, and a transformer has to carry the noise of each from its input to its output. clips: pixels
    [b, 3, f, h, w], of which the vectors and the latents' scale are found; that is one for all channels, which leaves
    small ones small.
    """
    outward = _matrix(vae.post_quant_conv)
    inward = _matrix(vae.quant_conv)[: len(outward)]  # of the mean
    found = [vae.encode(pixels, return_dict=False)[0].mode().transpose(0, 1).flatten(1) for pixels in clips]
    read = outward @ torch.cat(found, 1) + _column(vae.post_quant_conv)  # [z, n]
    chosen = torch.linalg.eigh(read @ read.T / read.shape[1]).eigenvectors.flip(1)[:, :channels]  # [z, channels]
    narrow = AutoencoderKLWan.from_config({**vae.config, "z_dim": channels})
    assert isinstance(narrow, AutoencoderKLWan)
    to_latents, last, first = chosen.T @ outward, vae.encoder.conv_out, vae.decoder.conv_in
    shift = to_latents @ _column(vae.quant_conv)[: len(inward)] + chosen.T @ _column(vae.post_quant_conv)
    mean_weight = torch.einsum("kc,cifhw->kifhw", to_latents @ inward, last.weight)
    mean_bias = to_latents @ inward @ _column(last) + shift
    narrow.load_state_dict(vae.state_dict() | {
        "encoder.conv_out.weight": torch.cat([mean_weight, torch.zeros_like(mean_weight)]),
        "encoder.conv_out.bias": torch.cat([mean_bias[:, 0], torch.full((channels,), NO_NOISE)]),
        **_identity("quant_conv", 2 * channels), **_identity("post_quant_conv", channels),
        "decoder.conv_in.weight": torch.einsum("oz...,zk->ok...", first.weight, chosen),
    })  # fmt: skip
    latents = chosen.T @ read
    scale = float(latents.var(1).mean().sqrt())
    narrow.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=[scale] * channels)
    return narrow.eval()


def _matrix(layer: torch.nn.Conv3d) -> Tensor:
    """Returns the matrix [out, in] that a convolution of single points is."""
    return layer.weight.flatten(1)


def _column(layer: torch.nn.Conv3d) -> Tensor:
    """Returns a convolution's bias as a column [out, 1]."""
    assert layer.bias is not None
    return layer.bias[:, None]


def _identity(layer: str, channels: int) -> dict[str, Tensor]:
    """Returns the state of a convolution of single points that changes nothing."""
    weight = torch.eye(channels).reshape(channels, channels, 1, 1, 1)
    return {f"{layer}.weight": weight, f"{layer}.bias": torch.zeros(channels)}
