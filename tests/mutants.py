"""Some fifty faults of the product, planted one at a time, and whether the tests that should notice each of them do.

    cd tests
    python -m mutants --baseline                       # all of them; about ten minutes on two cores
    python -m mutants mpo-rows-before-columns --jobs 2

A mutant is *killed* where its tests fail, and *survives* where they pass. It is *broken*, and shows nothing, where its
source does not occur exactly once, no test ran, or a module does not load. A survivor asks for a better test, not for
another mutant. Nothing is written into this checkout, which may change meanwhile: each mutant has a copy of it as it
was at the beginning.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import click

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("loraover", "export", "serve")
COPIED = (*PACKAGES, "tests", "docs", "pyproject.toml")
LIMIT_S = 600.0
UNLOADABLE = re.compile(r"^E +(ImportError|ModuleNotFoundError|NameError|SyntaxError)\b|ERROR collecting", re.MULTILINE)
FAILED = re.compile(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", re.MULTILINE)


Outcome = Literal["killed", "survived", "broken"]


class Selection(NamedTuple):
    """Tests, by the name of their file, wherever below `tests/` it lies, and pytest's `-k` expression."""

    file: str
    only: str = ""


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        name: what is wrong with it.
        old: source that occurs exactly once in the product, so that no path has to be named.
        new: what stands there instead.
        tests: tests that should fail.
    """

    name: str
    old: str
    new: str
    tests: Selection


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Args:
        seconds: duration of its tests.
        note: the first test that failed, or why the mutant shows nothing.
    """

    name: str
    outcome: Outcome
    seconds: float
    note: str


