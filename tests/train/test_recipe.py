"""Recipes: every fault is named, and a file that is not plain YAML does nothing."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Trainer, TrainerCallback, TrainingArguments

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError
from loraover.common.strict_yaml import MAX_YAML_BYTES, parse_yaml
from loraover.training.recipe import Recipe, load_recipe, parse_override, recipe_names

from support.tiny_models import tiny_net

SMALL: dict[str, Any] = {"model": "owner/model", "data": {"train": "word-problems"}, "training": {"max_steps": 3}}

Write = Callable[[str | bytes | dict[str, Any]], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe, as text or as values, and gives its path."""

    def written(content: str | bytes | dict[str, Any]) -> str:
        path = tmp_path / "recipe.yaml"
        text = yaml.safe_dump(content) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return written


def changed(**parts: Any) -> dict[str, Any]:
    return {**SMALL, **parts}


def fault(recipe: str, **overrides: Any) -> str:
    """What is wrong with a recipe, in words."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_ships_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    assert recipe.push_to_hub is None
    if recipe.training.max_steps is not None:
        assert recipe.training.save_steps <= recipe.training.max_steps, "an interrupted run can be resumed"


def test_a_shipped_recipe_goes_before_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").write_text("model: mine")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo").model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_file_gives_the_recipe_and_its_defaults(write: Write) -> None:
    recipe = load_recipe(write(changed(lora={"r": 3, "rank_pattern": {"q_proj": 5}}, method="lora")))
    assert (recipe.model, recipe.method, recipe.training.max_steps) == ("owner/model", "lora", 3)
    assert (recipe.lora.r, recipe.lora.rank_pattern, recipe.lora.lora_alpha) == (3, {"q_proj": 5}, 16)
    assert recipe.evaluation == Recipe.model_validate(SMALL).evaluation


def test_a_dumped_recipe_loads_as_itself(write: Write) -> None:
    recipe = load_recipe("demo", {"over.seed": 5, "lora.alpha_pattern": {"q": 0.1}, "training.learning_rate": 1e-5})
    assert load_recipe(write(recipe.model_dump(mode="json"))) == recipe


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.csv", "chat.jsonl.gz", "chat.json", "folder"])
def test_data_in_the_place_of_a_recipe_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    else:
        path.write_text('[{"prompt": "a"}]' if name.endswith(".json") else '{"prompt": "a"}')
    assert f"give --data {path} --model NAME, such as HuggingFaceTB/SmolLM2" in fault(str(path))


def test_a_model_that_is_missing_is_shown_how_to_name() -> None:
    with pytest.raises(
        ConfigError, match="model: required and missing; give a folder or a hub name, such as --model H"
    ):
        load_recipe(None, {"data.train": "chat.jsonl"})


def test_all_faults_are_reported_at_once(write: Write) -> None:
    message = fault(
        write(
            {
                "method": "qlora",
                "data": {"train": "word-problems", "train_examples": 0},
                "lora": {"r": "eight", "lora_alpha": -1},
                "training": {"max_steps": 5, "learning_rate": float("nan"), "save_total_limit": 0},
                "evaluation": {"examples": -1},
                "ouput": 3,
            }
        )
    )
    for place in (
        "model: required and missing",
        "method:",
        "data.train_examples:",
        "lora.r:",
        "lora.lora_alpha:",
        "training.learning_rate:",
        "training.save_total_limit:",
        "evaluation.examples:",
        "ouput: unknown key",
    ):
        assert place in message
    assert "'qlora'" in message
    assert "'eight'" in message


@pytest.mark.parametrize(("given", "other"), [("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")])
def test_a_length_takes_the_place_of_the_other(given: str, other: str, write: Write) -> None:
    asked = {f"training.{given}": 2}
    path = write(changed(training={other: 1}))
    for recipe, more in ((path, {}), (None, {"model": "m", "data.train": "a.jsonl"})):
        training = load_recipe(recipe, asked | more).training
        assert (getattr(training, given), getattr(training, other)) == (2, None)
    assert "give one of max_steps and num_train_epochs" in fault(path, **asked, **{f"training.{other}": 3})


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"metod": "x"}, "metod: unknown key; did you mean 'method'?"),
        ({"evaluation": {"exampels": "x"}}, "evaluation.exampels: unknown key; did you mean 'examples'?"),
        ({"zzzz": 1}, "zzzz: unknown key"),
        ({"load_in_4bit": True}, "load_in_4bit: unknown key; did you mean 'model_init.quantization: nf4'?"),
        ({"model_init": {"torch_dtype": "x"}}, "torch_dtype: unknown key; did you mean 'model_init.dtype'?"),
    ],
)
def test_a_misspelt_key_names_the_nearest(parts: dict[str, Any], said: str, write: Write) -> None:
    assert fault(write(changed(**parts))).endswith(said)


STEPS = {"max_steps": 3}
CONSTANT = STEPS | {"lr_scheduler_type": "constant"}
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"over": {"decomposition": "tucker"}}, "expected one of mpo, svd, chain"),
    ({"over": {"options": {"cores": 3}}}, "'cores'"),
    ({"over": {"sites": []}}, "over.sites"),
    ({"over": {"aux_lr_scale": -1}}, "over.aux_lr_scale"),
    ({"training": {}}, "give one of max_steps and num_train_epochs"),
    ({"training": STEPS | {"num_train_epochs": 1}}, "give one of max_steps and num_train_epochs"),
    # PEFT would draw A as for a plain LoRA, or leave it as it was; transformers would leave the warmup out.
    ({"method": "lora", "lora": {"init_lora_weights": "eva"}}, "which loraover train does not measure"),
    ({"method": "lora", "lora": {"init_lora_weights": "lora_ga"}}, "which loraover train does not measure"),
    ({"training": CONSTANT | {"warmup_steps": 1}}, "take constant_with_warmup"),
    ({"training": STEPS | {"bf16": True, "fp16": True}}, "give one of bf16 and fp16"),
    ({"trainer": "grpo"}, "trainer grpo needs reward_funcs"),
    ({"verify_rollouts": True}, "judges an engine that samples, and trainer sft has none here"),
    ({"verify_rollouts": "often"}, "verify_rollouts"),
    ({"trainer": "dpo", "method": "soma"}, "method soma trains with sft or seq2seq"),
    ({"trainer": "ppo"}, "trainer: Input should be 'sft'"),
    ({"data": {"train": []}}, "at least 1 item"),
    ({"lora": {"init_lora_weights": "pissa"}}, "no fold would be a plain LoRA"),
    ({"lora": {"use_dora": True}}, "lora.use_dora: DoRA is more than a product B A"),
    (
        {"data": {"train": "a", "streaming": True}, "training": {"num_train_epochs": 1}},
        "data.streaming needs training.max_steps",
    ),
    ({"trainer": "dpo", "method": "lora", "lora": {"init_lora_weights": "pissa"}}, "the reference of trainer dpo"),
    ({"method": "full", "model_init": {"quantization": "nf4"}}, "method full cannot train quantised weights"),
]


@pytest.mark.parametrize(("parts", "said"), FAULTS)
def test_keys_that_do_not_fit_one_another_show_when_a_recipe_is_read(
    parts: dict[str, Any], said: str, write: Write
) -> None:
    message = fault(write(changed(**parts)))
    assert said in message
    assert all(part in message for part in parts if part != "method")


def test_an_engine_is_verified_where_one_samples_and_an_adapter_is_trained(write: Write) -> None:
    rewarded: dict[str, Any] = {"trainer": "grpo", "reward_funcs": ["think_format_reward"], "verify_rollouts": "stop"}
    assert "use trainer grpo with training.use_vllm true" in fault(write(changed(**rewarded)))
    rewarded["training"] = STEPS | {"use_vllm": True}
    assert load_recipe(write(changed(**rewarded))).verify_rollouts == "stop"
    assert "method full trains none" in fault(write(changed(**rewarded, method="full")))


def test_a_run_may_have_epochs_and_a_constant_rate_after_a_warmup(write: Write) -> None:
    training = {"num_train_epochs": 0.5, "warmup_steps": 0.1, "lr_scheduler_type": "constant_with_warmup"}
    assert load_recipe(write(changed(training=training))).training.max_steps is None


class BegunError(Exception):
    """A training that has begun; its argument is the number of steps that the trainer counted."""


class StopAtOnce(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        raise BegunError(state.max_steps)


@pytest.mark.parametrize(
    ("examples", "epochs", "batch", "accumulated", "steps"),
    [(64, 1, 32, 1, 2), (65, 1, 32, 1, 3), (65, 2, 8, 4, 6), (10, 0.5, 2, 1, 3), (1, 1, 32, 8, 1), (9, 0.1, 3, 1, 1)],
)
def test_steps_of_epochs_are_counted_as_the_trainer_does(
    examples: int, epochs: float, batch: int, accumulated: int, steps: int, write: Write, tmp_path: Path
) -> None:
    counts = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    recipe = load_recipe(write(changed(training={"num_train_epochs": epochs, **counts})))
    assert recipe.training.steps(examples) == steps
    args = TrainingArguments(str(tmp_path / "out"), num_train_epochs=epochs, use_cpu=True, report_to="none", **counts)
    trainer = Trainer(tiny_net(), args, train_dataset=[{"x": 0}] * examples, callbacks=[StopAtOnce()])
    with pytest.raises(BegunError) as begun:
        trainer.train()
    assert begun.value.args == (steps,)


UNSAFE = "!!python/object/apply:os.system ['touch {mark}']"


@pytest.mark.parametrize("text", [UNSAFE, "? " + UNSAFE + "\n: 1", "model: !custom x"])
def test_yaml_that_would_run_code_is_refused_and_runs_none(
    text: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "was-here"
    path = write(text.replace("{mark}", str(mark)))
    assert "not YAML" in fault(path)
    assert run(cli, ["train", path, "-o", str(tmp_path / "out")]) == 2
    assert "not YAML" in capsys.readouterr().err
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    ["model: [", "model: \x07", b"model: \xff\xfe\xff", "[" * 20_000, "model: 2024-13-01"],
    ids=["open", "bell", "not-utf-8", "deep", "no-date"],
)
def test_what_is_not_yaml_is_refused(content: str | bytes, write: Write) -> None:
    assert "not YAML" in fault(write(content))


@pytest.mark.parametrize("twice", ["model: a\nmodel: b", "lora: {r: 4, 'r': 8}", "a: &a {<<: {r: 1}, r: 2, r: 3}"])
def test_a_key_that_occurs_twice_is_refused(twice: str, write: Write) -> None:
    key = "model" if twice.startswith("model") else "r"
    assert f"the key '{key}' occurs twice in one mapping" in fault(write(twice))
    with pytest.raises(ConfigError, match="is not YAML"):
        parse_override("lora={r: 4, r: 8}")


def test_a_merged_mapping_may_repeat_keys() -> None:
    text = "a: &a {<<: &b {r: 1, s: 1}, r: 2}\nc: {<<: [*a, *b], s: 3}\nd: {r: 4, <<: *b}"
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "expected keys"), ("- model\n- data", "expected keys"), ("1: 2\n", "model: required and missing")],
)
def test_what_holds_no_keys_is_refused(content: str, said: str, write: Write) -> None:
    assert said in fault(write(content))


def test_aliases_that_unfold_to_a_giant_are_refused_cheaply(write: Write) -> None:
    """A million-fold list takes 300 bytes of YAML; a message that spells it out takes megabytes, or all memory."""
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 6)]
    path = write("\n".join([*levels, "model: *l5"]))
    load_recipe("demo")
    tracemalloc.start()
    try:
        message = fault(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "model:" in message
    assert len(message) < 10_000
    assert peak < 2e6


def test_a_giant_file_is_not_read(write: Write) -> None:
    content = yaml.safe_dump(SMALL).encode()
    assert load_recipe(write(content + b"#" * (MAX_YAML_BYTES - len(content)))).model == "owner/model"
    assert str(MAX_YAML_BYTES) in fault(write(content + b"#" * (MAX_YAML_BYTES - len(content) + 1)))


def test_overrides_reach_every_depth(write: Write) -> None:
    path = write(changed(lora={"r": 4}))
    recipe = load_recipe(
        path, {"method": "lora", "lora.use_rslora": True, "over.options.num_cores": 2, "training.max_steps": 9}
    )
    assert recipe.method == "lora"
    assert (recipe.lora.r, recipe.lora.model_dump()["use_rslora"]) == (4, True)
    assert recipe.over.options == {"num_cores": 2}
    assert recipe.training.max_steps == 9


def test_an_override_is_checked_like_the_file(write: Write) -> None:
    path = write(SMALL)
    assert "training.seed" in fault(path, **{"training.seed": -1})
    assert "model holds a value" in fault(path, **{"model.name": "x"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.seed=1", ("training.seed", 1)),
        ("lora.target_modules=[q_proj, v_proj]", ("lora.target_modules", ["q_proj", "v_proj"])),
        ("data.test=", ("data.test", None)),
        (" method = lora", ("method", "lora")),
    ],
)
def test_an_override_is_a_key_and_a_yaml_value(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["training.seed", "a=[", "a=!!python/object/apply:os.system ['x']"])
def test_an_override_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected key=value|is not YAML"):
        parse_override(text)


def test_an_unknown_recipe_suggests_the_nearest_or_lists_all(tmp_path: Path) -> None:
    assert "did you mean 'gsm8k-smollm2'?" in fault("gsm8k-smolm2")
    message = fault("zzzzzz")
    assert all(name in message for name in recipe_names())
    assert "no such YAML file" in fault(str(tmp_path))
