"""The verdict on one engine. The first of these rules that finds something decides.

Each reason is one sentence, which says what was found, and what is right; what the user can do about a fault stands in
`remedies`. What was not looked at is in the list `not_checked`.

1. Requests for the base model are answered with the adapter, or its error has the direction of a known fault.
2. The base model is further off than any number format explains: it is another base model, or has other weights than
   the quantised ones that were recorded, which is *inconclusive*.
3. Some answers are the base model's, or answers to one question disagree.
4. The adapter's strength, or its excess, is beyond what is allowed: a fault of the adapter, which is searched for.
5. The answers to a few prompts are far off.
6. Generated answers end early, lack the adapter, or contradict the logprobs; or answers in mixed batches are wrong.
7. The server's chat template differs, which questions of token ids do not show.
8. *As trained*, if everything that was asked for could be judged, the interval of the strength is narrow, and the
   number format of the answers and of the recorded weights is not coarser than declared; *inconclusive* otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from loraover_serve.judge.case import Case, flag, split_base
from loraover_serve.judge.estimates import Interval, in_percent, share_found
from loraover_serve.judge.evidence import Evidence
from loraover_serve.judge.fleet import (
    Split,
    servers_seen,
    some_are_base,
    some_disagree,
    some_say_nothing,
    sources,
    unseen_servers,
)
from loraover_serve.judge.limits import (
    ADAPTER,
    BASE,
    ENOUGH_PROMPTS,
    FEW_AS_BASE,
    FEW_PROMPTS,
    FLOOR,
    NUMBER_FORMATS,
    OTHER,
    PLAIN,
    SEEN,
    Verdict,
)
from loraover_serve.judge.models import ReadChat
from loraover_serve.judge.names import (
    BASE_LAYERS,
    BASE_OR_TEMPLATE,
    CHANGED,
    CHANGED_BY_OTHER,
    COARSE_CACHE,
    DECODED,
    ENDS_EARLY,
    LEAKS,
    NOT_APPLIED,
    OTHER_BASE,
    PENALTY,
    POSITIONS,
    TEMPERATURE,
    TEMPLATE,
    UNLIKE,
    WINDOW,
)
from loraover_serve.judge.results import MixedBatch, Suspect
from loraover_serve.judge.search import find_base_fault, suspects
from loraover_serve.judge.templates import TemplateReading


class RuleFinding(NamedTuple):
    """Finding of a rule.

    Args:
        reason: The reason, in a sentence.
        fault: Name of the fault; None if it has none.
        suspects: Faults that were compared, the nearest first.
        split: Answers of which some are wrong; None if no rule found any.
        explains_base: Whether the fault explains the base model's distance from PyTorch.
        not_checked: Things that this rule did not find out, in words.
    """

    verdict: Verdict
    reason: str
    fault: str | None = None
    suspects: Sequence[Suspect] = ()
    split: Split | None = None
    explains_base: bool = False
    not_checked: Sequence[str] = ()

    def with_unchecked(self, *things: str) -> RuleFinding:
        """The finding, with more things that were not found out."""
        return self._replace(not_checked=[*self.not_checked, *things])


def judge(
    evidence: Evidence, served_format: str = "bf16", option: Callable[[str], str] = flag, *, is_quick: bool = False
) -> dict[str, Any]:
    """The verdict on an engine, and what was measured.

    Args:
        evidence: The engine's answers, and the models.
        served_format: Coarsest number format in which the base model is known to be served.
        option: Name of an option as its user writes it.
        is_quick: Whether only a few answers of the adapter were asked for, which show whether it is applied.

    Returns:
        The fields of an engine's result in verify.json, but for those that say who was judged and how long it took.
    """
    case = Case(evidence, served_format, option)
    if is_quick:
        found = quick(case)
        if evidence.models.weights is not None:  # the first of several bases is in use
            found = found.with_unchecked("which weights the server has")
        return _told(found, evidence) | {"weights": None}
    found = _named_by_chats(
        next(finding for rule in RULES if (finding := rule(case)) is not None), evidence.answers.chats
    )
    failure = left_out(option) if evidence.answers.without_mixed else evidence.answers.mixed_failure
    if failure is not None:
        found = found.with_unchecked(f"requests for both models at the same time: {failure}")
    if found.verdict != "differs":
        found = found.with_unchecked(*_unseen(case))
    if evidence.models.weights is not None:
        found = _with_weights(found, evidence.models.weights)
    template = evidence.answers.template
    found = _with_template(found, template, option)
    return _told(found, evidence) | {
        "strength": case.strength if math.isfinite(case.strength.half) and case.effect > 0 else None,
        "allowed_strength": case.allowed,
        "base": case.noise,
        "number_format": case.number_format,
        "cache_share": 0.0 if found.explains_base else case.cache_share,
        "visible_share": share_found(sum(map(len, case.as_base))),
        "adapter": case.found,
        "effect": case.effect,
        "allowed": case.limit,
        "greedy": case.greedy,
        "mixed": MixedBatch(**case.mixed) if {BASE, ADAPTER} <= case.mixed.keys() else None,
        "mixed_failure": failure,
        "template": None if template is None else template.words,
        "suspects": [*found.suspects],
    }


def _told(found: RuleFinding, evidence: Evidence) -> dict[str, Any]:
    """Finding of a rule, as fields of an engine's result."""
    few = [each.counted for each in some_say_nothing(evidence.answers.responses) if each.fault != found.fault]
    return {
        "verdict": found.verdict,
        "reason": found.reason,
        "not_checked": [*found.not_checked, *few],
        "fault": found.fault,
        "compared": evidence.compared,
        "replicas": None if found.split is None else found.split.shown(),
        "weights": evidence.models.weights,
        "servers": servers_seen([each.told for each in evidence.answers.responses]),
    }


