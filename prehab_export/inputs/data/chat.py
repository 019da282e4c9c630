"""Turns conversations into text with the tokenizer's own chat template."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from datasets import Dataset, Features

from converters.errors import InputError

CHAT_NAMES = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
# Columns in which some datasets keep parts of a conversation; they are not read.
_UNREAD = ("tools", "functions", "system", "system_prompt")
# Role names of ShareGPT and similar formats → role names of chat templates.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# Some templates write today's date, but a run continued tomorrow must read the same text. A macro in place of the
# function that transformers offers to templates makes the date 1 January 2025 for every run.
_DATE = {"%Y": "2025", "%y": "25", "%B": "January", "%b": "Jan", "%m": "01", "%d": "01", "%A": "Wednesday", "%a": "Wed"}
_TIME = {"%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM"}
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in (_DATE | _TIME).items())
    + " -}}{%- endmacro -%}"
)


def chat_columns(features: Features) -> list[str]:
    """Return the columns that hold conversations: lists of turns with ``role``/``content`` or ``from``/``value``."""
    return [name for name, feature in features.items() if _holds_turns(feature, name)]


def _holds_turns(feature: Any, name: str) -> bool:
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    if isinstance(inner, dict):
        return {"role", "content"} <= set(inner) or {"from", "value"} <= set(inner)
    # `datasets` keeps turns with differing keys as JSON.
    return type(inner).__name__ == "Json" and name.lower() in CHAT_NAMES


def unread_warnings(features: Features, column: str) -> tuple[str, ...]:
    """Return a warning if parts of the conversations of ``column`` are in other columns, which are not read."""
    unread = [name for name in features if name.lower() in _UNREAD]
    if not unread or column not in chat_columns(features):
        return ()
    names = ", ".join(map(repr, unread))
    return (f"conversations of column {column!r} are read without {names}; turns with the role system are read",)


def chat_texts(rows: Dataset, column: str, split: str, tokenizer: Any, start: str) -> Iterator[str]:
    """Yield every conversation as text.

    Args:
        start: text that every window starts with; it is removed from the start of a conversation.

    Raises:
        InputError: the tokenizer has no chat template, or its template rejects a conversation; the message names the
            row.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"column {column!r} holds conversations, and the tokenizer has no chat template to write them as text; "
            "give a tokenizer with one (chat_template.jinja), or data with a column of text"
        )
    template = _template(tokenizer)
    row = 0
    for batch in rows.select_columns([column]).iter(batch_size=100):
        for conversation in batch[column]:
            place = f"row {row} of {split}, column {column!r}"
            yield _rendered(_turns(conversation, place), place, tokenizer, template).removeprefix(start)
            row += 1


def _template(tokenizer: Any) -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(f"the tokenizer has several chat templates, and none is called default: {error}") from error
    return _FIXED_DATE + template if "strftime_now" in template else template


def _rendered(turns: list[dict[str, Any]], place: str, tokenizer: Any, template: str) -> str:
    try:
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{place}: the chat template rejects this conversation: {error}") from error


def _turns(conversation: Any, place: str) -> list[dict[str, Any]]:
    if isinstance(conversation, Mapping):  # one list per key
        keys = list(conversation)
        conversation = [dict(zip(keys, values, strict=True)) for values in zip(*conversation.values(), strict=True)]
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise InputError(f"{place} has no conversation; remove such rows")
    return [_turn(turn, place) for turn in conversation]


def _turn(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise InputError(f"{place}: a turn must have a role and a content, not {turn!r}")
    turn = {key: value for key, value in turn.items() if value is not None}  # tables fill gaps with null
    if "from" in turn and "role" not in turn:
        role = _ROLES.get(str(turn.pop("from")).strip().lower())
        if role is None:
            raise InputError(f"{place}: the speaker of a turn is unknown; known speakers are {', '.join(_ROLES)}")
        turn = {"role": role, "content": turn.pop("value", ""), **turn}
    if "role" not in turn:
        raise InputError(f"{place}: a turn has no role")
    turn = {"content": ""} | turn
    return turn | {"content": _content(turn["content"], place)}


def _content(content: Any, place: str) -> Any:
    """Return the text of a turn. A list of parts is joined, because many templates would print it as a Python list."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    plain = [text for text in texts if isinstance(text, str)]
    if len(plain) < len(texts):
        kinds = sorted({str(part.get("type")) for part in content if isinstance(part, Mapping)} - {"text"})
        raise InputError(f"{place}: a turn holds more than text ({', '.join(kinds) or 'unknown'}); remove such rows")
    return "".join(plain)
