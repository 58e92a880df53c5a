"""What a set of prompts is like: repetitions, lengths, scripts, and how much of it a run will see."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from phased_dmd.checkpoint import write_atomically
from phased_dmd.config import Config
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.errors import UserError
from phased_dmd.near_duplicates import near_duplicates, normalised
from phased_dmd.pool import begins_with_teacher
from phased_dmd.prompts import Prompt

SCRIPTS = {"CJK": "Han"}  # by the first word of a letter's name, where the script is called otherwise


@dataclass(frozen=True)
class Corpus:
    """Prompts, and what was found of them.

    repeated, alike, near: by the index of a prompt, the index of the one before it that it repeats letter by letter,
    but for case, marks and spaces, or nearly. lengths: of each prompt, in `unit`, which is `tokens` or `words`.
    scripts: how many prompts have most of their letters in each script.
    """

    prompts: Sequence[Prompt]
    repeated: dict[int, int]
    alike: dict[int, int]
    near: dict[int, int]
    lengths: Sequence[int]
    unit: str
    scripts: Counter[str]

    @property
    def kept(self) -> list[Prompt]:
        """Returns the prompts without those that repeat one before them, nearly or not."""
        left_out = self.repeated.keys() | self.alike.keys() | self.near.keys()
        return [prompt for i, prompt in enumerate(self.prompts) if i not in left_out]


def examine(prompts: Sequence[Prompt], tokens: Callable[[Sequence[str]], Sequence[int]] | None = None) -> Corpus:
    """Returns what a set of prompts is like. Prompts with other pictures are never the same.

    tokens: counts those of each text; None counts words, what spaces part.
    """
    first: dict[object, int] = {}
    repeated: dict[int, int] = {}
    alike: dict[int, int] = {}
    texts = [normalised(prompt.text) for prompt in prompts]
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if prompt in first:
            repeated[i] = first[prompt]
        elif (text, prompt.image) in first:
            alike[i] = first[text, prompt.image]
        else:
            first[text, prompt.image] = i
        first.setdefault(prompt, i)
    lengths = [len(prompt.text.split()) for prompt in prompts]
    if tokens is not None:
        lengths = list(tokens([prompt.text for prompt in prompts]))
    scripts = Counter(script_of(prompt.text) for prompt in prompts)
    near = _near(prompts, texts, [i for i in range(len(prompts)) if i not in repeated and i not in alike])
    return Corpus(prompts, repeated, alike, near, lengths, "words" if tokens is None else "tokens", scripts)


def _near(prompts: Sequence[Prompt], texts: Sequence[str], single: Sequence[int]) -> dict[int, int]:
    """Returns the near duplicates among single prompts that have one picture, or none."""
    found: dict[int, int] = {}
    by_image: dict[Path | None, list[int]] = {}
    for i in single:
        by_image.setdefault(prompts[i].image, []).append(i)
    for members in by_image.values():
        if len(members) > 1:
            pairs = near_duplicates([texts[i] for i in members])
            found |= {members[i]: members[j] for i, j in pairs.items()}
    return found


def script_of(text: str) -> str:
    """Returns the script of most of a text's letters, `Latin` or `Han`; `no letters` where there are none."""
    counts = Counter(script for character in text if (script := _script(character)))
    return counts.most_common(1)[0][0] if counts else "no letters"


@lru_cache(maxsize=2**16)
def _script(character: str) -> str | None:
    """Returns a letter's script by the first word of its Unicode name; None for what is no letter."""
    if not character.isalpha():
        return None
    word = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "OTHER").split()[0]
    return SCRIPTS.get(word, word.capitalize())


def draws(config: Config) -> tuple[int, int]:
    """Returns how many prompts a run draws: uniformly from all, and from the prompts of its pool's entries.

    A path of the generator draws one a sample, of a pair of antithetic samples one; updates that share a path share it.
    """
    paths, pooled = 0, 0
    for phase in range(1, config.plan.phases + 1):
        iterations, anchored = config.phase_iterations(phase), config.anchored(phase)
        each = 1 if config.rollouts.reuse else 1 + config.fake.updates
        if begins_with_teacher(config, phase):
            pooled += (iterations - anchored) * each
        else:
            paths += (iterations - anchored) * each
        pooled += anchored
    size = config.batch_size // (2 if config.rollouts.antithetic else 1)
    return paths * size, pooled * size


def share_seen(config: Config, count: int) -> float:
    """Returns the expected share of `count` prompts that a run draws at least once.

    Each draw is uniform, so a prompt is missed by n draws with probability (1 - 1/count)^n. Entries of a pool are
    spread evenly over the prompts. Of prompts with pictures, each counts as one that fits every resolution bucket.
    """
    uniform, pooled = draws(config)
    entries = config.rollouts.pool // (2 if config.rollouts.antithetic else 1)
    inside = min(count, entries)
    missed = (1 - 1 / count) ** uniform
    of_pool = (1 - 1 / inside) ** pooled
    return 1 - missed * (inside * of_pool + count - inside) / count


def token_counter(config: Config) -> Callable[[Sequence[str]], Sequence[int]] | None:
    """Returns what counts prompts' tokens for a recipe's encoder.

    None where the base is neither a folder of this machine nor in the hub's cache; nothing is downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from phased_dmd.models.loader import bare_codec
    from phased_dmd.models.pipeline import PipelineCodec
    from phased_dmd.models.source import BareSource

    teacher = config.teacher
    if not isinstance(teacher, PipelineTeacher):
        return None
    if not BareSource(teacher).on_disk:
        try:
            cached = snapshot_download(teacher.path, revision=teacher.revision, local_files_only=True)
        except (LocalEntryNotFoundError, ValueError):  # ValueError: no name of the hub's
            return None
        teacher = teacher.model_copy(update={"path": cached})
    codec = bare_codec(teacher, BareSource(teacher))
    assert isinstance(codec, PipelineCodec)
    return codec.lengths


def write_prompts(prompts: Sequence[Prompt], output: Path) -> None:
    """Writes prompts as a txt or jsonl file, pictures relative to it.

    Raises UserError for a file that is there, for another kind, and for what no line of a txt can hold.
    """
    if output.exists():
        raise UserError(f"--output: {output} exists")
    if output.suffix == ".txt":
        odd = next((p for p in prompts if p.image or p.text.startswith("#") or len(p.text.splitlines()) > 1), None)
        if odd is not None:
            raise UserError(f"--output: a line of a txt cannot hold {odd.text[:60]!r}; name a .jsonl")
        lines = [prompt.text for prompt in prompts]
    elif output.suffix == ".jsonl":
        folder = output.absolute().parent
        lines = [
            Prompt(p.text, Path(os.path.relpath(p.image.absolute(), folder)) if p.image else None).line()
            for p in prompts
        ]
    else:
        raise UserError(f"--output: {output} is neither a .txt nor a .jsonl")
    write_atomically(output, "".join(f"{line}\n" for line in lines).encode())
