"""`phased-dmd teach nano` and `teach scenes`: trains an embedded teacher, a tiny diffusers `WanPipeline` folder.

Its stages, in order: the VAE on pictures and clips, the latents of many of them, the text encoder on captions where a
world has a grammar, and the transformer by flow matching (Eq. 4), nano's together with its text encoder. `teach
nano-moe`, `scenes-moe` and `nano-i2v` (`variants.py`) train new transformers around their VAE and text encoder; `teach
digits` trains the classifier of nano's evaluation.
"""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from phased_dmd.checkpoint import save_tensors
from phased_dmd.lab.metrics.digit_classifier import DigitClassifier, classify
from phased_dmd.lab.metrics.distances import moments
from phased_dmd.lab.teach.descent import Descent
from phased_dmd.lab.teach.language import (
    build_text_encoder,
    build_tokenizer,
    captions_table,
    encode_captions,
    train_encoder,
)
from phased_dmd.lab.teach.mnist import Digits, clip_batch, image_batch, load_digits
from phased_dmd.lab.teach.narrow import narrow_vae
from phased_dmd.lab.teach.worlds import VAE_CHANNELS, WIDE, TrainingBudget, World
from phased_dmd.maths.phases import shift_time, unshift_time

SHIFT = 3.0  # of the training times


def build_vae(world: World) -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=8, z_dim=VAE_CHANNELS, num_res_blocks=1, **world.vae)


def build_transformer(world: World, further_channels: int = 0) -> WanTransformer3DModel:
    """Builds a transformer; further_channels: of its input, beside those of the latents."""
    return WanTransformer3DModel(
        in_channels=world.channels + further_channels, out_channels=world.channels, text_dim=world.text["d_model"],
        freq_dim=128, cross_attn_norm=True, rope_max_seq_len=32, **world.transformer,
    )  # fmt: skip


def build_scheduler() -> UniPCMultistepScheduler:
    """Returns the stock scheduler that is Euler's method on the grid of shift 5: order 1, never corrected."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, solver_order=1,
        disable_corrector=list(range(100)),
    )  # fmt: skip


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decodes without the clamp of `vae.decode` to [-1, 1], behind which a black output gets no gradient for ever."""
    chunks: list[Any] = []
    handle = vae.decoder.register_forward_hook(lambda _module, _inputs, output: chunks.append(output))
    vae.decode(latents)
    handle.remove()
    return torch.cat(chunks, dim=2)


def chroma(pixels: Tensor) -> Tensor:
    """Returns pixels [b, 3, f, h, w] less the mean over their channels: what makes them no grey."""
    return pixels - pixels.mean(1, keepdim=True)


def train_vae(
    world: World, digits: Digits, steps: int, generator: torch.Generator, say: Callable[[str], None], state: Path
) -> AutoencoderKLWan:
    """Alternates 64 pictures and 8 clips: L1 + L2 reconstruction, colour by itself too, with a faint KL term.

    state: a file of the training so far, from which it goes on.
    """
    vae = build_vae(world).train()
    descent = Descent(vae, steps, lr=2e-3, weight_decay=0.0)
    started = time.monotonic()
    for step in range(descent.load(state, generator), steps):
        pixels, _, _ = world.vae_pictures(digits, 64, generator) if step % 2 else world.clips(digits, 8, generator)
        posterior = vae.encode(pixels, return_dict=False)[0]
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = decode_unclamped(vae, posterior.mean + posterior.std * noise)
        squares = F.mse_loss(decoded, pixels)
        error = F.l1_loss(decoded, pixels) + squares + world.chroma * F.mse_loss(chroma(decoded), chroma(pixels))
        descent.step(error + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel())
        if step % 100 < 2:
            kind, took = "pictures" if step % 2 else "clips", time.monotonic() - started
            say(f"vae {step}/{steps} {kind} mse {squares.item():.4f} {took:.0f} s")
        descent.save(state, generator, step)
    return vae.eval()


