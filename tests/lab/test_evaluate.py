"""`evaluate`: intervals against closed forms, the base against itself, the cache, folders of files, real pipelines."""

import json
import re
import sys
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import PICTURES, build, teacher
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_metrics import dino
from tiny import draw, teacher_alone
from torch import Tensor

from phased_dmd.config import Config, Fake, Generator, Lora, Plan
from phased_dmd.config.teacher import AnalyticTeacher
from phased_dmd.errors import UserError
from phased_dmd.export import export
from phased_dmd.lab.evaluate import FLOOR_SEEDS, Protocol, evaluate, parse_seeds, table
from phased_dmd.lab.evaluate.compare import compare_media
from phased_dmd.lab.evaluate.instruments import Readings, load_instruments, whole_prompts
from phased_dmd.lab.evaluate.measures import Reference, clip_features, measurements, mixture_statistics
from phased_dmd.lab.evaluate.measures import statistics as measures_of
from phased_dmd.lab.evaluate.sample_sets import SampleSet, deal_out, group_by_seed, sample_sets
from phased_dmd.lab.evaluate.samples import Base, SampleFolder, SampleSource, weights_hash
from phased_dmd.lab.evaluate.tables import FINER, WIDTH, show, title
from phased_dmd.lab.metrics.distances import frechet, moments
from phased_dmd.lab.metrics.features import load_features
from phased_dmd.lab.metrics.intervals import interval, jackknife_half_width, leave_one_out
from phased_dmd.lab.reproduce.workers import PlannedRun
from phased_dmd.media import read_media, save_clip, save_image, strip, to_images
from phased_dmd.models.analytic import AnalyticModel, PlainCodec
from phased_dmd.networks.build import build_system
from phased_dmd.prompts import Prompt
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load
from phased_dmd.sampling.sampler import Sampler
from phased_dmd.train import distill


def chosen(prompts: int, seeds: int) -> SampleSet:
    """Prompt-major, every prompt with seeds 0, 1, ...; left out are the seeds."""
    texts = [Prompt(f"prompt {i}") for i in range(prompts) for _ in range(seeds)]
    return SampleSet("s", "", texts, list(range(seeds)) * prompts, torch.arange(seeds).repeat(prompts))


def test_few_decoded_clips_are_held_however_many_are_measured(tmp_path: Path) -> None:
    """Of twelve clips that are decoded two at a time never more than those, and the two that take their names."""
    held, most = [0], [0]

    def pixels(indices: Sequence[int]) -> Tensor:
        clips = torch.rand(len(indices), 5, 32, 32, 3)
        held[0] += len(clips)
        most[0] = max(most[0], held[0])
        weakref.finalize(clips, freed, len(clips))
        return clips

    def freed(count: int) -> None:
        held[0] -= count

    asked = SampleSet("s", "", [Prompt("a seven")] * 12, list(range(12)), deal_out(12))
    tools = load_instruments(Protocol(features="digits"), None, clips=True)
    sources = {name: SampleSource(pixels, size=2, fps=16.0, calls=4, seconds=1.0) for name in ("base", "ours")}
    compare_media(sources, asked, None, tools, tmp_path, {})
    assert 2 <= most[0] <= 4 and held[0] == 0


def test_the_jackknife_of_a_mean_is_students_interval() -> None:
    values = draw(40, seed=1, dtype=torch.float64)
    groups = torch.arange(40) % 8
    value, without = leave_one_out(lambda keep: float(values[keep].mean()), groups)
    known = interval([float(values[groups == g].mean()) for g in range(8)])
    assert value == pytest.approx(known["mean"], rel=1e-12)
    assert jackknife_half_width(without) == pytest.approx(known["half_width"], rel=1e-9)
    assert jackknife_half_width(without[:2]) is None


def test_the_jackknifes_interval_holds_the_truth_as_often_as_it_says() -> None:
    """The variance of normal samples, which is no mean of theirs: 400 sets of 200, in 10 groups."""
    held, groups = 0, deal_out(200)
    for seed in range(400):
        x = draw(200, seed=seed, dtype=torch.float64)
        value, without = leave_one_out(lambda keep, x=x: float(x[keep].var()), groups)
        held += abs(value - 1) <= (jackknife_half_width(without) or 0)
    assert 0.91 < held / 400 < 0.98