MUTANTS = (
    # The algebra of cores
    Mutant(
        "mpo-rows-before-columns",
        "[1 + 2 * k for k in range(count)] + [2 + 2 * k for k in range(count)]",
        "[2 + 2 * k for k in range(count)] + [1 + 2 * k for k in range(count)]",
        Selection("test_decompositions.py", "contraction_equals_the_oracle"),
    ),
    Mutant(
        "mpo-random-gauge-is-the-identity",
        'self.gauge == "identity" and rows == columns',
        "rows == columns",
        Selection("test_initial_cores.py", "another_seed"),
    ),
    Mutant(
        "mpo-centre-takes-the-matrix-as-it-lies",
        "tensors = _interleave(matrices, layout).reshape(",
        "tensors = matrices.reshape(",
        Selection("test_moments.py", "transposed_jacobian"),
    ),
    # Methods beside LoRA-Over
    Mutant(
        "soma-splits-off-the-largest-triplets",
        "return Pair(u[:, -r:] * root, root[:, None] * vt[-r:])",
        "return Pair(u[:, :r] * root, root[:, None] * vt[:r])",
        Selection("test_soma.py", "the_split"),
    ),
    Mutant(
        "soma-serves-the-start-twice",
        "torch.cat([b, -b0.to(b)], dim=1)",
        "torch.cat([b, b0.to(b)], dim=1)",
        Selection("test_soma.py", "exact_update"),
    ),
    Mutant(
        "lorasc-forgets-the-last-average",
        "(1 - pace) ** (stages - t) for",
        "(1 - pace) ** (stages - t - 1) for",
        Selection("test_lorasc.py", "weights_of_the_stages"),
    ),
    Mutant(
        "lorasc-loses-ended-stages-in-checkpoints",
        "for t, stage in enumerate(self.ended)\n            for path, pair",
        "for t, stage in enumerate(self.ended[:0])\n            for path, pair",
        Selection("test_lorasc.py", "resumes_to_the_same_bits"),
    ),
    Mutant(
        "federated-average-ignores-the-numbers-of-rows",
        "* (len(client.rows) / len(loader.dataset))",
        "/ len(clients)",
        Selection("test_federated.py", "two_clients"),
    ),
    Mutant(
        "federated-rows-of-many-tokens-weigh-more",
        "return nats / (labels != -100).sum(1).clamp_min(1)",
        "return nats",
        Selection("test_federated.py", "two_clients"),
    ),
    Mutant(
        "tensorguide-starts-from-another-function",
        "return Pair(now.b - first.b, now.a)",
        "return Pair(now.b, now.a)",
        Selection("test_tensorguide.py", "keeps_the_models_function"),
    ),
    Mutant(
        "tensorguide-reads-b-row-by-row",
        "vectors[:, at:].reshape(-1, r, layout.out_features).mT",
        "vectors[:, at:].reshape(-1, layout.out_features, r)",
        Selection("test_tensorguide.py", "contraction_equals"),
    ),
    Mutant(
        "tensorguide-pulls-back-without-a",
        'stack_gradients(self.factors("B")), stack_gradients(self.factors("A"))]',
        'stack_gradients(self.factors("B")), 0 * stack_gradients(self.factors("A"))]',
        Selection("test_tensorguide.py", "differences_of_the_oracle or micro_batches"),
    ),
    Mutant(
        "tensorguide-resumes-from-its-first-cores",
        "nn.ModuleList(self.trains).load_state_dict(tensors)",
        "tensors.clear()",
        Selection("test_tensorguide.py", "resumes_to_the_same_bits"),
    ),
    # The optimizer's hooks
    Mutant(
        "hooks-matrix-keeps-its-gradient",
        "site.clear_gradient()",
        "site.gradient()",
        Selection("test_between_steps.py", "gradient"),
    ),
    Mutant(
        "hooks-cores-keep-their-gradients",
        "group.clear_gradients()",
        "group.contract()",
        Selection("test_between_steps.py", "left_on_the_cores or skipped_for_infinity"),
    ),
    Mutant(
        "hooks-closure-sees-the-last-steps-matrices",
        "group.write()\n            loss = closure()",
        "group.contract()\n            loss = closure()",
        Selection("test_optimizers.py", "every_evaluation"),
    ),
    Mutant(
        "hooks-skipped-step-counts",
        'return bool(getattr(optimizer, "found_inf", False))',
        "return False",
        Selection("test_schedules.py", "scaler_skips"),
    ),
    # Moments and shards
    Mutant(
        "moments-squares-are-carried-like-means",
        "squared=key in SQUARED",
        "squared=key in LINEAR",
        Selection("test_moments.py", "carried_moments_are_those"),
    ),
    Mutant(
        "shards-changed-everywhere-or-nowhere",
        "dist.ReduceOp.MAX",
        "dist.ReduceOp.MIN",
        Selection("test_fsdp.py", "changed_in_one_process"),
    ),
    # Schedules, budgets and scores
    Mutant(
        "schedule-rounds-end-too-soon",
        "* k / (config.rounds - 1) for k in",
        "* k / config.rounds for k in",
        Selection("test_budgets.py", "rounds_come_evenly"),
    ),
    Mutant(
        "budget-group-is-not-charged",
        "below[group] -= self._cost(name)",
        "below[group] -= 0",
        Selection("test_budgets.py", "within_one_site"),
    ),
    Mutant(
        "score-smoothing-the-wrong-way",
        "before.lerp(now, 1 - SMOOTHING)",
        "before.lerp(now, SMOOTHING)",
        Selection("test_importance.py", "what_its_source_defines"),
    ),
    # Checkpoints, read and resumed from
    Mutant(
        "checkpoint-without-a-digest-passes",
        "if meta.digest != digest_of(",
        "if meta.digest and meta.digest != digest_of(",
        Selection("test_checkpoint.py", "lacks_a_seal"),
    ),
    Mutant(
        "checkpoint-file-without-a-checksum-passes",
        "found != self.meta.sha256.get(name) and",
        "found != self.meta.sha256.get(name, found) and",
        Selection("test_checkpoint.py", "lacks_a_seal"),
    ),
    Mutant(
        "checkpoint-contradiction-of-less-than-one-passes",
        "if excess.amax() > 0:",
        "if excess.amax() > 1:",
        Selection("test_checkpoint.py", "contradict"),
    ),
    Mutant(
        "resume-makes-new-cores-of-the-matrix",
        "group.core(k, i).copy_(core[0])",
        "group.core(k, i).copy_(group.core(k, i))",
        Selection("test_checkpoint.py", "uninterrupted"),
    ),
    Mutant(
        "resume-seal-is-not-compared",
        "sha256_of(folder / name) == digest for name, digest",
        "digest for name, digest",
        Selection("test_resume.py", "seal_covers"),
    ),
    # Output and JSON
    Mutant(
        "output-name-before-content",
        "sync(draft)\n            draft.replace(target)",
        "draft.replace(target)\n            sync(target)",
        Selection("test_output.py"),
    ),
    Mutant(
        "json-infinite-numbers-pass",
        "number = _finite if finite else float",
        "number = float",
        Selection("test_checkpoint_refused.py", "wrong_adapter_config"),
    ),
    # Fold and delta
    Mutant(
        "fold-rounds-twice",
        "(wide.abs_() > x.abs()).to(torch.int32)).bitwise_or_(inexact)",
        "(wide.abs_() > x.abs()).to(torch.int32))",
        Selection("test_rounding.py", "known_number or around_every_tie"),
    ),
    Mutant(
        "fold-certificate-judges-the-mean",
        "float(error.div_(bound).amax())",
        "float(error.div_(bound).mean())",
        Selection("test_fold_rejected.py", "certificate_rejects"),
    ),
    Mutant(
        "unfolded-router-that-is-a-linear-layer-gets-a-hook",
        'any(targeted_parameter(target, module) == "weight" for target in self.parameters)',
        "False",
        Selection("test_experts.py", "as_peft_adapts"),
    ),
    Mutant(
        "delta-scaling-of-rslora-is-loras",
        "alpha / math.sqrt(r) if self.use_rslora else alpha / r",
        "alpha / r",
        Selection("test_delta.py", "stored_matrices"),
    ),
    Mutant(
        "delta-bound-ignores-the-error-of-a",
        "a.bound + gamma(self.rank, U64) * size])",
        "gamma(self.rank, U64) * size])",
        Selection("test_delta.py", "errors_of_both_factors"),
    ),
    Mutant(
        "merge-transposes-no-conv1d",
        "return weight if isinstance(module, nn.Linear) else weight.mT",
        "return weight.mT if isinstance(module, nn.Embedding) else weight",
        Selection("test_merge.py", "oracles_sum"),
    ),
    Mutant(
        "merge-trusts-the-shapes-of-the-files",
        "if shard.shape(key) != tuple(parameter.shape):",
        "if len(shard.shape(key)) != parameter.ndim:",
        Selection("test_merge_refused.py", "base_that_cannot"),
    ),
    Mutant(
        "low-rank-bound-of-the-factorizations-alone",
        "bound = self.noise(rank) + OF_NORMS * (1 + self.departure) * product",
        "bound = self.noise(rank) / 100",
        Selection("test_low_rank.py", "covers_exact"),
    ),
    Mutant(
        "storage-error-of-b-alone",
        "sum_norm([(change_b, exact_a), (b.double(), change_a)])",
        "sum_norm([(change_b, exact_a)])",
        Selection("test_shrink.py", "error_is_the_tail"),
    ),
    Mutant(
        "low-rank-balances-b-only",
        "a * torch.where(used, 1 / power, 0.0)[:, None]",
        "a * torch.where(used, 1.0, 0.0)[:, None]",
        Selection("test_low_rank.py", "smallest_singular_values"),
    ),
    Mutant(
        "combine-ignores-the-sign-of-a-weight",
        "scale(delta.b, weight)) for delta, weight in weighted",
        "scale(delta.b, abs(weight))) for delta, weight in weighted",
        Selection("test_combine.py", "many_kinds"),
    ),
    Mutant(
        "merge-says-that-weights-are-still-tied",
        'return config | nested | {"tie_word_embeddings": False}',
        "return config | nested",
        Selection("test_merge_files.py", "untied_where"),
    ),
    Mutant(
        "merge-counts-what-rounding-kept",
        "squares[rounded == before]",
        "squares[rounded != before]",
        Selection("test_merge_files.py", "erased"),
    ),
    # vLLM and ONNX
    Mutant(
        "uniform-pads-b-in-front",
        "_padded(scaled, (0, r - exact.value.shape[1]))",
        "_padded(scaled, (r - exact.value.shape[1], 0))",
        Selection("test_vllm_uniform.py", "delta_is_the_sources"),
    ),
    Mutant(
        "vllm-largest-vocabulary-is-refused",
        "size > MAX_VOCABULARY",
        "size >= MAX_VOCABULARY",
        Selection("test_vllm_preflight.py", "vocabulary_beyond"),
    ),
    Mutant(
        "onnx-padding-rolls-on",
        'add("Sub", [order, count], "order-count")',
        'add("Add", [order, count], "order-count")',
        Selection("test_onnx_padding.py", "mended_graph"),
    ),
    Mutant(
        "onnx-any-matrix-of-the-shape-is-taken",
        "if not np.array_equal(held, drawn[name].mT.numpy().astype(held.dtype)):",
        "if name in places:",
        Selection("test_onnx_swappable.py", "oracles_matrices"),
    ),
    # Parity
    Mutant(
        "parity-one-side-shows-equivalence",
        "max(stats.t.cdf(upper, freedom), stats.t.sf(lower, freedom))",
        "min(stats.t.cdf(upper, freedom), stats.t.sf(lower, freedom))",
        Selection("test_equivalence.py", "sleep_data or p_value"),
    ),
    Mutant(
        "parity-bootstrap-of-the-population",
        "variance = (square - mean**2) / (n - 1)",
        "variance = (square - mean**2) / n",
        Selection("test_equivalence.py", "bootstrap_of_students"),
    ),
    Mutant(
        "holm-adjusted-values-may-fall",
        "largest = max(largest, (len(p_values) - position) * p_values[i])",
        "largest = (len(p_values) - position) * p_values[i]",
        Selection("test_equivalence.py", "holms_correction"),
    ),
    Mutant(
        "design-forth-and-forth",
        "orders.append(forth + forth[::-1])",
        "orders.append(forth + forth)",
        Selection("test_parity.py", "drift"),
    ),
    Mutant(
        "outputs-noise-of-zero-hides-no-adapter",
        "change > APPLIED * (noise or 0.0)",
        "change >= APPLIED * (noise or 0.0)",
        Selection("test_parity.py", "weak_adapter"),
    ),
    # Earlier graphs of ONNX Runtime
    Mutant(
        "serve-builds-a-graph-although-one-is-given",
        "names=names, graph=graph, check=False)",
        "names=names, check=False)",
        Selection("test_earlier_graph.py", "runs_the_earlier_graph"),
    ),
    Mutant(
        "serve-takes-a-graph-without-a-cache",
        "if earlier.web or not earlier.cache:",
        "if earlier.web:",
        Selection("test_earlier_graph.py", "refused_first"),
    ),
    # Verification
    Mutant(
        "verify-no-noise-is-allowed",
        "return sensitivity * noise.rms * (1 + SURE * math.sqrt(2) * relative) + FLOOR",
        "return FLOOR",
        Selection("test_verify.py", "coarser_base_model"),
    ),
    Mutant(
        "verify-noise-of-the-adapted-model",
        "noise = distance(answers.base, reference.base)",
        "noise = distance(answers.adapter, reference.adapter)",
        Selection("test_verify.py", "planted_fault"),
    ),
    Mutant(
        "verify-scalings-are-divided-the-other-way",
        "rule(subject.config, len(delta.a), delta.scaling) / delta.scaling",
        "delta.scaling / rule(subject.config, len(delta.a), delta.scaling)",
        Selection("test_verify.py", "planted_fault"),
    ),
    Mutant(
        "verify-greedy-tokens-are-not-compared",
        "greedy.gap > greedy.allowed",
        "greedy.gap < 0",
        Selection("test_verify.py", "other_tokens"),
    ),
    Mutant(
        "verify-weak-adapter-passes",
        "if effect <= APPLIED * allowed:",
        "if effect < 0:",
        Selection("test_verify.py", "below_the_noise"),
    ),
    Mutant(
        "verify-mixed-batch-beside-itself",
        "zip(mixed[arm], apart[arm], strict=True)",
        "zip(mixed[arm], mixed[arm], strict=True)",
        Selection("test_verify_endpoint.py", "mixed_batch"),
    ),
    # Evaluation
    Mutant(
        "answer-behind-the-first-mark",
        'text.rpartition("####")[2]',
        'text.partition("####")[2]',
        Selection("test_answers.py", "final_number"),
    ),
    Mutant(
        "code-runs-without-consent",
        "if not options.allow_code_execution:",
        "if options.allow_code_execution is None:",
        Selection("test_humaneval.py", "consent"),
    ),
    Mutant(
        "judge-rates-zero",
        "if found is None or not 1 <= float(found[1]) <= 10:",
        "if found is None or not 0 <= float(found[1]) <= 10:",
        Selection("test_mt_bench.py", "ratings_are_read"),
    ),
    # Conversions
    Mutant(
        "loha-columns-out-of-step",
        "a = (b1[:, None, :] * b2[None, :, :]).flatten(end_dim=1)",
        "a = (b1[None, :, :] * b2[:, None, :]).flatten(end_dim=1)",
        Selection("test_convert.py", "delta_is_pefts or oracles"),
    ),
    Mutant(
        "hra-reflections-in-reverse",
        "t[:i, i] = -2 * t[:i, :i] @ gram[:i, i]",
        "t[i, :i] = -2 * t[:i, :i] @ gram[:i, i]",
        Selection("test_convert.py", "compact_form"),
    ),
    Mutant(
        "pissa-start-kept",
        "found = LowRank(torch.cat([b, -b0], dim=1), torch.cat([a, a0]), left_out)",
        "found = LowRank(torch.cat([b, b0 * 0], dim=1), torch.cat([a, a0]), left_out)",
        Selection("test_convert.py", "delta_is_pefts"),
    ),
    Mutant(
        "adalora-scaled-by-remaining-ranks",
        "scaling / (module.config.init_r + 1e-5)",
        "scaling / (len(a) + 1e-5)",
        Selection("test_convert.py", "delta_is_pefts"),
    ),
    Mutant(
        "pissa-start-alike-on-all-machines",
        "float((residual - (stored.double() - b0 @ a0)).norm()) + apart, part",
        "float((residual - (stored.double() - b0 @ a0)).norm()), part",
        Selection("test_convert_bounds.py", "another_machine"),
    ),
    Mutant(
        "part-error-halved",
        "return f * math.sqrt(k * k + k * (longer - len(values)) + 2 * coupled)",
        "return f * math.sqrt(k * k + k * (longer - len(values)) + coupled / 2)",
        Selection("test_single_precision.py", "attained"),
    ),
    Mutant(
        "coinciding-triplets-forgotten",
        "best = min(best, turned[-1] + _separated_part_error(values, longer, place, f, tail))",
        "best = min(best, _separated_part_error(values, longer, place, f, tail))",
        Selection("test_single_precision.py", "coincide"),
    ),
    Mutant(
        "any-part-determined",
        "if part.apart > LARGEST_SHARE * norm:",
        "if part.apart > 2 * LARGEST_SHARE * norm:",
        Selection("test_convert_bounds.py", "half"),
    ),
    Mutant(
        "olora-bound-without-scaling",
        "apart = abs(s) * (2 * basis_error",
        "apart = (2 * basis_error",
        Selection("test_convert_bounds.py", "another_machine"),
    ),
    Mutant(
        "fold-check-without-labels",
        "task_type=task, num_labels=labels, device=device)",
        "task_type=task, device=device)",
        Selection("test_fold_check_error.py", "classifier"),
    ),
    Mutant(
        "classifier-in-batches",
        """if task_type == "SEQ_CLS" and config.pad_token_id is None:""",
        """if task_type == "SEQ_CLS" and False:""",
        Selection("test_fold_check_error.py", "classifier"),
    ),
    Mutant(
        "deft-rounding-of-the-sum-alone",
        "rounded = gamma(ROUNDINGS * (m + n + r), U64) * float(q.norm()) * size",
        "rounded = gamma(ROUNDINGS * (m + n + r), U64) * float(q.norm()) * float(a.norm())",
        Selection("test_convert_bounds.py", "cancel"),
    ),
    Mutant(
        "osf-start-in-float32",
        "(factor.to(stored.dtype).double() for factor in (start.u, start.s, start.vt))",
        "(factor.double() for factor in (start.u, start.s, start.vt))",
        Selection("test_convert_bounds.py", "peft_stores"),
    ),
    Mutant(
        "convert-checks-after-publishing",
        "        check(draft)\n    return certificate",
        "    check(target.output)\n    return certificate",
        Selection("test_convert_refused.py", "check_that_cannot"),
    ),
    # Data, recipes, plans and studies
    Mutant(
        "format-last-turn-alone",
        "for i in turns:",
        "for i in turns[-1:]:",
        Selection("test_data.py", "assistant_turn"),
    ),
    Mutant(
        "recipe-steps-across-epochs",
        "math.ceil(self.num_train_epochs * math.ceil(batches / self.gradient_accumulation_steps))",
        "math.ceil(self.num_train_epochs * batches / self.gradient_accumulation_steps)",
        Selection("test_recipe.py", "steps_of_epochs"),
    ),
    Mutant(
        "plan-one-moment",
        "optimizer_states=2 * (trained + added * CORE_BYTES)",
        "optimizer_states=2 * trained + added * CORE_BYTES",
        Selection("test_plan.py", "counts_what_a_run_trains"),
    ),
    Mutant(
        "study-interval-counts-examples-as-seeds",
        "stats.t.ppf(0.975, seeds - 1)",
        "stats.t.ppf(0.975, examples - 1)",
        Selection("test_analysis.py", "excludes_zero"),
    ),
    Mutant(
        "study-shows-what-the-first-run-knows-of-its-rank",
        "served_rank=max(_known(outcome.served_rank for outcome in outcomes), default=None)",
        "served_rank=outcomes[0].served_rank",
        Selection("test_report.py", "older_version"),
    ),
    Mutant(
        "experts run slowest in the columns of B",
        "return stack.view(len(stack), -1, self.experts)[..., self.expert]",
        "return stack.view(len(stack), self.experts, -1)[:, self.expert]",
        Selection("test_expert_stacks.py", "deltas"),
    ),
    Mutant(
        "square experts of an old PEFT are read as they are",
        "    return not is_present\n",
        "    return False\n",
        Selection("test_expert_stacks.py", "deltas"),
    ),
    Mutant(
        "the gradient of an expert is read after it was cleared",
        "else total.clone()  # clear_gradient overwrites the stack's",
        "else total",
        Selection("test_experts.py", "autograd"),
    ),
    Mutant(
        "experts without cores are taken from the optimizer",
        "taken[id(site.parameter)] == site.part.experts]",
        "taken[id(site.parameter)] >= 1]",
        Selection("test_experts.py", "other_experts"),
    ),
    Mutant(
        "the orientation of vLLM's experts is not looked at",
        "(outputs, hidden) == (2 * down_inputs, down_outputs)",
        "True",
        Selection("test_vllm_experts.py", "orientation"),
    ),
    Mutant(
        "gate and up of vLLM's experts are swapped",
        "names = (gate, up) if stack.parameter",
        "names = (up, gate) if stack.parameter",
        Selection("test_vllm_experts.py", "pairs"),
    ),
    Mutant(
        "gate and up of llama.cpp's experts are swapped",
        "zip(names, b.chunk(len(names), dim=1), strict=True)}",
        "zip(reversed(names), b.chunk(len(names), dim=1), strict=True)}",
        Selection("test_gguf_families.py", "logits"),
    ),
)