@dataclass(frozen=True)
class LatentSet:
    """What a transformer learns: latents [n, 16, f, h, w] with captions; first frames [n, 20, f, h, w] if it has any.

    size: of a batch.
    """

    latents: Tensor
    captions: list[str]
    size: int
    first_frames: Tensor | None = None


@torch.no_grad()
def encode_digits(
    world: World, vae: AutoencoderKLWan, digits: Digits, budget: TrainingBudget, generator: torch.Generator,
    measure: bool = False,
) -> list[LatentSet]:  # fmt: skip
    """Returns latents of pictures twice and of clips once, for a transformer's steps to take in turn.

    measure: whether their mean and standard deviation by channel, which normalise them, are put into the VAE's
    configuration first, where WanPipeline reads them.
    """
    raw = []
    for make, count, size, batch in (
        (world.pictures, budget.num_images, 256, 64), (world.clips, budget.num_clips, 64, 24),
    ):  # fmt: skip
        latents, captions = [], []
        for start in range(0, count, size):
            pixels, texts, _ = make(digits, min(size, count - start), generator)
            latents.append(vae.encode(pixels, return_dict=False)[0].mode())
            captions += texts
        raw.append(LatentSet(torch.cat(latents), captions, batch))
    if measure:
        flat = torch.cat([latents.latents.transpose(0, 1).flatten(1) for latents in raw], dim=1)
        vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())
    pictures, clips = (replace(latents, latents=normalise(vae, latents.latents)) for latents in raw)
    return [pictures, pictures, clips]


def normalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Returns latents with the VAE's own mean and standard deviation taken out of every channel."""
    names = ("latents_mean", "latents_std")
    mean, std = (torch.tensor(vae.config[name]).reshape(1, -1, 1, 1, 1) for name in names)
    return (latents - mean) / std


def train_transformer(
    transformer: WanTransformer3DModel, data: Sequence[LatentSet], embed: Callable[[list[str]], Tensor],
    encoder: nn.Module | None, steps: int, generator: torch.Generator, say: Callable[[str], None], state: Path,
    interval: tuple[float, float] = (0.0, 1.0), further: bool = False,
) -> None:  # fmt: skip
    """Trains by flow matching (Eq. 4) at times inside the interval; the network ends with the averaged weights.

    data: sets that the steps take in turn. embed: captions to [b, tokens, d]; one caption in ten is dropped. encoder:
    the text encoder, if it is trained along. state: a file of the training so far, from which it goes on. further:
    whether the network has been trained before; the matrices of its blocks then descend by Muon.
    """
    trained = nn.ModuleList([transformer] if encoder is None else [transformer, encoder]).train()
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    matrices = [weight for weight in transformer.blocks.parameters() if weight.ndim == 2] if further else []
    descent = Descent(trained, steps, lr=1e-3, average=average, matrices=matrices)
    low, high = (unshift_time(t, SHIFT) for t in interval)
    started = time.monotonic()
    for step in range(descent.load(state, generator), steps):
        clips = data[step % len(data)]
        index = torch.randint(len(clips.latents), (clips.size,), generator=generator)
        dropped = (torch.rand(clips.size, generator=generator) < 0.1).tolist()
        texts = ["" if drop else clips.captions[i] for i, drop in zip(index.tolist(), dropped, strict=True)]
        x_0 = clips.latents[index]
        t = shift_time(low + (high - low) * torch.rand(clips.size, generator=generator), SHIFT)
        eps = torch.randn(x_0.shape, generator=generator)
        t_ = t.reshape(-1, 1, 1, 1, 1)
        x_t = (1 - t_) * x_0 + t_ * eps
        if clips.first_frames is not None:
            x_t = torch.cat([x_t, clips.first_frames[index]], dim=1)
        velocity = transformer(x_t, t * 1000, embed(texts)).sample
        loss = F.mse_loss(velocity, eps - x_0)
        descent.step(loss)
        if step % 200 < len(data):
            say(f"transformer {step}/{steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s")
        descent.save(state, generator, step)
    trained.load_state_dict(average.module.state_dict())
    trained.eval()


