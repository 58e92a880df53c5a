"""`phased-dmd teach nano`: trains the embedded teacher, a complete if tiny diffusers `WanPipeline` folder.

Three stages, in order: the VAE on pictures and clips, the latents of many of them, and the transformer together with
its text encoder by flow matching (Eq. 4). `teach nano-moe` and `teach nano-i2v` (`variants.py`) train new transformers
around nano's VAE and text encoder; `teach digits` trains the classifier of the evaluation.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from phased_dmd.checkpoint import save_tensors
from phased_dmd.lab.metrics.digit_classifier import DigitClassifier, classify
from phased_dmd.lab.metrics.distances import moments
from phased_dmd.lab.teach.mnist import Digits, all_captions, clip_batch, image_batch, load_digits
from phased_dmd.maths.phases import shift_time, unshift_time

MAX_TOKENS = 16  # of a prompt, its end token included
SHIFT = 3.0  # of the training times
WIDE = 1.5  # pixels, the jitter that the VAE and the classifier learn from


@dataclass(frozen=True)
class TrainingBudget:
    """The steps and sizes of each stage; the shipped weights are of the defaults."""

    vae_steps: int = 2400
    num_images: int = 32_000
    num_clips: int = 16_000
    transformer_steps: int = 10_500
    switch_steps: tuple[int, int] = (3000, 7500)  # of nano-moe's two networks, noisiest first
    first_frame_steps: int = 6000
    classifier_steps: int = 1500


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a word-level tokenizer over the captions' own words."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(all_captions(), trainers.WordLevelTrainer(vocab_size=64, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def build_text_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    )


def build_transformer(in_channels: int = 16) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=4, attention_head_dim=32, in_channels=in_channels, out_channels=16,
        text_dim=64, freq_dim=128, ffn_dim=384, num_layers=4, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def build_scheduler() -> UniPCMultistepScheduler:
    """Returns the stock scheduler that is Euler's method on the grid of shift 5: order 1, never corrected."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, solver_order=1,
        disable_corrector=list(range(100)),
    )  # fmt: skip


class Descent:
    """AdamW whose learning rate warms up over a hundred steps and falls to zero by a cosine, with clipped gradients."""

    def __init__(
        self, network: nn.Module, steps: int, lr: float, weight_decay: float = 0.01, clip: float = 1.0
    ) -> None:
        def factor(step: int) -> float:
            ramp = min(1.0, (step + 1) / 100)
            return ramp * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps))))

        self.network, self.clip = network, clip
        self.optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, factor)

    def step(self, loss: Tensor) -> None:
        """Makes one step down the gradient of the loss."""
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimiser.step()
        self.schedule.step()


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decodes without the clamp of `vae.decode` to [-1, 1], behind which a black output gets no gradient for ever."""
    chunks: list[Any] = []
    handle = vae.decoder.register_forward_hook(lambda _module, _inputs, output: chunks.append(output))
    vae.decode(latents)
    handle.remove()
    return torch.cat(chunks, dim=2)


def train_vae(digits: Digits, steps: int, generator: torch.Generator, say: Callable[[str], None]) -> AutoencoderKLWan:
    """Alternates 64 pictures and 8 clips: L1 + L2 reconstruction with a faint KL term."""
    vae = build_vae().train()
    descent = Descent(vae, steps, lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        pixels, _, _ = image_batch(digits, 64, generator, WIDE) if step % 2 else clip_batch(digits, 8, generator)
        posterior = vae.encode(pixels, return_dict=False)[0]
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = decode_unclamped(vae, posterior.mean + posterior.std * noise)
        squares = F.mse_loss(decoded, pixels)
        error = F.l1_loss(decoded, pixels) + squares
        descent.step(error + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel())
        if step % 100 < 2:
            say(f"vae {step}/{steps} {'pictures' if step % 2 else 'clips'} mse {squares.item():.4f}")
    return vae.eval()


@dataclass(frozen=True)
class LatentSet:
    """What a transformer learns: latents [n, 16, f, 4, 4] with captions; first frames [n, 20, f, 4, 4] if it has any.

    size: of a batch.
    """

    latents: Tensor
    captions: list[str]
    size: int
    first_frames: Tensor | None = None


@torch.no_grad()
def encode_digits(
    vae: AutoencoderKLWan, digits: Digits, budget: TrainingBudget, generator: torch.Generator, measure: bool = False
) -> list[LatentSet]:
    """Returns latents of pictures twice and of clips once, for a transformer's steps to take in turn.

    measure: whether their mean and standard deviation by channel, which normalise them, are put into the VAE's
    configuration first, where WanPipeline reads them.
    """
    raw = []
    for make, count, size, batch in (
        (image_batch, budget.num_images, 256, 64), (clip_batch, budget.num_clips, 64, 24),
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


def encode_captions(tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, captions: Sequence[str]) -> Tensor:
    """Returns embeddings [b, MAX_TOKENS, d], zero after the end token, as WanPipeline pads them.

    Each distinct caption is encoded once.
    """
    distinct = list(dict.fromkeys(captions))
    tokens = tokenizer(distinct, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state * tokens.attention_mask[..., None]
    return states[torch.tensor([distinct.index(caption) for caption in captions])]


def train_transformer(
    transformer: WanTransformer3DModel, data: Sequence[LatentSet], embed: Callable[[list[str]], Tensor],
    encoder: nn.Module | None, steps: int, generator: torch.Generator, say: Callable[[str], None],
    interval: tuple[float, float] = (0.0, 1.0),
) -> None:  # fmt: skip
    """Trains by flow matching (Eq. 4) at times inside the interval; the network ends with the averaged weights.

    data: sets that the steps take in turn. embed: captions to [b, tokens, d]; one caption in ten is dropped. encoder:
    the text encoder, if it is trained along.
    """
    trained = nn.ModuleList([transformer] if encoder is None else [transformer, encoder]).train()
    average = torch.optim.swa_utils.AveragedModel(
        trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    descent = Descent(trained, steps, lr=1e-3)
    low, high = (unshift_time(t, SHIFT) for t in interval)
    started = time.monotonic()
    for step in range(steps):
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
        average.update_parameters(trained)
        if step % 200 < len(data):
            say(f"transformer {step}/{steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s")
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


def teach_nano(output: Path, data: Path, seed: int, budget: TrainingBudget, say: Callable[[str], None]) -> None:
    """Does `phased-dmd teach nano`: writes a `WanPipeline` folder, its weights rounded to half precision."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    training, _ = load_digits(data)
    vae = train_vae(training, budget.vae_steps, rng, say)
    torch.manual_seed(seed + 1)  # a stage of its own: the VAE of another run may be put in
    rng.manual_seed(seed + 1)
    turns = encode_digits(vae, training, budget, rng, measure=True)
    tokenizer, transformer, encoder = build_tokenizer(), build_transformer(), build_text_encoder()
    embed = partial(encode_captions, tokenizer, encoder)
    train_transformer(transformer, turns, embed, encoder, budget.transformer_steps, rng, say)
    pipeline = WanPipeline(
        tokenizer=tokenizer,  # type: ignore[arg-type] any tokenizer, any scheduler with flow sigmas
        text_encoder=encoder, vae=vae, scheduler=build_scheduler(),  # type: ignore[arg-type]
        transformer=transformer,
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(output)
    say(f"nano: written to {output}")
