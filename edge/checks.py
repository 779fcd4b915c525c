"""Read a client's JSON body field by field; a refusal names the field that does not fit.

Knows JSON and its types; knows no API and no field's meaning. An explicit null counts as absent.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from routing.errors import Code, Failure

_N = TypeVar("_N", int, float)
_T = TypeVar("_T")
_SHOWN = 60  # characters of an offending value that a message repeats


class BadField(Failure):
    """The body does not hold what it must. `pointer` names the field (RFC 6901), "" the whole."""

    def __init__(self, pointer: str, says: str, code: Code = Code.BAD_INPUT) -> None:
        super().__init__(code, f"AiError: Bad input: Error: {says}")
        self.pointer = pointer


class Fields:
    """The members of one JSON object, each read with its type and range checked."""

    __slots__ = ("_at", "_values")

    def __init__(self, values: dict[str, Any], at: str = "") -> None:
        self._values = values
        self._at = at

    def at(self, name: str | int = "") -> str:
        """The pointer of a member, or of the object itself."""
        return self._at if name == "" else f"{self._at}/{_escaped(str(name))}"

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def value(self, name: str) -> Any:
        """The member as it came; None when absent."""
        return self._values.get(name)

    def items(self) -> list[tuple[str, Any]]:
        return list(self._values.items())

    @property
    def names(self) -> list[str]:
        return list(self._values)

    def text(self, name: str) -> str | None:
        return self._typed(name, str, "string")

    def flag(self, name: str) -> bool | None:
        return self._typed(name, bool, "boolean")

    def array(self, name: str) -> list[Any] | None:
        return self._typed(name, list, "array")

    def fields(self, name: str) -> Fields | None:
        values = self._typed(name, dict, "object")
        return None if values is None else Fields(values, self.at(name))

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number in [low, high]; `3.0` is one, as JSON Schema has it."""
        value = self._values.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and type(value) is not int:
            raise mismatch(self.at(name), value, "integer")
        return None if value is None else _within(self.at(name), value, low, high)

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self._values.get(name)
        if value is None:
            return None
        return as_number(self.at(name), value, low, high)

    def need(self, *names: str) -> None:
        """Refuse an object without one of these."""
        missing = [name for name in names if not self.has(name)]
        if missing:
            raise BadField(self.at(missing[0]), required(self.at(), *missing))

    def _typed(self, name: str, kind: type[_T], called: str) -> _T | None:
        value = self._values.get(name)
        if value is None or isinstance(value, kind):
            return value
        raise mismatch(self.at(name), value, called)


def read(body: bytes) -> Fields:
    """The members of a body that must be one JSON object, whatever its content type says."""
    try:
        values = msgspec.json.decode(body)
    except RecursionError:
        raise BadField("", "the body is nested too deeply") from None
    except ValueError as malformed:  # msgspec's own errors and UnicodeDecodeError are both
        raise BadField("", f"the body is not valid JSON: {malformed}") from None
    if not isinstance(values, dict):
        raise mismatch("", values, "object")
    return Fields(values)


def as_fields(pointer: str, value: Any) -> Fields:
    if not isinstance(value, dict):
        raise mismatch(pointer, value, "object")
    return Fields(value, pointer)


def as_number(pointer: str, value: Any, low: float, high: float) -> float:
    if type(value) is not int and type(value) is not float:
        raise mismatch(pointer, value, "number")
    return float(_within(pointer, value, low, high))


def mismatch(pointer: str, value: Any, *wanted: str) -> BadField:
    """The refusal of a value whose JSON type is none of those wanted."""
    kinds = ", ".join(f"'{kind}'" for kind in wanted)
    return BadField(
        pointer, f"Type mismatch of '{pointer or '/'}', '{_kind(value)}' not in {kinds}"
    )


def required(pointer: str, *names: str) -> str:
    listed = ", ".join(f"'{name}'" for name in names)
    return f"required properties at '{pointer or '/'}' are {listed}"


def shown(value: object) -> str:
    """A value as a message may repeat it: short."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"a number of over {_SHOWN} digits"
    text = str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _within(pointer: str, value: _N, low: float, high: float) -> _N:
    if value < low:
        raise BadField(pointer, f"'{pointer}' must be >= {low}, got {shown(value)}")
    if value > high:
        raise BadField(pointer, f"'{pointer}' must be <= {high}, got {shown(value)}")
    return value


def _kind(value: Any) -> str:
    """A decoded value's JSON type, as JSON Schema calls it."""
    for kind, name in _KINDS:
        if isinstance(value, kind):
            return name
    return "null"


_KINDS = (
    (bool, "boolean"),  # before int: a bool is one to Python
    (int, "integer"),
    (float, "number"),
    (str, "string"),
    (list, "array"),
    (dict, "object"),
)


def _escaped(name: str) -> str:
    return shown(name).replace("~", "~0").replace("/", "~1")