def test_groups_are_of_one_size_and_hold_every_prompt_alike() -> None:
    """1000 samples go round ten digits, and 160 round ten digits in each of eight moves, whose flow has no spread."""
    assert deal_out(1000).bincount().tolist() == [100] * 10
    assert sorted(deal_out(4).tolist()) == [0, 1, 2, 3]
    for of_prompt in (torch.arange(1000) % 10, torch.arange(160) % 80 // 10):
        groups = deal_out(len(of_prompt))
        _, without = leave_one_out(lambda keep, x=of_prompt: float(x[keep].double().mean()), groups)
        assert jackknife_half_width(without) == pytest.approx(0, abs=1e-12)


def test_seeds_are_the_groups_where_every_prompt_has_the_same_three_or_more() -> None:
    ids = torch.arange(3).repeat_interleave(4)
    assert group_by_seed(ids, [0, 1, 2, 3] * 3).tolist() == [0, 1, 2, 3] * 3
    assert group_by_seed(torch.zeros(1000, dtype=torch.long), range(1000)).bincount().tolist() == [100] * 10
    assert group_by_seed(torch.arange(220), [42] * 220).bincount().tolist() == [22] * 10
    assert group_by_seed(torch.arange(4).repeat_interleave(2), [0, 1] * 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_base_has_no_gap_to_itself_and_other_samples_of_its_law_have_one_within_the_interval() -> None:
    """Features of 21 prompts with 8 seeds; 40 pairs of independent sets, 95 % intervals."""
    the_set, ids = chosen(21, 8), torch.arange(21).repeat_interleave(8)

    def sampled(seed: int) -> Readings:
        features = draw(21, 6, seed=99)[ids] + draw(168, 6, seed=seed)
        return {"features": features[:, None], "contrast": draw(168, seed=seed + 1000) + 3}

    held = {"pairwise_cosine": 0, "contrast": 0}
    for seed in range(40):
        one, other = sampled(seed), sampled(seed + 500)
        references = {"_paired": Reference(one)}
        rows = {name: measures_of(r, the_set, references, None) for name, r in {"a": one, "b": other, "c": one}.items()}
        found = measurements(rows, "a", the_set.groups)
        assert all(figure["gap"] == 0 and figure["gap_half_width"] == 0 for figure in found["c"].values())
        assert found["c"]["frechet_features_paired"]["value"] == 0
        for name in held:
            held[name] += abs(found["b"][name]["gap"]) <= found["b"][name]["gap_half_width"]
    assert all(count >= 35 for count in held.values()), held


def test_fewer_samples_read_no_larger_distance_and_its_interval_holds_the_truth() -> None:
    """Two Gaussians in 16 dimensions at a distance of 1: 100 samples of each read as 1.9, and 1.0 debiased."""
    shift = torch.zeros(16)
    shift[0] = 1.0
    held, values, plain = 0, [], []
    for seed in range(40):
        a, b = (draw(100, 16, seed=2 * seed + i) for i in range(2))
        the_set = chosen(100, 1)
        the_set = SampleSet("s", "", the_set.prompts, the_set.seeds, deal_out(100))
        statistic = Reference({"features": a[:, None]}).distances({"features": (b + shift)[:, None]})
        plain.append(statistic["frechet_features"](torch.arange(100)))
        found = measurements({"b": statistic}, "b", the_set.groups)["b"]["frechet_features"]
        values.append(found["value"])
        held += abs(found["value"] - 1) <= found["half_width"]
    assert sum(plain) / 40 > 1.6 and sum(values) / 40 == pytest.approx(1, abs=0.12) and held >= 34


def test_a_histograms_divergence_and_entropy_have_no_bias_of_few_samples() -> None:
    """250 exact samples of 25 equal modes: the plug-in reads (25 - 1) / (2 n) = .048, debiased nothing."""
    means = tuple((float(x), float(y)) for x in range(5) for y in range(5))
    exact = AnalyticModel(AnalyticTeacher(means=means, std=0.01), 0, fit=False).exact
    plain, values = [], []
    for seed in range(40):
        points = exact.sample(250, torch.Generator().manual_seed(seed))
        statistic = {"mode_histogram_kl": mixture_statistics(points, exact)["mode_histogram_kl"]}
        plain.append(statistic["mode_histogram_kl"](torch.arange(250)))
        values.append(measurements({"a": statistic}, "a", deal_out(250))["a"]["mode_histogram_kl"]["value"])
    assert sum(plain) / 40 == pytest.approx(0.048, abs=0.01) and abs(sum(values) / 40) < 0.007


def test_two_training_seeds_are_evaluated_with_no_noise_in_common() -> None:
    config = resolve("nano-t2i", {})
    sets = [
        sample_sets(config, PlannedRun(config.model_copy(update={"seed": seed}), Path(), 4000).protocol, False)
        for seed in (0, 1, 99)
    ]
    used = [seed + other for of_seed in sets for seed in of_seed[0].seeds for other in (0, FLOOR_SEEDS)]
    assert len(set(used)) == len(used) == 2 * 3 * 4000


def test_a_known_difference_is_the_signed_gap() -> None:
    """Everything twice as bright, and features moved by (3, 0): gap 1 in contrast, Fréchet distance 9."""
    the_set, noise = chosen(5, 4), draw(20, 2, seed=1)
    one = {"features": noise[:, None], "contrast": torch.ones(20)}
    other = {"features": (noise + torch.tensor([3.0, 0.0]))[:, None], "contrast": torch.full((20,), 2.0)}
    references = {"": Reference(one)}
    rows = {name: measures_of(r, the_set, references, None) for name, r in {"a": one, "b": other}.items()}
    found = measurements(rows, "a", the_set.groups)["b"]
    assert (found["contrast"]["value"], found["contrast"]["gap"], found["contrast"]["gap_half_width"]) == (2, 1, 0)
    assert found["frechet_features"]["gap"] == pytest.approx(9, rel=1e-5)


def test_diversity_is_over_the_seeds_of_each_prompt_and_not_over_prompts() -> None:
    """Equal features for one prompt, at right angles for the other: cosines 1 and 0, whatever lies between prompts."""
    features = torch.tensor([[1.0, 0, 0]] * 3 + [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    distances = torch.tensor([[0.0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 4, 1], [4, 0, 1], [1, 1, 0]])
    readings = {"features": features[:, None], "perceptual": torch.nn.functional.pad(distances, (0, 13))}
    found = measures_of(readings, chosen(2, 3), {}, None)
    everything, without_the_last_seed = torch.arange(6), torch.tensor([0, 1, 3, 4])
    assert found["pairwise_cosine"](everything) == pytest.approx(0.5)
    assert found["pairwise_perceptual"](everything) == pytest.approx((1 + 2) / 2)
    assert found["pairwise_perceptual"](without_the_last_seed) == pytest.approx((1 + 4) / 2)


def test_frames_and_clips_have_distances_of_their_own() -> None:
    """The same frames in another order: no distance of frames, and of clips that of their changes alone."""
    frames = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    one = torch.stack([frames + i for i in range(8)])
    other = one[:, [0, 3, 1, 2]]
    assert clip_features(one)[0].tolist() == [1.5, 1.0]
    assert clip_features(other)[0].tolist() == [1.5, 2.0]
    found = measures_of({"features": other}, chosen(8, 1), {"": Reference({"features": one})}, None)
    everything = torch.arange(8)
    assert found["frechet_features"](everything) == pytest.approx(0, abs=1e-9)
    assert found["frechet_video"](everything) == pytest.approx(1)


def test_the_mixtures_energy_distance_is_by_its_definition_of_whatever_samples_are_kept() -> None:
    """Also: exact samples are next to nothing away, and those moved by 3 nearly 6, as two points 3 apart are."""
    exact = AnalyticModel(AnalyticTeacher(means=((-1.0, 0.0), (1.0, 0.0)), std=0.1), 0, fit=False).exact
    points, reference = draw(200, 2, seed=3).double(), exact.sample(200, torch.Generator().manual_seed(10**9))
    energy = mixture_statistics(points, exact)["energy_distance"]
    for keep in (torch.arange(200), torch.arange(100)):
        within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (points[keep], reference.double())]
        known = 2 * torch.cdist(points[keep], reference.double()).mean() - within[0] - within[1]
        assert energy(keep) == pytest.approx(float(known), rel=1e-9)
    law = exact.sample(2000, torch.Generator().manual_seed(1))
    assert abs(mixture_statistics(law, exact)["energy_distance"](torch.arange(2000))) < 0.01
    far = AnalyticModel(AnalyticTeacher(means=((0.0, 0.0),), std=1e-6), 0, fit=False).exact
    moved = torch.tensor([3.0, 0.0]).expand(50, 2)
    assert mixture_statistics(moved, far)["energy_distance"](torch.arange(50)) == pytest.approx(6, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "prompts", "seeds", "groups"),
    [("wan21-t2i", 21, range(8), 8), ("qwen-image", 21, range(8), 8), ("wan22-t2v", 220, (42,), 10)],
)
def test_the_papers_protocol(recipe: str, prompts: int, seeds: Sequence[int], groups: int) -> None:
    (found,) = sample_sets(resolve(recipe, {}), Protocol(), takes_images=False)
    assert len(dict.fromkeys(found.prompts)) == prompts
    assert sorted(set(found.seeds)) == list(seeds)
    assert len(found.prompts) == prompts * len(seeds) == len(found.groups)
    assert int(found.groups.max()) + 1 == groups


def test_image_to_video_asks_for_pictures(tmp_path: Path) -> None:
    config = resolve("nano-i2v", {"teacher.path": "elsewhere"})
    with pytest.raises(UserError, match="samples.jsonl"):
        sample_sets(config, Protocol(), takes_images=True)
    rows = [{"prompt": f"p{i}", "image": f"{i}.png"} for i in range(220)]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (found,) = sample_sets(config, Protocol(prompts=str(tmp_path / "p.jsonl")), takes_images=True)
    assert set(found.seeds) == {42} and len(found.prompts) == 220


# The base's samples


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shortest run on the embedded teacher."""
    overrides = {"iterations": 1, "batch_size": 2, "plan.phases": 1, "teacher.base_steps": 3, "generator.lora.rank": 2}
    return distill(resolve("nano-t2i", overrides), tmp_path_factory.mktemp("nano") / "run", quiet=True)


class Counted(Sampler):
    """A sampler that notes how many samples each call asks for, and is stopped in one call."""

    def __init__(self, sampler: Sampler, stopped_in: int = 0) -> None:
        super().__init__(sampler.system, sampler.codec)
        self.asked: list[int] = []
        self.stopped_in = stopped_in

    def __call__(self, prompts: Any, seeds: Sequence[int], teacher_steps: int | None = None) -> Tensor:
        self.asked.append(len(seeds))
        if len(self.asked) == self.stopped_in:
            raise KeyboardInterrupt
        return super().__call__(prompts, seeds, teacher_steps)


def test_the_base_is_sampled_once_and_goes_on_where_it_was_stopped(nano: Path, tmp_path: Path) -> None:
    sampler = Counted(load(nano), stopped_in=2)
    prompts, seeds, everything = [Prompt("a handwritten digit")] * 130, range(130), list(range(130))
    with pytest.raises(KeyboardInterrupt):
        Base(sampler, tmp_path).samples(prompts, seeds, 2)
    found = Base(sampler, tmp_path).samples(prompts, seeds, 2)
    assert sampler.asked == [64, 64, 64, 2]  # the first batch was kept
    other = Counted(load(nano))
    again = Base(other, tmp_path).samples(prompts, seeds, 2)
    assert not other.asked and found.calls == again.calls == 4 and found.key == again.key
    assert torch.equal(found.pixels(everything), again.pixels(everything))
    alone = sampler.decode(sampler(prompts[:1], [129], 2))
    assert torch.allclose(found.pixels([129]), alone, atol=1e-4)
    base = Base(sampler, tmp_path)
    assert len({base.samples(prompts[:2], of, steps).key for of, steps in (([0, 1], 2), ([0, 1], 3), ([1, 2], 2))}) == 3


def test_the_bases_samples_are_known_by_its_own_times_and_its_guidances_rule(tmp_path: Path) -> None:
    """Of Z-Image, whose shift is its scheduler's: the plan's changes nothing, that one and the norm's limit do."""
    folder = build("z_image", tmp_path / "z")

    def key(plan_shift: float, **changes: Any) -> str | None:
        section = teacher("z_image", folder).model_copy(update=changes)
        plan = Plan(steps=2, phases=2, shift=plan_shift)
        sampler = teacher_alone(Config(recipe="tiny", teacher=section, plan=plan, prompts="default-t2i"))
        return Base(sampler, tmp_path / "base").samples([Prompt("a boat")], [0], 2).key

    first = key(5.0)
    assert key(3.0) == first and key(5.0, norm_limit=1.0) != first
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"shift": 6.0', '"shift": 4.0'))
    assert key(5.0) != first


def test_wans_base_is_known_by_its_own_solver_and_its_calls_are_counted(tmp_path: Path) -> None:
    """UniPC on the folder's shift: the plan's shift and start change nothing, the solver's order and kind do."""
    folder = build("wan22_t2v", tmp_path / "wan")

    def sampled(**plan: Any) -> SampleSource:
        section = teacher("wan22_t2v", folder)
        plan = {"steps": 2, "phases": 2, "shift": 5.0} | plan
        sampler = teacher_alone(Config(recipe="tiny", teacher=section, plan=Plan(**plan), prompts="default-t2v"))
        return Base(sampler, tmp_path / "base").samples([Prompt("a boat")], [0], 3)

    first = sampled()
    assert sampled(shift=3.0, start=0.98).key == first.key and first.calls == 2 * 3, "each step with guidance"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    whole = scheduler.read_text()
    for old, new in (
        ('"solver_order": 2', '"solver_order": 3'),
        ('"bh2"', '"bh1"'),
        ('"flow_shift": 5.0', '"flow_shift": 3.0'),
    ):
        assert old in whole
        scheduler.write_text(whole.replace(old, new))
        assert sampled().key != first.key


class Slow(Sampler):
    """A sampler that takes a while, notes the first seed of each call, and makes samples of that number."""

    sampled: list[int] = []

    def __call__(self, prompts: Any, seeds: Sequence[int], teacher_steps: int | None = None) -> Tensor:
        self.sampled.append(seeds[0])
        time.sleep(0.2)
        return torch.full((len(seeds), *self.shape), float(seeds[0]))


def test_two_at_once_sample_the_base_once(nano: Path, tmp_path: Path) -> None:
    """Each waits for the batch that the other has in hand. `flock` tells open files apart: threads do for processes."""
    samplers = [Slow(sampler.system, sampler.codec) for sampler in (load(nano), load(nano))]
    prompts, seeds = [Prompt("a handwritten digit")] * 150, range(150)
    with ThreadPoolExecutor() as pool:
        keys = list(pool.map(lambda sampler: Base(sampler, tmp_path).samples(prompts, seeds, 2).key, samplers))
    assert sorted(Slow.sampled) == [0, 64, 128] and keys[0] == keys[1]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "changes",
    [{"teacher.std": 0.3}, {"teacher.schedule": "vp-cosine"}, {"teacher.prediction": "x0"}, {"plan.shift": 3.0}],
)
def test_another_teacher_has_other_samples(changes: dict[str, object], tmp_path: Path) -> None:
    """What no network's weights tell: the base's samples of one toy are not taken for another's."""

    def key(overrides: dict[str, object]) -> str | None:
        config = resolve("toy-2d", {**overrides})
        model = AnalyticModel(config.teacher, 0, fit=False)
        sampler = Sampler(build_system(config, model, {}), PlainCodec())
        return Base(sampler, tmp_path).samples([Prompt("")] * 2, [0, 1], 2).key

    assert key({}) == key({"seed": 5, "generator.ema": 0.9}) != key(changes)


def test_pictures_are_no_part_of_text_to_images_base_and_need_not_be_there(nano: Path, tmp_path: Path) -> None:
    base = Base(load(nano), tmp_path)
    keys = [base.samples([Prompt("a digit", image)], [0], 1).key for image in (None, tmp_path / "absent.png")]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("end", ["\N{LINE SEPARATOR}", "\N{NEXT LINE}", "\N{PARAGRAPH SEPARATOR}"])
def test_a_prompt_with_unicodes_own_ends_of_a_line_stays_one_in_a_folder_of_samples(end: str, tmp_path: Path) -> None:
    """JSON need not escape them, and `phased-dmd sample` does not."""
    prompt = f"a fox{end}asleep, \u72d0\u72f8"
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    row = json.dumps({"prompt": prompt, "seed": 3, "image": "0.png"}, ensure_ascii=False)
    (tmp_path / "samples.jsonl").write_bytes(f"{row}\n".encode())
    assert SampleFolder(tmp_path).rows == {"0": (Prompt(prompt), 3)}


def test_a_clip_that_stands_still_keeps_its_frames_and_their_rate(tmp_path: Path) -> None:
    """WebP joins equal frames: nine alike, and five and four alike."""
    still = torch.rand(1, 16, 16, 3).expand(9, -1, -1, -1)
    halves = torch.cat([still[:5], torch.rand(1, 16, 16, 3).expand(4, -1, -1, -1)])
    for clip in (still, halves, torch.rand(9, 16, 16, 3)):
        save_clip(clip, tmp_path / "c.webp", 16)
        found, fps = read_media(tmp_path / "c.webp")
        assert found.shape == (9, 128, 128, 3)
        assert torch.allclose(found[:, ::8, ::8], clip, atol=0.6 / 255)
        assert fps is None or fps == pytest.approx(16, rel=0.02)


def test_the_teachers_hash_is_of_its_weights_and_not_of_the_adapters_on_it(nano: Path) -> None:
    sampler = load(nano)
    assert weights_hash(sampler) == weights_hash(teacher_alone(sampler.system.config))
    with torch.no_grad():
        name, weight = next((n, p) for n, p in sampler.system.model.networks[0].named_parameters() if "lora" not in n)
        weight[..., 0] += 1e-3
    assert weights_hash(sampler) != weights_hash(load(nano)), name


def test_a_run_is_measured_once_by_one_protocol(nano: Path, tmp_path: Path) -> None:
    """The second protocol is another evaluation; pictures hold the same prompts and seeds in every row."""
    protocol = Protocol(samples=24)
    first = evaluate([nano], protocol, cache=tmp_path)[str(nano)]
    stamp = (nano / "evaluation.json").stat().st_mtime_ns
    assert evaluate([nano], protocol, cache=tmp_path)[str(nano)] == first
    assert (nano / "evaluation.json").stat().st_mtime_ns == stamp
    rows = first["sets"]["weak"]["rows"]
    assert list(rows) == ["base, 3 steps", "base, 4 steps", "dmd, 4 steps"]
    assert rows["base, 3 steps"]["network_calls"] == {
        "value": 6, "half_width": None, "gap": 0, "gap_half_width": None
    }  # fmt: skip
    paired, other = (rows["base, 3 steps"][f"frechet_features{suffix}"]["value"] for suffix in ("_paired", ""))
    assert paired == 0 != other
    assert first["nets"]["features"] == "digits" and "(digits)" in table(first)
    pictures = nano / "samples" / "weak"
    names = [sorted(path.name for path in (pictures / row).iterdir()) for row in ("base-3-steps", "dmd-4-steps")]
    assert names[0] == names[1] == [f"{i:02d}.png" for i in range(20)]
    assert json.loads((pictures / "shown.json").read_text())[3] == {"prompt": "a handwritten digit", "seed": 3}
    with Image.open(pictures / "dmd-4-steps" / "03.png") as image:
        kept = torch.from_numpy(np.array(image.convert("RGB"))) / 255
    sampler = load(nano)
    assert torch.allclose(kept, sampler.decode(sampler(["a handwritten digit"], [3]))[0, 0].clamp(0, 1), atol=0.6 / 255)
    assert evaluate([nano], Protocol(samples=25), cache=tmp_path)[str(nano)]["protocol"]["samples"] == 25


def test_what_matters_fits_a_terminal(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row a measure, the finer ones left to the file and the whole table; values and gaps are the file's."""
    evaluation = evaluate([nano], Protocol(samples=24), cache=tmp_path)[str(nano)]
    show(evaluation, Console(width=WIDTH))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "(gap to base, 3 steps: what its sampler makes, guided as the teacher is)" in lines
    for name, found in evaluation["sets"].items():
        start = lines.index(next(line for line in lines if line.startswith(f"{name}: {found['about']}")))
        measures = [measure for measure in found["rows"]["dmd, 4 steps"] if measure not in FINER]
        assert FINER & found["rows"]["dmd, 4 steps"].keys()
        for line, measure in zip(lines[start + 2 :], measures, strict=False):
            base, _, ours = (row[measure] for row in found["rows"].values())
            said, at_base, _, at_ours = re.split(r"\s{2,}", line.strip())
            assert said == title(measure)
            assert float(at_base.replace("−", "-")) == pytest.approx(base["value"], rel=0.05, abs=0.01)
            gap = float(at_ours.partition("(")[2].rstrip(")").split()[0].replace("−", "-"))
            assert gap == pytest.approx(ours["gap"], rel=0.05, abs=0.01)


# Folders of files


def clips(folder: Path, shift: int, names: Sequence[str], frames: int = 9) -> None:
    """Lossless clips of a random texture that moves to the right, pixels a frame."""
    for i, name in enumerate(names):
        texture = torch.nn.functional.interpolate(draw(1, 3, 40, 100, seed=i).sigmoid(), scale_factor=4, mode="bicubic")
        texture = texture[0].clamp(0, 1).permute(1, 2, 0)
        frames_ = torch.stack([texture[:128, 200 - shift * k : 328 - shift * k] for k in range(frames)])
        save_clip(frames_, folder / name, 8)


def test_two_folders_of_clips_are_compared_by_their_files(tmp_path: Path) -> None:
    """4 pixels a frame against 1: the flow, and the gap; VBench's threshold, 6 for a shorter side of 256, lies between.

    The files say that they have 8 frames a second. The base's manifest tells another order than the names'.
    """
    names = [f"a-cat-seed{seed}.webp" for seed in range(4)]
    clips(tmp_path / "base", 4, names)
    clips(tmp_path / "student", 1, names)
    rows = [{"image": name, "prompt": "a cat", "seed": 3 - i} for i, name in enumerate(names[::-1])]
    (tmp_path / "base" / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dino(tmp_path / "dino", 3)
    protocol = Protocol(features=str(tmp_path / "dino"))
    found = evaluate([tmp_path / "student"], protocol, base=tmp_path / "base")[str(tmp_path / "student")]
    base, student = found["sets"]["samples"]["rows"].values()
    assert base["optical_flow"]["value"] == pytest.approx(4, abs=0.1)
    assert student["optical_flow"]["value"] == pytest.approx(1, abs=0.1)
    assert student["optical_flow"]["gap"] == pytest.approx(-3, abs=0.15)
    assert (base["dynamic_degree"]["value"], student["dynamic_degree"]["value"]) == (1, 0)
    assert found["nets"] == {"features": "dino, dinov3_vit", "flow": "OpenCV DIS"}
    assert "pairwise_cosine" in student and found["sets"]["samples"]["about"] == "4 files, 1 prompt"
    itself = evaluate([tmp_path / "base"], protocol, base=tmp_path / "base")[str(tmp_path / "base")]
    assert all(figure["gap"] == 0 for figure in itself["sets"]["samples"]["rows"]["samples"].values())


def test_perceptual_distances_are_between_all_seeds_of_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grey levels 0, .2, .6 of one prompt and equal ones of another: pairs .2, .6, .4 and 0, in the mean .2."""

    class Metric(torch.nn.Module):
        def __init__(self, **_: object) -> None:
            super().__init__()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).abs().mean()

    module = ModuleType("torchmetrics.image.lpip")
    module.LearnedPerceptualImagePatchSimilarity = Metric  # type: ignore[attr-defined]
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", module)
    for name, levels in {"a": (0.0, 0.2, 0.6), "b": (0.4, 0.4, 0.4)}.items():
        for seed, level in enumerate(levels):
            path = tmp_path / "s" / f"{name}-seed{seed}.png"
            save_image(to_images(torch.full((1, 16, 16, 3), level))[0], path)
    dino(tmp_path / "dino", 3)
    protocol = Protocol(features=str(tmp_path / "dino"), perceptual=True)
    found = evaluate([tmp_path / "s"], protocol, base=tmp_path / "s")[str(tmp_path / "s")]
    assert found["nets"]["perceptual"] == "LPIPS, AlexNet"
    figure = found["sets"]["samples"]["rows"]["base"]["pairwise_perceptual"]
    assert figure["value"] == pytest.approx(0.2, abs=1e-6) and figure["half_width"] > 0
    many = [Prompt("a")] * 17
    with pytest.raises(UserError, match="--perceptual: needs each prompt's samples together, at most 16"):
        whole_prompts(SampleSet("", "", many, range(17), torch.arange(17)))
    with pytest.raises(UserError, match="--perceptual"):
        whole_prompts(SampleSet("", "", [Prompt("a"), Prompt("b"), Prompt("a")], range(3), torch.arange(3)))


def test_folders_that_do_not_match_are_one_line(tmp_path: Path) -> None:
    for folder, names in {"a": "wxyz", "b": "wxz", "c": "wxyz", "empty": ""}.items():
        (tmp_path / folder).mkdir()
        for i, name in enumerate(names):
            side = 32 + 16 * i * (folder == "c")
            save_image(to_images(torch.rand(1, side, 32, 3))[0], tmp_path / folder / f"{name}.png")
    (tmp_path / "broken").mkdir()
    for name in "wxz":
        (tmp_path / "broken" / f"{name}.png").write_bytes(b"no picture")
    dino(tmp_path / "dino", 3)
    wrong = {
        ("a", None): "--base FOLDER", ("a", "b"): "holds no y", ("b", "a"): "holds no y", ("c", "a"): "different sizes",
        ("empty", "a"): "neither a run, nor an export", ("broken", "b"): "cannot be read",
    }  # fmt: skip
    for (subject, base), says in wrong.items():
        with pytest.raises(UserError, match=says):
            evaluate([tmp_path / subject], Protocol(features=str(tmp_path / "dino")), base=base and tmp_path / base)
        assert not (tmp_path / subject / "evaluation.json").exists()


def test_the_distance_to_real_pictures_is_that_to_a_folder_of_them(tmp_path: Path) -> None:
    """Pictures of another size than the samples', compared in the features of one net."""
    net = dino(tmp_path / "dino", 3)
    for folder, side, seed in (("base", 32, 0), ("real", 64, 10)):
        (tmp_path / folder).mkdir()
        for i in range(5):
            save_image(to_images(draw(1, side, side, 3, seed=seed + i).sigmoid())[0], tmp_path / folder / f"{i}.png")
    protocol = Protocol(features=str(tmp_path / "dino"), real=str(tmp_path / "real"))
    found = evaluate([tmp_path / "base"], protocol, base=tmp_path / "base")[str(tmp_path / "base")]
    features = load_features(str(tmp_path / "dino"))
    base, real = (
        features(torch.cat([read_media(tmp_path / folder / f"{i}.png")[0] for i in range(5)]))
        for folder in ("base", "real")
    )
    whole, *without = (
        frechet(moments(base[keep]), moments(real))
        for keep in (slice(None), *([i for i in range(5) if i != gone] for gone in range(5)))
    )
    distance = found["sets"]["samples"]["rows"]["samples"]["frechet_real"]["value"]
    assert not net.training and distance == pytest.approx(5 * whole - 4 * sum(without) / 5, rel=1e-4), "debiased"


def test_a_video_file_is_read_as_its_frames(tmp_path: Path) -> None:
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "v.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 8, (64, 48))
    for value in (40, 120, 200):
        frame = torch.zeros(48, 64, 3).byte()
        frame[..., 2] = value  # red: OpenCV's last
        writer.write(frame.numpy())
    writer.release()
    found, fps = read_media(tmp_path / "v.mp4")
    assert found.shape == (3, 48, 64, 3) and fps == 8
    assert torch.allclose(found[..., 0].mean((1, 2)) * 255, torch.tensor([40.0, 120, 200]), atol=6)
    assert found[..., 2].max() < 0.1


# Pipelines of the real classes


@pytest.mark.parametrize("name", ["wan22_t2v", *PICTURES])
def test_runs_and_exports_of_real_classes_are_evaluated_with_a_dino_folder(name: str, tmp_path: Path) -> None:
    """Random weights throughout; the export of a run gives the run's own figures."""
    dino(tmp_path / "dino", 3)
    picture = tmp_path / "given.png" if name == "qwen_image_edit" else None
    if picture:
        Image.effect_noise((96, 64), 80).convert("RGB").save(picture)
    fox, boat = Prompt("a red fox", picture), Prompt("a boat at night", picture)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f"{fox.line()}\n{boat.line()}\n")
    base = teacher(name, build(name, tmp_path / "pipeline")).model_copy(update={"base_steps": 8})
    config = Config(
        recipe="tiny", teacher=base, prompts=str(prompts), plan=Plan(steps=4, phases=2, shift=5.0),
        generator=Generator(lora=Lora(rank=2, alpha=2), lr=1e-2),
        fake=Fake(updates=1, lr=1e-3), iterations=1, batch_size=1,
    )  # fmt: skip
    run = distill(config, tmp_path / "run", quiet=True)
    protocol = Protocol(prompts=str(prompts), seeds=(0, 1, 2), features=str(tmp_path / "dino"), fps=16)
    found = evaluate([run], protocol, cache=tmp_path / "base")[str(run)]
    assert found["nets"]["features"] == "dino, dinov3_vit"
    base, _, own = found["sets"]["prompts"]["rows"].values()
    expected = {"frechet_features_paired", "pairwise_cosine", "contrast", "sharpness", "saturation"}
    expected |= {"optical_flow", "dynamic_degree", "frechet_video_paired"} if name == "wan22_t2v" else set()
    assert expected <= own.keys()
    sampler = load(run)
    pixels = sampler.decode(sampler([fox] * 3 + [boat] * 3, [0, 1, 2] * 2))
    assert own["contrast"]["value"] == pytest.approx(float(pixels.mean(4).flatten(2).std(2).mean()), rel=1e-5)
    assert own["contrast"]["gap"] == pytest.approx(own["contrast"]["value"] - base["contrast"]["value"], rel=1e-9)

    export(run, tmp_path / "export")
    again = evaluate([tmp_path / "export"], protocol, cache=tmp_path / "base", base=tmp_path / "pipeline")
    rows = again[str(tmp_path / "export")]["sets"]["prompts"]["rows"]
    for measure in expected:
        of_export = rows["phased-sgts, 4 steps"][measure]["value"]
        assert of_export == pytest.approx(own[measure]["value"], rel=1e-3, abs=1e-4)


def test_fit_to_the_prompt_is_the_cosine_of_the_stock_models_embeddings(tmp_path: Path) -> None:
    """A tiny CLIP with random weights, whose own forward gives the logits."""
    from pipelines import wan_tokenizer
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from phased_dmd.lab.metrics.alignment import load_alignment

    tokenizer = wan_tokenizer()
    tokenizer.save_pretrained(tmp_path / "clip")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = CLIPTextConfig(**shape, vocab_size=len(tokenizer), eos_token_id=1, max_position_embeddings=32)
    vision = CLIPVisionConfig(**shape, image_size=32, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).eval()
    model.save_pretrained(tmp_path / "clip")
    settings = {"do_resize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    settings["image_processor_type"] = "CLIPImageProcessor"
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels, texts = torch.rand(3, 1, 32, 32, 3), ["a red fox", "two grey cats asleep", "a boat"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        stock = model(pixel_values=pixels[:, 0].permute(0, 3, 1, 2) * 2 - 1, input_ids=tokens["input_ids"],
                      attention_mask=tokens["attention_mask"])  # fmt: skip
    known = (stock.logits_per_image / model.logit_scale.exp()).diag()
    found = load_alignment(str(tmp_path / "clip"))
    assert found.name == "clip, clip"
    assert torch.allclose(found(pixels, texts), known, atol=1e-5)
    with pytest.raises(UserError, match="no hub id or folder of a CLIP model"):
        load_alignment(str(tmp_path))
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"][:1].clone()
    save_file(tensors, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"visual_projection\.weight is \[1, 16\], where its CLIPModel has \[8, 16\]"):
        load_alignment(str(tmp_path / "clip"))


def test_pictures_higher_than_a_strip_are_shrunk_in_it_and_small_ones_kept() -> None:
    clip = torch.rand(5, 64, 96, 3)
    assert strip(clip).size == (5 * 96, 64) == strip(clip, most=64).size
    assert strip(clip, most=32).size == (5 * 48, 32)
    half = strip(torch.full((2, 64, 96, 3), 0.5), most=32)
    assert half.getextrema() == ((128, 128),) * 3


def test_seeds_are_read_as_numbers_and_ranges() -> None:
    assert [parse_seeds(text) for text in ("42", "0-7", "1, 5,9-10")] == [(42,), tuple(range(8)), (1, 5, 9, 10)]
    for wrong in ("", "a", "3-", "7-3", "1,1", "0-3,2"):
        with pytest.raises(UserError, match="^--seeds: "):
            parse_seeds(wrong)
