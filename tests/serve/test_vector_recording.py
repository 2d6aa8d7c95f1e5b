"""Recording of vectors, classes and scores: what a model's files say of them, adapters of each form, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loraover import LoraOverConfig, OverParameterization, write_checkpoint
from loraover.client.endpoint import Endpoint
from loraover.common.errors import ConfigError, DataError, LoraOverError
from loraover_export import fold_checkpoint
from loraover_serve import record_adapter, verify_adapter
from loraover_serve.judge.command import CheckOptions, check_vectors
from loraover_serve.judge.vectors.asking import VectorAsker
from loraover_serve.judge.vectors.reference import VectorReference, read_any_reference
from loraover_serve.judge.vectors.verdict import judge_vectors
from loraover_serve.verify.request import RecordRequest
from loraover_serve.verify.vector_recorder import read_texts

from support.drawn_vectors import answered
from support.tiny_hub import save_llama
from support.tiny_models import fill_b
from support.vector_server import BASE, SHOP, Serve, Service, save_encoder, save_vector_adapter, vector_server

TASK = "FEATURE_EXTRACTION"
PART = "sentence_transformers.models."


def save_parts(base: Path, pooling: dict[str, Any], *parts: str, **prompts: Any) -> None:
    """Write what sentence-transformers writes beside a model."""
    listed = [{"type": f"{PART}Transformer", "path": ""}, {"type": f"{PART}Pooling", "path": "1_Pooling"}]
    listed += [{"type": f"{PART}{part}", "path": f"2_{part}"} for part in parts]
    (base / "modules.json").write_text(json.dumps(listed))
    (base / "1_Pooling").mkdir(exist_ok=True)
    (base / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (base / "config_sentence_transformers.json").write_text(json.dumps(prompts))


def recorded(adapter: Path, base: Path, **options: Any) -> VectorReference:
    """The reference of an adapter, recorded anew."""
    report = record_adapter(adapter, model=str(base), device="cpu", force=True, **options)
    found = read_any_reference(report.path)
    assert isinstance(found, VectorReference)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    base = save_encoder(folder, TASK, decoder=False)
    return base, save_vector_adapter(base, folder / SHOP, TASK, target_modules=["query", "value"])


def test_pooling_length_and_prompt_are_those_of_the_models_files(made: tuple[Path, Path]) -> None:
    base, adapter = made
    prompts = {"query": "query: ", "document": "text: "}
    save_parts(base, {"pooling_mode_mean_tokens": True}, "Normalize", prompts=prompts, default_prompt_name="query")
    reference = recorded(adapter, base)
    assert (reference.is_normalised, reference.prefix) == (True, "")  # servers add no prompt by themselves
    service = Service(base, adapter, TASK)
    with vector_server(service, Serve(pooling="mean", prefix="query: ")) as server:
        asker = VectorAsker.of(reference, Endpoint(server.url), SHOP, BASE)
        assert check_vectors(asker, CheckOptions(repeats=1))["fault"] == "a prefix added to the input"
    reference = recorded(adapter, base, prefix="query: ")
    service = Service(base, adapter, TASK)
    right = Serve(pooling="mean", prefix="query: ")
    expected = {
        None: right,
        "prefix of the input missing": Serve(pooling="mean"),
        "a prefix added to the input": Serve(pooling="mean", prefix="text: "),
        "another pooling": Serve(pooling="cls", prefix="query: "),
    }
    for fault, serve in expected.items():
        with vector_server(service, serve) as server:
            asker = VectorAsker.of(reference, Endpoint(server.url), SHOP, BASE)
            found = check_vectors(asker, CheckOptions(repeats=1))
        assert found["fault"] == fault, found["reason"]


def test_options_replace_what_the_files_say(made: tuple[Path, Path]) -> None:
    base, adapter = made
    save_parts(base, {"pooling_mode": "mean"}, prompts={"query": "query: "}, default_prompt_name="query")
    assert not recorded(adapter, base).is_normalised  # no part of the model normalises
    reference = recorded(adapter, base, pooling="last", normalised=True, prefix="")
    assert (reference.is_normalised, reference.prefix) == (True, "")
    text = reference.questions[3].text
    exact = Service(base, adapter, TASK).answer(SHOP, [text], Serve(pooling="last", normalised=False))
    assert np.abs(exact - reference.rows["adapter"][3]).max() < 1e-5


def test_what_a_regression_estimates_has_no_activation(tmp_path: Path) -> None:
    base = save_encoder(tmp_path, "SEQ_CLS", ("good", "bad"))
    adapter = save_vector_adapter(base, tmp_path / SHOP, "SEQ_CLS", target_modules=["q_proj"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"problem_type": "regression"}))
    reference = recorded(adapter, base)
    assert reference.activation is None
    assert reference.answer(reference.rows[BASE][0]) == list(reference.rows[BASE][0])


def test_a_prefix_that_the_pooling_leaves_out_is_refused(made: tuple[Path, Path]) -> None:
    base, adapter = made
    save_parts(base, {"pooling_mode": "mean", "include_prompt": False})
    with pytest.raises(ConfigError, match=r"leaves the tokens of a prompt out .*; leave out"):
        recorded(adapter, base, prefix="query: ")


def test_a_text_that_the_model_does_not_read_whole_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    save_parts(base, {"pooling_mode": "mean"})
    file = tmp_path / "prompts.txt"
    file.write_text(f"a text\nanother\n{'words ' * 300}\n")
    with pytest.raises(DataError, match=r"text 3 has \d+ tokens, and the model reads 256; shorten it"):
        recorded(adapter, base, prompts=file)


@pytest.mark.parametrize(
    ("pooling", "parts", "message"),
    [
        ({"pooling_mode_mean_tokens": True}, ("Dense",), r"has the part Dense, and only Transformer, Pooling"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, (), r"names the poolings mean, cls"),
        ({"pooling_mode": "weightedmean"}, (), r"names the poolings weightedmean, expected one of mean"),
        ({}, (), r"names the poolings none"),
    ],
)
def test_models_of_other_parts_are_refused(
    made: tuple[Path, Path], pooling: dict[str, Any], parts: tuple[str, ...], message: str
) -> None:
    save_parts(made[0], pooling, *parts)
    with pytest.raises(ConfigError, match=message):
        recorded(made[1], made[0])


def test_an_adapter_of_the_model_with_its_head_and_a_checkpoint_are_recorded(tmp_path: Path) -> None:
    """PEFT names the layers of a causal model behind `model.`, and the cores of a checkpoint are run unfolded."""
    base = save_llama(tmp_path / "base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type=TASK)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    fill_b(model)
    model.save_pretrained(tmp_path / "checkpoint")
    write_checkpoint(tmp_path / "checkpoint", OverParameterization(model, LoraOverConfig(seed=5)), step=0)
    unfolded = recorded(tmp_path / "checkpoint", base)
    fold_checkpoint(tmp_path / "checkpoint", tmp_path / "folded")
    folded = recorded(tmp_path / "folded", base)
    for arm in (BASE, "adapter"):
        assert np.abs(np.array(unfolded.rows[arm]) - np.array(folded.rows[arm])).max() < 1e-5
    assert np.abs(np.array(folded.rows[BASE]) - np.array(folded.rows["adapter"])).max() > 0.01


def test_built_in_texts_show_where_servers_cut_inputs(tmp_path: Path) -> None:
    """A text has at least as many tokens as words; three answers that are off are more than chance."""
    request = RecordRequest(tmp_path, device="cpu")
    words = sorted((len(text.split()) for text, _ in read_texts(request, is_pair=False)), reverse=True)
    assert len(words) == 32
    assert words[2] > 225
    assert words[3] > 128


def test_texts_and_pairs_of_a_file_are_recorded(tmp_path: Path) -> None:
    base = save_encoder(tmp_path, "SEQ_CLS", ("relevant",))
    adapter = save_vector_adapter(base, tmp_path / SHOP, "SEQ_CLS", target_modules=["q_proj"])
    file = tmp_path / "prompts.txt"
    file.write_text("a query\ta document\nanother\tone more\n")
    assert [each[:2] for each in recorded(adapter, base, prompts=file).questions] == [
        ("a query", "a document"),
        ("another", "one more"),
    ]
    file.write_text("a text\nanother\n")
    assert [each.pair for each in recorded(adapter, base, prompts=file, pairs=False).questions] == [None, None]
    with pytest.raises(DataError, match="'a text' is not a pair; put a tab"):
        recorded(adapter, base, prompts=file)
    file.write_text("a text\n")
    with pytest.raises(DataError, match="holds 1 prompts, expected two or more"):
        recorded(adapter, base, prompts=file, pairs=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": True}, r"--pairs.*does not have one label|pairs: .*does not have one label"),
        ({"pooling": "mean"}, "is for vectors, and .* gives classes"),
        ({"long": True}, "is for generated text, and this adapter has none"),
        ({"new_tokens": 8}, "new_tokens: not for adapters of vectors"),
        ({"max_memory_gib": 4.0}, "max_memory_gib: not for adapters of vectors"),
    ],
)
def test_options_of_other_tasks_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    base = save_encoder(tmp_path, "SEQ_CLS", ("a", "b"))
    adapter = save_vector_adapter(base, tmp_path / SHOP, "SEQ_CLS", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=message):
        recorded(adapter, base, **options)


def test_options_of_vectors_are_refused_for_generated_text(base: Path, adapter: Path) -> None:
    with pytest.raises(ConfigError, match="is for adapters of vectors, classes or scores"):
        record_adapter(adapter, model=str(base), device="cpu", force=True, pooling="mean")


def test_a_classifier_whose_head_would_be_random_is_refused(tmp_path: Path) -> None:
    base = save_encoder(tmp_path, "SEQ_CLS", ("a", "b"))
    adapter = save_vector_adapter(base, tmp_path / SHOP, "SEQ_CLS", target_modules=["q_proj"])
    with pytest.raises(LoraOverError, match=r"is a LlamaForCausalLM, whose head for classes would be random"):
        recorded(adapter, save_llama(tmp_path / "plain"))


def test_models_that_no_reference_can_hold_are_refused(tmp_path: Path) -> None:
    base = save_encoder(tmp_path, "SEQ_CLS", ("same", "same"))
    adapter = save_vector_adapter(base, tmp_path / SHOP, "SEQ_CLS", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"cannot be recorded: .*labels with different names.* Give each class"):
        recorded(adapter, base)
    with pytest.raises(ConfigError, match=r"cannot be recorded: .*labels with different names"):
        verify_adapter(adapter, model=str(base), engines=("torch",))


def change_weights(base: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change a tensor in the weights of a model."""
    tensors = load_file(base / "model.safetensors")
    (key,) = [key for key in tensors if key.endswith(name)]
    save_file(tensors | {key: change(tensors[key]).contiguous()}, base / "model.safetensors", {"format": "pt"})


