"""The typed config: what it refuses and how it says so, recipes, overrides and methods; prompt files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import phased_dmd
from phased_dmd.cli.flags import assignment
from phased_dmd.config import Config, phase_plan, renoise_interval
from phased_dmd.config.overrides import apply_overrides, build, read_file, with_method
from phased_dmd.config.teacher import AnalyticTeacher
from phased_dmd.errors import UserError
from phased_dmd.prompts import Prompt, read_prompts
from phased_dmd.recipes import RECIPES, resolve


def data_of(recipe: str, **overrides: Any) -> dict[str, Any]:
    return apply_overrides(json.loads(RECIPES[recipe]().model_dump_json()), overrides)


def set_path(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """data with a dotted path set, known or not."""
    *parents, name = path.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    node[name] = value
    return data


# ---------------------------------------------------------------- misspelt fields

MISSPELT = [
    ("toy-1d", "plan.shfit", 3.0, "shift"),
    ("toy-1d", "iteration", 5, "iterations"),
    ("toy-1d", "optimizer", {"clip": 1.0}, "optimiser"),
    ("toy-1d", "optimiser.second_momment", "bfloat16", "second_moment"),
    ("toy-1d", "teacher.fit_step", 5, "fit_steps"),
    ("nano-t2i", "teacher.guidence", 3.0, "guidance"),
    ("nano-t2i", "fake.lora.alhpa", 3.0, "alpha"),
    ("nano-t2i", "renoise.above_switc", "clamp", "above_switch"),
]


@pytest.mark.parametrize(("recipe", "path", "value", "meant"), MISSPELT)
def test_a_misspelt_field_is_named_with_the_nearest(
    recipe: str, path: str, value: Any, meant: str, tmp_path: Path
) -> None:
    expected = f"{path}: unknown field; did you mean {meant}?"
    with pytest.raises(UserError) as built:
        build(set_path(data_of(recipe), path, value))
    assert str(built.value) == expected
    with pytest.raises(UserError) as overridden:
        resolve(recipe, {path: value})
    assert str(overridden.value) == expected
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(set_path(data_of(recipe), path, value)))
    with pytest.raises(UserError) as read:
        resolve(str(file), {})
    assert expected in str(read.value)


@pytest.mark.parametrize(
    ("path", "parent", "meant"), [("plna.shift", "plna", "plan"), ("generator.loar.rank", "loar", "lora")]
)
def test_a_misspelt_section_is_named_with_the_nearest(path: str, parent: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"^{path}: unknown field; did you mean {meant}\\?$"):
        resolve("toy-1d", {path: 3.0})


def test_a_field_like_no_other_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"^plan\.qqqq: unknown field; one of steps, phases, shift, start, gradient$"):
        build(set_path(data_of("toy-1d"), "plan.qqqq", 1))
    with pytest.raises(UserError, match=r"^plan\.qqqq: unknown field; one of steps, phases, shift, start, gradient$"):
        resolve("toy-1d", {"plan.qqqq": 1})


# ---------------------------------------------------------------- values and combinations

REFUSED = [
    ("toy-1d", {"plan.steps": 4, "plan.phases": 3}, "plan.phases: 4 steps cannot be split into 3 equal phases"),
    ("toy-1d", {"plan.steps": 2, "plan.phases": 4}, "plan.phases: 2 steps cannot be split into 4 equal phases"),
    ("toy-1d", {"plan.steps": 0}, "plan.steps: must be greater than 0"),
    ("toy-1d", {"ablation.solver": "euler"}, "ablation.solver: must be 'ddim' or 'renoise', and this is \"euler\""),
    ("toy-1d", {"plan.gradient": "some"}, "plan.gradient: must be 'all' or 'last', and this is \"some\""),
    ("toy-1d", {"generator.weights": "lora"}, "an analytic teacher has only 'full' students"),
    ("toy-1d", {"fake.weights": "lora"}, "an analytic teacher has only 'full' students"),
    ("toy-1d", {"prompts": "nano-t2i"}, "prompts: an analytic teacher takes none"),
    ("nano-t2i", {"prompts": None}, "prompts: this teacher needs a prompt set"),
    ("toy-1d", {"ablation.renoise": "nest"}, "ablation.renoise: must be 'nested', 'disjoint' or a time in (0, 1]"),
    ("toy-1d", {"ablation.renoise": 1.5}, "ablation.renoise: must be 'nested', 'disjoint' or a time in (0, 1]"),
    ("toy-1d", {"ablation.renoise": 0.5}, "ablation.renoise: 0.5 is outside (0.5, 1] of phase 1"),
    (
        "toy-1d",
        {"ablation.renoise": 0.95, "plan.start": 0.9},
        "ablation.renoise: 0.95 is outside (0.45, 0.9] of phase 1",
    ),
    (
        "toy-1d",
        {"teacher.means": [[0.0], [1.0, 2.0]]},
        "teacher: means: needs at least one mean, all of the same length",
    ),
    ("toy-1d", {"teacher.weights": [1.0, 2.0]}, "teacher: weights: needs one positive weight a mean"),
    ("toy-1d", {"generator.lr": -1.0}, "generator.lr: must be greater than 0"),
    ("toy-1d", {"generator.ema": 1.0}, "generator.ema: must be less than 1"),
    ("toy-1d", {"phase_shares": [1.0]}, "phase_shares: 1 of them for 2 phases; null makes all phases alike"),
    ("toy-1d", {"phase_shares": [1.0, 0.0]}, "phase_shares.1: must be greater than 0"),
    ("toy-1d", {"iterations": 2.5}, "iterations: must be a whole number, and this is 2.5"),
    ("nano-t2i", {"teacher.guidance": 0.5}, "teacher.guidance.0: must be greater than or equal to 1"),
]


READ_OTHERWISE = [  # after --set; what is said
    ("teacher.negative_prompt=", "must be text, and YAML reads this as null; quote it: --set '{}=\"...\"'"),
    ("teacher.negative_prompt=no", "must be text, and YAML reads this as false; quote it: --set '{}=\"...\"'"),
    ("teacher.negative_prompt=7", "must be text, and YAML reads this as 7; quote it: --set '{}=\"...\"'"),
    ("teacher.negative_prompt=2024-01-01", 'must be text, and YAML reads this as "2024-01-01"; quote it: '),
    (
        "teacher.negative_prompt=blurry: low quality",
        "must be text, and YAML reads this as {{'blurry': 'low quality'}}; quote it: --set '{}=\"...\"'",
    ),
    ("trackers=wandb", 'must be a list, and this is "wandb"; in brackets it is one: --set \'{}=["wandb"]\''),
    ("iterations=1e3", 'must be a whole number, and this is "1e3"'),
    ("iterations=", "must be a whole number, and this is null"),
    ("generator.lora.alpha=two", 'must be a number, and this is "two"'),
    ("engine.offload=maybe", 'must be true or false, and this is "maybe"'),
    ("generator=3", "must be a mapping of fields, and this is 3"),
    ("teacher.sizes=[]", "must have at least 1 item, and this is []"),
    ("teacher.kind=wann", "'wann' is unknown; did you mean wan?"),
]


@pytest.mark.parametrize(("setting", "says"), READ_OTHERWISE)
def test_what_a_field_needs_and_what_yaml_made_of_the_setting_is_said_in_our_words(setting: str, says: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(UserError) as error:
        resolve("nano-t2i", dict([assignment(setting)]))
    assert str(error.value).startswith(f"{key}: {says.format(key)}")


def test_no_message_is_in_pydantics_words() -> None:
    """Of every field, given what no field takes."""
    data = json.loads(RECIPES["nano-t2i"]().model_dump_json())
    sections = {name: fields for name, fields in data.items() if isinstance(fields, dict)}
    for path in [*data, *(f"{name}.{field}" for name, fields in sections.items() for field in fields)]:
        for value in (object(), "", "a\0b", -1e300, {"x": 1}, [None]):
            try:
                resolve("nano-t2i", {path: value})
            except UserError as error:
                said = str(error)
                assert said.startswith(path.split(".")[0])
                assert not re.search("Input|valid|instance|dictionary|tuple|[Ss]tring|tag|validation|Field", said), said


@pytest.mark.parametrize(("text", "value"), [("010", 8), ("0_17", 15), ("1:30", 90), ("1:30.5", 90.5), ("-012", -10)])
def test_a_number_that_yaml_reads_in_another_base_than_it_looks_like_is_refused(
    text: str, value: float, tmp_path: Path
) -> None:
    """YAML 1.1: octal for a leading zero, sexagesimal for a colon."""
    assert yaml.safe_load(text) == value
    with pytest.raises(UserError, match=f"--set: 'seed={text}' is not read: {text} is {value} to YAML; write that; "):
        assignment(f"seed={text}")
    (tmp_path / "run.yaml").write_text(f"recipe: a\nteacher: {{kind: wan}}\nseed: {text}\n")
    with pytest.raises(UserError, match=f"run.yaml: cannot be read as YAML or JSON: {text} is {value} to YAML"):
        resolve(str(tmp_path / "run.yaml"), {})
    for fine, read in ((f'"{text}"', text), ("007", 7), ("08", "08"), ("0", 0), ("0x10", 16), ("1.05", 1.05)):
        assert assignment(f"seed={fine}") == ("seed", read)


@pytest.mark.parametrize("value", ["@night", "*", "a: b: c", "'open"])
def test_a_text_that_is_no_yaml_is_told_to_be_quoted(value: str) -> None:
    with pytest.raises(UserError, match=r"is not read: .*; quote what is text: --set 'teacher.negative_prompt=\"..."):
        assignment(f"teacher.negative_prompt={value}")


@pytest.mark.parametrize(("recipe", "overrides", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line(recipe: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(recipe, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_edge_of_each_refusal_is_accepted() -> None:
    assert resolve("toy-1d", {"ablation.renoise": 0.5001}).ablation.renoise == 0.5001
    assert resolve("toy-1d", {"ablation.renoise": 1.0}).ablation.renoise == 1
    assert resolve("toy-1d", {"ablation.renoise": 0.9, "plan.start": 0.9}).ablation.renoise == 0.9
    assert phase_plan(resolve("toy-2d", {"plan.steps": 6, "plan.phases": 3})).starts == (0, 2, 4)


def test_intervals_of_four_phases() -> None:
    """Nested to t_0, disjoint to the phase's own begin; the grid of shift 5 is 1, 15/16, 5/6, 5/8, 0."""
    nested = resolve("toy-2d", {"plan.shift": 5.0})
    disjoint = resolve("toy-2d", {"plan.shift": 5.0, "ablation.renoise": "disjoint"})
    ends, begins = [15 / 16, 5 / 6, 5 / 8, 0.02], [1.0, 15 / 16, 5 / 6, 5 / 8]
    for phase in range(1, 5):
        low, high = ends[phase - 1], begins[phase - 1]
        for config, most in ((nested, 1.0), (disjoint, high)):
            assert interval_of(config, phase) == pytest.approx((low, most, 0.0), abs=1e-12)


