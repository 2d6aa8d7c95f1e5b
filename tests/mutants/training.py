"""Faults of `loraover`: cores, optimizers, schedules, checkpoints and evaluation."""

from __future__ import annotations

from mutants.mutant import Mutant, Selection

TRAINING = (
    # The algebra of cores
    Mutant(
        "mpo-rows-before-columns",
        "[1 + 2 * k for k in range(count)] + [2 + 2 * k for k in range(count)]",
        "[2 + 2 * k for k in range(count)] + [1 + 2 * k for k in range(count)]",
        Selection("test_decompositions.py", "contraction_equals_the_oracle"),
    ),
    Mutant(
        "svd-loses-the-signs-of-its-values",
        "return (u * s) @ v",
        "return (u * s.abs()) @ v",
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
    # Optimizers
    Mutant(
        "what-a-step-writes-into-a-twin-is-dropped",
        "for key in twin.keys() - {",
        "for key in set() - {",
        Selection("test_optimizers.py", "switch_off"),
    ),
    Mutant(
        "wrapper-around-the-optimizer-goes-unseen",
        "        if not self._has_stepped:\n            check_outermost(optimizer)\n",
        "",
        Selection("test_optimizers.py", "wrapper_around"),
    ),
    Mutant(
        "rows-that-fill-up-an-epoch-are-learned",
        'batch["labels"][max(state.remainder - launched().rank * size, 0) :] = -100',
        "pass",
        Selection("test_many_processes.py", "every_engine_trains"),
    ),
    # Weights that stay in their files
    Mutant(
        "streamed-weight-takes-writes",
        "if weight is not None and func._schema.is_mutable:",
        "if False:",
        Selection("test_streaming.py", "nothing_is_written"),
    ),
    Mutant(
        "streamed-tied-weights-are-two",
        "if place not in made:",
        "if name:",
        Selection("test_streaming.py", "logits_are"),
    ),
    Mutant(
        "streamed-blocks-lose-their-biases",
        "None if bias is None else bias[b]",
        "None",
        Selection("test_streaming.py", "in_blocks"),
    ),
    Mutant(
        "streamed-view-is-not-converted",
        "return tree_map_only(Tensor, weight._computed, part)",
        "return part",
        Selection("test_streaming.py", "logits_are"),
    ),
    Mutant(
        "streams-what-was-allowed",
        "room if max_memory_gib is None else max_memory_gib * 2**30",
        "room",
        Selection("test_record.py", "memory_is_told"),
    ),
    Mutant(
        "streams-a-quantised-base",
        "weights <= limit or is_quantised",
        "weights <= limit",
        Selection("test_quantised_base.py", "quantised_base"),
    ),
    Mutant(
        "int8-weights-are-shared",
        "tensor.dtype == torch.int8",
        "tensor.dtype == torch.int16",
        Selection("test_quantised_base.py", "quantised_base"),
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
    Mutant(
        "hooks-groups-are-looked-up-once",
        "return self._layout != self._present_layout()",
        "return not self._layout",
        Selection("test_changed_groups.py", "follow_the_present or was_deleted"),
    ),
    Mutant(
        "hooks-cores-stay-after-a-step-that-raised",
        "if self._undo is not None:",
        "if self._undo is None:",
        Selection("test_injection.py", "leaves_a_plain_optimizer"),
    ),
    Mutant(
        "late-answer-is-never-read",
        "before, self._asked = self._asked, _Asked(",
        "before, self._asked = None, _Asked(",
        Selection("test_fingerprints.py", "answers_late"),
    ),
    # Moments and shards
    Mutant(
        "moments-squares-are-carried-like-means",
        "convert(moment, key in SQUARED)",
        "convert(moment, key in LINEAR)",
        Selection("test_moments.py", "carried_moments_are_those"),
    ),
    Mutant(
        "shards-changed-everywhere-or-nowhere",
        "dist.ReduceOp.MAX",
        "dist.ReduceOp.MIN",
        Selection("test_fsdp.py", "changed_in_one_process"),
    ),
    Mutant(
        "checkpoint-of-torch-steps-the-cores",
        "        if self._is_filling:\n            return None",
        "        if False:\n            return None",
        Selection("test_fsdp.py", "checkpoint_of_torch"),
    ),
    Mutant(
        "covered-matrices-have-no-state-in-a-checkpoint",
        "optimizer.register_state_dict_pre_hook(lambda _: view.fill_state())",
        "optimizer.register_state_dict_pre_hook(lambda _: None)",
        Selection("test_between_steps.py", "looks_plain"),
    ),
    Mutant(
        "zero-pieces-are-read-in-another-place",
        "whole.view(-1)[self.start : self.start + len(part)] = part",
        "whole.view(-1)[: len(part)] = part",
        Selection("test_traffic.py", "every_stage"),
    ),
    Mutant(
        "zero-pieces-are-not-summed",
        "    dist.all_reduce(sent, operation)\n",
        "",
        Selection("test_traffic.py", "every_stage"),
    ),
    Mutant(
        "zero-3-shares-are-swapped",
        "min(share * dist.get_rank(held.ds_process_group), held.ds_numel)",
        "share * (1 - dist.get_rank(held.ds_process_group))",
        Selection("test_traffic.py", "every_stage"),
    ),
    Mutant(
        "zero-counts-a-step-for-each-group",
        "return self._present()[1] == self._count - 1",
        "return True",
        Selection("test_traffic.py", "every_stage"),
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
        Selection("test_checkpoint_refused.py", "lacks_a_seal"),
    ),
    Mutant(
        "checkpoint-file-without-a-checksum-passes",
        "found != self.meta.sha256.get(name) and",
        "found != self.meta.sha256.get(name, found) and",
        Selection("test_checkpoint_refused.py", "lacks_a_seal"),
    ),
    Mutant(
        "checkpoint-contradiction-of-less-than-one-passes",
        "unavoidable = lost * (1 + cast) + smallest_subnormal(stored.dtype)",
        "unavoidable = 1.0",
        Selection("test_checkpoint.py", "contradict"),
    ),
    Mutant(
        "resume-makes-new-cores-of-the-matrix",
        "group.core(k, i).copy_(as_tensor(core[0]))",
        "group.core(k, i).copy_(group.core(k, i))",
        Selection("test_checkpoint.py", "uninterrupted"),
    ),
    Mutant(
        "resume-seal-is-not-compared",
        "sha256_of(folder / name) == digest for name, digest",
        "digest for name, digest",
        Selection("test_seal.py", "seal_covers"),
    ),
    Mutant(
        "a-resume-compares-in-the-wider-type",
        "max(held.dtype, dtypes[site.name], key=unit_roundoff)",
        "min(held.dtype, dtypes[site.name], key=unit_roundoff)",
        Selection("test_checkpoint.py", "peft_has_widened"),
    ),
    Mutant(
        "the-best-model-stays-in-float32",
        "site.parameter.data = site.parameter.data.to(dtypes[site.path])",
        "pass",
        Selection("test_callback.py", "best_models"),
    ),
    Mutant(
        "a-trials-checkpoint-is-any-trials",
        ".trial_params == state.trial_params",
        ".global_step == state.global_step",
        Selection("test_trainer_checkpoint.py", "each_trial"),
    ),
    Mutant(
        "no-limit-of-checkpoints-keeps-none",
        "self._limit is not None and self._limit > 0",
        "self._limit is not None",
        Selection("test_seal.py", "rotation"),
    ),
    # Output and JSON
    Mutant(
        "output-name-before-content",
        "            sync(draft)\n            if replace:\n",
        "            if replace:\n",
        Selection("test_output.py"),
    ),
    Mutant(
        "json-infinite-numbers-pass",
        "str(path), _finite if finite else float)",
        "str(path), float)",
        Selection("test_checkpoint_refused.py", "wrong_adapter_config"),
    ),
    # Adapters, as PEFT reads them
    Mutant(
        "reference-of-a-plain-adapter-is-unfolded",
        "if adapter.is_run_by_peft:",
        "if False:",
        Selection("test_reference_model.py", "reads_what_peft"),
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
    # Multiple testing
    Mutant(
        "holm-adjusted-values-may-fall",
        "largest = max(largest, (len(p_values) - position) * p_values[i])",
        "largest = (len(p_values) - position) * p_values[i]",
        Selection("test_equivalence.py", "holms_correction"),
    ),
    # Evaluation
    Mutant(
        "answer-behind-the-first-mark",
        'written = found[-1]["number"]',
        'written = found[0]["number"]',
        Selection("test_answers.py", "final_number"),
    ),
    Mutant(
        "a label's score has the generated token in place of its first one",
        "slice(len(context), -1)",
        "slice(len(context) + 1, None)",
        Selection("test_harness.py", "labels_behind"),
    ),
    Mutant(
        "code-runs-without-consent",
        "if not request.allow_code_execution:",
        "if request.allow_code_execution is None:",
        Selection("test_humaneval.py", "consent"),
    ),
    Mutant(
        "judge-rates-zero",
        "if found is None or not 1 <= float(found[1]) <= 10:",
        "if found is None or not 0 <= float(found[1]) <= 10:",
        Selection("test_mt_bench.py", "ratings_are_read"),
    ),
    Mutant(
        "eval asks an adapter in its base model's chat template",
        "own.chat_template = template",
        "own.chat_template = known",
        Selection("test_eval_command.py", "own_chat_template"),
    ),
)
