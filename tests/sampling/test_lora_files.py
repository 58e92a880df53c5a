"""One adapter, written out by hand in every public layout, is read back as itself; what is no such file is named."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tiny import draw
from torch import Tensor, nn

from phased_dmd.errors import UserError
from phased_dmd.models.wan import ORIGINAL
from phased_dmd.networks.change import Change, parameter_shapes
from phased_dmd.sampling.lora_files import public_names, read_changes

RANK, ALPHA = 3, 7.5
Pairs = dict[str, tuple[Tensor, Tensor]]
WAN_NAMES = {  # of one block and of what stands outside of the blocks, in Wan's own program: from its checkpoints
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q", "blocks.0.attn1.to_k": "blocks.0.self_attn.k",
    "blocks.0.attn1.to_v": "blocks.0.self_attn.v", "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
    "blocks.0.attn2.to_q": "blocks.0.cross_attn.q", "blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
    "blocks.0.attn2.to_v": "blocks.0.cross_attn.v", "blocks.0.attn2.to_out.0": "blocks.0.cross_attn.o",
    "blocks.0.attn2.add_k_proj": "blocks.0.cross_attn.k_img", "blocks.0.attn2.add_v_proj": "blocks.0.cross_attn.v_img",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0", "blocks.0.ffn.net.2": "blocks.0.ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}  # fmt: skip


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return pipelines.wan_transformer(first_frame=20, image_dim=8, added_kv_proj_dim=24)


@pytest.fixture(scope="module")
def qwen() -> nn.Module:
    return pipelines.qwen_image().transformer


def linears(network: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}


def random_pairs(network: nn.Module, rank: int = RANK, only: str = "") -> Pairs:
    """A random adapter of the layers whose names begin with `only`."""
    layers = {name: layer for name, layer in linears(network).items() if name.startswith(only)}
    return {
        name: (draw(rank, layer.in_features, seed=2 * i), draw(layer.out_features, rank, seed=2 * i + 1))
        for i, (name, layer) in enumerate(layers.items())
    }


def original(name: str) -> str:
    """Wan's own name, by the table above: its first block's stand for all."""
    block = name.split(".")[1] if name.startswith("blocks.") else "0"
    known = name.replace(f"blocks.{block}.", "blocks.0.") if name.startswith("blocks.") else name
    return WAN_NAMES.get(known, known).replace("blocks.0.", f"blocks.{block}.")


def flat(name: str) -> str:
    return name.replace(".", "_")


def same(name: str) -> str:
    return name


def written(
    pairs: Pairs, prefix: str, halves: tuple[str, str], name: Callable[[str], str], alpha: float | None = None
) -> dict[str, Tensor]:
    """A file's tensors; alpha: stands beside each layer."""
    tensors = {}
    for layer, pair in pairs.items():
        for half, tensor in zip(halves, pair, strict=True):
            tensors[f"{prefix}{name(layer)}.{half}.weight"] = tensor
        if alpha is not None:
            tensors[f"{prefix}{name(layer)}.alpha"] = torch.tensor(alpha)
    return tensors


def read(tensors: Mapping[str, Tensor], network: nn.Module, folder: Path, **header: Any) -> Change:
    metadata = {key: json.dumps(value) for key, value in header.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "lora.safetensors", metadata)
    (change,) = read_changes([folder / "lora.safetensors"], [network], ORIGINAL)
    return change


def check(change: Change, pairs: Pairs, scale: float) -> None:
    """The change is scale B A of these layers, and no more."""
    assert change.layers.keys() == pairs.keys() and not change.differences and not change.whole
    for name, (a, b) in pairs.items():
        found_a, found_b = change.layers[name]
        torch.testing.assert_close(change.scale * found_b @ found_a, scale * b @ a, rtol=1e-6, atol=1e-6)


