"""The words of an embedded world: its tokenizer, its text encoder, and what the encoder learns from captions alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from phased_dmd.lab.teach.descent import Descent
from phased_dmd.lab.teach.worlds import World

CAPTIONS = 96  # in a batch
Say = Callable[[str], None]


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Returns a word-level tokenizer over the captions' own words, which cuts off what a prompt has too much."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(world.captions(), trainers.WordLevelTrainer(vocab_size=64, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=world.max_tokens,
    )  # fmt: skip


def build_text_encoder(world: World) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=64, num_heads=4, dropout_rate=0.0, **world.text))


def train_encoder(
    world: World, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, steps: int,
    generator: torch.Generator, say: Say, state: Path,
) -> None:  # fmt: skip
    """Trains the encoder to say of every word what the digit is like that it belongs to, by a linear layer.

    As the encoders of large models it has learned its language before it meets a picture: trained along with the
    transformer, it had not told one digit's attributes from another's after 4,400 steps. state: a file of the training
    so far, from which it goes on.
    """
    assert world.grammar
    sizes = world.grammar.classes
    head = nn.Linear(world.text["d_model"], sum(sizes))
    trained = nn.ModuleList([encoder, head]).train()
    descent = Descent(trained, steps, lr=2e-3)
    for step in range(descent.load(state, generator), steps):
        captions, named = world.grammar.draw(CAPTIONS, world.max_tokens, generator)
        told = head(encode_captions(tokenizer, encoder, captions)).split(sizes, 2)
        losses = [
            F.cross_entropy(t.flatten(0, 1), named[..., i].flatten(), ignore_index=-1) for i, t in enumerate(told)
        ]
        loss = torch.stack(losses).sum()
        descent.step(loss)
        if step % 100 == 0:
            say(f"text encoder {step}/{steps} loss {loss.item():.4f}")
        descent.save(state, generator, step)
    encoder.eval()


def encode_captions(tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, captions: Sequence[str]) -> Tensor:
    """Returns embeddings [b, tokens, d], zero after the end token, as WanPipeline pads them.

    Each distinct caption is encoded once.
    """
    distinct = list(dict.fromkeys(captions))
    tokens = tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt")
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state * tokens.attention_mask[..., None]
    return states[torch.tensor([distinct.index(caption) for caption in captions])]


def captions_table(tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel) -> Callable[[list[str]], Tensor]:
    """Returns a function from captions to embeddings [b, tokens, d], which encodes each distinct caption once."""
    known: dict[str, Tensor] = {}

    @torch.no_grad()
    def embed(captions: list[str]) -> Tensor:
        new = [caption for caption in dict.fromkeys(captions) if caption not in known]
        if new:
            known.update(zip(new, encode_captions(tokenizer, encoder, new), strict=True))
        return torch.stack([known[caption] for caption in captions])

    return embed