def interval_of(config: Config, phase: int, switches: tuple[float, ...] = ()) -> tuple[float, float, float]:
    found = renoise_interval(config, phase_plan(config, switches), phase)
    return found.low, found.high, found.floor


SWITCHED = [  # phases, interval, what the switch does -> of each phase (low, high] that t is drawn from, and its floor
    (2, "nested", "clamp", [(5 / 6, 1, 0.875), (0.02, 1, 0)]),
    (2, "nested", "truncate", [(0.875, 1, 0), (0.02, 1, 0)]),
    (1, "nested", "clamp", [(0.02, 1, 0)]),
    (4, "nested", "clamp", [(15 / 16, 1, 0.875), (5 / 6, 1, 0.875), (5 / 8, 1, 0), (0.02, 1, 0)]),
    (2, "disjoint", "truncate", [(0.875, 1, 0), (0.02, 5 / 6, 0)]),
    (2, "nested", None, [(5 / 6, 1, 0), (0.02, 1, 0)]),
]


@pytest.mark.parametrize(("phases", "interval", "above", "expected"), SWITCHED)
def test_a_switch_bounds_the_phases_above_it(phases: int, interval: str, above: Any, expected: list[Any]) -> None:
    """Shift 5, grid 1, 15/16, 5/6, 5/8; the switch .875 lies above the end of the second step."""
    shape = {"plan.shift": 5.0, "plan.phases": phases, "plan.gradient": "last"}
    config = resolve("toy-2d", {**shape, "ablation.renoise": interval, "renoise.above_switch": above})
    plan, without = phase_plan(config, (0.875,)), resolve("toy-2d", {**shape, "ablation.renoise": interval})
    for phase, (low, high, floor) in enumerate(expected, 1):
        assert interval_of(config, phase, (0.875,)) == pytest.approx((low, high, floor))
        assert renoise_interval(config, plan, phase).support == pytest.approx((max(low, floor), high))
        assert interval_of(config, phase) == interval_of(without, phase), "without a switch the field does nothing"


