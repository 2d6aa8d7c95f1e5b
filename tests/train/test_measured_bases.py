"""Bases from calibration batches: eigenvectors of the covariances that the batches give, counted once, by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from loraover import Budget, LoraOverConfig, OverParameterization, Probe, read_checkpoint, write_checkpoint
from loraover.common.errors import ConfigError
from loraover.common.threads import one_thread
from loraover.overparam import covariances
from loraover.overparam.block_bases import Blocks
from loraover.overparam.decompositions import Eigen
from loraover.overparam.sites import lora_layers

from oracles.contraction import Array
from support.hooked_run import same
from support.tiny_models import lora_matrices, tiny_llama, tiny_net, token_ids, trainable, with_lora

MEASURED = {"short": "calibration", "long": "calibration", "block": 16}
BATCHES = [{"input_ids": batch, "labels": batch} for batch in (token_ids(seed) for seed in range(3))]
LAYER = "model.layers.1.self_attn"


@pytest.fixture(autouse=True, scope="module")
def _single_thread() -> Iterator[None]:
    with one_thread():
        yield


def llama(**options: Any) -> Any:
    return with_lora(tiny_llama(), task_type="CAUSAL_LM", **options)


def measured(model: Any, batches: Any = BATCHES, **options: Any) -> OverParameterization:
    config = LoraOverConfig(decomposition="eigen", options=MEASURED | options)
    return OverParameterization(model, config, probe=Probe(model, batches))


class Recorded:
    """Inputs and output gradients of each LoRA layer, (tokens, features) float64, as PyTorch's own hooks see them."""

    def __init__(self, model: Any, batches: Any) -> None:
        self.inputs: dict[str, list[Array]] = {}
        self.gradients: dict[str, list[Array]] = {}
        self.of_matrices: dict[str, Array] = {}
        handles = []
        for name, layer in lora_layers(model).items():
            handles.append(layer.register_forward_pre_hook(self._note(name)))
            handles.append(layer.register_full_backward_hook(self._note_gradient(name)))
        model.train()
        for batch in batches:
            model(**batch).loss.backward()
        model.eval()
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.of_matrices[name] = parameter.grad.double().numpy().copy()
        model.zero_grad()

    def _note(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.inputs.setdefault(name, []).append(tokens(inputs[0]))

        return note

    def _note_gradient(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
            self.gradients.setdefault(name, []).append(tokens(outputs[0]))

        return note

    def covariance(self, name: str, matrix: str) -> Array:
        """C_in for A, C_out for B."""
        rows = np.concatenate((self.inputs if matrix == "A" else self.gradients)[name])
        return rows.T @ rows


def tokens(x: Tensor) -> Array:
    return x.detach().double().reshape(-1, x.shape[-1]).numpy()


def blocks_of(basis: Tensor) -> list[Array]:
    """Blocks of a core (count * size, size)."""
    return list(basis.reshape(-1, basis.shape[1], basis.shape[1]).double().numpy())


def assert_diagonalises(basis: Tensor, moment: Array, division: Blocks) -> None:
    """Block by block, to within float32 sums; the diagonal decreases."""
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(len(moment)), division.number)])
    for end, block in zip(ends, blocks_of(basis), strict=True):
        size = division.size if division.full == division.number or end <= division.full * division.size else None
        size = size or division.size - 1
        v, c = block[:size, :size], moment[end - size : end, end - size : end]
        turned = v.T @ c @ v
        # A sum over 96 tokens in float32, then u of the core, on a symmetric matrix.
        error = 200 * 2.0**-24 * np.linalg.norm(c)
        assert np.linalg.norm(turned - np.diag(np.diag(turned))) <= error
        assert (np.diff(np.diag(turned)) <= error).all()
        assert np.linalg.norm(v.T @ v - np.eye(size)) < 1e-5


def basis_of(over: OverParameterization, name: str, side: str) -> tuple[Tensor, Blocks]:
    group, i = over.injected[name]
    eigen = over.decomposition
    assert isinstance(eigen, Eigen)
    k, division = eigen.basis_core(side, *group.shape), eigen.blocks(side, *group.shape)  # type: ignore[arg-type]
    assert k is not None
    assert division is not None
    return group.core(k, i), division


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


def kept(moment: Array, division: Blocks) -> Array:
    """A matrix of which only the diagonal blocks are left."""
    mask = np.zeros_like(moment)
    for part in np.array_split(np.arange(len(moment)), division.number):
        mask[np.ix_(part, part)] = 1
    return moment * mask


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
    assert not any(module._forward_hooks for module in model.modules())
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
    assert over.gauge_numbers() < sum(over.decomposition.gauge_numbers(*site.shape) for site in over.sites.values())


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