def product_files(root: Path) -> list[Path]:
    """Every module of the three packages."""
    return [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]


def place_of(mutant: Mutant, texts: Mapping[Path, str]) -> Path:
    """The one file that holds the mutant's source.

    Raises:
        ValueError: there is none, or the source occurs more than once.
    """
    found = [path for path, text in texts.items() for _ in range(text.count(mutant.old))]
    if len(found) != 1:
        raise ValueError(f"its source occurs {len(found)} times, expected once")
    return found[0]


def file_of(tests: Selection, root: Path) -> Path:
    """The file that holds the tests.

    Raises:
        ValueError: no file of that name, or several.
    """
    found = list((root / "tests").rglob(tests.file))
    if len(found) != 1:
        raise ValueError(f"{len(found)} files are named {tests.file}, expected one")
    return found[0]


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of the product and its tests, for the time of a block."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, ignore=ignored)
            else:
                shutil.copy(root / name, copy)
        yield copy


def run_tests(copy: Path, tests: Selection) -> tuple[int, str]:
    """pytest's exit code in a copy, and its output.

    Raises:
        ValueError: no such file of tests, or they have not ended after LIMIT_S seconds.
    """
    ours = os.pathsep.join(str(copy / name) for name in (".", "export", "serve"))
    environment = {name: value for name, value in os.environ.items() if name != "LORAOVER_COMPATIBILITY"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["--hypothesis-seed=0", str(file_of(tests, copy))] + (["-k", tests.only] if tests.only else [])
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"its tests have not ended after {LIMIT_S:g} s") from None
    return done.returncode, done.stdout + done.stderr


