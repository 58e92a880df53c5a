"""The cache of encoded prompts: what comes back, what is encoded again and what is not, and damage."""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import group
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TinyCodec, TinyWan, draw, killed_after
from torch import Tensor

from phased_dmd.checkpoint import RunFolder, wait_for_lock
from phased_dmd.cli import main
from phased_dmd.conditions import CHUNK, Conditions, picture_hashes
from phased_dmd.config import Config
from phased_dmd.config.teacher import OwnTeacher, Size, WanTeacher
from phased_dmd.errors import Stopped, UserError
from phased_dmd.inputs import check_prompts, prepare
from phased_dmd.models.analytic import PlainCodec
from phased_dmd.models.hashes import REMEMBERED
from phased_dmd.models.protocol import Condition
from phased_dmd.models.source import Source
from phased_dmd.models.wan import NANO, WanCodec
from phased_dmd.prompts import Prompt
from phased_dmd.recipes import resolve
from phased_dmd.step import bucket_odds
from phased_dmd.train import distill

MANY = [Prompt(f"prompt {i} {'x' * (i % 7)}") for i in range(2 * CHUNK + 5)]  # three files


class Recorder(PlainCodec):
    """A `Codec` whose rows are as long as their prompt, and that keeps every call; a picture fits `shapes`."""

    def __init__(self, fingerprint: str = "one", takes_images: bool = False, killed_at: str | None = None) -> None:
        self.fingerprint, self.takes_images, self.killed_at = fingerprint, takes_images, killed_at
        self.texts: list[list[str]] = []
        self.images: list[tuple[str, int]] = []
        self.freed = 0

    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        if self.killed_at in prompts:
            raise KeyboardInterrupt
        self.texts.append(list(prompts))
        return [{"text": text_row(self.fingerprint, prompt), "ids": torch.arange(len(prompt))} for prompt in prompts]

    def fits(self, image: Path) -> list[int]:
        """By its name: `wide-tall.png` fits the buckets 0 and 2."""
        return [bucket for bucket, shape in enumerate(("wide", "square", "tall")) if shape in image.stem]

    def encode_picture(self, prompt: str, picture: Path, bucket: int) -> Condition:
        self.images.append((picture.name, bucket))
        return {"image": image_row(picture, bucket)}

    def free(self) -> None:
        self.freed += 1


def text_row(fingerprint: str, prompt: str) -> Tensor:
    return draw(len(prompt), 3, seed=sum(map(ord, fingerprint + prompt)), dtype=torch.bfloat16)


def image_row(image: Path, bucket: int) -> Tensor:
    return torch.tensor([*image.read_bytes(), bucket], dtype=torch.float32)


def encoded(codec: Recorder) -> list[str]:
    return [text for texts in codec.texts for text in texts]


def same(a: Condition, b: Condition) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def same_rows(cache: Conditions, prompts: Sequence[Prompt], fingerprint: str = "one") -> bool:
    expected = Recorder(fingerprint).encode_text([prompt.text for prompt in prompts])
    return all(same(cache.row(i, 0), row) for i, row in enumerate(expected))


# ---------------------------------------------------------------- what comes back


def test_rows_are_the_codecs_own_bit_for_bit_in_their_own_length_and_type(tmp_path: Path) -> None:
    prompts = [*MANY, Prompt(""), Prompt("a fox")]
    cache = Conditions(Recorder(), prompts, "blurry", tmp_path)
    assert same_rows(cache, prompts)
    assert same(cache.negative, Recorder().encode_text(["blurry"])[0])
    again = Conditions(Recorder(), prompts, "blurry", tmp_path)
    assert same_rows(again, prompts) and same(again.negative, cache.negative)


@pytest.fixture(scope="module")
def nano() -> WanCodec:
    return WanCodec(WanTeacher(path="nano", max_tokens=16), torch.device("cpu"))


