"""Every trainer that a recipe can name, and keys of TRL, transformers and PEFT, on tiny models for two steps."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainingArguments

import loraover
import loraover.data.sources
from loraover import read_checkpoint
from loraover.common.errors import ConfigError, DataError
from loraover.training.recipe import load_recipe
from loraover.training.recipe_parts import BATCH
from loraover.training.run_result import read_run
from loraover_lab.methods.layers import make_optimizer

from support.resumed_run import assert_same_run, killed, stopped
from support.tiny_hub import save_llama, write_recipe
from support.train_command import data_file, train
from support.trained_run import losses, matrices, metrics, watched

pytestmark = pytest.mark.process

PAIRS = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}"} for n in range(8)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS],
    "dpo": PAIRS,
    "kto": [
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": n % 2 == 0} for n, pair in enumerate(PAIRS)
    ],
    "grpo": [{"prompt": pair["prompt"], "solution": pair["chosen"]} for pair in PAIRS],
    "reward": [{"chosen": pair["prompt"] + pair["chosen"], "rejected": pair["prompt"]} for pair in PAIRS],
    "seq2seq": [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS],
    "classification": [{"text": pair["prompt"], "label": n % 3} for n, pair in enumerate(PAIRS)],
}
PARTS: dict[str, dict[str, Any]] = {
    "grpo": {
        "reward_funcs": ["think_format_reward", "support.rewards.length"],
        "training": {"num_generations": 2, "max_completion_length": 8, "temperature": "9e-1"},
    },
    "dpo": {"training": {"beta": 0.2, "loss_type": ["sigmoid"]}},
}


def recipe_of(name: str, folder: Path, bases: dict[str, Path], **parts: Any) -> Path:
    base = bases[{"seq2seq": "t5", "grpo": "chat"}.get(name, "llama")]
    files = {"train": data_file(folder / "rows.jsonl", *ROWS[name])}
    files["test"] = data_file(folder / "test.jsonl", *({**row, next(iter(row)): "9 + 9 ="} for row in ROWS[name][:2]))
    data = {split: str(file) for split, file in files.items()}
    own = PARTS.get(name, {})
    training = {"max_steps": 2, "per_device_train_batch_size": 2} | own.get("training", {}) | parts.pop("training", {})
    changes = {key: value for key, value in own.items() if key != "training"} | parts
    return write_recipe(
        folder / "recipe.yaml",
        base,
        trainer=name,
        data=data,
        training=training,
        evaluation={"examples": 2, "exact_match": False},
        **changes,
    )


@pytest.mark.parametrize("method", ["lora", "lora-over"])
@pytest.mark.parametrize("name", ROWS)
def test_a_trainer_takes_two_steps(name: str, method: str, bases: dict[str, Path], tmp_path: Path) -> None:
    result = loraover.train(str(recipe_of(name, tmp_path, bases, method=method)), tmp_path / "out")
    assert result.steps == 2
    assert result.update_norm
    assert (result.after is None) is (name == "grpo")
    assert len([row for row in metrics(tmp_path / "out") if "loss" in row]) == 2
    assert not (tmp_path / "out" / "adapter" / "ref").exists()


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("sft", "seq2seq")])
def test_a_stopped_run_is_resumed_bit_for_bit(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Or killed, as that of dpo is. Those of sft and seq2seq are in test_resume.py.

    GRPO draws its answers anew, from the restored generators.
    """
    training = {"max_steps": 6, "logging_steps": 1, "save_steps": 2, "weight_decay": 0.1}
    recipe = recipe_of(name, tmp_path, bases, lora={"r": 2, "lora_dropout": "2e-1"}, training=training)
    assert train(recipe, tmp_path / "whole") == 0
    halted = (killed if name == "dpo" else stopped)(recipe, tmp_path / "halted", 5)
    assert train(recipe, halted, "--resume") == 0
    assert_same_run(halted, tmp_path / "whole")