def judge(code: int, output: str) -> tuple[Outcome, str]:
    """Outcome and note of a run of pytest."""
    if code not in (0, 1):
        return "broken", "no test was selected" if code == 5 else f"pytest ended with exit code {code}"
    if unloadable := UNLOADABLE.search(output):
        return "broken", f"a module does not load: {unloadable[1] or 'see pytest'}"
    if code == 1:
        failed = FAILED.search(output)
        return "killed", failed[1] if failed else "pytest names no test"
    return ("survived", "") if re.search(r"\d passed", output) else ("broken", "every selected test was skipped")


def attempt(root: Path, tests: Selection, mutant: Mutant | None = None) -> Verdict:
    """Run tests in a copy of the tree, with a mutant planted or as it is: then, to survive is to pass."""
    started = time.perf_counter()
    outcome: Outcome
    try:
        with copied(root) as copy:
            if mutant is not None:
                texts = {path: path.read_text(encoding="utf-8") for path in product_files(copy)}
                place = place_of(mutant, texts)
                place.write_text(texts[place].replace(mutant.old, mutant.new), encoding="utf-8")
            outcome, note = judge(*run_tests(copy, tests))
    except ValueError as error:
        outcome, note = "broken", str(error)
    name = f"{tests.file} -k {tests.only!r}" if mutant is None else mutant.name
    return Verdict(name, outcome, time.perf_counter() - started, note)


