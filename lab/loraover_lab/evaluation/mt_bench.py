"""MT-Bench: eighty conversations of two turns, rated by another model with FastChat's prompts.

Source: Zheng et al. 2023, arXiv:2306.05685. Departure: answers are greedy, where FastChat samples in some categories.
Without a chat template, questions are put into Alpaca's prompt (Taori et al. 2023), with which the recipes train.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraover.client.at_once import at_once
from loraover.common.errors import ConfigError, DataError, EngineError
from loraover.common.paths import kind_of
from loraover.data.formats import ALPACA, ALPACA_TURN
from loraover_lab.evaluation.base import (
    IN_CHAT_TEMPLATE,
    Example,
    Keep,
    Questions,
    Row,
    Task,
    TaskScores,
    read_questions,
    text_field,
    uses_chat,
)

if TYPE_CHECKING:
    from loraover.client.endpoint import Endpoint
    from loraover_lab.evaluation.request import EvaluationRequest
    from loraover_lab.evaluation.subjects import Answerer, Chat

TRIES = 3
RETRY_TEMPERATURE = 0.7  # at temperature 0 a grader would repeat itself
MAX_TOKENS = 2048
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
# FastChat's second choice is any "[7]", even in code that the grader quotes
_LOOSE_RATING = re.compile(r"rating\W*\[(\d+(?:\.\d+)?)\]", re.IGNORECASE)


@dataclass(frozen=True)
class Rating:
    """A grader's reply: its rating from 1 to 10, or none, and its text, or why there is none."""

    rating: float | None
    text: str


@dataclass(frozen=True)
class Grader:
    """A model that rates answers."""

    endpoint: Endpoint
    name: str

    def rate(self, system_prompt: str, prompt: str) -> Rating:
        """Ask until there is a rating, `TRIES` times at most; an EngineError if the server refuses every request."""
        from loraover.client.endpoint import UnansweredError, UnfitRequestError  # http, which no help needs

        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": prompt}]
        reply = ""
        for attempt in range(TRIES):
            temperature = RETRY_TEMPERATURE if attempt else 0.0
            try:
                reply = self.endpoint.chat(self.name, messages, max_tokens=MAX_TOKENS, temperature=temperature)
            except (UnansweredError, UnfitRequestError) as error:
                return Rating(None, str(error))  # the endpoint has repeated the request where that may help
            rating = find_rating(reply)
            if rating is not None:
                return Rating(rating, reply)
        return Rating(None, reply)


def find_rating(text: str) -> float | None:
    """Read the first "[[7]]", or else the first "Rating: [7]"; None if there is none from 1 to 10."""
    found = _RATING.search(text) or _LOOSE_RATING.search(text)
    if found is None or not 1 <= float(found[1]) <= 10:
        return None
    return float(found[1])


QUESTIONS, PROMPTS = "question.jsonl", "judge_prompts.jsonl"
REFERENCES = ("reference_answer/gpt-4.jsonl", "reference_answer_gpt-4.jsonl")
WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")  # FastChat's NEED_REF_CATS
PROMPT_NAMES = {  # by whether there is a reference, and by turn
    (False, 0): "single-v1",
    (True, 0): "single-math-v1",
    (False, 1): "single-v1-multi-turn",
    (True, 1): "single-math-v1-multi-turn",
}
REQUESTS_AT_A_TIME = 4


@dataclass(frozen=True)
class MtBench(Task):
    """Mean rating, 1 to 10, by another model: the grader, which users know as the judge."""

    is_right_or_wrong: bool = False
    max_new_tokens: int = 1024

    def check(self, request: EvaluationRequest) -> None:
        if request.data is None or kind_of(request.data) != "folder":
            raise ConfigError(
                f"mtbench needs {request.named('data', 'FOLDER')} with {QUESTIONS}, {PROMPTS} and {REFERENCES[0]}, as "
                "in fastchat/llm_judge/data of github.com/lm-sys/FastChat."
            )
        if request.judge_url is None:
            options = f"{request.named('judge_url')} and {request.named('judge_model')}"
            raise ConfigError(f"mtbench needs a judge: {options}.")
        grader_of(request)

    def read(self, request: EvaluationRequest) -> Questions:
        folder = Path(str(request.data))
        prompts = {row["name"]: row for row in _rows(folder / PROMPTS, _prompt)}
        lacking = [name for name in PROMPT_NAMES.values() if name not in prompts]
        if lacking:
            raise DataError(f"{folder / PROMPTS}: has no prompt named {lacking[0]!r}.")
        file = next((folder / name for name in REFERENCES if (folder / name).is_file()), folder / REFERENCES[0])
        references = {row["question_id"]: row["turns"] for row in _rows(file, _reference)}
        found = read_questions(str(folder / QUESTIONS), _question, split="test", limit=request.limit)
        for row in found.rows:
            row["references"] = None
            if row["category"] in WITH_REFERENCE:
                if row["question_id"] not in references:
                    raise DataError(f"{file}: has no answer to question {row['question_id']}.")
                row["references"] = references[row["question_id"]]
            row["prompts"] = [prompts[PROMPT_NAMES[row["references"] is not None, turn]] for turn in (0, 1)]
        return found

    def measure(self, subject: Answerer, questions: Questions, request: EvaluationRequest, keep: Keep) -> TaskScores:
        chats: list[Chat] = [[] for _ in questions.rows]
        for turn in (0, 1):
            for chat, row in zip(chats, questions.rows, strict=True):
                chat.append({"role": "user", "content": row["turns"][turn]})
            answers = _answers(subject, chats, request, request.new_tokens or self.max_new_tokens)
            for chat, answer in zip(chats, answers, strict=True):
                chat.append({"role": "assistant", "content": answer})
        texts = [message["content"] for chat in chats for message in chat[1::2]]
        answered = [Example(name, None, text) for name, text in zip(_names(questions), texts, strict=True)]
        keep(answered)
        return self.rate(answered, questions, request)

    def rate(self, answered: list[Example], questions: Questions, request: EvaluationRequest) -> TaskScores:
        grader = grader_of(request)
        if [example.id for example in answered] != _names(questions):
            raise DataError("the answers in the file belong to other questions; name a new file.")
        texts = [example.answer for example in answered]
        asked = [
            (row, turn, [first, second])
            for row, first, second in zip(questions.rows, texts[::2], texts[1::2], strict=True)
            for turn in (0, 1)
        ]
        lacking = [i for i, example in enumerate(answered) if example.score is None]
        with request.report.task("ratings", len(lacking)) as advance:
            verdicts = at_once(lambda i: _rate(grader, *asked[i]), lacking, REQUESTS_AT_A_TIME, advance)
        examples = list(answered)
        for i, verdict in zip(lacking, verdicts, strict=True):
            examples[i] = replace(answered[i], score=verdict.rating, note=verdict.text)
        if all(example.score is None for example in examples):
            first = f"its reply to the first one: {verdicts[0].text:.500}"
            raise EngineError(f"judge {grader.name} at {grader.endpoint.api}: rated none of the answers; {first}")
        parts = {"rating": examples, "turn 1": examples[::2], "turn 2": examples[1::2]}
        rated = {name: [e.score for e in part if e.score is not None] for name, part in parts.items()}
        return TaskScores({name: sum(each) / len(each) for name, each in rated.items() if each}, examples)

    def settings(self, request: EvaluationRequest, tokenizer: Any) -> dict[str, str]:
        grader = grader_of(request)
        return {
            "prompt": IN_CHAT_TEMPLATE if uses_chat(request, tokenizer) else "Alpaca's",
            "judge": f"{grader.name} at {grader.endpoint.api}",
            "note": "ratings of different judges cannot be compared",
        }


