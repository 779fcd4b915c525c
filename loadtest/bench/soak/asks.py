"""What the clients of a soak ask, from a seed, and whether what they hear is right. Pure."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import msgspec

from loadtest.bench.host_model import END_ID
from loadtest.bench.soak.engine import answer_to
from loadtest.bench.soak.fleet import MODEL

TENANTS = ("acme", "globex", "initech")
NEAR = {
    "weur": {"cf-iplatitude": "48.86", "cf-iplongitude": "2.35"},  # Paris
    "enam": {"cf-iplatitude": "42.36", "cf-iplongitude": "-71.06"},  # Boston
}
LONGEST_ANSWER = 160  # tokens
_BEGINNINGS = 6  # that prompts share, up to 400 characters
_LETTERS = string.ascii_letters + " "

# What reading an answer raises that is not of the form it should have.
MALFORMED = (msgspec.DecodeError, KeyError, IndexError, TypeError, AttributeError)

Act = Literal["read", "leave", "slow"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request."""

    tenant: str
    near: str  # a region
    edge: int
    chat: bool  # by OpenAI's API, else natively
    stream: bool
    prompt: str
    max_tokens: int
    stop: str | None
    act: Act
    leave_after: float  # of the answer, or seconds where it is not streamed

    @cached_property
    def answer(self) -> str:
        """What is right: up to the stop string, where one is hit."""
        text = self._whole
        return text if self.stop is None else text.partition(self.stop)[0]

    @cached_property
    def completion_tokens(self) -> int:
        """As the client is to be told: up to the one that completes the stop string."""
        at = -1 if self.stop is None else self._whole.find(self.stop)
        return self.max_tokens if at < 0 else at + len(self.stop or "")

    @cached_property
    def _whole(self) -> str:
        return answer_to(self.prompt_ids, self.max_tokens)

    @property
    def prompt_ids(self) -> list[int]:
        ids = list(self.prompt.encode())
        return [*ids, END_ID, ord("@")] if self.chat else ids  # the template of `host_model`

    @property
    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"max_tokens": self.max_tokens, "stream": self.stream}
        if self.stop is not None:
            body["stop"] = [self.stop]
        # Claims that are nobody's to make: to be somebody, and to go first.
        body |= {"cache_salt": "acme", "priority": 9} if self.max_tokens % 5 == 0 else {}
        if not self.chat:
            return {"prompt": self.prompt, "raw": True, **body}
        body |= {"stream_options": {"include_usage": True}} if self.stream else {}
        return {"model": MODEL, "messages": [{"role": "user", "content": self.prompt}], **body}

    @property
    def path(self) -> str:
        root = f"/client/v4/accounts/{self.tenant}/ai"
        return f"{root}/v1/chat/completions" if self.chat else f"{root}/run/{MODEL}"


def ask(chance: random.Random, num_edges: int) -> Asked:
    """Another request."""
    beginning = random.Random(chance.randrange(_BEGINNINGS))
    shared = "".join(beginning.choices(_LETTERS, k=beginning.randrange(16, 400)))
    own = "".join(chance.choices(_LETTERS, k=chance.randrange(1, 80)))
    asked = Asked(
        tenant=chance.choice(TENANTS),
        near=chance.choice(sorted(NEAR)),
        edge=chance.randrange(num_edges),
        chat=chance.random() < 0.3,
        stream=chance.random() < 0.7,
        prompt=shared + own if chance.random() < 0.7 else own,
        max_tokens=chance.randint(1, LONGEST_ANSWER),
        stop=None,
        act=chance.choices(("read", "leave", "slow"), (0.7, 0.2, 0.1))[0],
        leave_after=chance.random(),
    )
    if chance.random() < 0.2 and asked.max_tokens > 4:
        begin = chance.randrange(asked.max_tokens - 2)
        stop = asked.answer[begin : begin + 3]
        asked = Asked(**(vars_of(asked) | {"stop": stop}))
    return asked


def vars_of(asked: Asked) -> dict[str, Any]:
    return {name: getattr(asked, name) for name in Asked.__dataclass_fields__}


@dataclass(slots=True)
class Hearing:
    """What came of one streamed answer so far."""

    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    error: int | None = None  # its public code
    done: bool = False
    wrong: str = ""  # what no stream of ours should hold

    def take(self, line: str) -> None:
        """A line of the stream."""
        if not line.startswith("data: "):
            return
        if self.done or self.error is not None:
            self.wrong = f"after the end: {line}"
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.done = True
            return
        told = msgspec.json.decode(data, type=dict)
        if told.get("success") is False:
            self.error = told["errors"][0]["code"]
        elif "choices" in told:
            self.text += "".join(it["delta"].get("content", "") for it in told["choices"])
        else:
            self.text += told["response"]
        self.usage = told.get("usage") or self.usage

    def verdict(self, asked: Asked) -> str:
        """How it ended: `ok`, `broke off: CODE`, or `wrong: ...`."""
        if self.wrong:
            return f"wrong: {self.wrong}"
        if self.error is not None:
            good = asked.answer.startswith(self.text)
            return f"broke off: {self.error}" if good else f"wrong: {self.text!r} before an error"
        if not self.done:
            return "wrong: ended without [DONE]"
        return judged(asked, self.text, self.usage)

    def begins(self, asked: Asked) -> bool:
        """Whether it is right so far."""
        return asked.answer.startswith(self.text) and not self.wrong


def judged(asked: Asked, text: str, usage: dict[str, Any]) -> str:
    """A whole answer: `ok` or `wrong: ...`."""
    if text != asked.answer:
        return f"wrong: {text!r}, not {asked.answer!r}"
    told = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    right = (len(asked.prompt_ids), asked.completion_tokens)
    return "ok" if told == right else f"wrong: told {told} tokens, not {right}"


def whole(asked: Asked, content: bytes) -> tuple[str, dict[str, Any]]:
    """The verdict on an answer that was not streamed, and the usage it tells."""
    told = msgspec.json.decode(content, type=dict)
    if asked.chat:
        text, usage = told["choices"][0]["message"]["content"], told["usage"]
    else:
        text, usage = told["result"]["response"], told["result"]["usage"]
    return judged(asked, text, usage), usage


REFUSALS = {429, 503, 408}  # what a fleet in trouble may say


def refusal(status: int, content: bytes) -> str:
    """The verdict on an answer that is none: `refused: STATUS/CODE`, or `wrong: ...`."""
    try:
        told = msgspec.json.decode(content, type=dict)
        code = told["errors"][0]["code"]
    except MALFORMED:
        return f"wrong: {status} with {content[:200]!r}"
    if status not in REFUSALS or told.get("success") is not False:
        return f"wrong: {status} with {content[:200]!r}"
    return f"refused: {status}/{code}"