def test_one_time_for_all_is_bounded_by_no_switch() -> None:
    fixed = resolve("toy-2d", {"plan.shift": 5.0, "plan.phases": 2, "ablation.renoise": 0.9})
    assert [interval_of(fixed, phase, (0.875,)) for phase in (1, 2)] == [(0.9, 0.9, 0.0)] * 2


def test_a_switch_that_leaves_no_times_is_refused_with_the_teacher() -> None:
    """Disjoint phases at shift 7: the third begins at the switch itself, .875, and may not go below it."""
    four = {"plan.shift": 7.0, "plan.phases": 4, "ablation.renoise": "disjoint", "renoise.above_switch": "truncate"}
    config = resolve("toy-2d", four)
    with pytest.raises(
        ValueError, match=r"^renoise: no time of phase 3 is left below 0\.875 at or above the switch 0\.875$"
    ):
        phase_plan(config, (0.875,))


# ---------------------------------------------------------------- recipes, files, overrides


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_valid_and_survive_json(recipe: str) -> None:
    """The functions skip validation in places (model_copy), so each is built again from its own JSON."""
    config = RECIPES[recipe]()
    again = build(json.loads(config.model_dump_json()))
    assert again == config and again.recipe == recipe
    assert again.model_dump_json() == config.model_dump_json()


