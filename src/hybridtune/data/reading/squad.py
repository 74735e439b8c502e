"""SQuAD's nested JSON, flattened to a row a question, as `datasets` has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .notes import Notes


def is_squad(entry: Any) -> bool:
    """Whether the first entry of a list is an article of SQuAD."""
    return isinstance(entry, dict) and isinstance(entry.get("paragraphs"), list)


def flatten(
    articles: Iterator[tuple[int, Any, int]], name: str, notes: Notes
) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yields a row for every question.

    Args:
        articles: line, value and length of each.
        name: of the file, for messages.
        notes: get the questions that lack something.

    Returns:
        The line of the article, and `id`, `question`, `context` and `answers` as `{"text": [...], "answer_start":
        [...]}`, empty for a question that cannot be answered.
    """
    for number, (line, article, _) in enumerate(articles):
        if not is_squad(article):
            notes.reject(name, line, f"data[{number}] has no list of paragraphs", str(article)[:1000])
            continue
        for at, paragraph in enumerate(article["paragraphs"]):
            place = f"data[{number}].paragraphs[{at}]"
            context = paragraph.get("context") if isinstance(paragraph, dict) else None
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(context, str) or not isinstance(questions, list):
                expected = '{"context": "...", "qas": [...]}'
                notes.reject(name, line, f"{place} has no context or no qas", str(paragraph)[:1000], expected=expected)
                continue
            for which, question in enumerate(questions):
                row = _row(question, context)
                if row is None:
                    expected = '{"id": "...", "question": "...", "answers": [{"text": "...", "answer_start": 0}]}'
                    problem = f"{place}.qas[{which}] is no question with answers"
                    notes.reject(name, line, problem, str(question)[:1000], expected=expected)
                else:
                    yield line, row, len(context)


def _row(question: Any, context: str) -> dict[str, Any] | None:
    if not isinstance(question, dict) or not isinstance(question.get("question"), str):
        return None
    answers = [] if question.get("is_impossible") else question.get("answers", [])
    if not isinstance(answers, list):
        return None
    texts, starts = [], []
    for answer in answers:
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            return None
        if not isinstance(answer.get("answer_start"), int):
            return None
        texts.append(answer["text"])
        starts.append(answer["answer_start"])
    return {
        "id": question.get("id"),
        "question": question["question"],
        "context": context,
        "answers": {"text": texts, "answer_start": starts},
    }