def _with_weights(found: RuleFinding, weights: str) -> RuleFinding:
    """Finding of a rule, with the served weights on which it was made in its reason."""
    known = "" if weights in found.reason else f" (compared on the weights of {weights})"
    return found._replace(reason=f"{found.reason}{known}")


def _unseen(case: Case) -> Iterator[str]:
    """Yield what the answers cannot show, in words."""
    if case.greedy is None:
        yield "generated texts: the server does not tell which tokens it generates"
    if case.is_one_model:
        yield ONE_MODEL
    if case.mixed and OTHER not in case.mixed:
        yield "requests for two adapters at the same time: the server has no other adapter"
    if case.evidence.answers.without_template:
        yield f"the chat template: the option {case.option('without_template')} leaves it out"
    yield from unseen_servers(case)


def _named_by_chats(found: RuleFinding, chats: Sequence[ReadChat] | None) -> RuleFinding:
    """Finding of a rule, with the chat template as the fault if the server reads most chats as other tokens."""
    others = [each for each in chats or () if not each.is_same]
    if found.verdict != "differs" or found.fault not in (None, *OF_PROMPTS) or 2 * len(others) <= len(chats or ()):
        return found
    reason = (
        f"{TEMPLATE}: in {len(others)} of {len(chats or ())} chats the server reads other tokens than the adapter's "
        f"template gives, in one of them {others[0].read} in place of {others[0].expected}"
    )
    return found._replace(reason=reason, fault=TEMPLATE)


def _with_template(found: RuleFinding, template: TemplateReading | None, option: Callable[[str], str]) -> RuleFinding:
    """Finding of a rule, with the server's chat template in its reason, or as the fault if it has no other."""
    if template is None:
        return found
    found = found.with_unchecked(*template.unseen)
    if template.is_unclear and found.verdict != "as trained":
        return found.with_unchecked(template.words)
    if not template.is_other and not template.is_unclear:
        return found
    if found.verdict == "differs":
        return found._replace(reason=f"{found.reason}, and besides, {TEMPLATE}: {template.words}")
    if found.verdict != "as trained":
        found = found.with_unchecked(f"the adapter: {found.reason}")
    alone = (
        f"while answers to prompts that no template touches are {found.verdict} (judge them alone with "
        f"{option('without_template')})"
    )
    if template.is_unclear:
        return found._replace(verdict="inconclusive", reason=f"{template.words}, {alone}")
    return found._replace(verdict="differs", reason=f"{TEMPLATE}: {template.words}, {alone}", fault=TEMPLATE)


ALIKE = "other faults that would give the same answers"
"""Thing that is not known of a fault, with the other faults."""

ONE_MODEL = (
    "answers without the adapter, and requests for both models at the same time: the server has one model under both "
    "names"
)
"""Things that a server without a base model does not show."""

