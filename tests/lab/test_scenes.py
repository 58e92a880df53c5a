"""The world of scenes: captions are read back, drawn scenes have their law, and the reader and the measures tell it."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from torch import Tensor

from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import evaluate
from phased_dmd.lab.evaluate.sample_sets import Protocol, sample_sets, world_of
from phased_dmd.lab.evaluate.scene_measures import OF_SPECIFIC, OF_WEAK, scene_statistics
from phased_dmd.lab.evaluate.tables import BETTER, HEADINGS
from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS, SPEEDS, WORDS, DigitClassifier
from phased_dmd.lab.metrics.scene_reader import (
    OUTPUTS,
    SceneReader,
    colour_masks,
    load_reader,
    named_motion,
    places,
    truth,
)
from phased_dmd.lab.metrics.scenes import CELLS, COLOURS, HEIGHT, PANS, WIDTH, Digit, Scene, caption, parse
from phased_dmd.lab.teach.descent import Descent
from phased_dmd.lab.teach.language import build_tokenizer
from phased_dmd.lab.teach.mnist import Digits, load_digits
from phased_dmd.lab.teach.nano import build_vae, normalise, teach
from phased_dmd.lab.teach.narrow import narrow_vae
from phased_dmd.lab.teach.reader import accuracies, teach_scenes_reader
from phased_dmd.lab.teach.scene_batches import clip_batch, draw_captions, draw_scene, leave_out, picture_batch, render
from phased_dmd.lab.teach.variants import teach_moe
from phased_dmd.lab.teach.worlds import COLOURED, DIGITS, TrainingBudget
from phased_dmd.prompts import Prompt, read_prompts
from phased_dmd.recipes import RECIPES, resolve
from phased_dmd.train import distill

DATA = Path(__file__).parents[2] / "data" / "mnist_5k.csv.gz"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = TrainingBudget(
    vae_steps=2, encoder_steps=2, num_images=16, num_clips=8, transformer_steps=3, further_steps=2, switch_steps=(2, 2)
)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def held_out() -> Digits:
    return load_digits(DATA)[1]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of scenes of a step or two a stage."""
    folder = tmp_path_factory.mktemp("taught") / "scenes"
    teach(COLOURED, folder, DATA, 0, TINY, lambda _: None)
    return folder


def drawn(clip: bool, count: int) -> list[Scene]:
    generator = rng()
    labels = torch.randint(10, (count, 3), generator=generator).tolist()
    return [draw_scene(each, clip, generator) for each in labels]


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize("clip", [False, True])
def test_a_caption_is_read_back_whatever_it_names(clip: bool) -> None:
    generator = rng()
    for scene in drawn(clip, 300):
        named = leave_out(scene, clip, generator)
        assert parse(caption(scene, clip)) == scene and scene.is_whole(clip)
        assert parse(caption(named, clip)) == named and named.is_whole(clip) == (named == scene)


def test_captions_are_the_sentences_they_are_meant_to_be() -> None:
    three, seven = Digit("three", "red", "top left", "right", "fast"), Digit("eight", None, "bottom right", "up")
    assert caption(Scene((three, seven), "camera pans left"), True) == (
        "a red three top left moving right fast and an eight bottom right moving up, camera pans left"
    )
    assert caption(Scene((Digit(), Digit(speed="slowly"))), True) == "a digit and a digit moving slowly"
    assert [caption(Scene((Digit(),) * n), False) for n in (0, 2, 3)] == ["some digits", "two digits", "three digits"]
    assert caption(Scene(), True) == "some digits moving"


@pytest.mark.parametrize("text", ["", "a handwritten seven", "a red three", "a three red and a two", "two digits, x"])
def test_other_text_names_no_scene(text: str) -> None:
    with pytest.raises(ValueError, match="names no"):
        parse(text)


def test_captions_are_as_specific_as_they_are_said_to_be() -> None:
    """Three tenths name everything and a tenth nothing, of 2,000: four standard deviations."""
    generator = rng()
    named = [leave_out(scene, True, generator) for scene in drawn(True, 2000)]
    for share, expected in (
        (sum(scene.is_whole(True) for scene in named), 0.3), (named.count(Scene()), 0.1),
    ):  # fmt: skip
        assert share / 2000 == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 2000))


