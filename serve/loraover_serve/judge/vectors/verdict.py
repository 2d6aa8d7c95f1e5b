"""The verdict on a server of vectors, classes or scores: the first rule that finds something decides.

1. Classes have other names, answers have too many or too few numbers, or their probabilities hide the logits. Another
   way to compute both models, such as another pooling, explains them: this fault is named, with the strength of the
   adapter in it.
2. Requests for the base model are answered with the adapter, or by another model.
3. Some answers are the base model's, or answers to one text disagree.
4. The adapter's strength, or its distance, is beyond what is allowed: the nearest fault of an adapter is searched for.
5. The answers to a few texts are far off; or those to requests for both models that are sent together.
6. *As trained* if the interval of the strength is narrow, and the number format is one that was asked for.

Strength, excess, noise and the search for faults are defined as for answers with logprobs (`case`, `search`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from loraover.common.errors import printable
from loraover_serve.judge.case import Case, flag, share_along, strength_along
from loraover_serve.judge.estimates import in_percent, share_found
from loraover_serve.judge.evidence import by_prompt
from loraover_serve.judge.fleet import servers_seen, some_are_base, some_disagree, unseen_servers
from loraover_serve.judge.limits import (
    ADAPTER,
    BASE,
    CERTAIN,
    ENOUGH_PROMPTS,
    EXPLAINED,
    FEW_AS_BASE,
    FLOOR,
    NUMBER_FORMATS,
)
from loraover_serve.judge.names import CHANGED, CUT, DIMENSION, ENCODING, IN_BASE, LABELS, LEAKS, OTHER_BASE, UNLIKE
from loraover_serve.judge.rules import (
    FURTHER_THAN_4_BITS,
    FURTHER_THAN_ADAPTED,
    ONE_MODEL,
    RuleFinding,
    all_is_right,
    is_narrow,
    left_out,
    passes_as_well,
    quick,
    too_far,
)
from loraover_serve.judge.search import suspects
from loraover_serve.judge.vectors.asking import LABEL_CHARACTERS, VectorAnswers
from loraover_serve.judge.vectors.reading import LIKE, AnswerReader, find_setting, is_clear
from loraover_serve.judge.vectors.reference import SIZE, Vector, VectorReference, VectorSetting

CUT_SHARE, CUT_TIMES = 0.02, 5.0
"""Smallest distance of answers to texts that are cut off: as a share of their size, and in distances of the others."""


class VectorCase(NamedTuple):
    """Answers of a server and the models, with the estimates that the rules need.

    Args:
        reference: The reference.
        answers: The answers.
        rows: Answers of both arms to each text, in the units of the reference.
        case: The answers compared with the right models.
        setting: Setting that explains the answers, and the answers compared with its models; None if it is the right
            one.
        served_format: Coarsest number format in which the server may hold the base model.
    """

    reference: VectorReference
    answers: VectorAnswers
    rows: Mapping[str, Mapping[int, Vector]]
    case: Case
    setting: tuple[VectorSetting, Case] | None
    served_format: str


def judge_vectors(
    reference: VectorReference,
    answers: VectorAnswers,
    served_format: str = "bf16",
    option: Callable[[str], str] = flag,
    *,
    is_quick: bool = False,
) -> dict[str, Any]:
    """The verdict on a server, and what was measured; the arguments are those of `judge`.

    Returns:
        The fields of a result in verify.json, but for those that say who was judged and how long it took.
    """
    read = AnswerReader(reference, answers)
    headers = [told for one in answers.rounds for _, told in one.values()]
    known = {"compared": "vectors", "servers": servers_seen(headers)}
    unread = _of_other_names(reference, answers) or _of_another_size(read) or _of_sure_classes(read)
    if unread is not None:
        return known | _told(unread) | {"vectors": read.findings(None)}
    case = Case(read.evidence(reference.right), served_format, option)
    if is_quick:
        return known | _told(quick(case)) | {"vectors": read.findings(case)}
    whole = VectorCase(reference, answers, read.rows, case, find_setting(read, case), served_format)
    found = next(finding for rule in VECTOR_RULES if (finding := rule(whole)) is not None)
    if not case.mixed and not case.is_one_model and not answers.is_here:
        found = found.with_unchecked(f"requests for both models at the same time: {left_out(option)}")
    if found.verdict != "differs":
        found = found.with_unchecked(*unseen_servers(case))
    strength = (whole.setting[1] if whole.setting else case).strength
    return (
        known
        | _told(found)
        | {
            "strength": strength if math.isfinite(strength.half) and case.effect > 0 else None,
            "allowed_strength": case.allowed,
            "number_format": case.number_format,
            "visible_share": share_found(sum(map(len, case.as_base))),
            "vectors": read.findings(case, whole.setting, found.suspects),
        }
    )


def _told(found: RuleFinding) -> dict[str, Any]:
    split, unseen = None if found.split is None else found.split.shown(), [*found.not_checked]
    named = {"verdict": found.verdict, "reason": found.reason, "fault": found.fault}
    return named | {"not_checked": unseen, "replicas": split}


def _of_other_names(reference: VectorReference, answers: VectorAnswers) -> RuleFinding | None:
    """Say that the classes have other names than the recorded ones."""
    named = next((said.names for _, _, said in answers.every() if said.names), None)
    if named is None:
        return None
    mine = ", ".join(reference.labels)
    reason = f"{LABELS}: the server names the classes {', '.join(named):.200}, expected {mine:.200}"
    return RuleFinding("differs", reason, LABELS)


def _of_sure_classes(read: AnswerReader) -> RuleFinding | None:
    """Say that probabilities do not tell the logits."""
    if not read.hides_logits:
        return None
    reason = "the server answers with probabilities, and probabilities of 0 or 1 hide the logits"
    return RuleFinding("inconclusive", f"{reason}: let it answer with logits, or record texts of less certain classes")


def _of_another_size(read: AnswerReader) -> RuleFinding | None:
    """Say that answers have another number of components, and if it is smaller, whether they are the first ones."""
    if not read.wrong_sizes:
        return None
    reference, size, right = read.reference, read.size or 0, read.reference.numbers
    if reference.task == "token_classify":
        (wrong, right), classes = read.wrong_sizes[0], len(reference.labels)
        some = f"{len(read.wrong_sizes)} of {len(read.sizes)} answers have classes of other tokens than recorded"
        tokens = f"{wrong / classes:.4g} tokens, expected {right // classes}"
        reason = f"{DIMENSION}: {some}, such as {tokens}, so the server cuts inputs, or omits special tokens"
        return RuleFinding("differs", reason, DIMENSION)
    if not size:
        found = " or ".join(map(str, sorted({wrong for wrong, _ in read.wrong_sizes})))
        some = f"{len(read.wrong_sizes)} of {len(read.sizes)} answers have {found:.60} numbers, expected {right}"
        return RuleFinding("differs", f"{DIMENSION}: {some}, so another model gives them", DIMENSION)
    what = "a vector" if reference.task == "embed" else "an answer"
    if reference.task != "embed" or size > right:
        reason = f"{DIMENSION}: {what} has {size} numbers, expected {right}"
        return RuleFinding("differs", f"{reason}, so the server has another model, or another head", DIMENSION)
    short = VectorSetting(DIMENSION, f"the first {size} of {right} numbers", reference.right.rows, dimensions=size)
    case = Case(read.evidence(short))
    reason = f"{DIMENSION}: a vector has {size} numbers, expected {right}"
    if case.number_format is None:
        return RuleFinding("differs", f"{reason}, and they are not the first {size} of the right ones", DIMENSION)
    return RuleFinding(
        "differs", f"{reason}, which are the first of the right ones, and {case.strength.plainly}", DIMENSION
    )


def numbers_differ(whole: VectorCase) -> RuleFinding | None:
    """Vectors in base64 differ from those in numbers by more than two answers to one text do."""
    for numbers, encoded in whole.answers.encoded:
        size = math.hypot(*numbers) / SIZE
        noise = CERTAIN * math.sqrt(2) * (whole.case.noise.rms + FLOOR)
        if len(numbers) != len(encoded) or math.dist(numbers, encoded) > noise * size:
            reason = f"{ENCODING} than those of the same text in a list of numbers"
            return RuleFinding("differs", reason, ENCODING)
    return None


def setting_is_another(whole: VectorCase) -> RuleFinding | None:
    """Both models are computed in another way than was recorded."""
    if whole.setting is None:
        return None
    setting, case = whole.setting
    reason = f"{setting.fault}: {setting.detail}, and in this setting, {case.strength.plainly}"
    return RuleFinding("differs", reason, setting.fault)


def input_is_cut(whole: VectorCase) -> RuleFinding | None:
    """Answers to all texts of some length or more are far off, and those to shorter texts are not."""
    case, questions = whole.case, whole.reference.questions
    off = by_prompt(case.off if case.is_one_model else case.evidence.off(BASE, case.evidence.base))
    ordered = sorted(off, key=lambda place: questions[place].tokens)
    for at in range(FEW_AS_BASE, len(ordered) - FEW_AS_BASE + 1):
        near, far = ordered[:at], ordered[at:]
        short, long = questions[near[-1]].tokens, questions[far[0]].tokens
        most, least = max(off[place] for place in near), min(off[place] for place in far)
        if short < long and least > CUT_SHARE * SIZE and least > CUT_TIMES * most:
            reason = (
                f"answers to texts of {long} tokens or more are wrong, and answers to texts of up to {short} tokens "
                "are right"
            )
            return RuleFinding("differs", f"{CUT}: {reason}, so raise the server's maximum length", CUT)
    return None


def labels_are_others(whole: VectorCase) -> RuleFinding | None:
    """The server gives the likeliest class another name than the recorded one."""
    labels = whole.reference.labels
    for place, said in whole.answers.adapter.items():
        mine = labels[max(range(len(labels)), key=said.numbers.__getitem__)] if labels else None
        if said.label is not None and mine is not None and said.label != printable(mine)[:LABEL_CHARACTERS]:
            text = whole.reference.questions[place].text
            reason = (
                f"{LABELS}: the likeliest class of {text!r:.60} is {mine}, and the server calls it {said.label!r:.60}"
            )
            return RuleFinding("differs", reason, LABELS)
    return None


def base_is_wrong(whole: VectorCase) -> RuleFinding | None:
    """Requests for the base model are answered by the adapter, or by another model."""
    case = whole.case
    if case.is_one_model:
        return None
    along = case.evidence.base_changes(case.evidence.adapter)
    way = strength_along(along)
    if abs(way.value - 1) <= LIKE and share_along(along, way) >= EXPLAINED and is_clear(way):
        reason = f"requests for the base model are answered with {in_percent(way.value)} of the adapter"
        return RuleFinding("differs", f"{IN_BASE}: {reason}", IN_BASE)
    if case.number_format is None:
        reason = f"even without the adapter, the answers are {FURTHER_THAN_4_BITS}"
        return RuleFinding("differs", f"{OTHER_BASE}: {reason}", OTHER_BASE)
    if case.is_nearer():
        return RuleFinding("differs", f"{UNLIKE}: {FURTHER_THAN_ADAPTED}", UNLIKE)
    return None


def some_are_others(whole: VectorCase) -> RuleFinding | None:
    """Some of the adapter's answers are the base model's, or those to one text disagree."""
    split = some_are_base(whole.case)
    if split is None and (other := some_disagree(whole.case)) is not None:
        split = other._replace(words="differ from other answers to the same text")
    return None if split is None else RuleFinding("differs", split.reason, split.fault, split=split)


def adapter_is_wrong(whole: VectorCase) -> RuleFinding | None:
    """The strength or the distance is not that of a right adapter."""
    case, (low, high) = whole.case, whole.case.allowed
    is_off = case.effect > 0 and (case.strength.low > high or case.strength.high < low)
    if not is_off and not case.is_further():
        return None
    found = case.strength.beside(case.allowed) if is_off else too_far(case)
    compared = suspects(case)
    nearest = compared[0]
    if not nearest.explains:
        reason = f"{found}, and no known fault explains it, so another adapter may be served"
        return RuleFinding("differs", reason, None, compared)
    return RuleFinding("differs", f"{nearest.fault}: {nearest.detail}, so that {found}", nearest.fault, compared)


def some_texts_are_far(whole: VectorCase) -> RuleFinding | None:
    """The answers to a few texts are far off."""
    far = whole.case.far(whole.case.off)
    if len(far) < FEW_AS_BASE:
        return None
    text = whole.reference.questions[far[0]].text
    reason = f"the answers to {len(far)} texts are wrong, such as the answer to {text!r:.60}, and the others are right"
    return RuleFinding("differs", reason, None)


def strength_is_wide(whole: VectorCase) -> RuleFinding | None:
    """The interval of the strength is wide, or the adapter changes too little to be seen."""
    case = whole.case
    if case.effect > FLOOR and is_narrow(case.strength, case.allowed):
        return None
    reason = passes_as_well(case)
    if case.prompts < ENOUGH_PROMPTS:
        reason += f": record {ENOUGH_PROMPTS} texts or more, in place of {case.prompts}"
    return RuleFinding("inconclusive", reason)


def mixed_differ(whole: VectorCase) -> RuleFinding | None:
    """Answers of one model change while the other one is asked as well."""
    case = whole.case
    for arm, fault in ((BASE, LEAKS), (ADAPTER, CHANGED)):
        if arm in case.mixed and case.is_apart(arm):
            reason = (
                f"{fault}: these answers differ from those sent alone, while requests for one model at a time are "
                f"answered right: send requests for one model at a time, and judge only these with "
                f"{case.option('without_mixed')}"
            )
            return RuleFinding("differs", reason, fault)
    return None


def format_is_coarse(whole: VectorCase) -> RuleFinding | None:
    """The base model is coarser than was declared."""
    case = whole.case
    found = case.number_format or NUMBER_FORMATS[-1]
    if NUMBER_FORMATS.index(found) <= NUMBER_FORMATS.index(whole.served_format):
        return None
    reason = (
        f"{case.strength.plainly}, but the base model answers as if it were rounded to {found}, were another model, or "
        f"read other inputs (such as inputs with a prefix): if it is served in {found}, say so with "
        f"{case.option('served_format')} {found}"
    )
    return RuleFinding("inconclusive", reason)


def vectors_are_right(whole: VectorCase) -> RuleFinding:
    """No rule found anything."""
    case = whole.case
    return RuleFinding("as trained", all_is_right(case), not_checked=[ONE_MODEL] if case.is_one_model else [])


VECTOR_RULES: tuple[Callable[[VectorCase], RuleFinding | None], ...] = (
    setting_is_another,
    input_is_cut,
    labels_are_others,
    base_is_wrong,
    some_are_others,
    adapter_is_wrong,
    some_texts_are_far,
    numbers_differ,
    mixed_differ,
    format_is_coarse,
    strength_is_wide,
    vectors_are_right,
)
"""The rules in their order; the last always finds something."""