def test_nanos_rows_are_unpadded_and_the_encoder_is_let_go(nano: WanCodec, tmp_path: Path) -> None:
    """A prompt's words and the end; the empty one is the end alone. The empty prompt is the negative one too."""
    texts = ["a handwritten seven", "", "a handwritten digit moving right fast"]
    cache = Conditions(nano, [Prompt(text) for text in texts], "", tmp_path)
    assert nano._encoder is None
    rows = [cache.row(i, 0) for i in range(3)]
    assert [len(row["text"]) for row in rows] == [4, 1, 7]
    assert all(same(row, own) for row, own in zip(rows, nano.encode_text(texts), strict=True))
    torch.testing.assert_close(cache.negative["text"], rows[1]["text"], rtol=0, atol=1e-6)


def test_a_full_cache_loads_no_encoder(nano: WanCodec, tmp_path: Path) -> None:
    prompts = [Prompt("a handwritten seven")]
    Conditions(nano, prompts, "", tmp_path)
    loaded = []

    class Recorded(Source):
        def load(self, kind: type, name: str, **options: Any) -> Any:
            loaded.append(name)
            return super().load(kind, name, **options)

    def codec(max_tokens: int) -> WanCodec:
        teacher = WanTeacher(path="nano", max_tokens=max_tokens)
        return WanCodec(teacher, torch.device("cpu"), Recorded(teacher))

    Conditions(codec(16), prompts, "", tmp_path)
    assert sorted(loaded) == ["tokenizer", "vae"]
    Conditions(codec(15), prompts, "", tmp_path)
    assert "text_encoder" in loaded  # cut off elsewhere, prompts may be encoded to something else


# ---------------------------------------------------------------- what is encoded again