FURTHER_THAN_ADAPTED = (
    "answers to requests for the base model are further from the right ones than the adapter's, so another model gives "
    "them"
)
"""Sentence on a base model that is not that of the adapter, whose answers are nearer to the right ones."""

FURTHER_THAN_4_BITS = "further from the right ones than rounding to 4 bits explains"
"""Words on answers of a base model that no number format explains."""

OF_PROMPTS = (TEMPERATURE, PENALTY, POSITIONS, WINDOW, BASE_LAYERS, OTHER_BASE, BASE_OR_TEMPLATE, UNLIKE)
"""Faults of the base model that can also be prompts that the server changed."""


def base_is_faulty(case: Case) -> RuleFinding | None:
    """Rule for a base model whose error points in the direction of a fault."""
    found = find_base_fault(case)
    if found is None:
        return None
    reason = (
        f"{found.fault}: {found.detail}, which explains {in_percent(found.share)} of the distance of the base model's "
        "answers from the right ones"
    )
    return RuleFinding("differs", reason, found.fault, explains_base=True)


def base_is_another(case: Case) -> RuleFinding | None:
    """The base model is further off than any number format explains; with one model alone, the adapter may be wrong."""
    if case.number_format is not None:
        return None
    if case.has_other_weights:
        return RuleFinding("inconclusive", _of_other_weights(case))
    if case.is_one_model:
        return _nearest(case, f"the answers are {FURTHER_THAN_4_BITS}")
    fault = OTHER_BASE if case.evidence.answers.chats is None else BASE_OR_TEMPLATE
    reason = f"{fault}: even without the adapter, the answers are {FURTHER_THAN_4_BITS}"
    return RuleFinding("differs", reason, fault)


def _of_other_weights(case: Case) -> str:
    """Reason why a server cannot be judged by a reference on quantised weights that it does not have."""
    return (
        f"the server has other weights than the recorded ones ({case.evidence.models.weights}): record the adapter on "
        f"the server's weights, with {case.option('base_weights')}"
    )


def base_is_unlike(case: Case) -> RuleFinding | None:
    """The adapter's answers are nearer to PyTorch's than noise as large as the base model's allows."""
    if not case.is_nearer():
        return None
    return RuleFinding("differs", f"{UNLIKE}: {FURTHER_THAN_ADAPTED}", UNLIKE)


def adapter_is_intermittent(case: Case) -> RuleFinding | None:
    """Some of the adapter's answers are wrong, and others are not."""
    split = some_are_base(case) or some_disagree(case)
    return None if split is None else RuleFinding("differs", split.reason, split.fault, split=split)


def adapter_is_beyond(case: Case) -> RuleFinding | None:
    """The strength or the distance is not that of a right adapter."""
    found, (low, high) = case.strength, case.allowed
    if case.effect > 0 and (found.low > high or found.high < low):
        return _nearest(case, found.beside(case.allowed))
    return _nearest(case, too_far(case)) if case.is_further() else None


def too_far(case: Case) -> str:
    """Sentence on answers that are further off than noise explains."""
    return f"its answers are {case.times_off:.2g} times as far from the right ones as noise explains"


def _nearest(case: Case, found: str) -> RuleFinding:
    """The nearest fault, if one explains what was found."""
    compared = suspects(case)
    nearest = compared[0]
    if not nearest.explains:
        reason = f"{found}, and no known fault explains it: "
        if case.is_one_model:
            reason += (
                "the server has one model under both names, which may be another base model, or have several adapters "
                f"at once (llama-server answers for each alone with {case.option('protocol')} llama-server)"
            )
        else:
            reason += "another adapter may be served; verify can name it if its folder is beside this one"
        return RuleFinding("differs", reason, None, compared)
    others = [each.detail for each in compared[1:] if each.explains]
    reason = f"{nearest.fault}: {nearest.detail}, so that {found}"
    also = [f"{ALIKE}: {', '.join(others)}"] if others else []
    return RuleFinding("differs", reason, nearest.fault, compared, not_checked=also)


def some_are_far(case: Case) -> RuleFinding | None:
    """The answers to some prompts are far off. No fault of the adapter is searched for: it would change all answers."""
    far = case.far(case.off)
    if len(far) < FEW_AS_BASE:
        return None
    reason = (
        f"the answers to {len(far)} of {case.prompts} prompts are wrong, and the others are right: some requests do "
        "not get the adapter as it was trained; check again, and look for what these prompts have in common"
    )
    return RuleFinding("differs", reason)


