"""Faults of `loraover`: experts, requests, recipes, data, plans, studies, trackers and held-out losses."""

from __future__ import annotations

from mutants.mutant import Mutant, Selection

REQUESTS = (
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
    # Recipes, data, plans and studies
    Mutant(
        "held-out-data-beside-word-problems-are-passed-over",
        "if data.test == BUILT_IN or (data.train == BUILT_IN and data.test is None):",
        "if data.train == BUILT_IN or data.test == BUILT_IN:",
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
        "math.ceil(self.num_train_epochs * math.ceil(batches / in_a_step))",
        "math.ceil(self.num_train_epochs * batches / in_a_step)",
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
        "study-asks-the-winner-to-be-tuned",
        "loser = result if found.mean > 0 else",
        "loser = result if found.mean < 0 else",
        Selection("test_verdict.py", "each_verdict or seems_worse"),
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
    Mutant(
        "study-scores-every-rate",
        "found += [run for run in runs if tuned is not None and run.rate == tuned.best_rate]",
        "found += [run for run in runs if tuned is not None]",
        Selection("test_paper.py", "chosen_rate"),
    ),
    Mutant(
        "study-scores-another-adapter",
        "results.get(_adapter(run), ModelResult(",
        "results.get(_adapter(runs[0]), ModelResult(",
        Selection("test_paper.py", "leaves_no_score"),
    ),
    Mutant(
        "study-shows-the-scores-of-other-questions",
        'f"{task}.{request.benchmark}-{asked}.json"',
        'f"{task}.{request.benchmark}.json"',
        Selection("test_paper.py", "chosen_rate"),
    ),
    Mutant(
        "a-base-of-4-bits-rounds-what-is-trained",
        "parameter.data = values.to(parameter.device)",
        "pass",
        Selection("test_trainer_kinds.py", "4_bits_is_resumed"),
    ),
    Mutant(
        "packed-rows-are-measured-in-batches",
        "trainer.data_collator = replace(collator, padding_free=False)",
        "pass",
        Selection("test_trainer_kinds.py", "measured_one_by_one"),
    ),
    Mutant(
        "start-takes-an-adapter-with-two-names-once",
        "for found in same.values() if len(found) > 1)",
        "for found in same.values() if not found)",
        Selection("test_start_refused.py", "two_names"),
    ),
    Mutant(
        "start-forgets-the-recipes-scaling",
        "(delta.b.value.double() / target.scaling, delta.a.value.double())",
        "(delta.b.value.double(), delta.a.value.double())",
        Selection("test_start_from.py", "smaller_rank"),
    ),
    Mutant(
        "start-says-nothing-of-what-a-sum-left-out",
        "_Module(a, b, norm, math.hypot(left_out, *(one.truncation_error for one in certificates)))",
        "_Module(a, b, norm, math.hypot(*(one.truncation_error for one in certificates)))",
        Selection("test_start_from.py", "smaller_rank"),
    ),
    Mutant(
        "start-adds-directions-that-are-never-trained",
        "a = torch.cat([kept.a, target.a[used:]])",
        "a = torch.cat([kept.a, 0 * target.a[used:]])",
        Selection("test_start_from.py", "larger_rank"),
    ),
    Mutant(
        "start-of-a-branch-that-has-moved-is-taken",
        're.fullmatch(r"[0-9a-f]{40}", found.revision) is None',
        "False",
        Selection("test_start_from.py", "spelt"),
    ),
    Mutant(
        "a study averages runs whose start was trained anew",
        '(outcome.started_from, (str(start),), "adapters to start from", trained_anew),',
        "",
        Selection("test_tuning.py", "from_other_adapters"),
    ),
    Mutant(
        "a card has the secrets of an address",
        'shlex.join(map(without_secrets, ["loraover", "train",',
        'shlex.join(map(str, ["loraover", "train",',
        Selection("test_start_from.py", "secrets_of_an_address"),
    ),
    Mutant(
        "a key of a YAML file may occur twice",
        "if (key.tag, key.value) in seen:",
        "if False:",
        Selection("test_recipe.py", "occurs_twice"),
    ),
    Mutant(
        "an example counts as cut by its prompt alone",
        "if one.total > most:",
        "if one.prompt > most:",
        Selection("test_lengths.py", "what_is_cut_is_counted"),
    ),
    Mutant(
        "rows that the reward trainer drops count as cut",
        'if name == "reward" or (one.prompt',
        "if (one.prompt",
        Selection("test_lengths.py", "preferences_that_trl_leaves_out"),
    ),
    Mutant(
        "a chat template may leave out a system prompt",
        'if role in ("user", "assistant") or not content:',
        "if True:",
        Selection("test_lengths.py", "chat_template_does_not_write"),
    ),
    Mutant(
        "a run of one step takes it at rate 0",
        "share * steps < 1",
        "steps < 1",
        Selection("test_lengths.py", "one_step_trains"),
    ),
    Mutant(
        "messages beside the trainer's columns are learned",
        "(columns is None or (columns == TURNS and form.turns))",
        "form.turns",
        Selection("test_learned_rows.py", "messages_beside_the_columns"),
    ),
    Mutant(
        "a system prompt of a column is put before another",
        'if isinstance(start, list) and start[0]["role"] == "system":',
        "if False:",
        Selection("test_learned_rows.py", "learned_once"),
    ),
    Mutant(
        "the token that ends a text is not counted",
        "totals = [end + max(",
        "totals = [max(",
        Selection("test_lengths.py", "those_that_trl_trains_on"),
    ),
    Mutant(
        "all calls of tools have the keys of all others",
        "features=Features(plain.features | nested))",
        "features=None)",
        Selection("test_trainer_rows.py", "other_rows_call_tools"),
    ),
    Mutant(
        "held-out-turns-of-trained-conversations",
        "return parts[0], list(parts[0].numbers)",
        "return parts[0], list(range(len(parts[0].rows)))",
        Selection("test_training_rows.py", "held_out_together"),
    ),
    Mutant(
        "columns-are-those-of-the-first-row",
        "rows = [lacking | row for row in rows]",
        "rows = list(rows)",
        Selection("test_trainer_rows.py", "begin_after"),
    ),
    Mutant(
        "a-stream-is-read-for-one-process",
        "training.gradient_accumulation_steps * self.clients * processes",
        "training.gradient_accumulation_steps * self.clients",
        Selection("test_trainer_rows.py", "stream"),
    ),
    Mutant(
        "held-out rows of a file are trained on",
        "train = [i for i, place in enumerate(places) if place not in taken]",
        "train = [*range(len(places))]",
        Selection("test_training_rows.py", "held_out_if_it_has_enough"),
    ),
    Mutant(
        "what precedes an assistant's first turn counts as learned",
        "if answers_only else rows.rows",
        "if not answers_only else rows.rows",
        Selection("test_trainer_rows.py", "mixture_with_tools"),
    ),
    Mutant(
        "numbers-of-messages-pass-through-ujson",
        "module.ujson_dumps, module.ujson_loads = json.dumps, json.loads",
        "module.ujson_dumps = module.ujson_dumps",
        Selection("test_trainer_rows.py", "number_of_a_message"),
    ),
    Mutant(
        "checkpoint-that-may-not-be-read-is-incomplete",
        "    except (FileNotFoundError, CheckpointError):",
        "    except (OSError, CheckpointError):",
        Selection("test_seal.py", "may_not_be_read"),
    ),
    Mutant(
        "repository-is-public",
        "private=is_private, ",
        "",
        Selection("test_push.py", "plain_lora_is_uploaded"),
    ),
    Mutant(
        "folded-adapter-is-public",
        "is_private=request.private or None",
        "is_private=None",
        Selection("test_push.py", "fold_and_an_export"),
    ),
    Mutant(
        "resumed-run-takes-another-template",
        "elif begun.chat_template != found.chat_template:",
        "elif False:",
        Selection("test_row_settings.py", "its_template_only"),
    ),
    Mutant(
        "named-template-is-not-taken",
        "        reads.chat_template = template\n",
        "        pass\n",
        Selection("test_row_settings.py", "place_of_the_models"),
    ),
    Mutant(
        "float32-is-for-the-faster-cpu",
        "return None if prefers_bf16(device) else",
        "return None if not prefers_bf16(device) else",
        Selection("test_train.py", "default_where_it_is_faster"),
    ),
    Mutant(
        "missing-file-has-no-hint",
        'return "" if found is None else f" Is',
        'return "" if found is not None else f" Is',
        Selection("test_checkpoint_refused.py", "folder_below"),
    ),
    # Trackers, which `LORAOVER_TRACKERS` has to name a Python for
    Mutant(
        "a run in wandb stays open for the next one",
        "    wandb.finish()  # else",
        "    # else",
        Selection("test_trackers.py", "keep_losses"),
    ),
    Mutant(
        "trackers are not given the reference",
        "for name in (CERTIFICATE_FILE, REFERENCE_FILE)",
        "for name in (CERTIFICATE_FILE,)",
        Selection("test_trackers.py", "keep_losses"),
    ),
    Mutant(
        "trackers are given what lies beside the cores",
        "files = proofs(plain)",
        "files = proofs(adapter)",
        Selection("test_trackers.py", "keep_losses"),
    ),
    # Held-out losses
    Mutant(
        "held-out losses stand in the order in which they were computed",
        "return [row for _, row in sorted(zip(order, found[: len(order)], strict=True))]",
        "return found[: len(order)]",
        Selection("test_trainer_kinds.py", "in_their_order"),
    ),
    Mutant(
        "the loader of the trainer's own evaluation is taken for the held-out rows",
        '    "dataloader_persistent_workers": False,',
        "",
        Selection("test_trainer_kinds.py", "in_their_order"),
    ),
    Mutant(
        "a causal model is scored on the token that it has just read",
        'labels = batch["labels"][:, is_causal:]',
        'labels = batch["labels"][:, : -is_causal or None]',
        Selection("test_held_out_losses.py", "labelled_tokens"),
    ),
    Mutant(
        "a margin may be in some rows only",
        "if fault is not None and any(margin is not None for margin in margins):",
        "if fault is not None and margins[fault] is not None:",
        Selection("test_trainer_kinds.py", "margin"),
    ),
)