AB, DOWN_UP, DEFAULT = ("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_A.default", "lora_B.default")
LAYOUTS: dict[str, tuple[str, tuple[str, str], Callable[[str], str], float | None]] = {
    "diffusers": ("transformer.", AB, same, None),
    "ours": ("diffusion_model.", AB, original, None),
    "lightning": ("diffusion_model.", DOWN_UP, original, ALPHA),
    "as ComfyUI saves": ("model.diffusion_model.", DOWN_UP, original, ALPHA),
    "without a prefix": ("", DOWN_UP, original, ALPHA),
    "without a prefix, no alpha": ("", AB, original, None),
    "diffusers' names without a prefix": ("", AB, same, None),
    "kohya": ("lora_unet_", DOWN_UP, lambda name: flat(original(name)), ALPHA),
    "kohya on diffusers' names": ("lora_unet_", DOWN_UP, flat, ALPHA),
    "peft": ("base_model.model.", AB, same, None),
    "peft with an adapter's name": ("base_model.model.", DEFAULT, same, None),
    "a half of alpha": ("diffusion_model.", AB, original, ALPHA / 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("model", "only"),
    [("wan", ""), ("wan", "blocks.1.attn1"), ("wan", "proj_out"), ("qwen", ""), ("qwen", "transformer_blocks.1.attn")],
)
def test_every_layout_is_read_as_the_adapter_that_it_holds(
    layout: str, model: str, only: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Of all layers, of some of one block alone, and of the head alone."""
    network, (prefix, halves, name, alpha) = request.getfixturevalue(model), LAYOUTS[layout]
    pairs = random_pairs(network, only=only)
    assert pairs
    tensors = written(pairs, prefix, halves, name, alpha)
    check(read(tensors, network, tmp_path), pairs, 1.0 if alpha is None else alpha / RANK)


def test_layers_have_the_names_that_diffusers_gives_wans_own_checkpoints(wan: nn.Module) -> None:
    """Its converter of whole checkpoints is written the other way round, and by others; norms are in it, too."""
    names = public_names(parameter_shapes(wan), ORIGINAL)
    own = {name: layer for name, layer in names.items() if "." in name and name != layer}
    assert len(own) == len(linears(wan)) + 2 * 6 + 2  # and six norms a block, and two of pictures
    for name, layer in own.items():
        if layer:
            (found,) = convert_wan_transformer_to_diffusers({f"{name}.weight": torch.zeros(1)})
            assert found == f"{layer}.weight"


@pytest.mark.parametrize("layout", ["diffusers", "ours", "lightning", "kohya"])
def test_what_diffusers_reads_is_read_alike(layout: str, wan: nn.Module, tmp_path: Path) -> None:
    """Of all layers of the blocks, as the converters of diffusers 0.42 want them."""
    prefix, halves, name, alpha = LAYOUTS[layout]
    tensors = written(random_pairs(wan, only="blocks."), prefix, halves, name, alpha)
    change = read(tensors, wan, tmp_path)
    theirs = WanLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name="lora.safetensors", use_safetensors=True)
    assert len(theirs) == 2 * len(change.layers)
    for layer, (a, b) in change.layers.items():
        their_a, their_b = (theirs[f"transformer.{layer}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(b @ a, their_b @ their_a, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what the libraries themselves write


def adapted(network: nn.Module, **options: Any) -> Any:
    """peft's own adapter on a copy of a network, with random numbers in both halves."""
    targets = [name for name in linears(network) if name.startswith(("blocks.0.attn1", "blocks.1.ffn", "proj_out"))]
    made = get_peft_model(copy.deepcopy(network), LoraConfig(r=RANK, target_modules=targets, **options))  # type: ignore[arg-type]
    for i, (name, p) in enumerate(made.named_parameters()):
        if "lora_" in name:
            p.data = draw(*p.shape, seed=i)
    return made


def deltas(model: Any) -> dict[str, Tensor]:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    return {name.removeprefix("base_model.model."): layer.get_delta_weight("default") for name, layer in layers}


PEFT: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 7.5},
    "alpha of its own": {"lora_alpha": 7.5, "alpha_pattern": {"proj_out": 2.0, "blocks.0.attn1.to_q": 9.0}},
    "rank of its own": {"lora_alpha": 7.5, "rank_pattern": {"proj_out": 1}},
    "rslora": {"lora_alpha": 7.5, "use_rslora": True},
}