def generated_is_wrong(case: Case) -> RuleFinding | None:
    """Greedy answers, which are computed by the engine's cache, contradict the logprobs."""
    greedy = case.greedy
    if greedy is None:
        return None
    as_base, others = split_base(case.evidence.decoded())
    if len(as_base) >= FEW_AS_BASE:
        clear = len(as_base) + len(others)
        reason = f"{len(as_base)} of {clear} generated tokens have the base model's logprobs, and prompts the adapter's"
        return RuleFinding("differs", f"{DECODED}: {reason}", DECODED)
    if greedy.gap > greedy.allowed:
        reason = "the engine generates tokens that its own logprobs make unlikely"
        if greedy.as_base >= FEW_AS_BASE:
            whose = f"in {greedy.as_base} answers those of the base model"
            return RuleFinding("differs", f"{DECODED}: {reason}, {whose}", DECODED)
        return RuleFinding("differs", reason)
    answers = len(case.generated)
    if greedy.early * answers >= min(FEW_AS_BASE, answers):
        reason = f"{in_percent(greedy.early)} of the generated answers stop before PyTorch's, without an end token"
        return RuleFinding("differs", f"{ENDS_EARLY}: {reason}", ENDS_EARLY)
    return None


def mixed_is_wrong(case: Case) -> RuleFinding | None:
    """Answers change if requests for another model are computed in the same batch.

    vLLM 0.32 on a CPU computes a batch's rows for the base model with the weights of an adapter, if another row asks
    for one, and reports nothing. Batches of two adapters are compared as well, if the server has a second one.
    """
    subjects = {
        BASE: (LEAKS, "requests for the base model, sent together with requests for the adapter, are"),
        ADAPTER: (CHANGED, "sent together with requests for the base model, they are"),
        OTHER: (CHANGED_BY_OTHER, "sent together with requests for the other adapter, they are"),
    }
    for name, (fault, subject) in subjects.items():
        if name in case.mixed and case.is_apart(name):
            reason = (
                f"{fault}: {subject} answered wrongly, while requests for one model at a time are answered right: send "
                f"requests for one model at a time, and judge only these with {case.option('without_mixed')}"
            )
            return RuleFinding("differs", reason, fault)
    return None


def left_out(option: Callable[[str], str]) -> str:
    """Reason why no requests were sent together: the user wanted none.

    Args:
        option: Name of an option as its user writes it.
    """
    return f"the option {option('without_mixed')} leaves them out"


def some_are_silent(case: Case) -> RuleFinding | None:
    """So many responses cannot be judged that a wrong server with this share of them could hide among them."""
    found = (each for each in some_say_nothing(case.evidence.answers.responses) if each.is_found)
    split = max(found, key=lambda each: len(each.bad), default=None)
    return None if split is None else RuleFinding("inconclusive", split.reason, split.fault, split=split)


def few_are_compared(case: Case) -> RuleFinding | None:
    """Most prompts cannot be compared: the server accepts no form of them, or its models return no common token."""
    asked = len(case.evidence.models.questions)
    if case.prompts >= FEW_PROMPTS or 2 * case.prompts >= asked:
        return None
    reason = (
        f"the answers to {case.prompts} of {asked} prompts could be compared, but "
        f"{min(FEW_PROMPTS, math.ceil(asked / 2))} are needed: start the server so that it takes token ids and lists "
        "20 logprobs (vLLM: --max-logprobs 20)"
    )
    return RuleFinding("inconclusive", reason)


def weights_are_other(case: Case) -> RuleFinding | None:
    """The base model is coarser than was declared, beside quantised weights: its own were quantised otherwise."""
    assert case.weights_format is not None
    is_declared = NUMBER_FORMATS.index(case.weights_format) <= NUMBER_FORMATS.index(case.served_format)
    if is_declared or not case.has_other_weights:
        return None
    return RuleFinding("inconclusive", _of_other_weights(case))


def strength_is_unclear(case: Case) -> RuleFinding | None:
    """The interval of the strength is wide, or the adapter changes too little to be seen."""
    if case.effect > FLOOR and is_narrow(case.strength, case.allowed):
        return None
    reason = passes_as_well(case)
    if case.prompts < ENOUGH_PROMPTS:
        reason += f": give {ENOUGH_PROMPTS} prompts or more, in place of {case.prompts}"
    elif case.number_format not in PLAIN and case.evidence.models.weights is None:
        reason += f": record the adapter on the weights that the server has, with {case.option('base_weights')}"
    return RuleFinding("inconclusive", reason)