def test_json_keeps_every_digit() -> None:
    third, tenth = 1 / 3, 0.1 + 0.2
    config = resolve("toy-1d", {"generator.lr": third, "teacher.means": [[tenth], [1e-300]], "seed": 2**53 + 1})
    again = build(json.loads(config.model_dump_json()))
    assert again.generator.lr == third and again.seed == 2**53 + 1
    assert again.teacher.kind == "analytic" and again.teacher.means == ((tenth,), (1e-300,))


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("optimiser.clip", "BAD", "optimiser.clip"),  # no clipping, say: `--set ...clip=.inf`
        ("fake.lora.alpha", "BAD", "fake.lora.alpha"),
        ("plan.shift", "BAD", "plan.shift"),
        ("seed", "BAD", "seed"),
        ("teacher.std", "BAD", "teacher.std"),
        ("teacher.means", [[0.0], ["BAD"]], "teacher.means.1.0"),
        ("teacher.weights", [1.0, "BAD", 1.0, 1.0], "teacher.weights.1"),
    ],
)
def test_a_number_that_is_not_finite_is_refused(path: str, value: Any, named: str, bad: float) -> None:
    """JSON has none, so a run could not be told from its own config.json."""

    def put(value: Any) -> Any:
        return [put(v) for v in value] if isinstance(value, list) else bad if value == "BAD" else value

    with pytest.raises(UserError, match=f"^{re.escape(named)}: must be a finite number, and this is (-?Infinity|NaN)$"):
        resolve("toy-1d", {path: put(value)})


@pytest.mark.parametrize("name", ["toy1d", "nano_t2i", "toy-3d"])
def test_an_unknown_recipe_is_named_with_the_nearest(name: str) -> None:
    nearest = {"toy1d": "toy-1d", "nano_t2i": "nano-t2i", "toy-3d": "toy-[12]d"}[name]
    with pytest.raises(UserError, match=f"^recipe: unknown recipe '{name}'; did you mean {nearest}\\?$"):
        resolve(name, {})