@pytest.mark.parametrize("where", ["encoding", "writing"])
def test_a_killed_encoding_goes_on_with_what_is_missing(where: str, tmp_path: Path) -> None:
    """Killed in the second of three files: the first is not encoded again, and nothing is half-written."""
    replace, written = Path.replace, []

    def killed(path: Path, target: Path) -> None:
        written.append(path)
        if len(written) == 2:
            path.write_bytes(b"\0" * 100)
            raise KeyboardInterrupt
        replace(path, target)

    first = Recorder(killed_at=MANY[CHUNK + 1].text if where == "encoding" else None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "writing":
            patch.setattr(Path, "replace", killed)
        Conditions(first, MANY, "", tmp_path)
    assert [path.exists() for path in written] == ([False, True] if where == "writing" else [])
    second = Recorder()
    cache = Conditions(second, MANY, "", tmp_path)
    assert second.texts == [[p.text for p in MANY[CHUNK : 2 * CHUNK]], [p.text for p in MANY[2 * CHUNK :]], [""]]
    assert same_rows(cache, MANY)


@pytest.mark.parametrize("changed", [0, CHUNK - 1, CHUNK, len(MANY) - 1])
def test_a_changed_prompt_is_encoded_again_with_its_file_only(changed: int, tmp_path: Path) -> None:
    Conditions(Recorder(), MANY, "", tmp_path)
    prompts = [*MANY[:changed], Prompt("another"), *MANY[changed + 1 :]]
    codec = Recorder()
    cache = Conditions(codec, prompts, "", tmp_path)
    start = changed // CHUNK * CHUNK
    assert codec.texts == [[prompt.text for prompt in prompts[start : start + CHUNK]]]
    assert same_rows(cache, prompts)


def test_a_changed_negative_prompt_is_encoded_alone(tmp_path: Path) -> None:
    Conditions(Recorder(), MANY, "", tmp_path)
    codec = Recorder()
    cache = Conditions(codec, MANY, "blurry", tmp_path)
    assert codec.texts == [["blurry"]] and same(cache.negative, Recorder().encode_text(["blurry"])[0])


def test_another_encoder_encodes_everything_again(tmp_path: Path) -> None:
    Conditions(Recorder("one"), MANY, "", tmp_path)
    codec = Recorder("two")
    cache = Conditions(codec, MANY, "", tmp_path)
    assert encoded(codec) == [*(prompt.text for prompt in MANY), ""]
    assert same_rows(cache, MANY, "two") and not same_rows(cache, MANY, "one")


@pytest.mark.parametrize(("before", "after"), [(["ab", "c"], ["a", "bc"]), (["a', 'b", "c"], ["a", "b', 'c"])])
def test_words_that_move_between_prompts_are_a_change(before: list[str], after: list[str], tmp_path: Path) -> None:
    """The same characters in a row, cut elsewhere."""
    Conditions(Recorder(), [Prompt(text) for text in before], "", tmp_path)
    prompts = [Prompt(text) for text in after]
    codec = Recorder()
    assert same_rows(Conditions(codec, prompts, "", tmp_path), prompts) and len(codec.texts) == 1


# ---------------------------------------------------------------- first frames


def pictures(folder: Path, *names: str) -> list[Prompt]:
    for name in names:
        (folder / name).write_bytes(name.encode())
    return [Prompt(f"what is in {name}", folder / name) for name in names]


def test_only_first_frames_that_fit_a_bucket_are_eligible(tmp_path: Path) -> None:
    prompts = pictures(tmp_path, "wide.png", "tall.png", "wide-tall.png")
    codec = Recorder(takes_images=True)
    cache = Conditions(codec, prompts, "", tmp_path / "cache")
    assert [list(cache.eligible(bucket)) for bucket in range(3)] == [[0, 2], [], [1, 2]]
    assert codec.images == [("wide.png", 0), ("tall.png", 2), ("wide-tall.png", 0), ("wide-tall.png", 2)]
    for bucket in (0, 2):
        for i in cache.eligible(bucket):
            row = cache.row(i, bucket)
            image = prompts[i].image
            assert image and torch.equal(row.pop("image"), image_row(image, bucket))
            assert same(row, Recorder().encode_text([prompts[i].text])[0])
    sizes = tuple(Size(weight=weight) for weight in (0.5, 0.3, 0.2))
    config = resolve("nano-i2v", {"teacher.sizes": [size.model_dump() for size in sizes]})
    assert bucket_odds(config, cache) == [0.5, 0.0, 0.2]
    assert bucket_odds(config, None) == [0.5, 0.3, 0.2]


def test_without_first_frames_every_prompt_is_eligible_in_every_bucket(tmp_path: Path) -> None:
    cache = Conditions(Recorder(), MANY, "", tmp_path)
    assert [list(cache.eligible(bucket)) for bucket in range(3)] == [list(range(len(MANY)))] * 3


def test_a_changed_picture_is_encoded_again_with_its_file_only(tmp_path: Path) -> None:
    """The name stays; the bytes of one picture in the second file change."""
    prompts = pictures(tmp_path, *(f"{i}-wide.png" for i in range(CHUNK + 2)))
    Conditions(Recorder(takes_images=True), prompts, "", tmp_path / "cache")
    image = prompts[CHUNK].image
    assert image
    image.write_bytes(b"another picture")
    codec = Recorder(takes_images=True)
    cache = Conditions(codec, prompts, "", tmp_path / "cache")
    assert codec.images == [(f"{CHUNK}-wide.png", 0), (f"{CHUNK + 1}-wide.png", 0)]
    assert torch.equal(cache.row(CHUNK, 0)["image"], image_row(image, 0))


def test_a_missing_first_frame_is_named_before_anything_is_encoded(tmp_path: Path) -> None:
    codec = Recorder(takes_images=True)
    prompts = [*pictures(tmp_path, "wide.png"), Prompt("a lonely text")]
    with pytest.raises(UserError, match="^prompts: the model needs a picture with every prompt; 'a lonely t"):
        Conditions(codec, prompts, "", tmp_path / "cache")
    assert codec.texts == [] and not (tmp_path / "cache").exists()


def test_a_model_that_takes_no_first_frame_ignores_the_pictures(tmp_path: Path) -> None:
    """Whether they are there or not: a file made for image-to-video serves text-to-video."""
    prompts = [Prompt("a fox", tmp_path / "absent.png"), Prompt("a hen")]
    codec = Recorder()
    cache = Conditions(codec, prompts, "", tmp_path / "cache")
    assert same_rows(cache, prompts) and codec.images == []


def test_a_real_first_frame_must_have_the_shape_of_a_bucket(tmp_path: Path) -> None:
    """32 x 48 pixels: 3:2 and half or double of it fit, and 5 % beside it; a square does not."""
    sizes = (Size(num_frames=5, height=32, width=48), Size(num_frames=5, height=48, width=32))
    codec = WanCodec(WanTeacher(path="nano", first_frame=True, sizes=sizes), torch.device("cpu"))
    paths = []
    for width, height in ((48, 32), (96, 64), (32, 48), (100, 64), (64, 64)):
        paths.append(tmp_path / f"{width}x{height}.png")
        Image.new("RGB", (width, height)).save(paths[-1])
    assert [codec.fits(path) for path in paths[:4]] == [[0], [0], [1], [0]]
    with pytest.raises(UserError, match=r"64x64.png: a picture of 64x64 fits none of the sizes"):
        codec.fits(paths[4])


def test_a_first_frame_is_fitted_and_encoded_as_a_viewer_shows_it(tmp_path: Path) -> None:
    """A telephone stores an upright picture on its side, with EXIF's word 6; the portrait's bucket is its own."""
    sizes = (Size(num_frames=5, height=32, width=48), Size(num_frames=5, height=48, width=32))
    codec = WanCodec(WanTeacher(path="nano-i2v", sizes=sizes), torch.device("cpu"))
    pixels = torch.rand(96, 64, 4, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    shown = Image.fromarray(pixels[..., :3])
    shown.save(tmp_path / "shown.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    shown.rotate(90, expand=True).save(tmp_path / "telephone.png", exif=exif)
    hidden = Image.fromarray(pixels)
    hidden.save(tmp_path / "hidden.png")
    Image.alpha_composite(Image.new("RGBA", hidden.size, "white"), hidden).convert("RGB").save(tmp_path / "white.png")
    rows = {
        name: codec.encode_picture("", tmp_path / f"{name}.png", 1)
        for name in ("shown", "telephone", "hidden", "white")
    }
    assert all(codec.fits(tmp_path / f"{name}.png") == [1] for name in rows)
    assert same(rows["telephone"], rows["shown"]) and same(rows["hidden"], rows["white"])
    assert not same(rows["shown"], rows["white"])


# ---------------------------------------------------------------- damage


def file_of(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"{name}-*.safetensors")
    return path


def test_a_damaged_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    """The last byte belongs to the tensor that the file holds last; all others are still served."""
    Conditions(Recorder(), MANY, "", tmp_path)
    path = file_of(tmp_path, "00001")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    codec = Recorder()
    cache = Conditions(codec, MANY, "", tmp_path)
    assert codec.texts == [], "the file is as long as it should be"
    damaged = []
    for i in range(len(MANY)):
        try:
            cache.row(i, 0)
        except UserError as error:
            damaged.append(i)
            assert str(error).startswith(f"{path}: {i}.") and str(error).endswith("is damaged; remove the file")
    assert len(damaged) == 1 and damaged[0] // CHUNK == 1
    path.unlink()
    assert same_rows(Conditions(Recorder(), MANY, "", tmp_path), MANY)


@pytest.mark.parametrize("content", [b"", b"no tensors", "half", "header"])
def test_a_file_that_is_no_good_is_written_again(content: bytes | str, tmp_path: Path) -> None:
    Conditions(Recorder(), MANY, "", tmp_path)
    path = file_of(tmp_path, "00000")
    whole = path.read_bytes()
    foreign = {"half": whole[: len(whole) // 2], "header": whole.replace(b"hashes", b"dashes")}
    path.write_bytes(foreign[content] if isinstance(content, str) else content)
    codec = Recorder()
    cache = Conditions(codec, MANY, "", tmp_path)
    assert codec.texts == [[prompt.text for prompt in MANY[:CHUNK]]]
    assert path.read_bytes() == whole and same_rows(cache, MANY)


# ---------------------------------------------------------------- a folder that runs share


def test_the_encoder_is_freed_once_all_is_encoded(tmp_path: Path) -> None:
    codec = Recorder()
    Conditions(codec, MANY, "", tmp_path)
    assert codec.freed == 1 and len(codec.texts) == 4


def test_runs_with_other_prompts_and_encoders_do_not_disturb_each_other(tmp_path: Path) -> None:
    """The first has read nothing yet when the others fill the same folder; then all go on from it."""
    others = [Prompt(f"other {i}") for i in range(CHUNK)]
    first = Conditions(Recorder("one"), MANY, "", tmp_path)
    second = Conditions(Recorder("one"), others, "blurry", tmp_path)
    third = Conditions(Recorder("two"), MANY, "", tmp_path)
    assert same_rows(first, MANY) and same_rows(second, others) and same_rows(third, MANY, "two")
    codecs = [Recorder("one"), Recorder("one"), Recorder("two")]
    for codec, prompts, negative in zip(codecs, (MANY, others, MANY), ("", "blurry", ""), strict=True):
        Conditions(codec, prompts, negative, tmp_path)
    assert all(codec.texts == [] for codec in codecs)


SMALL = {
    "iterations": 1, "batch_size": 2, "fake.updates": 1, "plan.steps": 2, "plan.phases": 2, "sample_every": None,
    "generator.lora.rank": 2, "fake.weights": "lora",
}  # fmt: skip


def small_run(folder: Path, **overrides: Any) -> Config:
    """A run of nano's, of one update a phase."""
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("a seven\na handwritten digit\nseven\n")
    return resolve("nano-t2i", {"prompts": str(prompts)} | SMALL | overrides)


def tiny_run(folder: Path, terminated_at: int = -1) -> tuple[Config, tuple[TinyWan, TinyCodec], list[str]]:
    """Such a run of a tiny random Wan, its model and codec, and the prompts that the codec will be asked to encode.

    terminated_at: once it has encoded so many, the process gets a SIGTERM.
    """
    asked: list[str] = []

    class Codec(TinyCodec):
        def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
            asked.extend(prompts)
            if len(asked) == terminated_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().encode_text(prompts)

    return small_run(folder).model_copy(update={"teacher": OwnTeacher()}), (TinyWan(), Codec()), asked


def test_two_runs_that_share_a_cache_encode_once(tmp_path: Path) -> None:
    """And train on what a run with a folder of its own trains on."""
    runs = []
    for name, cache, expected in (("a", "shared", 4), ("b", "shared", 0), ("c", None, 4)):
        config, own, asked = tiny_run(tmp_path)
        runs.append(distill(config, tmp_path / name, quiet=True, own=own, cache=cache and tmp_path / cache))
        assert len(asked) == expected
    assert [(run / "conditions").exists() for run in runs] == [False, False, True]
    experts = [(run / "experts" / "phase-2.safetensors").read_bytes() for run in runs]
    assert experts[0] == experts[1] == experts[2]


def test_a_signal_ends_the_encoding_between_two_files(tmp_path: Path) -> None:
    """The file at hand is finished, and kept."""
    (tmp_path / "prompts.txt").write_text("".join(f"seven {i}\n" for i in range(2 * CHUNK + 5)))
    config, own, asked = tiny_run(tmp_path, terminated_at=2 * CHUNK)
    with pytest.raises(Stopped, match="stopped while prompts were encoded; the same command goes on") as stopped:
        distill(config, tmp_path / "run", quiet=True, own=own)
    saved = list((tmp_path / "run" / "conditions").glob("*.safetensors"))
    assert stopped.value.number == signal.SIGTERM and len(asked) == 2 * CHUNK and len(saved) == 2
    assert not (tmp_path / "run" / "experts").exists()
    distill(config, tmp_path / "run", quiet=True, own=own)
    assert len(asked) == 2 * CHUNK + 5 + 1  # the rest, and the negative prompt
    assert len(list((tmp_path / "run" / "conditions").glob("*.safetensors"))) == 4
    assert (tmp_path / "run" / "experts" / "phase-2.safetensors").exists()


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("already", [False, True])
def test_each_process_of_a_group_encodes_a_share_of_the_files(already: bool, tmp_path: Path) -> None:
    """Three files of prompts and one of the negative prompt; or none, where all is there already."""
    if already:
        Conditions(Recorder(), MANY, "", tmp_path / "cache")

    def action(rank: int) -> None:
        codec = Recorder()
        cache = Conditions(codec, MANY, "", tmp_path / "cache")
        first = [[prompt.text for prompt in MANY[i : i + CHUNK]] for i in range(0, len(MANY), CHUNK)]
        assert codec.texts == ([] if already else [first[0], first[2]] if rank == 0 else [first[1], [""]])
        assert same_rows(cache, MANY) and same(cache.negative, Recorder().encode_text([""])[0])

    assert group(2, action) == [0, 0]


def test_a_run_waits_for_another_one_that_fills_the_folder_and_can_be_stopped_meanwhile(tmp_path: Path) -> None:
    with wait_for_lock(tmp_path / ".lock"), pytest.raises(ZeroDivisionError):
        times = iter([None, None, 0])
        Conditions(Recorder(), MANY, "", tmp_path, lambda: 1 / 0 if next(times) == 0 else None)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_of_a_group_each_process_reads_a_share_of_the_first_frames(tmp_path: Path) -> None:
    prompts = pictures(tmp_path, "a.png", "b.png", "c.png")

    def action(rank: int) -> None:
        read, read_bytes = [], Path.read_bytes
        Path.read_bytes = lambda path: (read.append(path.name), read_bytes(path))[1]
        assert picture_hashes(prompts) == [blake2b(name) for name in (b"a.png", b"b.png", b"c.png")]
        assert read == (["a.png", "c.png"] if rank == 0 else ["b.png"])

    def blake2b(data: bytes) -> str:
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    assert group(2, action) == [0, 0]
    assert picture_hashes([Prompt("a fox")]) == [""]


# ---------------------------------------------------------------- what a file of weights holds


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read in whole for their hash, some time after they were written."""
    read, digest, now = [], hashlib.file_digest, time.time

    def spy(file: Any, *more: Any) -> Any:
        read.append(Path(file.name).name)
        return digest(file, *more)

    monkeypatch.setattr(hashlib, "file_digest", spy)
    monkeypatch.setattr(time, "time", lambda: now() + 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return read


def encoder_of(folder: Path, size: int = REMEMBERED) -> Path:
    """A file of weights in a pipeline's folder."""
    path = folder / "text_encoder" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(size))
    return path


def fingerprint(folder: Path) -> str:
    return Source(WanTeacher(path=str(folder))).fingerprint(["text_encoder"])


@pytest.mark.parametrize("at", [0, REMEMBERED // 2, REMEMBERED - 1])
def test_an_encoder_that_is_changed_anywhere_has_another_fingerprint(at: int, tmp_path: Path) -> None:
    path = encoder_of(tmp_path)
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\1")
    assert fingerprint(tmp_path) != before


def test_a_file_of_weights_is_read_again_only_once_it_was_touched(hashed: list[str], tmp_path: Path) -> None:
    """In place, of the same size, and with its old time put back; a link is the same file."""
    path = encoder_of(tmp_path / "base")
    before = fingerprint(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    assert fingerprint(tmp_path / "base") == fingerprint(tmp_path / "link") == before
    assert hashed == ["model.safetensors"]
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(b"\1")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and fingerprint(tmp_path / "base") != before
    assert hashed == ["model.safetensors"] * 2


@pytest.mark.parametrize("fault", ["nowhere to keep it", "damaged", "just written"])
def test_a_hash_that_cannot_be_relied_on_is_made_again(
    fault: str, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder_of(tmp_path / "base")
    if fault == "nowhere to keep it":
        (tmp_path / "xdg").write_text("a file")
    if fault == "just written":
        monkeypatch.setattr(time, "time", lambda: 0.0)
    before = fingerprint(tmp_path / "base")
    for note in (tmp_path / "xdg").rglob("*.json"):
        note.write_bytes(b'{"file"')
    assert fingerprint(tmp_path / "base") == before and len(hashed) == 2


# ---------------------------------------------------------------- a run whose inputs have moved


def resharded(base: Path, folder: Path) -> Path:
    """A copy of a base, with its transformer in two files and in the words of another version of diffusers."""
    shutil.copytree(base, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors, where = load_file(file), {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, file.with_name(f"part-{i}.safetensors"), {"format": "pt"})
        where |= dict.fromkeys(names, f"part-{i}.safetensors")
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))  # a variant beside it, which is not loaded
    (file.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    config = json.loads((file.parent / "config.json").read_text())
    (file.parent / "config.json").write_text(json.dumps(config | {"_diffusers_version": "1.0", "_name_or_path": "x"}))
    return folder


def test_a_base_is_the_same_however_it_is_cut_and_reached_and_another_once_a_tensor_is(tmp_path: Path) -> None:
    def held(path: Path | str) -> str:
        return Source(WanTeacher(path=str(path))).contents()

    copy = resharded(NANO, tmp_path / "copy")
    assert held("nano") == held(NANO) == held(copy) != held("nano-moe")
    assert held(nudged(copy)) != held("nano")


def nudged(folder: Path) -> Path:
    """The resharded base itself, a number of it changed."""
    file = folder / "transformer" / "part-1.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    return folder


def test_a_run_goes_on_where_prompts_base_and_initial_experts_have_moved_to(tmp_path: Path) -> None:
    """To the byte, and only with the same."""
    first = distill(small_run(tmp_path), tmp_path / "first", quiet=True)

    def config(**places: object) -> Config:
        here = {"init_experts": first} | places
        return small_run(tmp_path, checkpoint_every=1, **{field: str(place) for field, place in here.items()})

    whole, run, data = distill(config(), tmp_path / "whole", quiet=True), tmp_path / "run", tmp_path / "data"
    with killed_after(1, 1):
        distill(config(), run, quiet=True)
    words = (tmp_path / "prompts.txt").read_text()
    (tmp_path / "prompts.txt").unlink()
    shutil.copytree(first, data / "first")
    (data / "prompts.txt").write_text(words)
    (data / "others.txt").write_text(words.replace("digit", "number"))
    moved = {"prompts": data / "prompts.txt", "init_experts": data / "first"}
    moved["teacher.path"] = resharded(NANO, data / "nano")

    def refused(message: str, **places: object) -> None:
        with pytest.raises(UserError, match=rf"^{message} is not what it was when {run} was begun"):
            distill(config(**moved | places), run, quiet=True)

    refused(f"prompts: {data}/others.txt", prompts=data / "others.txt")
    refused(f"init_experts: {whole}", init_experts=whole)
    other = nudged(resharded(NANO, data / "other"))
    refused(f"teacher.path: {other}", **{"teacher.path": other})
    assert distill(config(**moved), run, quiet=True) == run
    for phase in (1, 2):
        assert RunFolder(run).expert_path(phase).read_bytes() == RunFolder(whole).expert_path(phase).read_bytes()
    assert RunFolder(run).config() == config(**moved)

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (data / "copy.txt").write_text(words)
    assert distill(config(**moved | {"prompts": data / "copy.txt"}), run, quiet=True) == run  # finished: left as it is
    refused(f"prompts: {data}/others.txt", prompts=data / "others.txt")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------- prompts that are too long

WORDS = ["digit"] * 20  # a token each; the end is one more


def long_prompts(folder: Path) -> str:
    """Of 15 tokens with the end, 16, 17 and 21."""
    (folder / "long.txt").write_text("".join(" ".join(WORDS[:count]) + "\n" for count in (14, 15, 16, 20)))
    return str(folder / "long.txt")


def test_prompts_that_are_cut_off_are_counted_in_a_warning(tmp_path: Path) -> None:
    config = resolve("nano-t2i", {"prompts": long_prompts(tmp_path)})
    message = "prompts: 2 of 4 are longer than the text encoder takes, and are cut off"
    with pytest.warns(UserWarning, match=f"^{message}$"):
        _, codec, prompts = prepare(config)
    cache = Conditions(codec, prompts, "", tmp_path / "cache")
    assert [len(cache.row(i, 0)["text"]) for i in range(4)] == [15, 16, 16, 16]
    with pytest.raises(UserError, match=f"^{message}$"):
        prepare(config, strict=True)


def test_of_a_group_one_process_warns_of_prompts_that_are_cut_off() -> None:
    class Short(PlainCodec):
        def too_long(self, prompts: Sequence[str]) -> int:
            return 2

    def action(rank: int) -> None:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            check_prompts(Short(), MANY, strict=False)
        assert len(warned) == (rank == 0)

    assert group(2, action) == [0, 0]


def test_prompts_that_fit_are_no_warning(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(" ".join(WORDS[:15]) + "\n\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prepare(resolve("nano-t2i", {"prompts": str(tmp_path / "short.txt")}), strict=True)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_strict_is_one_line_and_exit_2_with_nothing_written(
    dry: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = ["distill", "nano-t2i", "--output", str(tmp_path / "run"), "--prompts", long_prompts(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["phased-dmd", *command, "--strict", *dry])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["phased-dmd: prompts: 2 of 4 are longer than the text encoder takes, and are cut off"]