def passes_as_well(case: Case) -> str:
    """Sentence on an interval of the strength that is wide."""
    seen, passes = case.strength, "so a wrong adapter would pass as well"
    if case.effect <= FLOOR:
        return f"the adapter changes these answers too little to be seen, {passes}"
    if math.isfinite(seen.half):
        return f"anything from {in_percent(seen.low, seen.high)} of the adapter may be applied, {passes}"
    return f"these answers do not show how much of the adapter is applied, {passes}"


def is_narrow(found: Interval, allowed: tuple[float, float]) -> bool:
    """Whether interval and allowed strengths are so narrow that a strength that is off by SEEN would be seen."""
    return found.half + (allowed[1] - allowed[0]) / 2 < SEEN


def format_is_undeclared(case: Case) -> RuleFinding | None:
    """The base model is coarser than was declared, so that it may be another model."""
    assert case.weights_format is not None
    models, rank = case.evidence.models, NUMBER_FORMATS.index
    if rank(case.weights_format) <= rank(case.served_format):
        known = max(case.served_format, models.finest or case.served_format, key=rank)
        if models.coarseness is None or rank(models.coarseness) <= rank(known):
            return None
        reason = (
            f"{case.strength.plainly}, but the server's base model has the weights of {models.weights}, which are "
            f"coarser than {known}: if it is to be served in {models.coarseness}, say so with "
            f"{case.option('served_format')}"
        )
        return RuleFinding("inconclusive", reason)
    reason = (
        f"{case.strength.plainly}, but the base model answers as if it were rounded to {case.number_format}, or were "
        f"another model: if it is served in {case.number_format}, say so with {case.option('served_format')} "
        f"{case.number_format}"
    )
    return RuleFinding("inconclusive", reason)


def mixed_is_missing(case: Case) -> RuleFinding | None:
    """Mixed batches were asked for, and not answered: all else is right."""
    if case.evidence.answers.mixed_failure is None:
        return None
    reason = (
        f"{case.strength.plainly}, but requests for both models at the same time were not answered: judge only the "
        f"other answers with {case.option('without_mixed')}"
    )
    return RuleFinding("inconclusive", reason)


def as_trained(case: Case) -> RuleFinding:
    """No rule found anything."""
    return RuleFinding("as trained", all_is_right(case))


def all_is_right(case: Case) -> str:
    """Sentence on a server of which no rule found anything."""
    coarse = f", with a {COARSE_CACHE}" if case.cache_share else ""
    return f"{case.strength.plainly}, and nothing else differs{coarse}"


RULES: tuple[Callable[[Case], RuleFinding | None], ...] = (
    base_is_faulty,
    base_is_another,
    base_is_unlike,
    adapter_is_intermittent,
    adapter_is_beyond,
    some_are_far,
    generated_is_wrong,
    mixed_is_wrong,
    some_are_silent,
    few_are_compared,
    weights_are_other,
    strength_is_unclear,
    format_is_undeclared,
    mixed_is_missing,
    as_trained,
)
"""The rules in their order; the last always finds something."""


def quick(case: Case) -> RuleFinding:
    """Whether the adapter is applied at all, by a few answers of the adapter alone."""
    as_base, others = split_base(case.answers)
    if len(as_base) >= FEW_AS_BASE:
        split = Split(NOT_APPLIED, "are the base model's", sources(as_base), sources(others))
        return RuleFinding("differs", split.reason, split.fault, split=split)
    if (silent := some_are_silent(case)) is not None:
        return silent
    clear = len(as_base) + len(others)
    if clear < FEW_AS_BASE or case.effect <= FLOOR:
        reason = (
            f"too few answers show whether the adapter is applied ({clear}, and {FEW_AS_BASE} are needed): check "
            f"without {case.option('quick')}"
        )
        return RuleFinding("inconclusive", reason)
    found = RuleFinding("as trained", f"the adapter is applied: {len(others)} of {clear} answers show it")
    if as_base:
        found = found.with_unchecked(
            f"answers of the base model in place of the adapter's: {len(as_base)} of {clear}, which may be chance"
        )
    return found.with_unchecked("other faults than a missing adapter: a full check shows them")