def test_a_recipe_unlike_any_lists_all() -> None:
    with pytest.raises(UserError, match=f"one of {re.escape(', '.join(RECIPES))}$"):
        resolve("zzzzzz", {})


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_a_file_gives_the_recipe_it_holds(suffix: str, tmp_path: Path) -> None:
    config = resolve("nano-t2v", {"plan.shift": 3.5})
    file = tmp_path / f"run{suffix}"
    data = json.loads(config.model_dump_json())
    file.write_text(json.dumps(data) if suffix == ".json" else yaml.safe_dump(data))
    assert resolve(str(file), {}) == config
    assert resolve(str(file), {"seed": 9}) == config.model_copy(update={"seed": 9})


def test_a_file_may_leave_out_what_has_a_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("recipe: mine\nteacher: {kind: analytic, means: [[0], [1]]}\ngenerator: {weights: full}\n")
    config = resolve(str(file), {"plan.shift": 2.0})
    assert config.recipe == "mine" and config.plan.shift == 2.0 and config.batch_size == 64
    assert config.teacher.kind == "analytic" and config.teacher.means == ((0.0,), (1.0,))


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "\x00"])
def test_an_unreadable_file_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^{file}: ") as error:
        read_file(file)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        resolve(str(tmp_path / "absent.yaml"), {})


def test_overrides_change_only_what_they_name() -> None:
    data = data_of("nano-t2i")
    before = json.loads(json.dumps(data))
    changed = apply_overrides(data, {"generator.lora.rank": 5, "seed": 7})
    assert data == before
    assert changed["generator"]["lora"].pop("rank") == 5 and changed.pop("seed") == 7
    del before["generator"]["lora"]["rank"], before["seed"]
    assert changed == before


@pytest.mark.parametrize(
    ("nested", "dotted"),
    [
        ({"generator": {"lora": {"rank": 8}}}, {"generator.lora.rank": 8}),
        ({"generator.lora": {"rank": 8}, "fake": {}}, {"generator.lora.rank": 8}),
        ({"generator": {"lora.rank": 8, "ema": None}}, {"generator.lora.rank": 8, "generator.ema": None}),
        ({"teacher": {"guidance": [2.0]}}, {"teacher.guidance": [2.0]}),
        ({"teacher": {"kind": "wan", "guidance": [2.0]}}, {"teacher.guidance": [2.0]}),
        ({"teacher": {"sizes": [{"num_frames": 5}]}}, {"teacher.sizes": [{"num_frames": 5}]}),
    ],
)
def test_a_mapping_changes_the_fields_of_a_section_that_it_names(nested: Any, dotted: Any) -> None:
    before, given = resolve("nano-t2i"), json.dumps(nested)
    assert resolve("nano-t2i", nested) == resolve("nano-t2i", dotted) != before
    assert json.dumps(nested) == given


def test_a_teacher_of_another_kind_replaces_all_of_it() -> None:
    mixture = {"kind": "analytic", "means": [[0.0], [1.0]], "std": 0.5}
    changes = {"teacher": mixture, "prompts": None, "generator": {"weights": "full"}}
    config = resolve("nano-t2i", changes)
    assert config.teacher == AnalyticTeacher(means=((0.0,), (1.0,)), std=0.5)
    assert config.generator == resolve("nano-t2i").generator.model_copy(update={"weights": "full"})