def test_answers_that_are_not_numbers_are_not_recorded(tmp_path: Path) -> None:
    base = save_encoder(tmp_path, TASK)
    adapter = save_vector_adapter(base, tmp_path / SHOP, TASK, target_modules=["q_proj"])
    change_weights(base, "layers.1.mlp.down_proj.weight", lambda weight: weight * math.nan)
    with pytest.raises(ConfigError, match=r"cannot be recorded: a number is not finite"):
        recorded(adapter, base)


def test_a_number_format_in_which_the_model_overflows_explains_nothing(tmp_path: Path) -> None:
    """Embeddings beyond the range of fp16, which the next layer divides by their size."""
    base = save_encoder(tmp_path, TASK, decoder=False)
    change_weights(base, "word_embeddings.weight", lambda weight: weight * 1e6)
    adapter = save_vector_adapter(base, tmp_path / SHOP, TASK, target_modules=["query", "value"])
    reference = recorded(adapter, base)
    assert reference.formats["fp16"]["distance"] < 1e-6 < reference.formats["bf16"]["distance"]
    assert reference.sensitivities["fp16"] == 1
    right = {arm: np.array([reference.answer(row) for row in reference.rows[arm]]) for arm in (BASE, "adapter")}
    assert judge_vectors(reference, answered(*right.values()))["verdict"] == "as trained"
    assert judge_vectors(reference, answered(-right[BASE], -right["adapter"]))["verdict"] == "differs"


def test_both_texts_of_a_pair_are_shortened_until_the_model_reads_them(tmp_path: Path) -> None:
    base = save_encoder(tmp_path, "SEQ_CLS", ("relevant",))
    adapter = save_vector_adapter(base, tmp_path / SHOP, "SEQ_CLS", target_modules=["q_proj"])
    tokenizer = Service(base, adapter, "SEQ_CLS").tokenizer
    lengths = [len(tokenizer(each.text, each.pair)["input_ids"]) for each in recorded(adapter, base).questions]
    assert max(lengths) <= 256