def failing_without_mutant(root: Path, selections: Iterable[Selection], jobs: int) -> dict[Selection, str]:
    """Tests that do not pass on the tree as it is, with the reason; a mutant that they kill shows nothing."""
    found = {}
    chosen = list(dict.fromkeys(selections))
    with ThreadPoolExecutor(jobs) as pool:
        for tests, verdict in zip(chosen, pool.map(partial(attempt, root), chosen), strict=True):
            passed = verdict.outcome == "survived"
            click.echo(f"{'passed' if passed else 'FAILED':9}{verdict.seconds:6.1f} s  {verdict.name}")
            if not passed:
                found[tests] = verdict.note
    return found


def try_mutants(root: Path, mutants: Sequence[Mutant], jobs: int, failing: Mapping[Selection, str]) -> list[Verdict]:
    """Try each mutant and show what became of it.

    Args:
        root: the tree to plant them in copies of.
        mutants: those to try.
        jobs: number of them at a time.
        failing: tests that fail without a mutant, with the reason.
    """

    def verdict_on(mutant: Mutant) -> Verdict:
        if mutant.tests in failing:
            return Verdict(mutant.name, "broken", 0.0, f"its tests fail without it: {failing[mutant.tests]}")
        return attempt(root, mutant.tests, mutant)

    verdicts = []
    with ThreadPoolExecutor(jobs) as pool:
        for verdict in pool.map(verdict_on, mutants):
            click.echo(f"{verdict.outcome:9}{verdict.seconds:6.1f} s  {verdict.name:45}  {verdict.note}")
            verdicts.append(verdict)
    return verdicts