def train_classifier(
    training: Digits, held_out: Digits, steps: int, generator: torch.Generator
) -> tuple[DigitClassifier, float]:
    """Trains the evaluation's classifier on jittered pictures and frames; returns its accuracy on held-out digits."""
    classifier = DigitClassifier().train()
    descent = Descent(classifier, steps, lr=2e-3, clip=math.inf)
    for step in range(steps):
        batch = image_batch(training, 64, generator, WIDE) if step % 2 else clip_batch(training, 64, generator)
        pixels, _, labels = batch
        frames = pixels[:, :1, step % pixels.shape[2]] / 2 + 0.5
        descent.step(F.cross_entropy(classifier(frames)[1], labels, label_smoothing=0.05))
    classifier.eval()
    pixels, _, labels = image_batch(held_out, 4000, generator)
    log_probabilities = classify(classifier, pixels.permute(0, 2, 3, 4, 1) / 2 + 0.5)[1]
    return classifier, float((log_probabilities.argmax(1) == labels).double().mean())


def teach_digits(output: Path, data: Path, seed: int, budget: TrainingBudget, say: Callable[[str], None]) -> None:
    """Does `phased-dmd teach digits`: the classifier, with the statistics of real held-out digits in its features."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    training, held_out = load_digits(data)
    classifier, accuracy = train_classifier(training, held_out, budget.classifier_steps, rng)
    pixels, _, _ = image_batch(held_out, 4000, rng)
    mean, covariance = moments(classify(classifier, pixels.permute(0, 2, 3, 4, 1) / 2 + 0.5)[0])
    tensors = {**classifier.state_dict(), "real.mean": mean, "real.covariance": covariance}
    save_tensors(output / "digits.safetensors", tensors, {"held_out_accuracy": accuracy})
    say(f"digits: {accuracy:.4f} of held-out digits read right")


def teach(
    world: World, output: Path, data: Path, seed: int, budget: TrainingBudget, say: Callable[[str], None]
) -> None:
    """Does `phased-dmd teach nano` and `teach scenes`: writes a `WanPipeline` folder, its weights in half precision.

    What is in the folder `unfinished` of a run that was stopped is not trained again.
    """
    torch.manual_seed(seed)
    rng, unfinished = torch.Generator().manual_seed(seed), output / "unfinished"
    training, _ = load_digits(data)
    vae = train_vae(world, training, budget.vae_steps, rng, say, unfinished / "vae.pt")
    torch.manual_seed(seed + 1)  # a stage of its own: the VAE of another run may be put in
    rng.manual_seed(seed + 1)
    if narrow := world.channels < VAE_CHANNELS:
        examples = [draw(training, count, rng)[0] for draw, count in ((world.pictures, 512), (world.clips, 64))]
        vae = narrow_vae(vae, examples, world.channels)
    turns = encode_digits(world, vae, training, budget, rng, measure=not narrow)
    tokenizer, transformer, encoder = build_tokenizer(world), build_transformer(world), build_text_encoder(world)
    if world.grammar:
        train_encoder(world, tokenizer, encoder, budget.encoder_steps, rng, say, unfinished / "text_encoder.pt")
        embed, trained = captions_table(tokenizer, encoder), None
    else:
        embed, trained = partial(encode_captions, tokenizer, encoder), encoder
    state = unfinished / "transformer.pt"
    train_transformer(transformer, turns, embed, trained, budget.transformer_steps, rng, say, state)
    if budget.further_steps:
        pictures, _, clips = turns
        state = unfinished / "transformer-further.pt"
        train_transformer(
            transformer, [pictures, clips, clips], embed, trained, budget.further_steps, rng, say, state, further=True
        )  # fmt: skip
    pipeline = WanPipeline(
        tokenizer=tokenizer,  # type: ignore[arg-type] any tokenizer, any scheduler with flow sigmas
        text_encoder=encoder, vae=vae, scheduler=build_scheduler(),  # type: ignore[arg-type]
        transformer=transformer,
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(output)
    shutil.rmtree(unfinished)
    say(f"{world.name}: written to {output}")