def test_the_longest_caption_fits_and_has_no_unknown_word() -> None:
    tokenizer = build_tokenizer(COLOURED)
    texts = [caption(scene, clip) for clip in (False, True) for scene in drawn(clip, 300)] + ["some digits moving"]
    tokens = [tokenizer(text, truncation=False).input_ids for text in texts]
    assert max(map(len, tokens)) == 31 <= COLOURED.max_tokens
    assert all(tokenizer.unk_token_id not in each for each in tokens)


# ---------------------------------------------------------------- pixels


def test_drawn_attributes_have_their_law() -> None:
    """Each of 2,000 scenes: equal shares, within four standard deviations; colours and cells are each there once."""
    scenes = drawn(True, 2000)
    digits = [digit for scene in scenes for digit in scene.digits]
    lists = [(list(PANS), [scene.pan for scene in scenes]), ([2, 3], [len(scene.digits) for scene in scenes])]
    tables = {"label": WORDS, "colour": COLOURS, "cell": CELLS, "direction": DIRECTIONS, "speed": SPEEDS}
    lists += [(list(table), [getattr(digit, name) for digit in digits]) for name, table in tables.items()]
    for kinds, found in lists:
        share = 1 / len(kinds)
        for kind in kinds:
            spread = math.sqrt(share * (1 - share) / len(found))
            assert found.count(kind) / len(found) == pytest.approx(share, abs=4 * spread), kind
    assert all(len({digit.colour for digit in scene.digits}) == len(scene.digits) for scene in scenes)
    assert all(len({digit.cell for digit in scene.digits}) == len(scene.digits) for scene in scenes)


def test_the_last_digit_is_in_front_and_a_pan_moves_everything(held_out: Digits) -> None:
    """Two digits of all ink in one cell; and digits that stand still in the world move against the camera."""
    ink = torch.ones(1, 3, 28, 28)
    both = tuple(Digit("one", colour, "top left") for colour in ("red", "green"))
    pixels = render(ink, [Scene(both)], rng())[0, :, 0, 8, 12]
    assert torch.allclose(pixels / 2 + 0.5, torch.tensor(COLOURS["green"]), atol=1e-5)
    still = replace(Digit("one", "red", "top left"), direction="right", speed="slowly")
    frames = render(ink, [Scene((still, still), "camera pans right")], rng()).permute(0, 2, 3, 4, 1) / 2 + 0.5
    position, _, _ = places(colour_masks(frames))
    assert position[0, :, 0].diff(dim=0).abs().max() < 0.05, "slowly to the right, as the camera"


# ---------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def untrained() -> SceneReader:
    return SceneReader(DigitClassifier().eval(), DigitClassifier(3, (HEIGHT, WIDTH), OUTPUTS).eval())


@pytest.mark.parametrize(("make", "count"), [(picture_batch, 200), (clip_batch, 60)])
def test_all_but_the_class_is_read_without_a_network(
    make: object, count: int, held_out: Digits, untrained: SceneReader
) -> None:
    pixels, _, scenes = make(held_out, count, rng())  # type: ignore[operator]
    found = accuracies(untrained(pixels.permute(0, 2, 3, 4, 1) / 2 + 0.5), truth(scenes))
    assert min(share for name, share in found.items() if name not in ("label", "all")) > 0.97, found


def test_nothing_is_read_of_an_empty_scene_and_numbers_of_any(untrained: SceneReader) -> None:
    """Grey frames, and noise in all colours, which hides the background."""
    found = untrained(torch.full((2, 9, HEIGHT, WIDTH, 3), 0.1))
    noise = untrained(torch.rand(2, 9, HEIGHT, WIDTH, 3, generator=rng()) * torch.tensor([1.0, 0.0, 0.0]))
    assert not found["present"].any()
    assert all(values.isfinite().all() for each in (found, noise) for values in each.values())


@pytest.mark.parametrize(("make", "count", "kind"), [(picture_batch, 500, "pictures"), (clip_batch, 100, "clips")])
def test_the_shipped_reader_reads_held_out_scenes_as_well_as_it_says(
    make: object, count: int, kind: str, held_out: Digits
) -> None:
    """Within four standard deviations of what was measured on other scenes, and at least what is asked of it."""
    reader, _, said = load_reader()
    assert min(said[kind].values()) > 0.95 and said[kind]["label"] > 0.98
    pixels, _, scenes = make(held_out, count, rng())  # type: ignore[operator]
    found = accuracies(reader(pixels.permute(0, 2, 3, 4, 1) / 2 + 0.5), truth(scenes))
    for name, share in found.items():
        assert share >= said[kind][name] - 4 * math.sqrt(max(said[kind][name] * (1 - said[kind][name]), 0.001) / count)