def test_an_unknown_field_of_a_mapping_is_named() -> None:
    with pytest.raises(UserError, match=r"^generator.lora.rnak: unknown field; did you mean rank\?$"):
        resolve("nano-t2i", {"generator": {"lora": {"rnak": 8}}})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (({"recipe": "nano-t2i"},), "recipe: a name or a file is needed, not a dict"),
        ((None,), "recipe: a name or a file is needed, not a NoneType"),
        (("nano-t2i", "dmd"), "overrides: 'dmd' is no mapping of fields"),
        (("nano-t2i", {"method": "dmd"}),
         "method: not a field; from Python it is the third argument, resolve('nano-t2i', {}, 'dmd')"),
        (("nano-t2i", {}, "phasd"), "method: unknown method 'phasd'; did you mean phased?"),
    ],
)  # fmt: skip
def test_what_resolve_cannot_take_is_one_line(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(*arguments)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_a_recipe_alone_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve("nano-t2i") == RECIPES["nano-t2i"]()
    (tmp_path / "run.json").write_text(resolve("nano-t2v").model_dump_json())
    assert resolve(tmp_path / "run.json") == RECIPES["nano-t2v"]()


INHERITED = """
recipe: nano-t2i
iterations: 7
plan: {steps: 8}
generator.lora.rank: 8
fake: {lora: {alpha: 3}}
"""


def test_a_file_inherits_what_it_does_not_name(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(INHERITED)
    changes = {"iterations": 7, "plan.steps": 8, "generator.lora.rank": 8, "fake.lora.alpha": 3}
    assert resolve(file) == resolve("nano-t2i", changes) != resolve("nano-t2i")
    assert resolve(file, {"iterations": 9}, "dmd").plan.phases == 1
    full = "prompts: null\ngenerator: {weights: full}\nfake: {weights: full}\n"
    file.write_text("recipe: nano-t2i\nteacher: {kind: analytic, means: [[0]]}\n" + full)  # another kind, as a whole
    assert resolve(file).teacher == AnalyticTeacher(means=((0.0,),))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ("wan22-i2v", "qwen-image-edit")])
