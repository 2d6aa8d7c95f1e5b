"""Bases from calibration batches: eigenvectors of the batches' covariances, measured at any injection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from loraover import Budget, LoraOverConfig, OverParameterization, Probe, read_checkpoint, write_checkpoint
from loraover.common.errors import ConfigError
from loraover.overparam import covariances
from loraover.overparam.block_bases import Blocks, Side
from loraover.overparam.decompositions import Eigen
from loraover.overparam.sites import lora_layers

from support.hf_trainer import llama
from support.hooked_run import same
from support.measured import BATCHES, LAYER, MEASURED, Recorded, assert_diagonalises, basis_of, kept, measured
from support.no_memory import NO_MEMORY, failing
from support.tiny_models import (
    hooks,
    lora_matrices,
    tiny_bart,
    tiny_llama,
    tiny_net,
    tiny_t5,
    token_ids,
    trainable,
    with_lora,
)
from tolerances import UNDERFLOW, UNIT, gamma

# What is measured


@pytest.mark.parametrize("block", [16, 20])
@pytest.mark.parametrize("module", ["q_proj", "k_proj", "o_proj"])
def test_bases_diagonalise_the_covariances_of_inputs_and_of_output_gradients(module: str, block: int) -> None:
    model, name = llama(), f"{LAYER}.{module}"
    matrices = {key: matrix.double().numpy() for key, matrix in lora_matrices(model).items() if name in key}
    a, b = (next(matrix for key, matrix in matrices.items() if f"lora_{kind}" in key) for kind in "AB")
    recorded = Recorded(model, BATCHES)
    over = measured(model, block=block)
    c_in, c_out = recorded.covariance(name, "A"), recorded.covariance(name, "B")
    columns, division_in = basis_of(over, f"{name}.lora_A", "columns")
    rows, division_out = basis_of(over, f"{name}.lora_B", "rows")
    assert_diagonalises(columns, c_in, division_in)
    assert_diagonalises(rows, c_out, division_out)
    # The sides of length r: B^T C_out B for A, A C_in A^T for B, with the covariances' diagonal blocks.
    whole = Blocks(1, 4, 1)
    assert_diagonalises(basis_of(over, f"{name}.lora_A", "rows")[0], b.T @ kept(c_out, division_out) @ b, whole)
    assert_diagonalises(basis_of(over, f"{name}.lora_B", "columns")[0], a @ kept(c_in, division_in) @ a.T, whole)


def test_where_b_is_zero_its_gradient_stands_for_it() -> None:
    model, name = llama(draw_b=False), f"{LAYER}.o_proj"
    recorded = Recorded(model, BATCHES)
    (gradient,) = (g for key, g in recorded.of_matrices.items() if f"{name}.lora_B" in key)
    assert gradient.any()
    over = measured(model)
    c_out = kept(recorded.covariance(name, "B"), Blocks.of(32, 16))
    assert_diagonalises(basis_of(over, f"{name}.lora_A", "rows")[0], gradient.T @ c_out @ gradient, Blocks(1, 4, 1))


def test_the_function_and_everything_else_of_the_model_stay_as_they_are() -> None:
    model = llama(lora_dropout=0.5)
    model.eval()
    before, random = lora_matrices(model), torch.get_rng_state()
    measured(model)
    for key, matrix in lora_matrices(model).items():
        torch.testing.assert_close(matrix, before[key], rtol=0, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert hooks(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


# Sharing


def test_what_reads_one_input_shares_its_basis_in_memory_and_in_the_checkpoint(tmp_path: Path) -> None:
    over = measured(model := llama())
    owners: dict[int, set[str]] = {}
    for name in over.sites:
        if name.endswith("lora_A"):
            owners.setdefault(basis_of(over, name, "columns")[0].data_ptr(), set()).add(name)
    kinds = [{name.split(".")[-2].removesuffix("_proj") for name in names} for names in owners.values()]
    assert sorted(map(sorted, kinds)) == sorted(2 * [["down"], ["gate", "up"], ["k", "q", "v"], ["o"]])
    model.save_pretrained(tmp_path)
    write_checkpoint(tmp_path, over, step=0)
    found = read_checkpoint(tmp_path)
    keys = {record.core_key(2) for record in found.meta.sites if record.name.endswith("lora_A")}
    assert len(keys) == len(owners)
    alone = ("o_proj.lora_A", "down_proj.lora_A", "lora_B")
    assert {len(record.shares) for record in found.meta.sites if record.name.endswith(alone)} == {0}
    bases = over.decomposition.bases
    assert bases is not None
    assert over.gauge_numbers() < sum(sum(bases.numbers(*site.shape)) for site in over.sites.values())


def test_trained_bases_are_not_shared() -> None:
    """However evenly those that measure the same lie."""
    model = llama(target_modules=["gate_proj", "up_proj"])
    over = measured(model, train_auxiliary=True)
    assert all(len(stack) == len(group.sites) for group in over.groups for stack in group.stacks)
    assert over.num_parameters()[0] == over.schedule.most_parameters[0]
    over.attach(optimizer := AdamW(trainable(model), lr=1e-3))
    before = {name: basis_of(over, name, "columns")[0].clone() for name in over.sites}
    for batch in BATCHES:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(basis_of(over, name, "columns")[0], basis) for name, basis in before.items())
    over.finish()


# Compiled models

COMPILED: dict[str, Callable[[Any], Any]] = {
    "a wrapper": lambda model: torch.compile(model, backend="eager"),
    "by layer": lambda model: (
        [layer.compile(backend="eager") for layer in model.get_base_model().model.layers] and model
    ),
}


@pytest.mark.parametrize("form", COMPILED)
def test_a_compiled_model_is_measured_as_an_ordinary_one(form: str) -> None:
    """Also where it was traced before, and Dynamo ignores hooks that come later."""
    model = COMPILED[form](llama())
    model.train()
    model(**BATCHES[0]).loss.backward()
    model.zero_grad()
    over, plain = measured(model), measured(llama())
    for name in plain.sites:
        for side in ("rows", "columns"):
            assert torch.equal(basis_of(over, name, side)[0], basis_of(plain, name, side)[0]), (name, side)


# Tokens that count


def moments_of(model: Any, batches: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """C_in and C_out of all layers, as they are summed up."""
    kept: dict[str, Tensor] = {}
    bases = covariances._bases

    def watch(chosen: Any, pairs: Any, moments: Mapping[str, Any], eigen: Eigen) -> Any:
        kept.update((f"{name}.{m}", total) for name, found in moments.items() for m, total in found.sums.items())
        return bases(chosen, pairs, moments, eigen)

    with monkeypatch.context() as patch:
        patch.setattr(covariances, "_bases", watch)
        measured(model, batches)
    return kept


def assert_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, moment in one.items():
        assert (moment - other[key]).abs().max() <= 1e-4 * moment.abs().max(), key


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_that_checkpointing_repeats_counts_once(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = moments_of(llama(), BATCHES, monkeypatch)
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    calls = []
    layer = lora_layers(model)[f"{LAYER}.q_proj"]
    with layer.register_forward_hook(lambda *_: calls.append(1)):
        found = moments_of(model, BATCHES, monkeypatch)
    assert len(calls) == 2 * len(BATCHES)
    assert len(found) == 28
    assert_close(found, plain)


def test_padding_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = token_ids(0)
    padded = torch.cat([batch, torch.zeros(4, 3, dtype=torch.long)], 1)
    labels = torch.where(padded == 0, -100, padded)
    mask = (padded != 0).long()
    plain = moments_of(llama(), [{"input_ids": batch, "labels": batch}], monkeypatch)
    found = moments_of(llama(), [{"input_ids": padded, "labels": labels, "attention_mask": mask}], monkeypatch)
    assert_close(found, plain)
    counted = moments_of(llama(), [{"input_ids": padded, "labels": labels}], monkeypatch)
    with pytest.raises(AssertionError):
        assert_close(counted, plain)


@pytest.mark.parametrize("is_target_padded", [False, True])
@pytest.mark.parametrize("base", [tiny_t5, tiny_bart])
def test_an_encoders_padding_is_not_the_decoders(
    base: Callable[[], Any], is_target_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both have the same length: of a decoder, only cross-attention reads the encoder's tokens."""
    ids, labels = token_ids(0), torch.cat([token_ids(1), token_ids(2)[:, :3]], 1)
    mask = torch.ones_like(labels)
    source, source_mask = (torch.cat([x, torch.zeros(4, 3, dtype=torch.long)], 1) for x in (ids, torch.ones_like(ids)))
    plain = {"input_ids": ids, "labels": labels}
    padded = {"input_ids": source, "attention_mask": source_mask, "labels": labels}
    if is_target_padded:
        mask[:, -2:] = 0
        plain["labels"] = labels[:, :-2].contiguous()
        padded |= {"labels": labels.masked_fill(mask == 0, -100), "decoder_attention_mask": mask}
    expected = moments_of(with_lora(base(), task_type="SEQ_2_SEQ_LM"), [plain], monkeypatch)
    found = moments_of(with_lora(base(), task_type="SEQ_2_SEQ_LM"), [padded], monkeypatch)
    assert_close(found, expected)