def readings_of(scenes: list[Scene], clip: bool) -> dict[str, Tensor]:
    """Returns what a reader without error reads."""
    true = truth(scenes)
    found = {name: true[name].clamp(min=0) for name in ("label", "cell")} | {"present": true["present"]}
    if clip:
        directions, speeds = torch.tensor(list(DIRECTIONS.values())), torch.tensor(list(SPEEDS.values()))
        found["velocity"] = directions[true["direction"].clamp(min=0)] * speeds[true["speed"].clamp(min=0), None]
        found["pan"] = torch.tensor(list(PANS.values()))[true["pan"]]
        assert torch.equal(named_motion(found)["pan"], true["pan"])
    return found


@pytest.mark.parametrize("clip", [False, True])
def test_the_truth_has_the_values_that_are_said_of_it(clip: bool) -> None:
    """Of 4,000 true scenes: the KL of a histogram of n over k kinds is (k - 1) / 2 n at the law."""
    scenes, keep = drawn(clip, 4000), torch.arange(4000)
    found = readings_of(scenes, clip)
    specific = scene_statistics(found, [caption(scene, clip) for scene in scenes])
    weak = scene_statistics(found, [caption(Scene(), clip)] * 4000)
    assert specific.keys() | weak.keys() <= HEADINGS.keys()
    if clip:
        assert (specific.keys(), weak.keys()) == (OF_SPECIFIC.keys(), OF_WEAK.keys())
    assert {name: statistic(keep) for name, statistic in specific.items()} == dict.fromkeys(specific, 1.0)
    for name, statistic in weak.items():
        assert statistic(keep) == pytest.approx(OF_WEAK[name], abs=0.01), name
    assert weak["law_kl"](keep) == pytest.approx(sum(weak[name](keep) for name in weak if name.endswith("_kl")) / 2)
    assert BETTER["law_kl"] == "lower" and BETTER["places_right"] == "higher"


def test_what_is_wrong_is_counted_once_where_it_is() -> None:
    """Of four clips: a class, a direction and a pan are wrong in one each, and in the last a digit is not asked for."""
    scenes = [scene for scene in drawn(True, 40) if len(scene.digits) == 2][:4]
    texts, found = [caption(scene, True) for scene in scenes], readings_of(scenes, True)
    first = found["present"].int().argmax(1)
    found["label"][0, first[0]] += 1
    found["velocity"][1, first[1]] *= -1
    found["pan"][2] += 0.6 if found["pan"][2] <= 0 else -0.6
    found["present"][3] |= (~found["present"][3]).cumsum(0) == 1
    values = {name: statistic(torch.arange(4)) for name, statistic in scene_statistics(found, texts).items()}
    assert values["faithfulness"] == 0 and values["pan_right"] == 0.75
    assert values["digits_right"] == values["directions_right"] == 7 / 8
    assert values["colours_right"] == values["places_right"] == values["speeds_right"] == 1


def test_a_collapse_is_as_far_from_the_law_as_it_can_be() -> None:
    scenes = [drawn(True, 1)[0]] * 10
    weak = scene_statistics(readings_of(scenes, True), ["some digits moving"] * 10)
    assert weak["pan_kl"](torch.arange(10)) == pytest.approx(math.log(3))
    nothing = readings_of(scenes, True) | {"present": torch.zeros(10, 4, dtype=torch.bool)}
    weak = scene_statistics(nothing, ["some digits moving"] * 10)
    assert weak["class_kl"](torch.arange(10)) == pytest.approx(math.log(10))
    assert weak["possible_count"](torch.arange(10)) == weak["world_speed"](torch.arange(10)) == 0
    assert scene_statistics(nothing, ["a fox"] * 10) == scene_statistics(nothing, ["a digit and a one"] * 10) == {}


# ---------------------------------------------------------------- sets and recipes


@pytest.mark.parametrize("recipe", ["scenes-t2i", "scenes-t2v", "scenes-moe"])
def test_scenes_are_evaluated_on_prompts_that_no_run_is_trained_on(recipe: str) -> None:
    config = resolve(recipe, {})
    clip = recipe != "scenes-t2i"
    assert world_of(config) == "scenes" and world_of(resolve("nano-i2v", {})) == "digits"
    assert world_of(resolve(recipe, {"teacher.path": "elsewhere"})) is None
    weak, specific = sample_sets(config, Protocol(samples=60), False)
    assert set(weak.prompts) == {Prompt("some digits moving" if clip else "some digits")}
    trained = read_prompts(config.prompts or "")
    assert all(parse(prompt.text).is_whole(clip) for prompt in specific.prompts)
    assert len(trained) == 200 and len(set(specific.prompts)) == 48
    assert not set(trained) & set(specific.prompts)
    assert sum(parse(prompt.text).is_whole(clip) for prompt in trained) == pytest.approx(60, abs=26)


