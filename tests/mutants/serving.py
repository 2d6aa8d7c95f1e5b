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
        "self.noise = self.found if evidence.is_one_model else Distance.of(evidence.off(BASE, evidence.base))",
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
        "verify-a-chat-is-compared-beyond-its-first-other-token",
        "answer.tops[: same + 1]",
        "answer.tops",
        Selection("test_verify_dialects.py", "wrong_one_differs and chats"),
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
        "client-a-trickle-has-no-deadline",
        "timer.start()",
        "timer.cancel()",
        Selection("test_endpoint.py", "trickles"),
    ),
    # The plug-in of vLLM
    Mutant(
        "plugin-follows-links-out",
        "if not all(place.resolve().is_relative_to(adapters) for place in places):",
        "if False:",
        Selection("test_plugin_settings.py", "leads_out"),
    ),
)
