"""Conversations: their turns in every form that they are written in, what is amiss with them, and what is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from .rows import as_text

Turn: TypeAlias = dict[str, str]

ROLES = ("system", "user", "assistant")
# What other formats call them: ShareGPT, Vicuna, Gemini, OpenAI's newer models.
_ALIASES = {
    **dict.fromkeys(("human", "prompter", "question", "instruction"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "ai", "chatgpt", "bing", "bard", "answer"), "assistant"),
    "developer": "system",
}
_ROLE, _CONTENT = ("role", "from", "speaker"), ("content", "value", "text")
_LEARNT = ("weight", "train", "training")  # by which OpenAI's and axolotl's formats leave turns out of the loss

UNKNOWN_ROLE, LATE_SYSTEM, EMPTY_TURN = "unknown_role", "late_system", "empty_turn"
JOINED, LEADING, CUT_BACK = "joined_turns", "leading_answer", "cut_back"
KINDS = {
    UNKNOWN_ROLE: "",
    LATE_SYSTEM: "",
    EMPTY_TURN: "",
    JOINED: "turns of one role that follow each other joined into one, with an empty line between them",
    LEADING: "what the assistant says before any user has spoken left out",
    CUT_BACK: "cut back to the last answer: the last turn is not the assistant's",
}
"""What may be amiss with a conversation, and what is done where it can be repaired."""


def turns_of(value: Any, role: str = "user") -> list[Turn]:
    """Returns the turns of a conversation, `{"role", "content"}` each.

    Args:
        value: a list of `{"role", "content"}` or `{"from", "value"}`, one such turn, a text, any of these written out
            as JSON, or None. A content may be a list of parts that are texts. `reasoning_content` goes in front of the
            content, as templates of models that think write it. System turns that say nothing are left out.
        role: whose turn a text by itself is.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        value = _written(value)
    if value is None:
        return []
    if isinstance(value, (int, float)):
        value = as_text(value)
    if isinstance(value, (dict, str)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError("is no conversation")
    turns = []
    for one in value:
        one = _written(one, among_turns=True) if isinstance(one, str) else one
        if isinstance(one, str):
            turns.append({"role": role, "content": one})
        elif isinstance(one, list):
            turns += turns_of(one, role)
        elif one is not None:
            turns.append(_turn(one))
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def _turn(value: Any) -> Turn:
    who = next((value[key] for key in _ROLE if value.get(key) is not None), None) if isinstance(value, dict) else None
    if not isinstance(who, str):
        raise ValueError("a turn has no role")
    content = next((value[key] for key in _CONTENT if value.get(key) is not None), "")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        content = as_text(content)
    thoughts = value.get("reasoning_content")
    if isinstance(thoughts, str) and thoughts.strip():
        content = f"<think>\n{thoughts.strip()}\n</think>\n\n{content}"
    role = who.strip().lower()
    role = _ALIASES.get(role, role)
    if role == "assistant" and any(value.get(key) in (0, False) for key in _LEARNT):
        raise ValueError("a turn of the assistant's is marked as one not to be learnt, but all that it says is")
    if value.get("tool_calls"):  # what it says beside them would be learnt as if it had called nothing
        role = f"{role} with tool_calls"
    return {"role": role, "content": content}


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError("a turn has parts that are no texts")


def _written(text: str, among_turns: bool = False) -> Any:
    """Returns what a text writes out as JSON, where all of that is turns; else the text, which may be about JSON.

    Args:
        text: by itself it is turns only where one has a role that is known.
        among_turns: it stands where a turn is expected. A file whose rows are of several forms is read so.
    """
    if text.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        roles = [_role_of(turn) for turn in (value if isinstance(value, list) else [value])]
        if roles and all(roles) and (among_turns or {*ROLES, *_ALIASES}.intersection(roles)):
            return value
    return text


def _role_of(value: Any) -> str:
    """Whose turn something is, by the name that it has there; empty where it is no turn."""
    if not isinstance(value, dict) or not any(key in value for key in _CONTENT):
        return ""
    who = next((value[key] for key in _ROLE if key in value), None)
    return who.strip().lower() if isinstance(who, str) else ""


def turns_of_history(value: Any) -> list[Turn]:
    """Returns the turns of what went before an instruction: pairs of what was said and answered, or turns.

    Args:
        value: a list of them, or one written out as JSON.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            raise ValueError("the history is no list") from None
    turns = []
    for one in [] if value is None else value:
        if isinstance(one, dict):
            turns.append(_turn(one))
        elif isinstance(one, (list, tuple)) and len(one) == 2:
            turns += [{"role": role, "content": as_text(text)} for role, text in zip(ROLES[1:], one, strict=True)]
        else:
            raise ValueError("the history holds something else than pairs of texts, or turns")
    return turns


def settled(turns: Sequence[Turn]) -> tuple[list[Turn], list[str]]:
    """Returns the turns as chat templates take them, a user's and the assistant's by turns, and what was amiss.

    Turns that say nothing, and those of other roles, stay as they are.
    """
    found: list[Turn] = []
    kinds: list[str] = []
    for turn in turns:
        if turn["role"] not in ROLES:
            kinds.append(UNKNOWN_ROLE)
        elif not turn["content"].strip():
            kinds.append(EMPTY_TURN)
        spoken = any(one["role"] == "user" for one in found)
        if turn["role"] == "system" and found and found[-1]["role"] != "system":
            kinds.append(LATE_SYSTEM)
        elif turn["role"] == "assistant" and not spoken:
            kinds.append(LEADING)
            continue
        if found and found[-1]["role"] == turn["role"]:
            kinds.append(JOINED)
            found[-1] = {**turn, "content": f"{found[-1]['content']}\n\n{turn['content']}"}
        else:
            found.append(dict(turn))
    return found, list(dict.fromkeys(kinds))


def parted(turns: Sequence[Turn]) -> tuple[list[Turn], str | None]:
    """Returns what goes before the last answer, and that answer; None where the last turn is not the assistant's."""
    if turns and turns[-1]["role"] == "assistant":
        return list(turns[:-1]), turns[-1]["content"]
    return list(turns), None


def cut_back(turns: Sequence[Turn]) -> list[Turn]:
    """Returns the turns up to the last answer; none where there is no answer."""
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    return list(turns[: last + 1])


def without_oldest(turns: Sequence[Turn]) -> list[Turn]:
    """Returns the turns without the oldest exchange, the system's kept; none where there is only one exchange."""
    first = 1 if turns and turns[0]["role"] == "system" else 0
    return [*turns[:first], *turns[first + 2 :]] if len(turns) - first > 2 else []


def as_one_text(turns: Sequence[Turn]) -> str:
    """Returns a conversation as one text: a single user's turn as it is, else with who says what."""
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