def test_the_scenes_recipes_are_nanos_but_for_the_world() -> None:
    for name in ("t2i", "t2v"):
        scenes, nano = RECIPES[f"scenes-{name}"](), RECIPES[f"nano-{name}"]()
        same = {"recipe": nano.recipe, "teacher": nano.teacher, "prompts": nano.prompts}
        assert scenes.model_copy(update=same) == nano
    moe, clips = RECIPES["scenes-moe"](), RECIPES["scenes-t2v"]()
    assert moe.method == "phased-all" and moe.updates == clips.updates
    assert moe.teacher == clips.teacher.model_copy(update={"path": "scenes-moe"})


# ---------------------------------------------------------------- teaching


def test_every_word_is_told_what_the_digit_is_like_that_it_belongs_to() -> None:
    """Word by word of the tokenizer's own, against what the caption's parse names; all tokens, the end too, know the
    pan.
    """
    captions, answers = draw_captions(200, 32, rng())
    tokens = build_tokenizer(COLOURED)(captions)["input_ids"]
    tables = (WORDS, COLOURS, CELLS, DIRECTIONS, SPEEDS)
    for text, ids, found in zip(captions, tokens, answers.tolist(), strict=True):
        scene = parse(text)
        pan = 0 if scene.pan is None else 1 + list(PANS).index(scene.pan)
        assert [row[-1] for row in found] == [pan] * len(ids) + [-1] * (32 - len(ids)), text
        expected = []
        for place, (phrase, digit) in enumerate(
            zip(text.partition(", ")[0].split(" and "), scene.digits, strict=False), 1
        ):
            named = zip(tables, vars(digit).values(), strict=True)
            row = [0 if value is None else 1 + list(table).index(value) for table, value in named]
            expected += [[*row, place]] * len(phrase.split()) + [[-1] * 6]
        if all(digit == Digit() for digit in scene.digits):
            expected = []
        assert [row[:-1] for row in found] == (expected + [[-1] * 6] * 32)[:32], text


def test_the_teachers_of_scenes_can_be_taught_again(taught: Path, tmp_path: Path) -> None:
    """Every stage for a step or two, and stock pipelines that load and sample; the second's networks begin as the
    first's own, and each has moved.
    """
    moe = tmp_path / "scenes-moe"
    teach_moe(replace(COLOURED, home=taught), moe, DATA, 0, TINY, lambda _: None)
    for folder in (taught, moe):
        pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        clip = pipeline(
            ["a red three top left and a blue seven bottom right"], height=HEIGHT, width=WIDTH, num_frames=9,
            num_inference_steps=2, max_sequence_length=32, output_type="pt",
        ).frames  # fmt: skip
        assert clip.shape == (1, 9, 3, HEIGHT, WIDTH) and clip.isfinite().all()
        assert not (folder / "unfinished").exists()
    first, second = (load_file(moe / part / WEIGHTS) for part in ("transformer", "transformer_2"))
    for name, tensor in load_file(taught / "transformer" / WEIGHTS).items():
        moved = [(network[name].float() - tensor.float()).abs().max() for network in (first, second)]
        assert max(moved) < 0.01, f"{name}: two steps from the teacher's"
    assert any((first[name] != second[name]).any() for name in first)


def test_an_embedded_teacher_that_is_not_there_names_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phased_dmd.models.source.ASSETS", tmp_path)
    with pytest.raises(UserError, match=rf"`phased-dmd teach scenes --output {tmp_path}/scenes` makes it"):
        distill(resolve("scenes-t2i"), tmp_path / "run", quiet=True)


