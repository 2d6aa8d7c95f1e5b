"""Faults of the methods of training and of the bases of decomposition eigen."""

from __future__ import annotations

from mutants.mutant import Mutant, Selection

METHODS = (
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
        "            stack.copy_(new if stack is not held[group.centre] else stack)\n        changes = {",
        Selection("test_eigen.py", "the_oracles"),
    ),
    Mutant(
        "eigen-bases-are-never-refreshed",
        "        self._turn(part, turns, squares)\n",
        "",
        Selection("test_measured_updates.py", "the_oracles"),
    ),
    Mutant(
        "eigen-each-process-has-bases-of-its-own",
        "new = of_first_process(torch.where(_wide(ready), orthonormalised(old @ rotation), old))",
        "new = torch.where(_wide(ready), orthonormalised(old @ rotation), old)",
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
        'these: those of squares by `squares`."""\n        group = self.group\n',
        'these: those of squares by `squares`."""\n        group = self.group\n'
        "        centre = group.stacks[group.centre]\n"
        "        values = torch.stack([site.values for site in group.sites]).to(centre)\n"
        "        centre.copy_(group.decomposition.to_centre(group.stacks, values, *group.shape))\n",
        Selection("test_block_bases.py", "a_refresh_keeps_every_matrix"),
    ),
    Mutant(
        "eigen-moments-stay-as-bases-turn",
        "            moment.copy_(packed(change.mT @ whole @ change))\n",
        "",
        Selection("test_eigen.py", "the_oracles"),
    ),
    Mutant(
        "eigen-bases-lose-their-orthogonality",
        "orthonormalised(old @ rotation)",
        "(old @ rotation)",
        Selection("test_block_bases.py", "stay_orthogonal"),
    ),
    Mutant(
        "eigen-earlier-moments-are-read-as-todays",
        "moment = packed((basis.mT @ moment.to(basis) @ basis).unsqueeze(0))[0]",
        "moment = packed(moment.unsqueeze(0))[0]",
        Selection("test_block_bases.py", "earlier_versions"),
    ),
    Mutant(
        "eigen-optimizer-states-turn-in-the-first-part-alone",
        "key: value[part] if group.is_joined",
        "key: value[: part.stop - part.start] if group.is_joined",
        Selection("test_block_bases.py", "in_parts"),
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
        Selection("test_measured_bases.py", "no_batch_reached"),
    ),
    Mutant(
        "calibration-takes-the-encoders-mask-for-the-decoder",
        "is_source = self.encoder is None or layer in self._layers or is_encoded",
        "is_source = True",
        Selection("test_measured_bases.py", "encoders_padding"),
    ),
    Mutant(
        "calibration-is-silent-without-a-label",
        "if not any(has_loss):",
        "if False:",
        Selection("test_measured_bases.py", "all_masked"),
    ),
    Mutant(
        "eigen-bases-stay-where-state-cannot-be-turned",
        'return {side: "calibration" for side in ("short", "long") if getattr(self._options, side) == "gradient"}',
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
        Selection("test_tensorguide.py", "micro_batches"),
    ),
    Mutant(
        "tensorguide-resumes-from-its-first-cores",
        "nn.ModuleList(self.trains).load_state_dict(tensors)",
        "tensors.clear()",
        Selection("test_tensorguide.py", "resumes_to_the_same_bits"),
    ),
)