def test_a_batch_counts_as_often_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    once = moments_of(llama(), BATCHES[:1], monkeypatch)
    assert_close(moments_of(llama(), BATCHES[:1] * 3, monkeypatch), {key: 3 * total for key, total in once.items()})


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_covariances_are_float32_under_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs whose squares sum up to more than float16 holds."""
    model = llama()
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.input_layernorm.weight *= 50
    tokens: dict[tuple[Any, str], list[Tensor]] = {}
    sums: dict[tuple[Any, str], Tensor] = {}
    turned: list[tuple[Any, str, Tensor, Tensor]] = []
    add, along = covariances._Moments.add, covariances._Moments.along

    def added(self: Any, matrix: str, x: Tensor) -> None:
        tokens.setdefault((self, matrix), []).append(x.double())
        add(self, matrix, x)
        sums[self, matrix] = self.sums[matrix].clone()  # which are dropped once bases are there

    def asked(self: Any, matrix: str, directions: Tensor) -> Tensor | None:
        result = along(self, matrix, directions)
        assert result is not None
        turned.append((self, matrix, directions, result))
        return result

    monkeypatch.setattr(covariances._Moments, "add", added)
    monkeypatch.setattr(covariances._Moments, "along", asked)
    with torch.autocast("cpu", dtype):
        measured(model)
    assert len(tokens) == len(turned) == 28
    for (moments, matrix), batches in tokens.items():
        x, blocks = torch.cat(batches), moments.blocks[matrix]
        exact, size = (blocks.diagonal(rows.mT @ rows) for rows in (x, x.abs()))
        bound = gamma(len(x) + len(batches), UNIT[torch.float32]) * size + UNDERFLOW[torch.float32]
        assert ((sums[moments, matrix] - exact).abs() <= bound).all()
    for moments, matrix, directions, result in turned:
        blocks, covariance = moments.blocks[matrix], sums[moments, matrix].double()
        w = blocks.split(directions.double()).transpose(0, 1)
        exact, size = ((v @ c @ v.mT).sum(0) for v, c in ((w, covariance), (w.abs(), covariance.abs())))
        bound = gamma(2 * blocks.size + blocks.number, UNIT[torch.float32]) * size + UNDERFLOW[torch.float32]
        assert ((result - exact).abs() <= bound).all()


# A frozen matrix


def half_frozen(frozen: str) -> Any:
    model = llama()
    for name, parameter in model.named_parameters():
        if f"lora_{frozen}" in name:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_the_long_side_is_measured_without_the_other_matrix(frozen: str) -> None:
    model, name = half_frozen(frozen), f"{LAYER}.q_proj"
    recorded = Recorded(model, BATCHES)
    over = measured(model, short="gradient")
    matrix = "B" if frozen == "A" else "A"
    basis, division = basis_of(over, f"{name}.lora_{matrix}", "rows" if matrix == "B" else "columns")
    assert_diagonalises(basis, recorded.covariance(name, matrix), division)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_the_short_side_is_refused_without_the_other_matrix(frozen: str) -> None:
    message = rf"q_proj\.lora_.: the basis of its side of length r is measured through {frozen} of .* short: gradient"
    with pytest.raises(ConfigError, match=message):
        measured(half_frozen(frozen))


# Refused


def test_batches_without_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"computes no loss from a batch of input_ids.*trainer_loss"):
        measured(llama(), [{"input_ids": token_ids()}])


def test_batches_whose_labels_are_all_masked_are_refused_unless_another_has_one() -> None:
    model, masked = llama(), {"input_ids": token_ids(), "labels": torch.full_like(token_ids(), -100)}
    before = lora_matrices(model)
    with pytest.raises(ConfigError, match=r"no batch has a finite loss, .* labels are all -100"):
        measured(model, [masked, masked])
    assert same(lora_matrices(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    over, name = measured(model, [masked, BATCHES[0]]), f"{LAYER}.q_proj.lora_B"
    alone = measured(llama(), [BATCHES[0]])
    assert torch.equal(basis_of(over, name, "rows")[0], basis_of(alone, name, "rows")[0])


@pytest.mark.parametrize("probe", ["none", "empty"])
def test_calibration_without_batches_is_refused(probe: str) -> None:
    model = llama()
    config = LoraOverConfig(decomposition="eigen", options=MEASURED)
    given = Probe(model, []) if probe == "empty" else None
    with pytest.raises(ConfigError, match="decomposition eigen with bases from calibration runs the model on"):
        OverParameterization(model, config, probe=given)
    over = OverParameterization(model, config, inject=False, probe=given)
    over.schedule.replay([])
    with pytest.raises(ConfigError, match="bases from calibration are measured on batches; give them with `probe`"):
        over.inject(["model.layers.0.self_attn.q_proj.lora_A"])


def test_inputs_that_are_not_finite_are_refused_and_leave_no_trace() -> None:
    model = llama()
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.0.input_layernorm").weight[3] = torch.nan
    before = lora_matrices(model)
    with pytest.raises(ConfigError, match=r"the inputs or gradients of model\.layers\.0\.\S+ are not finite"):
        measured(model)
    assert same(lora_matrices(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks(model) == 0


@pytest.mark.parametrize("name", NO_MEMORY)
def test_running_out_of_memory_says_what_is_needed(name: str) -> None:
    model = llama()
    probe = Probe(model, BATCHES, failing(name))
    # Per layer, blocks of 16 x 16 of both sides, float32: q and o 4 of them, k and v 3, gate, up and down 5.
    size = 2 * (2 * 4 + 2 * 3 + 3 * 5) * 16**2 * 4 / 2**20
    needed = (
        rf"ran out of memory: .* one batch, .* and {size:.1f} MiB for the moments of 14 layers, "
        rf"or {size / 2:.1f} MiB with block: 8\. Use smaller batches"
    )
    with pytest.raises(ConfigError, match=needed) as refusal:
        OverParameterization(model, LoraOverConfig(decomposition="eigen", options=MEASURED), probe=probe)
    assert refusal.value.__cause__ is NO_MEMORY[name]
    assert hooks(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_dynamic_schedule_measures_when_it_injects() -> None:
    """With bases that q, k and v share, and moments that are carried into them."""
    model = llama()
    config = LoraOverConfig(
        decomposition="eigen",
        options=MEASURED,
        schedule="dynamic",
        budget=Budget(fraction=1.0),
        rounds=2,
        start=0.3,
        end=0.6,
        quota="global",
    )
    over = OverParameterization(model, config, steps=10, probe=Probe(model, BATCHES))
    over.attach(optimizer := AdamW(trainable(model), lr=1e-2))
    recorded: dict[int, Recorded] = {}
    for step in range(8):
        batch = token_ids(50 + step)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        before = lora_matrices(model)
        optimizer.step()
        assert not any(torch.equal(matrix, before[key]) for key, matrix in lora_matrices(model).items())
        if len(over.schedule.rounds) > len(recorded):
            recorded[over.step] = Recorded(model, BATCHES)
    assert list(recorded) == [held.step for held in over.schedule.rounds] == [3, 6]
    for held, found in zip(over.schedule.rounds, recorded.values(), strict=True):
        for name in held.chosen:
            module, matrix = name.rsplit(".lora_", 1)
            basis, division = basis_of(over, name, "columns" if matrix == "A" else "rows")
            assert_diagonalises(basis, found.covariance(module, matrix), division)
    assert len(over.injected) == 28
    shared = [group for group in over.groups if len(group.stacks[-1]) < len(group.sites)]
    assert shared
    for group in over.groups:
        for i in range(len(group.sites)):
            assert float(group.core_state(group.centre, i)["step"]) == 8
    over.finish()


def test_carried_moments_are_turned_into_each_sites_own_basis() -> None:
    model = llama(target_modules=["q_proj", "k_proj", "v_proj"])
    config = LoraOverConfig(decomposition="eigen", options=MEASURED)
    over = OverParameterization(model, config, inject=False, probe=Probe(model, BATCHES))
    over.attach(optimizer := AdamW(trainable(model), lr=1e-2))
    for batch in BATCHES:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    before = {name: dict(optimizer.state[site.parameter]) for name, site in over.sites.items()}
    over.inject(over.sites)
    for name, (group, i) in over.injected.items():
        cores = [group.core(k, i).unsqueeze(0) for k in range(len(group.stacks))]
        state = group.core_state(group.centre, i)
        for key, squared in (("exp_avg", False), ("exp_avg_sq", True)):
            expected = over.decomposition.to_centre(cores, before[name][key][None], *group.shape, squared=squared)[0]
            torch.testing.assert_close(state[key], expected)


@pytest.mark.parametrize("weight", [None, 0.0], ids=["not-run", "no-gradient"])
def test_sites_that_no_batch_reached_are_refused_by_name(weight: float | None) -> None:
    """Their layers were not run, or without hooks, or the loss does not depend on them."""
    net = tiny_net()
    config = LoraOverConfig(decomposition="eigen", options=MEASURED)

    def loss(model: Any, x: Tensor) -> Tensor:
        hidden: Tensor = model.get_base_model().first(x)
        total = hidden.square().mean()
        return total if weight is None else total + weight * model(x).mean()

    message = r"no covariance of 4 matrices, first second\.lora_A: .* leave these out with `sites`, .*\{short: gradient"
    before = lora_matrices(net)
    with pytest.raises(ConfigError, match=message):
        OverParameterization(net, config, probe=Probe(net, [torch.ones(3, 6)], loss))
    assert all(torch.equal(matrix, before[key]) for key, matrix in lora_matrices(net).items())
    config = LoraOverConfig(decomposition="eigen", options=MEASURED, sites=["first.*"])
    over = OverParameterization(net, config, probe=Probe(net, [torch.ones(3, 6)], loss))
    assert not torch.equal(basis_of(over, "first.lora_B", "rows")[0], torch.eye(8))


def test_a_quantised_base_is_measured_as_it_computes() -> None:
    """4-bit weights: covariances are of activations, and need no weight."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = tiny_llama(hidden_size=64, intermediate_size=64)
    try:
        for name, linear in list(base.named_modules()):
            if isinstance(linear, nn.Linear) and name != "lm_head":
                quantised = bitsandbytes.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
                )
                quantised.load_state_dict(linear.state_dict())
                base.set_submodule(name, quantised.to("cpu"))
        base(token_ids())
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes has no 4-bit layers on this CPU: {error}")
    model = with_lora(base, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    recorded = Recorded(model, BATCHES)
    over = measured(model)
    sides: dict[str, Side] = {"A": "columns", "B": "rows"}
    for kind, side in sides.items():
        basis, division = basis_of(over, f"{LAYER}.q_proj.lora_{kind}", side)
        assert_diagonalises(basis, recorded.covariance(f"{LAYER}.q_proj", kind), division)
    over.attach(optimizer := AdamW(trainable(model), lr=1e-2))
    before = lora_matrices(model)
    model(**BATCHES[0]).loss.backward()
    optimizer.step()
    assert not any(torch.equal(matrix, before[key]) for key, matrix in lora_matrices(model).items())
