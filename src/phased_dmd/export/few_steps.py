"""A few-step pipeline is its base's diffusers pipeline with the experts of an export, at exactly their times.

Needs torch, diffusers 0.42 or later, transformers and peft, and ftfy where the index says so; nothing else.
`load_pipeline` does all. A copy of this file, as `pipeline.py`, is in every export, and makes it a custom pipeline of
diffusers.
"""

import inspect
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

INDEX = "export.json"  # in the folder of an export: see `FewSteps.load_few_steps`
READ = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a repository: no code, no pictures
GUIDANCE = ("guidance_scale", "guidance_scale_2", "true_cfg_scale")
Base = diffusers.WanPipeline if TYPE_CHECKING else object


class TrainedTimes(FlowMatchEulerDiscreteScheduler):
    """Takes Euler's steps, with fresh noise after each if it is stochastic, between exactly the trained times.

    times: where the steps begin. switch: called with the number of each step before it. generator: of fresh noise.
    """

    times: Sequence[float] = ()
    switch: Any = None
    generator: torch.Generator | None = None

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None) -> None:  # noqa: ANN001
        """Sets the trained times, whatever it is asked for."""
        super().set_timesteps(sigmas=list(self.times), device=device)
        self.switch(0)

    def step(self, *arguments: Any, **options: Any) -> Any:
        """Steps, and has the next step's expert put to work."""
        made = super().step(*arguments, **{"generator": self.generator} | options)
        if (self.step_index or 0) < len(self.times):
            self.switch(self.step_index)
        return made