@pytest.mark.parametrize("options", PEFT)
@pytest.mark.parametrize("saver", ["peft", "diffusers"])
def test_what_peft_and_diffusers_save_is_read_with_their_alpha(
    options: str, saver: str, wan: nn.Module, tmp_path: Path
) -> None:
    model = adapted(wan, **PEFT[options])
    if saver == "peft":
        model.save_pretrained(tmp_path)
    else:
        layers = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(model).items()}
        about = model.peft_config["default"].to_dict()
        WanPipeline.save_lora_weights(
            tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=about
        )  # fmt: skip
    (change,) = read_changes([tmp_path], [wan], ORIGINAL)
    expected = deltas(model)
    assert change.layers.keys() == expected.keys() and not change.differences
    for name, (a, b) in change.layers.items():
        torch.testing.assert_close(b @ a, expected[name], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what is no adapter of a layer


def test_differences_of_biases_norms_and_tables_are_read_as_they_are(wan: nn.Module, tmp_path: Path) -> None:
    """As the files of LightX2V have them; one that is zero everywhere is no difference."""
    pairs, p = random_pairs(wan, only="blocks.0.attn1"), "diffusion_model."
    held = {
        "blocks.0.self_attn.q.diff_b": ("blocks.0.attn1.to_q.bias", (24,)),
        "blocks.1.norm3.diff": ("blocks.1.norm2.weight", (24,)),
        "blocks.1.norm3.diff_b": ("blocks.1.norm2.bias", (24,)),
        "blocks.0.cross_attn.norm_k_img.diff": ("blocks.0.attn2.norm_added_k.weight", (24,)),
        "blocks.1.diff_m": ("blocks.1.scale_shift_table", (1, 6, 24)),
        "head.diff_m": ("scale_shift_table", (1, 2, 24)),
        "head.head.diff": ("proj_out.weight", (64, 24)),
        "patch_embedding.diff": ("patch_embedding.weight", (24, 36, 1, 2, 2)),
        "time_embedding.0.diff_b": ("condition_embedder.time_embedder.linear_1.bias", (24,)),
    }
    tensors = {p + key: draw(*shape, seed=i) for i, (key, (_, shape)) in enumerate(held.items())}
    zero = {f"{p}blocks.0.norm3.diff": torch.zeros(24)}
    change = read(written(pairs, p, DOWN_UP, original) | tensors | zero, wan, tmp_path)
    assert change.differences.keys() == {name for name, _ in held.values()}
    for key, (name, _) in held.items():
        assert torch.equal(change.differences[name], tensors[p + key])
    assert change.layers.keys() == pairs.keys()


def test_a_bias_of_pefts_is_scaled_as_its_layer_is(wan: nn.Module, tmp_path: Path) -> None:
    model = adapted(wan, lora_alpha=7.5, lora_bias=True)
    model.save_pretrained(tmp_path)
    (change,) = read_changes([tmp_path], [wan], ORIGINAL)
    x, layer = draw(2, 24, seed=1), wan.get_submodule("proj_out")
    a, b = change.layers["proj_out"]
    expected = model.base_model.model.proj_out(x)
    torch.testing.assert_close(layer(x) + x @ (b @ a).T + change.differences["proj_out.bias"], expected)


def test_numbers_of_half_precision_are_read_in_float32(wan: nn.Module, tmp_path: Path) -> None:
    pairs = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in random_pairs(wan, only="proj_out").items()}
    change = read(written(pairs, "", DOWN_UP, same, ALPHA), wan, tmp_path)
    ((a, b),) = change.layers.values()
    assert a.dtype == b.dtype == torch.float32
    check(change, {name: (a.float(), b.float()) for name, (a, b) in pairs.items()}, ALPHA / RANK)


# ---------------------------------------------------------------- two networks, and what is refused


def test_one_file_holds_both_networks_or_each_has_its_own(wan: nn.Module, tmp_path: Path) -> None:
    high, low = random_pairs(wan, only="blocks.0"), {name: (-a, b) for name, (a, b) in random_pairs(wan).items()}
    tensors = written(high, "transformer.", AB, same) | written(low, "transformer_2.", AB, same)
    both, settings = tmp_path / "both.safetensors", {"transformer.lora_alpha": 6.0, "transformer_2.lora_alpha": 1.5}
    save_file(tensors, both, {"lora_adapter_metadata": json.dumps(settings)})
    files = [tmp_path / "high.safetensors", tmp_path / "low.safetensors"]
    save_file(written(high, "diffusion_model.", AB, original), files[0])
    save_file(written(low, "diffusion_model.", AB, original), files[1])
    for paths, scales in ([both], (2.0, 0.5)), (files, (1.0, 1.0)):
        for change, pairs, scale in zip(read_changes(paths, [wan, wan], ORIGINAL), (high, low), scales, strict=True):
            check(change, pairs, scale)
    with pytest.raises(UserError, match="both.safetensors: 2 for 1 networks; one LoRA file each, the noisiest first"):
        read_changes([both], [wan], ORIGINAL)
    with pytest.raises(UserError, match="high.safetensors: 1 for 2 networks"):
        read_changes(files[:1], [wan, wan], ORIGINAL)


