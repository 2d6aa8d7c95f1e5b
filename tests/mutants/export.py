"""Faults of `loraover_export`: folds, merges, conversions and the writers of each format."""

from __future__ import annotations

from mutants.mutant import Mutant, Selection

EXPORT = (
    # Fold and delta
    Mutant(
        "fold-rounds-twice",
        "(wide.abs_() > x.abs()).to(torch.int32)).bitwise_or_(inexact)",
        "(wide.abs_() > x.abs()).to(torch.int32))",
        Selection("test_rounding.py", "around_every_tie"),
    ),
    Mutant(
        "fold-certificate-judges-the-mean",
        "float(error.div_(bound).amax())",
        "float(error.div_(bound).mean())",
        Selection("test_fold_rejected.py", "certificate_rejects"),
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
        "base-weights-are-copies-by-their-shape",
        "(found != base.weight(path).to(found.dtype))",
        "(found != found)",
        Selection("test_base_weights.py", "changed_rows"),
    ),
    Mutant(
        "convert-tokens-reach-the-head-alone",
        "for path in base.tied[1:]:",
        "for path in base.tied[-1:]:",
        Selection("test_convert.py", "all_that_is_tied"),
    ),
    Mutant(
        "merge-trusts-the-shapes-of-the-files",
        "if shard.shape(key) != tuple(parameter.shape):",
        "if len(shard.shape(key)) != parameter.ndim:",
        Selection("test_merge_refused.py", "base_that_cannot"),
    ),
    Mutant(
        "merge-reads-the-index-first",
        "if SINGLE in present:  #",
        "if SINGLE in present and INDEX not in present:  #",
        Selection("test_merge_files.py", "merge_of_a_single_file"),
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
        Selection("test_merge.py", "untied_where"),
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
        "_padded(scale(exact, module.scaling), (0, r - module.rank))",
        "_padded(scale(exact, module.scaling), (r - module.rank, 0))",
        Selection("test_vllm_uniform.py", "delta_is_the_sources"),
    ),
    Mutant(
        "vllm-largest-vocabulary-is-refused",
        "size > MAX_VOCABULARY",
        "size >= MAX_VOCABULARY",
        Selection("test_vllm_preflight.py", "vocabulary_beyond"),
    ),
    Mutant(
        "vllm-pools-in-bfloat16",
        'or (served.dtype == "float32" and is_pooling):',
        'or (served.dtype == "float32" and False):',
        Selection("test_vllm_preflight.py", "serves_a_model_in"),
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
        Selection("test_onnx_swappable.py", "begin_alike"),
    ),
    # Conversions
    Mutant(
        "loha-columns-out-of-step",
        "a = (b1[:, None, :] * b2[None, :, :]).flatten(end_dim=1)",
        "a = (b1[None, :, :] * b2[:, None, :]).flatten(end_dim=1)",
        Selection("test_convert.py", "delta_is_pefts"),
    ),
    Mutant(
        "hra-reflections-in-reverse",
        "t[:i, i] = -2 * t[:i, :i] @ gram[:i, i]",
        "t[i, :i] = -2 * t[:i, :i] @ gram[:i, i]",
        Selection("test_convert.py", "compact_form"),
    ),
    Mutant(
        "pissa-start-kept",
        "found = LowRank(torch.cat([b, -first.b], dim=1)",
        "found = LowRank(torch.cat([b, first.b * 0], dim=1)",
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
        "torch.cat([a, first.a]), first.rounded + first.apart)",
        "torch.cat([a, first.a]), first.rounded)",
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
        "apart > LARGEST_SHARE * norm:",
        "apart > 2 * LARGEST_SHARE * norm:",
        Selection("test_convert_bounds.py", "half"),
    ),
    Mutant(
        "gram-schmidt-without-its-condition",
        "u.T.contiguous(), rounded + turned)",
        "u.T.contiguous(), rounded)",
        Selection("test_convert_bounds.py", "gram_schmidt"),
    ),
    Mutant(
        "osf-compared-on-wide-weights",
        "start_dtype or compute_dtype, compute_dtype",
        "compute_dtype, compute_dtype",
        Selection("test_convert_bounds.py", "as_it_was_started"),
    ),
    Mutant(
        "excluded-modules-named",
        "return not self._is_excluded(module) and self._is_targeted(module)",
        "return self._is_targeted(module)",
        Selection("test_target_modules.py", "named_as_in_peft"),
    ),
    Mutant(
        "lost-heads-pass",
        'any(f"{ending}." in name for ending in found)',
        "name in found",
        Selection("test_target_modules.py", "beside_the_matrices"),
    ),
    Mutant(
        "lost-routers-pass",
        'targets.names_parameter(f"{path}.weight")',
        "targets.names_parameter(path)",
        Selection("test_target_modules.py", "lost_router"),
    ),
    Mutant(
        "lost-heads-are-right",
        "if missing_modules(subject) is not None:\n        return None\n    saved",
        "if subject is not None:\n        return None\n    saved",
        Selection("test_check.py", "without_its_head"),
    ),
    Mutant(
        "any-layer-named",
        'int(found["idx"]) in layers',
        'int(found["idx"]) >= 0',
        Selection("test_target_modules.py", "named_as_in_peft"),
    ),
    Mutant(
        "an-emptied-matrix-passes",
        "return self.worst_to_bound <= 1 and not self.is_lost",
        "return self.worst_to_bound <= 1",
        Selection("test_underflow.py", "half_of_its_norm"),
    ),
    Mutant(
        "gate-and-up-as-large-as-both",
        "(n, m // len(names))",
        "(n, m)",
        Selection("test_vllm_experts.py", "read_again"),
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
        "rounded = rounding(m, n, r) * float(q.norm()) * size",
        "rounded = rounding(m, n, r) * float(q.norm()) * float(a.norm())",
        Selection("test_convert_cancellation.py", "cancel"),
    ),
    Mutant(
        "osf-start-in-float32",
        "(factor.to(stored.dtype).double() for factor in (start.u, start.s, start.vt))",
        "(factor.double() for factor in (start.u, start.s, start.vt))",
        Selection("test_convert_bounds.py", "peft_stores"),
    ),
    Mutant(
        "convert-publishes-what-failed",
        'check(draft, certificate)\n        if certificate.verdict == "failed":\n            raise',
        "check(draft, certificate)\n        if not certificate.verdict:\n            raise",
        Selection("test_convert_refused.py", "loses_logits"),
    ),
    Mutant(
        "check-of-an-idle-adapter-passes",
        '"passed" if adapter_effect > 0 and adapter_effect >=',
        '"passed" if adapter_effect >=',
        Selection("test_fold_check_error.py", "conclusive_if"),
    ),
    Mutant(
        "onnx-later-nan-is-lost",
        "float(np.max([case.max_logit for case in self.cases]))",
        "max(case.max_logit for case in self.cases)",
        Selection("test_onnx_check.py", "no_numbers"),
    ),
    # Experts
    Mutant(
        "the orientation of vLLM's experts is not looked at",
        "(outputs, hidden) == (2 * down_inputs, down_outputs)",
        "True",
        Selection("test_vllm_experts.py", "orientation"),
    ),
    Mutant(
        "gate and up of vLLM's experts are swapped",
        'return projections[:2] if parameter == "gate_up_proj"',
        'return projections[1::-1] if parameter == "gate_up_proj"',
        Selection("test_vllm_experts.py", "pairs"),
    ),
    Mutant(
        "gate and up of llama.cpp's experts are swapped",
        "zip(names, b.chunk(len(names), dim=1), strict=True)}",
        "zip(reversed(names), b.chunk(len(names), dim=1), strict=True)}",
        Selection("test_gguf_families.py", "logits"),
    ),
    Mutant(
        "one expert's matrix stands for all in a GGUF file",
        'if names[path].kind == "expert" and path not in adapter.experts:',
        "if False:",
        Selection("test_gguf_refused.py", "experts_with"),
    ),
    Mutant(
        "a GGUF file replaces what came meanwhile",
        "publish_file(request.output, fill, parents=True, replace=request.force)",
        "publish_file(request.output, fill, parents=True)",
        Selection("test_gguf_refused.py", "meanwhile"),
    ),
    Mutant(
        "llama.cpp is trusted to leave out any layer's rotation",
        "([int(k % 4 != 0) for k in layers],)",
        "(config.no_rope_layers,)",
        Selection("test_gguf_refused.py", "computes_otherwise"),
    ),
    Mutant(
        "a single column keeps its strides in a GGUF file",
        "matrix.clone(memory_format=torch.contiguous_format)",
        "matrix.contiguous()",
        Selection("test_gguf.py", "rank_1"),
    ),
    Mutant(
        "every field that a sum cannot hold is sent to PEFT",
        "(remedies or {}).get(field, remedy)",
        "remedy",
        Selection("test_combine.py", "bad_input"),
    ),
)