def test_trained_bases_are_steady_where_their_rate_is_zero() -> None:
    model = llama()
    config = LoraOverConfig(decomposition="eigen", options=MEASURED | {"train_auxiliary": True}, aux_lr_scale=0)
    over = OverParameterization(model, config, probe=Probe(model, BATCHES))
    over.attach(optimizer := AdamW(trainable(model), lr=1e-2))
    other = measured(again := llama())
    other.attach(reference := AdamW(trainable(again), lr=1e-2))
    for batch in BATCHES:
        for net, stepped in ((model, optimizer), (again, reference)):
            net(**batch).loss.backward()
            stepped.step()
            stepped.zero_grad()
    matrices = lora_matrices(again)
    # The same but for the order of sums over sites, which share a basis in one of them.
    assert all((matrix - matrices[key]).abs().max() < 1e-4 for key, matrix in lora_matrices(model).items())


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


def test_a_batch_counts_as_often_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    once = moments_of(llama(), BATCHES[:1], monkeypatch)
    assert_close(moments_of(llama(), BATCHES[:1] * 3, monkeypatch), {key: 3 * total for key, total in once.items()})


# Refused


def test_batches_without_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match="computes no loss from a batch of input_ids"):
        measured(llama(), [{"input_ids": token_ids()}])


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
    assert not any(module._forward_hooks for module in model.modules())


def test_running_out_of_memory_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def out(self: Any, *args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model = llama()
    monkeypatch.setattr(covariances._Moments, "add", out)
    needed = r"ran out of memory: .* one batch, .* and 0\.1 MiB for the moments of 14 layers\. Use smaller batches"
    with pytest.raises(ConfigError, match=needed) as refusal:
        measured(model)
    assert isinstance(refusal.value.__cause__, torch.OutOfMemoryError)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    # Per layer, blocks of 16 x 16 of both sides, float32: q and o 4 of them, k and v 3, gate, up and down 5.
    assert pytest.approx(0.1, abs=0.05) == 2 * (2 * 4 + 2 * 3 + 3 * 5) * 16**2 * 4 / 2**20


# Other ways to be injected


def test_a_dynamic_schedule_measures_when_it_injects(monkeypatch: pytest.MonkeyPatch) -> None:
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
    times: list[int] = []
    measure = covariances._run

    def watched(*args: Any) -> None:
        times.append(over.step)
        measure(*args)

    monkeypatch.setattr(covariances, "_run", watched)
    for step in range(8):
        batch = token_ids(50 + step)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        before = lora_matrices(model)
        optimizer.step()
        assert not any(torch.equal(matrix, before[key]) for key, matrix in lora_matrices(model).items())
    assert times == [3, 6]
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


def test_a_static_choice_measures_what_it_chooses() -> None:
    model = llama()
    config = LoraOverConfig(
        decomposition="eigen", options=MEASURED, schedule="static", budget=Budget(fraction=0.25), quota="global"
    )
    over = OverParameterization(model, config, probe=Probe(model, BATCHES))
    assert len(over.injected) == 7
    for name in over.injected:
        basis, division = basis_of(over, name, "columns")
        identity = torch.eye(division.size).repeat(division.number, 1)
        assert not torch.equal(basis, identity)


def test_a_side_that_no_batch_reached_keeps_the_identity() -> None:
    net = tiny_net()
    config = LoraOverConfig(decomposition="eigen", options=MEASURED)

    def loss(model: Any, x: Tensor) -> Tensor:
        hidden: Tensor = model.get_base_model().first(x)
        return hidden.square().mean()

    over = OverParameterization(net, config, probe=Probe(net, [torch.ones(3, 6)], loss))
    basis, _ = basis_of(over, "third.lora_A", "columns")
    assert torch.equal(basis, torch.eye(8))
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
    for kind, side in (("A", "columns"), ("B", "rows")):
        basis, division = basis_of(over, f"{LAYER}.q_proj.lora_{kind}", side)
        assert_diagonalises(basis, recorded.covariance(f"{LAYER}.q_proj", kind), division)
    over.attach(optimizer := AdamW(trainable(model), lr=1e-2))
    before = lora_matrices(model)
    model(**BATCHES[0]).loss.backward()
    optimizer.step()
    assert not any(torch.equal(matrix, before[key]) for key, matrix in lora_matrices(model).items())