def test_a_run_on_scenes_is_evaluated_by_their_measures(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher and a reader of a few steps in the place of those that ship: all measures are there."""
    for name in ("HELD_OUT_PICTURES", "HELD_OUT_CLIPS"):
        monkeypatch.setattr(f"phased_dmd.lab.teach.reader.{name}", 12)
    said: list[str] = []
    teach_scenes_reader(tmp_path, DATA, 0, replace(TINY, reader_steps=(2, 2)), said.append)
    assert "cell 1.0000" in said[0] and "pan 1.0000" in said[1]
    monkeypatch.setattr("phased_dmd.models.source.ASSETS", taught.parent)
    monkeypatch.setattr("phased_dmd.lab.metrics.scene_reader.WEIGHTS", tmp_path / "scenes.safetensors")
    small = {"iterations": 1, "batch_size": 2, "plan.phases": 2, "teacher.base_steps": 3, "generator.lora.rank": 2}
    run = distill(resolve("scenes-t2v", small | {"fake.updates": 1}), tmp_path / "run", quiet=True)
    found = evaluate([run], Protocol(samples=8))[str(run)]
    assert found["nets"]["features"] == "scenes" and found["nets"]["reader"].startswith("scenes, ")
    for name, expected in (("weak", OF_WEAK), ("specific", OF_SPECIFIC)):
        for row in found["sets"][name]["rows"].values():
            assert expected.keys() | {"frechet_features", "frechet_real", "optical_flow"} <= row.keys()
            assert all(math.isfinite(measured["value"]) for measured in row.values())


@torch.no_grad()
def test_a_narrowed_vae_is_the_vae_but_for_what_its_channels_leave_out(held_out: Digits) -> None:
    """With all channels it decodes what the VAE decodes; with few, what is nearest to it that so many can hold."""
    torch.manual_seed(0)
    vae = build_vae(COLOURED).eval()
    for parameter in vae.post_quant_conv.parameters():
        parameter.normal_()  # a matrix that changes much, and a bias: borders are padded with zeros after it
    clips = [draw(held_out, 6, rng())[0] for draw in (picture_batch, clip_batch)]
    read = [vae.post_quant_conv(vae.encode(x, return_dict=False)[0].mode()) for x in clips]
    matrix = torch.cat([each.transpose(0, 1).flatten(1) for each in read], 1)
    for channels in (16, 4):
        narrow = narrow_vae(vae, clips, channels)
        latents = [narrow.encode(x, return_dict=False)[0] for x in clips]
        assert all((each.std < 1e-6).all() for each in latents)
        kept = torch.cat([each.mode().transpose(0, 1).flatten(1) for each in latents], 1)
        left_out = matrix.square().sum() - kept.square().sum()
        assert left_out / matrix.square().sum() == pytest.approx(
            float(torch.linalg.svdvals(matrix)[channels:].square().sum() / matrix.square().sum()), abs=1e-5
        )
        normal = torch.cat([normalise(narrow, each.mode()).transpose(0, 1).flatten(1) for each in latents], 1)
        assert normal.mean(1).abs().max() < 1e-4 and normal.var(1).mean() == pytest.approx(1, rel=1e-3)
        if channels == 16:
            for x, each in zip(clips, latents, strict=True):
                whole = vae.decode(vae.encode(x, return_dict=False)[0].mode(), return_dict=False)[0]
                torch.testing.assert_close(narrow.decode(each.mode(), return_dict=False)[0], whole, atol=1e-4, rtol=0)


class StoppedError(Exception):
    pass


FOUR_STEPS = replace(TINY, vae_steps=4, transformer_steps=4, further_steps=4)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "nano"
    teach(DIGITS, folder, DATA, 0, FOUR_STEPS, lambda _: None)
    return folder


@pytest.mark.parametrize("stopped_in", [4, 8, 12])
def test_teaching_goes_on_where_it_was_stopped(
    stopped_in: int, never_stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after every second step and stopped in the fourth of a stage, it ends with equal bytes."""
    monkeypatch.setattr("phased_dmd.lab.teach.descent.SAVED_EVERY", 2)
    step = Descent.step
    steps = itertools.count(1)

    def stopped(descent: Descent, loss: Tensor) -> None:
        if next(steps) == stopped_in:
            raise StoppedError
        step(descent, loss)

    monkeypatch.setattr(Descent, "step", stopped)
    with pytest.raises(StoppedError):
        teach(DIGITS, tmp_path / "parts", DATA, 0, FOUR_STEPS, lambda _: None)
    teach(DIGITS, tmp_path / "parts", DATA, 0, FOUR_STEPS, lambda _: None)
    assert next(steps) == 4 + 4 + 4 + 3, "two steps of the one that was stopped are made again"
    for whole in never_stopped.rglob("*.safetensors"):
        assert whole.read_bytes() == (tmp_path / "parts" / whole.relative_to(never_stopped)).read_bytes(), whole
