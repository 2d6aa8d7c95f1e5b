"""Faults of `loraover`: training, checkpoints, evaluation and studies."""

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
        "a-method-takes-every-recipe",
        "                kind.check_recipe(self)\n",
        "                pass\n",
        Selection("test_methods.py", "no_method_takes"),
    ),
    Mutant(
        "soma-weight-decay-never-starts",
        'for group in optimizer.param_groups:\n            group["weight_decay"]',
        'for group in ():\n            group["weight_decay"]',
        Selection("test_soma.py", "weight_decay"),
    ),
    Mutant(
        "soma-measures-the-rounding-of-one-module",
        "square += float((wide(get_weight(layer)) - exact)",
        "square = float((wide(get_weight(layer)) - exact)",
        Selection("test_served_update.py", "serves_what_it_trained"),
    ),
    Mutant(
        "trained-factors-share-memory-with-their-start",
        "value.to(old, copy=True).contiguous()",
        "value.to(old).contiguous()",
        Selection("test_served_update.py", "serves_what_it_trained"),
    ),
    Mutant(
        "an-untrained-result-is-published",
        "is_untrained = result.update_norm == 0",
        "is_untrained = False",
        Selection("test_untrained_result.py", "lost_its_training"),
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
        "lorasc-first-stage-has-no-noise",
        "    def begin(self) -> None:\n        self.set_base()",
        "    def begin(self) -> None:\n        pass",
        Selection("test_lorasc.py", "stage_trains_on"),
    ),
    Mutant(
        "lorasc-stages-train-on-the-first-base",
        "            self.set_base()\n            optimizer",
        "            optimizer",
        Selection("test_lorasc.py", "stage_trains_on"),
    ),
    Mutant(
        "lorasc-stages-keep-the-moments",
        "            optimizer.state.clear()",
        "            pass",
        Selection("test_lorasc.py", "optimizer_starts_again"),
    ),
    Mutant(
        "federated-average-ignores-the-numbers-of-rows",
        "* (len(client.rows) / len(loader.dataset))",
        "/ len(clients)",
        Selection("test_federated.py", "two_clients"),
    ),
    Mutant(
        "eigen-squares-are-turned-like-means",
        "for side, change in (squares if squared else changes).items():",
        "for side, change in changes.items():",
        Selection("test_eigen.py", "the_oracles"),
    ),
    Mutant(
        "eigen-centre-stays-as-bases-turn",
        "            stack.copy_(new)\n        changes = {",
        "            stack.copy_(new if stack is not group.stacks[group.centre] else stack)\n        changes = {",
        Selection("test_eigen.py", "the_oracles"),
    ),
    Mutant(
        "eigen-bases-are-never-refreshed",
        "        with full_precision(self.group.stacks[0].device):\n            self._refresh()\n",
        "",
        Selection("test_measured_updates.py", "the_oracles"),
    ),
    Mutant(
        "eigen-each-process-has-bases-of-its-own",
        "new = of_first_process(torch.where(_wide(is_ready), new, old))",
        "new = torch.where(_wide(is_ready), new, old)",
        Selection("test_eigen_processes.py", "eigenvectors_differ"),
    ),
    Mutant(
        "cores-gradients-are-off-by-a-hundredth",
        "                self._whole[k].grad = stack\n",
        "                self._whole[k].grad = 1.01 * stack\n",
        Selection("test_exactness.py", "beside_the_optimizer_equals"),
    ),
    Mutant(
        "eigen-turns-the-rounded-matrices",
        'moments of these."""\n        group = self.group\n',
        'moments of these."""\n        group = self.group\n'
        "        centre = group.stacks[group.centre]\n"
        "        values = torch.stack([site.values for site in group.sites]).to(centre)\n"
        "        centre.copy_(group.decomposition.to_centre(group.stacks, values, *group.shape))\n",
        Selection("test_block_bases.py", "a_refresh_keeps_every_matrix"),
    ),
    Mutant(
        "a-centred-rmsprop-turns-squares-and-means-apart",
        'is_centred = {"square_avg", "grad_avg"} <= given.keys()',
        "is_centred = False",
        Selection("test_block_bases.py", "centred_rmsprop"),
    ),
    Mutant(
        "calibration-takes-rows-from-training",
        "    if not _same(rows[:1], again):\n",
        "    if False:\n",
        Selection("test_calibration.py", "read_only_once"),
    ),
    Mutant(
        "calibration-is-silent-about-what-no-batch-reached",
        "    if unseen:\n",
        "    if False:\n",
        Selection("test_measured_injection.py", "no_batch_reached"),
    ),
    Mutant(
        "calibration-takes-the-encoders-mask-for-the-decoder",
        "is_source = self.encoder is None or layer in self._layers or is_encoded",
        "is_source = True",
        Selection("test_measured_bases.py", "encoders_padding"),
    ),
    Mutant(
        "calibration-is-silent-without-a-label",
        "if not has_loss:",
        "if False:",
        Selection("test_measured_bases.py", "all_masked"),
    ),
    Mutant(
        "eigen-bases-stay-where-state-cannot-be-turned",
        'return {side: "calibration" for side in ("short", "long") if getattr(self, side) == "gradient"}',
        "return {}",
        Selection("test_callback.py", "bases_are_measured"),
    ),
    Mutant(
        "federated-draws-all-rows",
        "drawn = client.rows[torch.rand(len(client.rows), generator=drawing) < client.rate]",
        "drawn = client.rows",
        Selection("test_federated.py", "draws_some_rows"),
    ),
    Mutant(
        "federated-noise-from-the-recipe",
        "np.random.SeedSequence(self.settings.noise_seed)",
        "np.random.SeedSequence(self.settings.noise_seed or 0)",
        Selection("test_federated.py", "comes_from_the_system"),
    ),
    Mutant(
        "federated-rows-of-many-tokens-weigh-more",
        "return nats.view_as(labels).sum(1) / (labels != -100).sum(1).clamp_min(1)",
        "return nats.view_as(labels).sum(1)",
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
        "before, self._asked = self._asked, _ask(differs)",
        "before, self._asked = None, _ask(differs)",
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
        Selection("test_checkpoint_seal.py", "lacks_a_seal"),
    ),
    Mutant(
        "checkpoint-file-without-a-checksum-passes",
        "found != self.meta.sha256.get(name) and",
        "found != self.meta.sha256.get(name, found) and",
        Selection("test_checkpoint_seal.py", "lacks_a_seal"),
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
        Selection("test_callback_resume.py", "best_models"),
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
        "sync(draft)\n            draft.replace(target)",
        "draft.replace(target)\n            sync(target)",
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
    # Data, recipes, plans and studies
    Mutant(
        "held-out-data-beside-word-problems-are-passed-over",
        "if data.test in (None, BUILT_IN):",
        "if wanted or data.test is None:",
        Selection("test_training_rows.py", "beside_word_problems"),
    ),
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
        "Spread(variances, (seeds - 1, examples - 1))",
        "Spread(variances, (examples - 1, examples - 1))",
        Selection("test_analysis.py", "ratio_over_examples"),
    ),
    Mutant(
        "power-takes-seeds-for-rows",
        "Spread((self.of_seed / seeds, self.of_row / rows), (seeds - 1, rows - 1))",
        "Spread((self.of_row / seeds, self.of_seed / rows), (seeds - 1, rows - 1))",
        Selection("test_power.py", "says_of_itself"),
    ),
    Mutant(
        "study-shows-what-the-first-run-knows-of-its-rank",
        "served_rank=max(_known(outcome.served_rank for outcome in outcomes), default=None)",
        "served_rank=outcomes[0].served_rank",
        Selection("test_report.py", "older_version"),
    ),
    # Experts
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
        "messages of a thread name keywords to a command's user",
        "submit(copy_context().run, work, *arguments)",
        "submit(work, *arguments)",
        Selection("test_convert_refused.py", "one_message"),
    ),
    # Requests
    Mutant(
        "an argument is given without the one that it needs",
        "if needs and self._is_given(name) and not self._is_given(needs):",
        "if needs and self._is_given(name) and not self._is_given(name):",
        Selection("test_requests.py", "in_their_own_words"),
    ),
    Mutant(
        "a recorded command line has defaults that were converted",
        "bool(value == self.converted(self.default)[0])",
        "bool(value == self.default)",
        Selection("test_requests.py", "makes_the_same_request"),
    ),
)