def grader_of(request: EvaluationRequest) -> Grader:
    """Return the grader that an evaluation asks for."""
    from loraover.client.endpoint import Endpoint

    return Grader(Endpoint(str(request.judge_url), request.judge_key_variable), str(request.judge_model))


def _names(questions: Questions) -> list[str]:
    """Name of each answer, in order."""
    return [f"{row['question_id']}, turn {turn}" for row in questions.rows for turn in (1, 2)]


def _answers(subject: Answerer, chats: list[Chat], request: EvaluationRequest, max_new_tokens: int) -> list[str]:
    """Answer the last question of each conversation."""
    if uses_chat(request, subject.tokenizer):
        return [text.strip() for text in subject.answers(chats, max_new_tokens=max_new_tokens, report=request.report)]
    prompts = []
    for chat in chats:
        first, *later = [message["content"] for message in chat]
        turns = zip(later[::2], later[1::2], strict=True)
        prompts.append(ALPACA.format(first) + "".join(f"{a}\n\n{ALPACA_TURN.format(q)}" for a, q in turns))
    stop = ALPACA_TURN.partition("\n")[0]
    answers = subject.answers(prompts, max_new_tokens=max_new_tokens, stop=(stop,), report=request.report)
    return [answer.partition(stop)[0].strip() for answer in answers]


def _rate(grader: Grader, row: Row, turn: int, answers: list[str]) -> Rating:
    prompt, turns = row["prompts"][turn], row["turns"]
    values = {
        "question": turns[0],
        "answer": answers[0],
        **{f"question_{i + 1}": turns[i] for i in (0, 1)},
        **{f"answer_{i + 1}": answers[i] for i in (0, 1)},
        **{f"ref_answer_{i + 1}": text for i, text in enumerate(row["references"] or ())},
    }
    return grader.rate(prompt["system_prompt"], fill(prompt["prompt_template"], values))


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace the {names} in a template; braces in the values, as in code, stay as they are."""
    return template.format_map(values)


def _rows(path: Path, read: Any) -> list[Row]:
    return read_questions(str(path), read, split="test", limit=None).rows


def _question(row: Mapping[str, Any], where: str) -> Row:
    return {
        "question_id": _id(row, where),
        "category": text_field(row, ("category",), where),
        "turns": _turns(row.get("turns"), where),
    }


def _prompt(row: Mapping[str, Any], where: str) -> Row:
    found = {name: text_field(row, (name,), where) for name in ("name", "prompt_template")}
    found["system_prompt"] = text_field(row, ("system_prompt",), where, may_be_empty=True)
    if found["name"] in PROMPT_NAMES.values():
        known = {
            "question",
            "answer",
            *(f"{kind}_{i}" for kind in ("question", "answer", "ref_answer") for i in (1, 2)),
        }
        try:
            fill(found["prompt_template"], dict.fromkeys(known, ""))
        except (LookupError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: prompt_template names an unknown field: {error!r}.") from error
    return found


def _reference(row: Mapping[str, Any], where: str) -> Row:
    choices = row.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    turns = first.get("turns") if isinstance(first, Mapping) else None
    return {"question_id": _id(row, where), "turns": _turns(turns, f"{where}, choices[0]")}


def _id(row: Mapping[str, Any], where: str) -> int:
    number = row.get("question_id")
    if type(number) is not int:
        raise DataError(f"{where}: field 'question_id' is {number!r}, expected a number.")
    return number


def _turns(turns: Any, where: str) -> list[str]:
    if not (
        isinstance(turns, list) and len(turns) == 2 and all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        raise DataError(f"{where}: field 'turns' is {turns!r:.100}, expected two texts.")
    return turns