class FewSteps(Base):
    """Comes before a pipeline's own class: switches the experts between steps, and refuses calls that would be wrong.

    A LoRA of the user's own may be loaded beside the experts, and is active in every step.
    """

    few_steps: dict[str, Any] | None = None  # what the export's index holds
    few_steps_from = ""  # the folder or hub id that it came from
    trained_scheduler: TrainedTimes | None = None
    own_loras: dict[str, Any] = {}  # weights of further adapters, by name; each pipeline's its own

    def load_few_steps(self, folder: str | Path, revision: str | None = None) -> Self:
        """Loads an export's experts and times, and returns the pipeline.

        folder: of an export whose base this pipeline is, or the hub id of one; revision: a commit of the latter.
        """
        place = find(folder, revision)
        index = read_index(place)
        if not isinstance(self, pipeline_class(index["pipeline"])):
            refuse(f"{folder}: its experts are for a {index['pipeline']}, and this is a {type(self).__name__}")
        if index["fused"] and Path(self.name_or_path) not in (Path(folder), place):
            refuse(f"{folder}: its experts are whole transformers; load the pipeline itself from there")
        if index["cleans"]:
            import ftfy  # noqa: F401  the pipeline cleans prompts with it, as in training
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            for expert in [] if index["fused"] else index["experts"]:
                options = {"load_into_transformer_2": True} if expert["part"] == "transformer_2" else {}
                super().load_lora_weights(
                    str(place), weight_name=expert["file"], adapter_name=expert["name"], use_safetensors=True, **options
                )  # fmt: skip
        if "boundary_ratio" in self.config:
            self.register_to_config(boundary_ratio=index["boundary_ratio"])
        self.few_steps, self.few_steps_from, self.own_loras = index, str(folder), {}
        self.scheduler = self.trained_scheduler = TrainedTimes(stochastic_sampling=index["solver"] == "renoise")
        self.scheduler.times, self.scheduler.switch = index["times"], self.use_expert
        return self

    def use_expert(self, step: int) -> None:
        """Makes the expert of a step, and the user's own adapters, the active ones of the transformer that it is on."""
        expert = next(expert for expert in self.adapters if step in expert["steps"]) if self.adapters else None
        if expert:
            network = getattr(self, expert["part"])
            own = {name: weight for name, weight in self.own_loras.items() if name in network.peft_config}
            network.set_adapters([expert["name"], *own], [1.0, *own.values()])

    @property
    def adapters(self) -> Sequence[dict[str, Any]]:
        """Returns the experts that are adapters; of a fused export there are none."""
        return [] if self.few_steps is None or self.few_steps["fused"] else self.few_steps["experts"]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Samples as the base's pipeline does, at the trained size unless told another; see `check_call`."""
        call = inspect.signature(super().__call__).bind(*arguments, **options).arguments
        few, scheduler = self.few_steps, self.trained_scheduler
        if few is None or scheduler is None:
            refuse("there are no experts yet: pipe.load_few_steps(FOLDER), with the export's folder or hub id")
        if self.scheduler is not scheduler:
            refuse("the scheduler was replaced: the experts were distilled for the times of the one that was there")
        check_call(call, few)
        scheduler.generator = call.get("generator")
        fixed = few["fixed"] | few["unguided"] | {"num_inference_steps": len(few["times"])}
        if few["max_sequence_length"]:
            fixed["max_sequence_length"] = few["max_sequence_length"]
        return super().__call__(**few["size"] | call | fixed)

    def _encode_vae_image(self, image: torch.Tensor, generator: Any) -> torch.Tensor:
        """Encodes a picture in the VAE's own precision: pipelines that edit hand it over in the network's."""
        return super()._encode_vae_image(image.to(self.vae.dtype), generator).to(image.dtype)  # type: ignore[attr-defined]

    def load_lora_weights(self, weights: Any, adapter_name: str | None = None, **options: Any) -> None:  # type: ignore[override]
        """Loads a LoRA of the user's own beside the experts; refuses the export's files, which are loaded already."""
        if self.is_of_export(weights, options.get("weight_name")):
            refuse(f"{weights}: load_few_steps loads the experts, all of them, each for its steps; this is for others")
        before = self.loaded_adapters()
        super().load_lora_weights(weights, adapter_name=adapter_name, **options)
        if self.adapters:
            self.own_loras |= {name: 1.0 for name in self.loaded_adapters() - before}

    def is_of_export(self, weights: Any, file: str | None) -> bool:
        """Says whether weights to be loaded are an export's: a folder or hub id, or one of the experts' files."""
        if isinstance(weights, dict):
            return False
        files = {expert["file"] for expert in self.adapters}
        known = str(weights) == self.few_steps_from or file in files or Path(weights).name in files
        return known or Path(weights, INDEX).exists()

    def loaded_adapters(self) -> set[str]:
        """Returns the names of all adapters, the experts' too."""
        return {name for names in self.get_list_adapters().values() for name in names}

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: Any = None) -> None:
        """Chooses the user's own adapters and their weights; those of the experts are chosen step by step."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        if not self.adapters:
            return super().set_adapters(adapter_names, adapter_weights)
        if odd := set(names) & {expert["name"] for expert in self.adapters}:
            refuse(f"set_adapters: {min(odd)} is an expert, which the pipeline puts to work at its steps by itself")
        if odd := set(names) - self.loaded_adapters():
            refuse(f"set_adapters: there is no adapter {min(odd)}")
        self.own_loras = {name: 1.0 if w is None else w for name, w in zip(names, weights, strict=True)}

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """Deletes adapters of the user's own."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if odd := set(names) & {expert["name"] for expert in self.adapters}:
            refuse(f"delete_adapters: {min(odd)} is an expert, without which its steps would be the base's")
        super().delete_adapters(adapter_names)
        self.own_loras = {name: weight for name, weight in self.own_loras.items() if name not in names}

    def fuse_lora(self, *arguments: Any, **options: Any) -> None:
        """Refuses to merge adapters: of several experts on a transformer only one could stay."""
        if self.adapters:
            refuse("fuse_lora: it would merge one expert for all steps; `phased-dmd export --fused` merges each")
        super().fuse_lora(*arguments, **options)

    def unload_lora_weights(self) -> None:
        """Refuses to take the experts off."""
        if self.adapters:
            refuse(
                "unload_lora_weights: without the experts this is the base in a few steps; delete_adapters takes one"
            )
        super().unload_lora_weights()

    def disable_lora(self) -> None:
        """Refuses to turn the experts off."""
        if self.adapters:
            refuse(
                "disable_lora: without the experts this is the base in a few steps; set_adapters([]) turns others off"
            )
        super().disable_lora()