def test_a_classifier_reads_no_padding_where_the_base_has_no_token_for_it(tmp_path: Path) -> None:
    """As GPT-2 and Llama, whose tokenizers then pad with the token that ends a text."""
    base = save_llama(tmp_path / "base", pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    losses = list[tuple[float, ...]]()
    test = data_file(tmp_path / "held-out.jsonl", *({"text": "9" * (8 * n + 1), "label": n} for n in range(3)))
    for batch in (1, 3):
        training = {"per_device_eval_batch_size": batch}
        recipe = recipe_of("classification", tmp_path, {"llama": base}, training=training)
        overrides = {"data.test": str(test), "evaluation.examples": 3}
        result = loraover.train(str(recipe), tmp_path / str(batch), overrides=overrides)
        losses.append(tuple(one.loss for one in (result.before, result.after) if one is not None))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_reference_of_dpo_is_the_base_model(bases: dict[str, Path], tmp_path: Path) -> None:
    """At the first step, policy and reference are the same model: the loss is log 2, and no answer is rewarded."""
    loraover.train(str(recipe_of("dpo", tmp_path, bases)), tmp_path / "out")
    first, later = (row for row in metrics(tmp_path / "out") if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert later["rewards/chosen"] != 0


def test_epochs_of_grpo_are_counted_as_trl_does(bases: dict[str, Path], tmp_path: Path) -> None:
    training = {"max_steps": None, "num_train_epochs": 1, "gradient_accumulation_steps": 2, "num_iterations": 2}
    result = loraover.train(str(recipe_of("grpo", tmp_path, bases, training=training)), tmp_path / "out")
    assert result.steps == 8 * 2 * 2 // (2 * 2)


LOADERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept workers": {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "by length": {"train_sampling_strategy": "group_by_length"},
    "whole batches": {"dataloader_drop_last": True},
}


@pytest.mark.parametrize("training", LOADERS.values(), ids=LOADERS.keys())
def test_losses_of_held_out_rows_stand_in_their_order(
    training: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_of("sft", tmp_path, bases, training=training | {"max_steps": 1, "per_device_eval_batch_size": 2})
    counts = (2, 7, 3, 5, 1)
    data_file(tmp_path / "test.jsonl", *({"prompt": "1 =", "completion": " 1" * count} for count in counts))
    asked = {"evaluation.examples": len(counts), "evaluation.before": False}
    loraover.train(str(recipe), tmp_path / "out", overrides=asked)
    tokens = [count for _, count in json.loads((tmp_path / "out" / "held_out.json").read_text())]
    assert sorted(range(5), key=tokens.__getitem__) == sorted(range(5), key=counts.__getitem__)


def test_answers_to_rows_without_a_prompt_and_a_completion_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of("dpo", tmp_path, bases)
    with pytest.raises(ConfigError, match=r"row 1 has .* and no prompt with a completion\. Set it to false"):
        loraover.train(recipe, tmp_path / "out", overrides={"evaluation.exact_match": True})


def test_a_run_that_ended_before_it_was_measured_publishes_its_best_step(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    recipe = recipe_of("sft", tmp_path, bases, training=evaluated | {"max_steps": 3, "learning_rate": 0.5})
    loraover.train(str(recipe), tmp_path / "out")
    known = matrices(tmp_path / "out")
    state = json.loads((tmp_path / "out/trainer/checkpoint-3/trainer_state.json").read_text())
    best = int(state["best_model_checkpoint"].rpartition("-")[2])
    assert best < 3
    assert read_checkpoint(tmp_path / "out" / "adapter").meta.step == best
    (tmp_path / "out" / "run.json").unlink()
    shutil.rmtree(tmp_path / "out" / "adapter")
    loraover.train(str(recipe), tmp_path / "out", resume=True)
    found = matrices(tmp_path / "out")
    assert {name for name in known if not torch.equal(known[name], found[name])} == set()
    assert read_checkpoint(tmp_path / "out" / "adapter").meta.step == best
    result = read_run(tmp_path / "out")
    assert (result.steps, result.best_step, result.facts()["weights of the best step"]) == (3, best, str(best))


def test_a_column_of_a_reward_has_values_of_one_type(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of("grpo", tmp_path, bases)
    data_file(tmp_path / "rows.jsonl", *(row | {"solution": n or "0"} for n, row in enumerate(ROWS["grpo"])))
    with pytest.raises(DataError, match=r"has values of several types, .*in one type"):
        loraover.train(str(recipe), tmp_path / "out")


def test_a_margin_is_learned(bases: dict[str, Path], tmp_path: Path) -> None:
    """At the first step both rewards are nearly the same, so the loss is that of the margin alone."""
    recipe = recipe_of("reward", tmp_path, bases)
    data_file(tmp_path / "rows.jsonl", *(row | {"margin": 5} for row in ROWS["reward"]))
    assert loraover.train(str(recipe), tmp_path / "out").unread == {}
    assert losses(tmp_path / "out")[1] == pytest.approx(math.log1p(math.exp(5)), rel=0.05)


@pytest.mark.parametrize("margin", [None, "5", True, math.nan])
def test_a_margin_in_some_rows_is_refused(margin: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of("reward", tmp_path, bases)
    data_file(tmp_path / "rows.jsonl", *(row | {"margin": 5 if n else margin} for n, row in enumerate(ROWS["reward"])))
    with pytest.raises(DataError, match=r"row 1: the margin is .*, expected a number in every row, or in none"):
        loraover.train(str(recipe), tmp_path / "out")


def test_a_trainer_without_a_stable_module_is_refused_by_name(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = data_file(tmp_path / "rows.jsonl", *PAIRS)
    recipe = write_recipe(tmp_path / "r.yaml", bases["llama"], trainer="orpo", data={"train": str(rows)})
    with pytest.raises(ConfigError, match=r"trainer orpo: trl .* has it only in trl\.experimental\.orpo"):
        loraover.train(str(recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt field of TRL": ({"training.packin": True}, "training.packin: unknown key; did you mean 'packing'"),
    "a misspelt field of PEFT": ({"lora.use_rslor": True}, "lora.use_rslor: unknown key; did you mean 'use_rslora'"),
    "a misspelt start": (
        {"method": "lora", "lora.init_lora_weights": "gausian"},
        "is 'gausian'; did you mean 'gaussian'",
    ),
    "a key of another part": ({"training.load_in_4bit": True}, "did you mean 'model_init.quantization: nf4'"),
    "what the run sets": ({"training.output_dir": "x"}, "training.output_dir: a run sets this itself"),
    "trained weights in 16 bits": ({"training.bf16_full_eval": True}, "bf16_full_eval: a run sets this itself"),
    "a checkpoint without its optimizer": ({"training.save_only_model": True}, "save_only_model: a run sets"),
    "optim_args that nobody reads": (
        {"training.optim_args": "betas=1", "training.loraplus_lr_ratio": 4},
        "with loraplus_lr_ratio, only optim soap takes them",
    ),
    "an option of another optimizer": (
        {"training.optim_args": "momentum=0.9"},
        r"^training.optim_args: 'momentum' is none of amsgrad, betas, .*, the options of AdamW\.",
    ),
    "an option that transformers drops": (
        {"training.optim": "sgd", "training.optim_args": "momentum=0.9,nonsense=1"},
        "'nonsense' is none of dampening, .*, the options of SGD",
    ),
    "an option with an impossible value": (
        {"training.optim_args": "foreach=true"},
        "training.optim 'adamw_torch_fused' .* cannot be used here: .fused. and .foreach.",
    ),
    "an option that transformers cannot read": (
        {"training.optim": "sgd", "training.optim_args": "momentum=high"},
        "training.optim_args: optim sgd refuses them: could not convert string to float: 'high'",
    ),
    "an option without a value": ({"training.optim_args": "amsgrad"}, "'amsgrad': expected a new name=value"),
    "LoRA+ of another optimizer": (
        {"training.loraplus_lr_ratio": 4, "training.optim": "adamw_torch_8bit"},
        "needs a LoRA and optim adamw_torch, adamw_torch_fused or soap",
    ),
    "what the run sets of PEFT": ({"lora.task_type": "CAUSAL_LM"}, "lora.task_type: a run sets this itself"),
    "another type": ({"training.packing": "perhaps"}, "training.packing: Input should be a valid boolean"),
    "what the class refuses": ({"training.eval_strategy": "sometimes"}, "SFTConfig refuses it"),
    "an unknown tracker": ({"training.report_to": "notebook"}, "training.report_to: notebook is not supported"),
    "a head trained in float16": (
        {"lora.modules_to_save": ["lm_head"], "model_init.dtype": "float16"},
        "lm_head.* would be trained in float16",
    ),
    "all weights trained in float16": (
        {"method": "full", "model_init.dtype": "float16"},
        "embed_tokens.* would be trained in float16",
    ),
    "a tracker that is not installed": ({"training.report_to": "comet_ml"}, "training.report_to: .*pip install comet"),
    "a schedule without its options": (
        {"training.lr_scheduler_type": "warmup_stable_decay"},
        "lr_scheduler_type 'warmup_stable_decay' cannot be used here: .*num_decay_steps",
    ),
    "a kernel that is not installed": ({"training.use_liger_kernel": True}, "use_liger_kernel.*pip install liger"),
    "kept workers where there are none": ({"training.dataloader_persistent_workers": True}, "no workers to keep"),
    "an evaluation of no rows": (
        {"training.eval_on_start": True, "evaluation.examples": 0},
        "an evaluation during training, and nothing is held out. Leave them out",
    ),
    "a field of another trainer": ({"training.beta": 0.1}, "training.beta: unknown key"),
    "a trainer of another model": ({"trainer": "seq2seq"}, "decoder-only; use sft"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_key_that_a_class_does_not_take_is_refused(case: str, recipe: Path, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        loraover.train(str(recipe), tmp_path / "out", overrides=changes)
    assert not (tmp_path / "out").exists()


def test_a_setting_that_trl_refuses_in_its_first_step_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of("dpo", tmp_path, bases, training={"loss_type": ["sigmoyd"]})
    with pytest.raises(ConfigError, match=r"TRL refuses a setting.*Unknown loss type: sigmoyd. Should be one of"):
        loraover.train(str(recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_lack_a_trainers_columns_are_refused_with_their_line(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of("dpo", tmp_path, bases)
    data_file(tmp_path / "rows.jsonl", *PAIRS, {"prompt": "a", "chosen": "b"})
    with pytest.raises(DataError, match=r"row 9: has fields \['chosen', 'prompt'\]; expected \['chosen', 'rejected'\]"):
        loraover.train(str(recipe), tmp_path / "out")


SETTINGS: dict[str, dict[str, Any]] = {
    "packing": {"training.packing": True, "training.packing_strategy": "wrapped"},
    "evaluation while training": {"training.eval_strategy": "steps", "training.eval_steps": "1"},
    "a tracker and a name": {"training.report_to": ["tensorboard"], "training.logging_first_step": "yes"},
    "fields of LoraConfig": {"lora.use_rslora": True, "lora.lora_dropout": "1e-1", "lora.exclude_modules": ["q_proj"]},
    "attention and a trained head": {
        "model_init.attn_implementation": "eager",
        "lora.modules_to_save": ["lm_head"],
    },
    "recomputed activations": {"training.gradient_checkpointing": True, "training.optim": "sgd"},
    "weights in bfloat16": {"model_init.dtype": "bfloat16", "training.bf16": True},
    "nf4": {"model_init.quantization": "nf4"},
    "int8": {"model_init.quantization": "int8"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_other_libraries_reach_them(case: str, recipe: Path, tmp_path: Path) -> None:
    if case in ("nf4", "int8"):
        pytest.importorskip("bitsandbytes")
    wide = save_llama(tmp_path / "base", hidden_size=64, intermediate_size=128)  # a block of nf4 has 64 numbers
    changes = {"model": str(wide), "training.max_steps": 2, "evaluation.exact_match": False} | SETTINGS[case]
    result = loraover.train(str(recipe), tmp_path / "out", overrides=changes)
    assert result.steps == 2
    assert result.update_norm
    logged = metrics(tmp_path / "out")
    assert ("eval_loss" in logged[2]) is (case == "evaluation while training")
    sites = read_checkpoint(tmp_path / "out" / "adapter").meta.sites
    assert any("q_proj" in site.name for site in sites) is (case != "fields of LoraConfig")
    saved = matrices(tmp_path / "out")
    assert ("base_model.model.lm_head.weight" in saved) is ("head" in case)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("adamw_torch_fused", "amsgrad=true", {"amsgrad": True, "fused": True}),
    "adamw in place of a recipe's key": ("adamw_torch", "eps=1e-3", {"eps": 1e-3}),
    "adafactor": ("adafactor", "clip_threshold=0.5, decay_rate=-0.5", {"clip_threshold": 0.5, "decay_rate": -0.5}),
    "sgd, as transformers reads it": ("sgd", "momentum=0.9,nesterov=true", {"momentum": 0.9, "nesterov": True}),
    "sgd, what transformers drops": ("sgd", "momentum=0.9,maximize=true", {"momentum": 0.9, "maximize": True}),
    "a default": ("rmsprop", "alpha=0.99,centered=false", {"alpha": 0.99, "centered": False}),
}


@pytest.mark.parametrize(("optim", "given", "expected"), OPTIONS.values(), ids=list(OPTIONS))
def test_the_optimizer_has_all_options_that_a_recipe_gives(optim: str, given: str, expected: dict[str, Any]) -> None:
    arguments = TrainingArguments(optim=optim, optim_args=given, weight_decay=0.1)
    (group,) = make_optimizer(arguments, [torch.nn.Parameter(torch.ones(2, 2))]).param_groups
    assert group | expected | {"weight_decay": 0.1} == group


def test_an_option_of_the_optimizer_changes_the_training(recipe: Path, tmp_path: Path) -> None:
    asked = {"training.max_steps": 2, "training.optim": "adafactor", "evaluation.exact_match": False}
    runs = [
        loraover.train(str(recipe), tmp_path / str(n), overrides=asked | {"training.optim_args": given})
        for n, given in enumerate((None, "clip_threshold=0.01"))
    ]
    assert runs[1].update_norm < runs[0].update_norm / 2  # type: ignore[operator]


def test_an_evaluation_leaves_the_gradients_of_a_base_of_4_bits(recipe: Path, tmp_path: Path) -> None:
    """bitsandbytes packs weights for an evaluation on some CPUs, and the packed product has no gradient."""
    pytest.importorskip("bitsandbytes")
    wide = save_llama(tmp_path / "base", hidden_size=64, intermediate_size=128)
    changes = {"model": str(wide), "training.max_steps": 2, "evaluation.exact_match": False} | SETTINGS["nf4"]
    runs = [
        loraover.train(str(recipe), tmp_path / str(before), overrides=changes | {"evaluation.before": before})
        for before in (True, False)
    ]
    assert runs[0].update_norm == runs[1].update_norm
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_a_run_on_a_base_of_4_bits_is_resumed_bit_for_bit(bases: dict[str, Path], tmp_path: Path) -> None:
    """TRL would round A and B to bfloat16, and the Trainer resume them in float32."""
    pytest.importorskip("bitsandbytes")
    wide = save_llama(tmp_path / "base", hidden_size=64, intermediate_size=128)
    training = {"max_steps": 4, "logging_steps": 1, "save_steps": 2}
    asked: dict[str, Any] = {"method": "lora", "model_init": {"quantization": "nf4"}, "training": training}
    recipe = recipe_of("sft", tmp_path, bases | {"llama": wide}, **asked)
    assert train(recipe, tmp_path / "whole") == 0
    halted = stopped(recipe, tmp_path / "halted", 3)
    assert train(recipe, halted, "--resume") == 0
    assert_same_run(halted, tmp_path / "whole")
    assert {tensor.dtype for tensor in matrices(tmp_path / "whole").values()} == {torch.float32}


def test_packed_rows_are_measured_one_by_one(bases: dict[str, Path], tmp_path: Path) -> None:
    """TRL would join a batch of held-out rows to one row, too."""
    out = {packed: tmp_path / str(packed) for packed in (False, True)}
    recipe = recipe_of("sft", tmp_path, bases, training={"max_length": 32})
    for packed, folder in out.items():
        loraover.train(str(recipe), folder, overrides={"training.packing": packed, "training.max_steps": 1})
    found = [read_run(folder).before for folder in out.values()]
    assert found[0] == found[1]


def test_a_missing_package_that_quantises_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match="pip install torchao"):
        loraover.train(str(recipe), tmp_path / "out", overrides={"model_init.quantization": "torchao-int8"})


def test_half_weights_other_ranks_and_a_chosen_batch(recipe: Path, tmp_path: Path) -> None:
    changes = {
        "model_init.dtype": "float16",
        "lora.rank_pattern": {"q_proj": 2},
        "training.per_device_train_batch_size": "auto",
        "training.max_steps": 2,
    }
    with watched() as seen:
        assert loraover.train(str(recipe), tmp_path / "out", overrides=changes).update_norm
    layer = seen[0][0].model.base_model.model.model.layers[0].self_attn.q_proj
    a = layer.lora_A["default"].weight
    assert (layer.base_layer.weight.dtype, a.dtype, a.shape[0]) == (torch.float16, torch.float32, 2)
    ran = load_recipe(str(tmp_path / "out" / "recipe.yaml")).training
    assert ran.micro_batch * ran.gradient_accumulation_steps == BATCH


def test_dora_and_a_trained_head_are_saved(recipe: Path, base: Path, tmp_path: Path) -> None:
    changes = {"method": "lora", "lora.use_dora": True, "lora.modules_to_save": ["lm_head"], "training.max_steps": 2}
    assert loraover.train(str(recipe), tmp_path / "out", overrides=changes).update_norm is None
    saved = matrices(tmp_path / "out")
    assert any("lora_magnitude_vector" in name for name in saved)
    head, start = saved["base_model.model.lm_head.weight"], load_file(base / "model.safetensors")["lm_head.weight"]
    assert 0 < (head - start).abs().max() < 1
