"""A folder such as FastChat's `llm_judge/data`, with two questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraover_lab.evaluation.mt_bench import QUESTIONS, REFERENCES

PROMPTS = {
    "single-v1": "[Question]\n{question}\n[Answer]\n{answer}",
    "single-math-v1": "[Question]\n{question}\n[Reference]\n{ref_answer_1}\n[Answer]\n{answer}",
    "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
    "single-math-v1-multi-turn": "{ref_answer_1}|{ref_answer_2}|{question_1}|{answer_1}|{question_2}|{answer_2}",
}
ASKED = [
    {"question_id": 81, "category": "writing", "turns": ["write {this}", "again"]},
    {"question_id": 101, "category": "reasoning", "turns": ["who?", "why?"]},
]
KNOWN = {"question_id": 101, "choices": [{"index": 0, "turns": ["me", "because"]}]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fastchat(folder: Path) -> Path:
    write_rows(folder / QUESTIONS, ASKED)
    prompts = [{"name": n, "system_prompt": f"judge {n}", "prompt_template": t} for n, t in PROMPTS.items()]
    write_rows(folder / "judge_prompts.jsonl", prompts)
    write_rows(folder / REFERENCES[0], [KNOWN])
    return folder