def check_call(call: dict[str, Any], few: dict[str, Any]) -> None:
    """Raises a ValueError for arguments of a call with which the samples would be others than those distilled."""
    steps, tokens = len(few["times"]), few["max_sequence_length"]
    if call.get("num_inference_steps", steps) != steps:
        refuse(f"num_inference_steps: {call['num_inference_steps']}, but the experts were distilled for {steps}")
    if call.get("max_sequence_length", tokens) != tokens:
        refuse(
            f"max_sequence_length: {call['max_sequence_length']}, but the experts were distilled for {tokens} tokens"
        )
    none = dict.fromkeys(GUIDANCE, 1.0) | few["unguided"]
    if guided := next((name for name in GUIDANCE if (call.get(name) or 0) > none[name]), None):
        refuse(f"{guided}: {call[guided]:g}, but the guidance is distilled into the experts; leave it out")
    if call.get("negative_prompt") or call.get("negative_prompt_embeds") is not None:
        refuse("negative_prompt: without guidance it changes nothing; leave it out")
    if call.get("sigmas") is not None:
        refuse("sigmas: the experts were distilled for their own times; leave it out")
    if odd := next((name for name, value in few["fixed"].items() if call.get(name, value) != value), None):
        refuse(f"{odd}: {call[odd]}, with which the experts of several steps would be mixed; leave it out")
    prompts = call.get("prompt")
    if few["alone"] and isinstance(prompts, list) and len(set(prompts)) > 1:
        refuse("prompt: samples of one call would depend on the longest prompt of it; call once for each prompt")
    if "scale" in (call.get("attention_kwargs") or {}):
        refuse("attention_kwargs: scale would weaken or strengthen the experts, which were distilled at 1")
    embeds = call.get("prompt_embeds")
    if embeds is not None and few["padded"] and embeds.shape[1] != tokens:
        refuse(f"prompt_embeds: {embeds.shape[1]} tokens, but the experts were distilled for text padded to {tokens}")


def refuse(why: str) -> NoReturn:
    raise ValueError(why)


def few_step_class(pipeline: str) -> Any:
    """Returns the few-step class of a pipeline, by the name of its class."""
    return type("FewStepPipeline", (FewSteps, pipeline_class(pipeline)), {})


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    """Returns a pipeline's class by its name in diffusers; raises a ValueError where that is none."""
    kind = getattr(diffusers, name, None)
    if isinstance(kind, type) and issubclass(kind, DiffusionPipeline):
        return kind
    refuse(f"{name}: no pipeline of diffusers")


def find(folder: str | Path, revision: str | None = None) -> Path:
    """Returns the folder of an export itself, or that of a hub id's download: weights and JSON, no code."""
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(folder), revision=revision, allow_patterns=list(READ)))


def read_index(folder: Path) -> dict[str, Any]:
    """Reads what an export says of itself; raises a ValueError for a folder that is none."""
    if not (path := folder / INDEX).exists():
        refuse(f"{folder}: holds no {INDEX}, which an export has")
    index = json.loads(path.read_text("utf-8"))
    pipeline_class(str(index.get("pipeline")))
    if not all(Path(expert["file"]).name == expert["file"] for expert in index["experts"]):
        refuse(f"{path}: names files elsewhere")
    if missing := {"unguided", "fixed", "padded", "alone", "cleans"} - index.keys():
        refuse(f"{path}: says nothing of {min(missing)}; an older version wrote it, and its own pipeline.py runs it")
    return index


def load_pipeline(
    folder: str | Path, base: str | Path | None = None, revision: str | None = None,
    dtype: torch.dtype | None = None, device: str | torch.device | None = None, **parts: Any,
) -> Any:  # fmt: skip
    """Returns the few-step pipeline of an export: `load_pipeline(FOLDER)(prompt="a fox")` samples.

    folder: an export's, or its hub id; revision: a commit of the latter. base: the base's folder or hub id, where it is
    another than the export names, or none is named. dtype: of all but the VAE, bfloat16 on a GPU and float32 on a CPU
    unless told. device: a GPU if there is one; with "cpu", `enable_model_cpu_offload()` can follow.
    parts: of the pipeline, in the place of the base's.
    """
    place = find(folder, revision)
    index, options = read_index(place), dict[str, Any]()
    if index["fused"]:
        base = place if base is None else refuse(f"base: {folder} is a whole pipeline, and needs no other")
    elif base is None and (place / "base").is_dir():
        base = place / "base"
    elif base is None:
        base, options["revision"] = index["base"], index["revision"]
    if base is None:
        refuse(f"{folder}: its base was a local folder; name it: load_pipeline({str(folder)!r}, base=FOLDER)")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    options |= {"dtype": {"default": dtype, "vae": torch.float32}, "use_safetensors": True} | parts
    return (
        few_step_class(index["pipeline"]).from_pretrained(base, **options).load_few_steps(folder, revision).to(device)
    )