@click.command()
@click.argument("names", nargs=-1)
@click.option("--list", "is_list", is_flag=True, help="Show the mutants and their tests, and run nothing.")
@click.option("--baseline", is_flag=True, help="First run each selection of tests once without a mutant.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Number of mutants at a time.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="File for the verdicts.")
def main(names: tuple[str, ...], is_list: bool, baseline: bool, jobs: int, file: Path | None) -> None:
    """Plant the mutants of these NAMES, or all of them; exit with 0 if every one was killed."""
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        raise click.UsageError(f"no such mutant: {', '.join(sorted(unknown))}; see --list.")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if is_list:
        for mutant in chosen:
            click.echo(f"{mutant.name:45}  {mutant.tests.file} {mutant.tests.only}")
        return
    with copied(ROOT) as root:
        failing = failing_without_mutant(root, (mutant.tests for mutant in chosen), jobs) if baseline else {}
        verdicts = try_mutants(root, chosen, jobs, failing)
    if file is not None:
        file.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n", encoding="utf-8")
    counts = Counter(verdict.outcome for verdict in verdicts)
    seconds = sum(verdict.seconds for verdict in verdicts)
    click.echo(
        f"{counts['killed']} of {len(verdicts)} killed, {counts['survived']} survived, {counts['broken']} broken; "
        f"{seconds:.0f} s of tests"
    )
    sys.exit(0 if counts["killed"] == len(verdicts) else 1)


if __name__ == "__main__":
    main()
