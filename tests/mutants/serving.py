"""Faults of `loraover_serve`: parity and verification."""

from __future__ import annotations

from mutants.mutant import Mutant, Selection

SERVING = (
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
        "design-forth-and-forth",
        "orders.append(forth + forth[::-1])",
        "orders.append(forth + forth)",
        Selection("test_parity_design.py", "drift"),
    ),
    Mutant(
        "outputs-noise-of-zero-hides-no-adapter",
        "change > APPLIED * (noise or 0.0)",
        "change >= APPLIED * (noise or 0.0)",
        Selection("test_parity_design.py", "weak_adapter"),
    ),
    Mutant(
        "outputs-the-floor-needs-no-ground",
        "agrees(mine[VANILLA], plain[BASE], sensitivity)",
        "agrees(mine[VANILLA], mine[VANILLA], sensitivity)",
        Selection("test_parity.py", "scales_all_adapters"),
    ),
    Mutant(
        "judge-noise-of-the-base-is-a-fleet",
        "sum(each.rest < each.total for each in others) < FEW_AS_BASE",
        "len(others) < FEW_AS_BASE",
        Selection("test_replicas.py", "noisy_answers"),
    ),
    Mutant(
        "verify-right-layers-of-another-model",
        "if shared != self._shared or self._held[0] > last:",
        "if self._held[0] > last:",
        Selection("test_right_layers.py", "another_model"),
    ),
    Mutant(
        "verify-right-layers-up-to-the-fault",
        "last = min(layer, len(self._layers)) - 1",
        "last = min(layer, len(self._layers) - 1)",
        Selection("test_right_layers.py", "whole_run"),
    ),
    Mutant(
        "verify-logits-kept-of-the-padding",
        "yield found[first - left_out : len(tokens) - left_out]",
        "yield found[first - longest : longest - left_out]",
        Selection("test_verify.py", "run_together"),
    ),
    Mutant(
        "record-a-text-of-several-tokens-is-one",
        "for i, text in decoded.items() if known.get(text) == i}",
        "for i, text in decoded.items()}",
        Selection("test_record.py", "texts"),
    ),
    Mutant(
        "record-logits-before-the-answers",
        "question.answered if answers_only else question.window",
        "question.window",
        Selection("test_record.py", "answers_alone"),
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
        "return sensitivity * noise.rms * (1 + sure_errors(noise.prompts) * math.sqrt(2) * relative) + FLOOR",
        "return FLOOR",
        Selection("test_verify.py", "allowed_distance"),
    ),
    Mutant(
        "verify-noise-of-the-adapted-model",
        "self.noise = self.found if evidence.is_one_model else ModelDistance.of(evidence.off(BASE, evidence.base))",
        "self.noise = self.found",
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
        "if case.effect > FLOOR and is_narrow(case.strength, case.allowed):",
        "if case.effect >= 0:",
        Selection("test_verify.py", "below_the_noise"),
    ),
    Mutant(
        "verify-mixed-batch-beside-itself",
        "row for row in alone}",
        "row for row in together}",
        Selection("test_verify_endpoint.py", "mixed_batch"),
    ),
    Mutant(
        "verify-one-odd-position-in-a-mixed-batch-is-a-fault",
        "if self.evidence.is_one_model or found.prompts < FEW_PROMPTS:\n            return found.rms > self.limit",
        "if found.rms > self.limit:\n            return True",
        Selection("test_judge_prompts.py", "odd_positions"),
    ),
    Mutant(
        "verify-answers-alike-hide-a-leak",
        "self._excess_of(halved, least=1.0)",
        "self._excess_of(halved)",
        Selection("test_judge_prompts.py", "leak_in"),
    ),
    Mutant(
        "verify-a-leak-into-three-prompts-passes",
        "return len(self.far(halved)) >= FEW_AS_BASE or",
        "return",
        Selection("test_judge_prompts.py", "leak_in"),
    ),
    Mutant(
        "verify-a-chat-is-compared-beyond-its-first-other-token",
        "return self.tops[: len(list(same)) + 1]",
        "return self.tops",
        Selection("test_verify_endpoint.py", "wrong_one_differs and chats"),
    ),
    Mutant(
        "verify-positions-are-independent",
        "sums[prompt] += f * math.sqrt(w) * r",
        "sums[len(sums)] += f * math.sqrt(w) * r",
        Selection("test_judge_estimates.py", "strength_is_that_of_numpy"),
    ),
    Mutant(
        "verify-a-right-adapter-keeps-its-strength-in-int4",
        "low, high = (2 * min(bias, 1.0) - 1, 2 * max(bias, 1.0) - 1)",
        "low, high = 1.0, 1.0",
        Selection("test_verify_strength.py", "right_adapters"),
    ),
    Mutant(
        "verify-one-answer-without-the-adapter-decides",
        "(1 - share) ** (answers - k) for k in range(FEW_AS_BASE))",
        "(1 - share) ** (answers - k) for k in range(1))",
        Selection("test_verify_strength.py", "show_a_share"),
    ),
    Mutant(
        "verify-far-prompts-pass",
        "    some_are_far,\n",
        "",
        Selection("test_judge_prompts.py", "on_some_prompts"),
    ),
    Mutant(
        "verify-one-odd-position-makes-a-prompt-far",
        "math.sqrt(median_low(mine))",
        "math.sqrt(max(mine))",
        Selection("test_judge_prompts.py", "odd_positions"),
    ),
    Mutant(
        "verify-a-cache-in-float8-is-another-base-model",
        "self.format_of(self.noise.rms * math.sqrt(1 - self.cache_share))",
        "self.number_format",
        Selection("test_verify_faults.py", "planted_fault"),
    ),
    Mutant(
        "verify-one-model-is-its-own-base",
        "BASE: [] if self.is_one_model else in_order(answers.base)}",
        "BASE: in_order(answers.base)}",
        Selection("test_verify_faults.py", "planted_fault"),
    ),
    Mutant(
        "check-noise-of-one-model-is-a-fault",
        "return self.format_of(found.rms) is None",
        "return True",
        Selection("test_judged_alike.py", "coarsest_format"),
    ),
    Mutant(
        "check-a-fault-of-one-model-leaves-anything",
        "return self.format_of(found.rms) is None",
        "return False",
        Selection("test_judged_alike.py", "coarsest_format"),
    ),
    Mutant(
        "verify-crossed-and-stale-are-confused",
        "((STALE, subject.earlier), (ANOTHER, subject.confusable))",
        "((ANOTHER, subject.earlier), (STALE, subject.confusable))",
        Selection("test_verify_faults.py", "exchanged"),
    ),
    Mutant(
        "client-an-asked-pause-is-not-kept",
        "pause = error.pause_s if self._repeats else None",
        "pause = None",
        Selection("test_endpoint.py", "pause"),
    ),
    Mutant(
        "client-the-lowest-number-is-a-logprob",
        "abs(value) < LARGEST_NATS",
        "abs(value) < float('inf')",
        Selection("test_verify_endpoint.py", "cannot_be_used"),
    ),
    Mutant(
        "client-a-trickle-has-no-deadline",
        "timer.start()",
        "timer.cancel()",
        Selection("test_endpoint.py", "trickles"),
    ),
    Mutant(
        "client-a-secret-header-is-shown",
        "for secret in (self._key, *others.values()) if secret]",
        "for secret in (self._key,) if secret]",
        Selection("test_endpoint.py", "headers"),
    ),
    Mutant(
        "client-a-key-in-json-is-shown",
        "return secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]",
        "return (secret,)",
        Selection("test_endpoint.py", "as_json_and_python"),
    ),
    Mutant(
        "client-an-answer-is-cut-before-its-key-is-hidden",
        "return self.hidden(repr(answer))[:SHOWN_CHARACTERS]",
        "return self.hidden(repr(answer)[:SHOWN_CHARACTERS])",
        Selection("test_endpoint.py", "where_an_answer_is_cut"),
    ),
    Mutant(
        "client-a-key-that-is-cut-is-shown",
        'part = next(filter(text.endswith, parts), "") if is_cut else ""',
        'part = ""',
        Selection("test_endpoint.py", "where_an_answer_is_cut"),
    ),
    Mutant(
        "client-any-certificate-is-taken",
        "return ssl.create_default_context(cafile=ca_file)",
        "return ssl._create_unverified_context(cafile=ca_file)",
        Selection("test_endpoint.py", "certificates"),
    ),
    Mutant(
        "client-the-server-is-asked-past-its-proxy",
        "secure.set_tunnel(self._host, self._port, headers)",
        "secure = http.client.HTTPSConnection(self._host, self._port, context=self._context)",
        Selection("test_endpoint.py", "tunnel"),
    ),
    Mutant(
        "client-an-adapter-has-to-be-listed",
        "if absent and not speaker.has(adapter):",
        "if absent:",
        Selection("test_verify_endpoint.py", "listed_by_another_name"),
    ),
    # Several servers behind one address
    Mutant(
        "fleet-ids-of-requests-name-servers",
        "if 2 * len(values) <= len(bad) and others < min(len(bad), len(good)):",
        "if others < min(len(bad), len(good)):",
        Selection("test_replicas.py", "headers_that_tell"),
    ),
    Mutant(
        "fleet-a-header-of-all-servers-tells-them-apart",
        "and others < min(len(bad), len(good)):",
        "and others <= len(good):",
        Selection("test_replicas.py", "headers_that_tell"),
    ),
    Mutant(
        "fleet-two-answers-decide",
        "return len({each.prompt for each in bad} if case.repeats else bad) < FEW_AS_BASE",
        "return not bad",
        Selection("test_replicas.py", "two_answers"),
    ),
    Mutant(
        "fleet-an-odd-question-is-a-server",
        "return len({each.prompt for each in bad} if case.repeats else bad) < FEW_AS_BASE",
        "return len(bad) < FEW_AS_BASE",
        Selection("test_replicas.py", "odd_question"),
    ),
    Mutant(
        "fleet-noise-disagrees",
        "return CERTAIN * max(math.sqrt(2) * arithmetic, usual)",
        "return usual",
        Selection("test_replicas.py", "noise_never"),
    ),
    Mutant(
        "fleet-a-coarse-engines-own-noise-disagrees",
        "return CERTAIN * max(math.sqrt(2) * arithmetic, usual)",
        "return CERTAIN * math.sqrt(2) * arithmetic",
        Selection("test_replicas.py", "noise_never"),
    ),
    Mutant(
        "fleet-only-first-answers-count",
        "return [each.change for each in self.repeats] or self.changes",
        "return self.changes",
        Selection("test_replicas.py", "lacks_the_adapter"),
    ),
    Mutant(
        "fleet-requests-for-a-share-of-right-answers",
        "math.log1p(-share)) if share < 1",
        "math.log(share)) if share < 1",
        Selection("test_replicas.py", "so_many_requests"),
    ),
    Mutant(
        "checker-the-worst-answer-is-the-right-one",
        "key=lambda row: fmean(map(abs, self.adapter.off(place, row)))",
        "key=lambda row: -fmean(map(abs, self.adapter.off(place, row)))",
        Selection("test_replicas.py", "another_fault"),
    ),
    Mutant(
        "checker-asks-in-order",
        "at_once(ask, random.sample(asked, len(asked)))",
        "at_once(ask, asked)",
        Selection("test_replicas.py", "lacks_the_adapter"),
    ),
    Mutant(
        "checker-asks-once",
        "for turn in range(repeats) for place in places]",
        "for turn in range(1) for place in places]",
        Selection("test_replicas.py", "lacks_the_adapter"),
    ),
    Mutant(
        "checker-an-unrecorded-token-counts-for-nothing",
        "else max(0.0, value - floor) for i, value in row.items()]",
        "else 0.0 for i, value in row.items()]",
        Selection("test_record.py", "unrecorded"),
    ),
    # The plug-in of vLLM
    Mutant(
        "plugin-follows-links-out",
        "if not all(place.resolve().is_relative_to(adapters) for place in places):",
        "if False:",
        Selection("test_plugin_settings.py", "leads_out"),
    ),
)
