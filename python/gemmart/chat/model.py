"""Commands that concern the model, and how it chooses its words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from gemmart.chat.reader import PATHS
from gemmart.errors import InvalidRequest
from gemmart.sampling import RANGES, Sampling, check_number
from gemmart.sampling import resolve as resolve_sampling
from gemmart.stops import StopStrings
from gemmart.terminal import speeds

if TYPE_CHECKING:
    from gemmart.chat.loop import Chat

SAMPLING = tuple(field.name for field in fields(Sampling))
OTHERS = {"max_tokens": 2**63 - 1, "seed": 2**64 - 1}
"""Whole numbers, and the largest."""
NAMES = (*SAMPLING, *OTHERS, "stop")
SHORT = {"temp": "temperature", "typical": "typical_p", "n": "max_tokens", "num_predict": "max_tokens"}
DEFAULT = "default"


def stats(chat: Chat, _: str) -> None:
    """Show how fast the last answer came, and its seed."""
    last = chat.last
    chat.say(f"{speeds(last)} · seed {last.seed}" if last else "no answer yet")


def template(chat: Chat, _: str) -> None:
    """Show the chat template exactly as the model has it.
    /dump shows what it makes of this conversation."""
    chat.say(chat.model.chat_template or "")


def set_(chat: Chat, text: str) -> None:
    """Set how tokens are chosen, or show it.
    NAME is temperature, top_k, top_p, min_p, max_tokens, seed, stop or another that /set alone lists. VALUE "default"
    is the model's own. stop takes one text, or several as ["A", "B"]; logit_bias takes {"ID": BIAS}."""
    name, _, value = text.removeprefix("parameter ").partition(" ")
    name, value = SHORT.get(name, name), value.strip()
    if not name:
        chat.say("\n".join(f"{name:18} {shown(chat, name)}" for name in NAMES))
    elif name not in NAMES:
        raise InvalidRequest(f"/set {name}: no such setting; there are {', '.join(NAMES)}")
    else:
        if value:
            change(chat.options, name, value)
        chat.say(f"{name} {shown(chat, name)}")


def set_names(_: Chat) -> Iterable[str]:
    return (*NAMES, DEFAULT)


def shown(chat: Chat, name: str) -> str:
    """A setting's value in words."""
    if name in SAMPLING:
        own = getattr(chat.options["sampling"] or Sampling(), name)
        value = getattr(resolve_sampling(chat.options["sampling"], chat.model.default_sampling), name)
        return f"{json.dumps(value) if name == 'logit_bias' else value}{'' if own is not None else '  (default)'}"
    value = chat.options.get(name)
    words = {"max_tokens": "as many as fit", "seed": "a new one each time", "stop": "none"}
    return words[name] if value is None or value == () else json.dumps(value)


def change(options: dict[str, Any], name: str, text: str) -> None:
    """Set an option of Model.stream() from what was typed. Raises InvalidRequest."""
    if text == DEFAULT:
        value: Any = () if name == "stop" else None
    elif name == "stop" and not text.startswith(("[", '"')):
        value = (text,)
    else:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidRequest(f"/set {name}: {text!r} is no value for it") from None
    if name in SAMPLING:
        if name == "logit_bias" and value is not None:
            value = _biases(value)
        if RANGES.get(name, (None,))[0] is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        options["sampling"] = replace(options["sampling"] or Sampling(), **{name: value})
    elif name == "stop":
        stops = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else None
        if stops is None or not all(isinstance(stop, str) for stop in stops):
            raise InvalidRequest('/set stop: expected a text, or several as ["A", "B"]')
        StopStrings(stops)
        options["stop"] = stops
    else:
        if value is not None:
            check_number(name, value, int, 0, OTHERS[name])
        options[name] = value


def _biases(value: Any) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in value.items()}
    except (AttributeError, ValueError):
        raise InvalidRequest('/set logit_bias: expected {"ID": BIAS, …}') from None


def switch(chat: Chat, ref: str) -> None:
    """Go on with another model, or show this one.
    The conversation is kept. Where the other model cannot be loaded, all stays as it was; both are in memory for a
    moment."""
    if not ref:
        chat.say(f"{chat.model.info.name}  {chat.model.info.path}")
        return
    if chat.load_model is None:
        raise InvalidRequest("/model: no other model can be loaded here")
    new = chat.load_model(ref)
    try:
        if chat.session is not None and not new.has_template:
            raise InvalidRequest(f"/model {ref}: is a base model, which has no conversations; start gemmart with it")
        chat.use(new)
    except BaseException:
        if chat.model is not new:
            new.close()
        raise
    chat.banner()


def names(_: Chat) -> Iterable[str]:
    from gemmart.sources import aliases

    return (*sorted(aliases()), PATHS)