def test_a_file_of_a_whole_recipe_is_that_recipe(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(resolve(recipe).model_dump_json())
    assert resolve(tmp_path / "run.json") == resolve(recipe)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "recipe: nano-t2\niterations: 10\n",
            "teacher is missing, and recipe: nano-t2 is none .*; did you mean nano-t2",
        ),
        (
            "teacher: {kind: analytic, means: [[0]]}\n",
            "recipe is missing: name the one that the rest ",
        ),
        ("recipe: nano-t2i\n3: 4\n", "3: unknown field"),
        ("recipe: nano-t2i\nnull: 4\n", "None: unknown field"),
        ("recipe: nano-t2i\n0: 4\n", "0: unknown field"),
    ],
)
def test_a_file_that_inherits_from_nothing_is_told_so(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^{file}: {says}"):
        resolve(str(file))


def test_a_field_that_a_file_gets_wrong_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("recipe: nano-t2i\nplan: {step: 8}\n")
    with pytest.raises(UserError, match=r"^plan\.step: unknown field; did you mean steps"):
        resolve(file)


# ---------------------------------------------------------------- methods

METHODS = {  # the paper's Fig. 1 as {phases} x {gradient}, for four steps
    "dmd": (1, "all"), "dmd-sgts": (1, "last"), "phased": (4, "all"), "phased-sgts": (2, "last"),
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["toy-2d", "nano-t2i"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_phases_and_gradient_and_keeps_the_updates(method: Any, recipe: str) -> None:
    base = resolve(recipe, {})
    config = resolve(recipe, {}, method)
    assert (config.plan.phases, config.plan.gradient) == METHODS[method]
    assert config.method == method
    assert config.iterations * config.plan.phases == base.iterations * base.plan.phases
    unchanged = {"plan": base.plan, "iterations": base.iterations}
    assert config.model_copy(update=unchanged) == base
    assert config.plan.model_copy(update={"phases": base.plan.phases, "gradient": base.plan.gradient}) == base.plan


@pytest.mark.parametrize(("steps", "phases", "gradient", "method"), [
    (4, 1, "all", "dmd"), (4, 1, "last", "dmd-sgts"), (4, 2, "last", "phased-sgts"), (4, 4, "all", "phased"),
    (4, 4, "last", "phased"),  # with one step a phase, the exit step is that step
    (4, 2, "all", "phased-all"), (1, 1, "all", "dmd"), (1, 1, "last", "dmd-sgts"), (6, 3, "last", "phased-sgts"),
])  # fmt: skip
def test_method_names_what_the_plan_does(steps: int, phases: int, gradient: str, method: str) -> None:
    overrides = {"plan.steps": steps, "plan.phases": phases, "plan.gradient": gradient}
    assert resolve("toy-2d", overrides).method == method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("phases", [1, 2, 4])
def test_updates_that_do_not_divide_are_never_exceeded(method: Any, phases: int, tmp_path: Path) -> None:
    """7 updates a phase: the total is kept to within less than one a phase."""
    file = tmp_path / "run.json"
    file.write_text(json.dumps(data_of("toy-2d", **{"plan.phases": phases, "iterations": 7})))
    config = resolve(str(file), {}, method)
    total = config.iterations * config.plan.phases
    assert 7 * phases - config.plan.phases < total <= 7 * phases


@pytest.mark.parametrize(("phases", "kept"), [(1, 2), (2, 2), (3, 3), (6, 2)])
def test_phased_sgts_keeps_a_split_that_is_one(phases: int, kept: int) -> None:
    data = with_method("phased-sgts", data_of("toy-2d", **{"plan.steps": 6, "plan.phases": phases}))
    assert data["plan"]["phases"] == kept and data["plan"]["gradient"] == "last"


def test_a_method_rescales_the_iterations_of_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(data_of("toy-2d", **{"plan.steps": 6, "plan.phases": 3, "iterations": 50})))
    assert [resolve(str(file), {}, method).iterations for method in METHODS] == [150, 150, 25, 50]


@pytest.mark.parametrize(("method", "shares"), [(None, (0.5, 0.5, 1.0, 1.5)), ("phased", (0.5, 0.5, 1.0, 1.5)),
                                                ("dmd", None), ("phased-sgts", None)])  # fmt: skip
def test_a_method_of_other_phases_drops_their_shares_and_keeps_the_updates(
    method: Any, shares: Any, tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(data_of("toy-2d", iterations=40, phase_shares=[0.5, 0.5, 1.0, 1.5])))
    config = resolve(str(file), {}, method)
    assert config.phase_shares == shares and config.updates == 20 + 20 + 40 + 60
    phases = config.plan.phases
    assert resolve(str(file), {"plan.phases": phases}, method) == config, "said twice, it is no contradiction"
    if shares:
        assert [config.phase_iterations(phase) for phase in (1, 2, 3, 4)] == [20, 20, 40, 60]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("iterations", [7, 500])
def test_a_method_keeps_the_updates_in_all_of_given_iterations_too(method: Any, iterations: int) -> None:
    """Those of a phase of the recipe's four, the recipe's own 500 among them."""
    config = resolve("toy-2d", {"iterations": iterations}, method)
    assert config.updates == 4 * iterations == resolve("toy-2d", {"iterations": iterations}).updates
    assert (config.plan.phases, config.plan.gradient) == METHODS[method] and config.method == method


@pytest.mark.parametrize("method", METHODS)
def test_iterations_given_with_the_phases_are_theirs(method: Any) -> None:
    """A method that changes nothing about the phases converts nothing."""
    phases = METHODS[method][0]
    assert resolve("toy-2d", {"iterations": 7, "plan.phases": phases}, method).iterations == 7
    shares = {"phase_shares": [0.5] * phases}
    assert resolve("toy-2d", {"iterations": 8, "plan.phases": phases, **shares}, method).updates == 4 * phases


def test_given_iterations_of_a_recipe_with_shares_keep_their_total() -> None:
    """nano-t2i-fast has .5, .5, 1 and 2.25 of them in its phases."""
    assert resolve("nano-t2i-fast", {"iterations": 40}).updates == 170
    assert resolve("nano-t2i-fast", {"iterations": 40}, "dmd").iterations == 170
    assert resolve("nano-t2i-fast", {"iterations": 40}, "phased").updates == 170


def test_overrides_of_the_plan_come_after_the_method() -> None:
    """Six steps in three phases, where phased-sgts alone makes four in two; each has a third of the updates."""
    config = resolve("toy-2d", {"plan.steps": 6, "plan.phases": 3}, "phased-sgts")
    assert (config.plan.steps, config.plan.phases, config.plan.gradient) == (6, 3, "last")
    assert config.method == "phased-sgts" and config.iterations == 4 * resolve("toy-2d", {}).iterations // 3
    assert resolve("toy-2d", {"plan.steps": 8}, "phased").iterations == resolve("toy-2d", {}).iterations // 2
    assert resolve("toy-2d", {"plan.steps": 8}, "phased").plan.phases == 8
    with pytest.raises(UserError, match="2 steps allow none"):
        resolve("toy-1d", {}, "phased-sgts")
    assert resolve("toy-2d", {"plan.gradient": "last"}, "phased").method == "phased"  # one step a phase: no truncation


CONTRADICTIONS = [
    ("dmd", {"plan.phases": 2}, "phased-all"),
    ("phased", {"plan.phases": 2}, "phased-all"),
    ("dmd", {"plan.gradient": "last"}, "dmd-sgts"),
    ("dmd-sgts", {"plan.phases": 2}, "phased-sgts"),
    ("dmd-sgts", {"plan.gradient": "all"}, "dmd"),
    ("phased", {"plan.phases": 1}, "dmd"),
    ("phased", {"plan.phases": 2, "plan.gradient": "last"}, "phased-sgts"),
    ("phased-sgts", {"plan.phases": 1}, "dmd-sgts"),
    ("phased-sgts", {"plan.phases": 4}, "phased"),
    ("phased-sgts", {"plan.gradient": "all"}, "phased-all"),
]


@pytest.mark.parametrize(("method", "overrides", "made"), CONTRADICTIONS)
def test_overrides_that_contradict_the_method_are_refused(method: Any, overrides: dict[str, Any], made: str) -> None:
    resolve("toy-2d", overrides)  # by themselves they are fine
    with pytest.raises(UserError) as error:
        resolve("toy-2d", overrides, method)
    assert str(error.value) == f"method: {method} contradicts plan.phases or plan.gradient, which make {made}"


def test_with_method_leaves_its_argument_alone() -> None:
    data = data_of("toy-2d")
    before = json.loads(json.dumps(data))
    with_method("dmd", data)
    assert data == before


# ---------------------------------------------------------------- imports


def test_config_phases_and_recipes_import_without_torch() -> None:
    code = (
        "import phased_dmd.config, phased_dmd.maths.phases, phased_dmd.recipes, sys;"
        "print([name for name in ('torch', 'diffusers', 'peft', 'transformers', 'numpy') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- prompts


def test_prompts_leave_out_comments_and_blanks_and_keep_repeats(tmp_path: Path) -> None:
    """A line that stands twice is drawn twice as often; a # inside a line is text."""
    file = tmp_path / "prompts.txt"
    file.write_text("# header\na seven\n\n   \na digit  \n#a nine\na seven\n  a one # of many\n")
    assert read_prompts(str(file)) == [Prompt(text) for text in ("a seven", "a digit", "a seven", "a one # of many")]


def test_a_shipped_set_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the same name in the working folder is not it; a path is never a set."""
    shipped = Path(phased_dmd.__file__).parent / "assets" / "prompts" / "nano-t2i.txt"
    (tmp_path / "nano-t2i").write_text("my own seven\n")
    monkeypatch.chdir(tmp_path)
    assert read_prompts("nano-t2i") == read_prompts(str(shipped)) != [Prompt("my own seven")]
    assert read_prompts("./nano-t2i") == [Prompt("my own seven")]


def test_missing_prompts_list_the_shipped_sets(tmp_path: Path) -> None:
    """And nothing else that lies there, such as README.md and the pictures."""
    sets = "default-t2i, default-t2v, nano-i2v, nano-i2v-held-out, nano-t2i, nano-t2v, paper-t2i, paper-t2v, "
    sets += "scenes-t2i, scenes-t2i-specific, scenes-t2v, scenes-t2v-specific"
    for source in ("digitz", str(tmp_path / "absent.txt"), str(tmp_path)):
        with pytest.raises(UserError) as error:
            read_prompts(source)
        assert str(error.value) == f"prompts: {source} is neither a readable prompt file nor a shipped set ({sets})"


@pytest.mark.parametrize("content", [b"", b"# only a comment\n\n", b"\xff\xfe\x00a"])
def test_useless_prompt_files_are_user_errors(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^prompts: {file}( holds no prompt|, line 1 is not UTF-8)"):
        read_prompts(str(file))


def test_a_user_error_is_a_value_error() -> None:
    """Callers of the Python interface may catch the built-in."""
    with pytest.raises(ValueError, match="unknown recipe"):
        resolve("nothing", {})
    assert isinstance(resolve("toy-1d", {}), Config)