def spoilt(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    """A file of the head and of one block's first layers, with something amiss."""
    a = "diffusion_model.head.head.lora_A.weight"
    match how:
        case "another model":
            return tensors | {"diffusion_model.double_blocks.0.img_attn.lora_A.weight": torch.zeros(3, 24)}
        case "another width":
            return tensors | {a: torch.zeros(3, 25)}
        case "other ranks":
            return tensors | {a: torch.zeros(2, 24)}
        case "half":
            return {name: tensor for name, tensor in tensors.items() if name != a}
        case "twice":
            return tensors | written({"proj_out": (torch.zeros(3, 24), torch.zeros(64, 3))}, "", AB, same)
        case "under two prefixes":
            return tensors | {"head.head.lora_A.weight": torch.zeros(3, 24)}
        case "another kind":
            return tensors | {"diffusion_model.head.head.dora_scale": torch.zeros(64)}
        case "text encoder":
            return tensors | {"lora_te_encoder_0.lora_down.weight": torch.zeros(3, 24)}
    raise ValueError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("another model", "1 of 6 layers are none of this model's, the first double_blocks.0.img_attn"),
        ("another width", r"it changes proj_out.weight \[64, 25\], which is \[64, 24\] in this run's network"),
        ("other ranks", "of proj_out A has 2 ranks, and B 3"),
        ("half", "of proj_out it holds B alone"),
        ("twice", "proj_out is there under two names"),
        ("under two prefixes", "1 tensors are there under two prefixes"),
        ("another kind", "1 of 11 tensors are of no kind that is read, the first head.head.dora_scale"),
        ("text encoder", "1 of 6 layers are none of this model's, the first lora_te_encoder_0"),
    ],
)
def test_what_does_not_fit_is_counted_and_the_first_is_named(
    how: str, message: str, wan: nn.Module, tmp_path: Path
) -> None:
    pairs = random_pairs(wan, only="proj_out") | random_pairs(wan, only="blocks.0.attn1")
    tensors = written(pairs, "diffusion_model.", AB, original)
    assert read(tensors, wan, tmp_path).layers.keys() == pairs.keys()
    with pytest.raises(UserError, match=rf"lora\.safetensors: {message}"):
        read(spoilt(tensors, how), wan, tmp_path)


def test_dora_is_refused(wan: nn.Module, tmp_path: Path) -> None:
    tensors = written(random_pairs(wan, only="proj_out"), "transformer.", AB, same)
    with pytest.raises(UserError, match="DoRA, which is not read"):
        read(tensors, wan, tmp_path, lora_adapter_metadata={"transformer.use_dora": True})


def test_only_safetensors_are_read_and_no_link_out_of_a_folder(wan: nn.Module, tmp_path: Path) -> None:
    folder, aside = tmp_path / "folder", tmp_path / "aside.safetensors"
    folder.mkdir()
    save_file(written(random_pairs(wan, only="proj_out"), "", AB, same), aside)
    (folder / "lora.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="folder: holds 0 safetensors files; name the one that is meant"):
        read_changes([folder], [wan], ORIGINAL)
    with pytest.raises(UserError, match=r"lora\.pt: only safetensors is read"):
        read_changes([folder / "lora.pt"], [wan], ORIGINAL)
    (folder / "a.safetensors").symlink_to(aside)
    with pytest.raises(UserError, match=r"a\.safetensors: leads out of "):
        read_changes([folder], [wan], ORIGINAL)
    (folder / "a.safetensors").unlink()
    for name in "ab":
        (folder / f"{name}.safetensors").write_bytes(aside.read_bytes())
    with pytest.raises(UserError, match=r"holds 2 safetensors files \(a\.safetensors, b\.safetensors\)"):
        read_changes([folder], [wan], ORIGINAL)
    (folder / "a.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.safetensors: no LoRA file, or damaged"):
        read_changes([folder / "a.safetensors"], [wan], ORIGINAL)
