"""Pickles looked at with nothing of them run: names become inert stand-ins, calls are noted down.

What a file may hold is listed by whoever reads it: opcodes and names. Anything else is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Set
from typing import Any

# Plain values and containers, and calls of the names that are allowed.
OPCODES = frozenset(
    "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BUILD MEMOIZE BINPUT LONG_BINPUT BINGET "
    "LONG_BINGET BININT BININT1 BININT2 NONE NEWTRUE NEWFALSE BINUNICODE SHORT_BINUNICODE "
    "SHORT_BINBYTES TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE EMPTY_LIST APPEND APPENDS".split())


class Made:
    """What a call of a name would have made: the name, the arguments, and the state given to it."""

    __slots__ = ("name", "arguments", "state")

    def __init__(self, name: tuple[str, str], arguments: tuple) -> None:
        self.name, self.arguments, self.state = name, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass  # An ordered dictionary; nobody asks for what is in it.


class _Name:
    __slots__ = ("name", "note")

    def __init__(self, name: tuple[str, str], note: Callable[[Made], None]) -> None:
        self.name, self.note = name, note

    def __call__(self, *arguments: Any) -> Made:
        made = Made(self.name, arguments)
        self.note(made)
        return made

    def __setstate__(self, state: Any) -> None:
        raise ValueError("changes what it names")


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, names: Set[tuple[str, str]],
                 persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(pickled))
        self.names, self.persistent, self.calls = names, persistent, list[Made]()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.names:
            raise ValueError(f"asks for {module}.{name}")
        return _Name((module, name), self.calls.append)

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise ValueError("asks for what is not in it")
        return self.persistent(pid)


def look(
    pickled: bytes, names: Set[tuple[str, str]], opcodes: Set[str] = OPCODES,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, list[Made]]:
    """What a pickle holds, and all calls that it would have made, in order.

    :param names: (module, name) of what it may call.
    :param persistent: is given what stands for something outside the pickle, and gives a stand-in;
        a name in there has its ``name``.
    :raises Exception: of any kind, if it is damaged or holds anything else.
    """
    for opcode, argument, _ in pickletools.genops(pickled):
        # For LONG_BINPUT the unpickler makes room up to the argument, which may be anything.
        if opcode.name not in opcodes or (
                opcode.name == "LONG_BINPUT" and (argument or 0) > len(pickled)):
            raise ValueError(f"has {opcode.name}")
    reader = _Unpickler(pickled, names, persistent)
    return reader.load(), reader.calls
