"""Turn the opcodes of a pickle into plain data, without importing or calling any name in it.

`pickle.Unpickler` is not used, not even a restricted one, because it allocates as much memory as a hostile file asks.
Source: the opcodes' documentation in the standard library's pickletools.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

MAX_WORK = 1_000_000
"""Opcodes of a file's pickles at most, and items that their calls are given; 20,000 tensors need 760,000."""
MAX_NAME = 256

Arguments = tuple[object, ...]


class PickleFault(Exception):
    """A pickle cannot be read; `code` is that of the CheckpointError to raise for it."""

    def __init__(self, code: str, found: str) -> None:
        super().__init__(found)
        self.code = code
        self.found = found


class Stream(Protocol):
    """The methods of a file that the opcode reader calls."""

    def read(self, count: int = ..., /) -> bytes:
        """Read at most `count` bytes."""

    def readline(self) -> bytes:
        """Read up to the next newline."""

    def tell(self) -> int:
        """Return the position of the next byte."""


@dataclass(frozen=True, slots=True)
class Inert:
    """A stand-in for a class, a function or an object, of which only the name is known."""

    name: str


@dataclass(frozen=True, slots=True)
class Known:
    """A known function that a pickle calls, and the function of ours to call in its place."""

    name: str
    build: Callable[[Arguments], object]


class ParameterTable(dict[str, object]):
    """The items of a pickled `torch.nn.ParameterDict`, which are among its attributes."""


class Work:
    """The work that one file may still ask for; bounds of its depth and size alone do not end it soon."""

    def __init__(self) -> None:
        self.left = MAX_WORK

    def spend(self, amount: int) -> None:
        """Take some of what is left.

        Args:
            amount: opcodes carried out, or items looked at.

        Raises:
            PickleFault: nothing is left.
        """
        self.left -= amount
        if self.left < 0:
            raise PickleFault("CKPT_BAD_PICKLE", f"a pickle of more than {MAX_WORK} steps")


def walk(
    stream: Stream, resolve: Callable[[str, str], object], persistent: Callable[[object], object], work: Work
) -> object:
    """Read the next pickle of a stream.

    Args:
        stream: the stream, at the beginning of a pickle.
        resolve: called as `resolve(module, name)` for each import.
        persistent: called as `persistent(id)` for each object that is stored outside of the pickle.
        work: the work that the file may still ask for.

    Returns:
        The object described. Its dictionaries have only their text keys, and objects of unknown classes are `Inert`.

    Raises:
        PickleFault: the pickle is damaged, not supported, or asks for too much work; the callbacks may raise others.
    """
    machine = _Machine(resolve, persistent, work)
    opcodes = pickletools.genops(stream)  # type: ignore[arg-type]
    try:
        for opcode, argument, _ in opcodes:
            machine.step(opcode.name, argument)
    except (ValueError, OverflowError) as error:
        raise PickleFault("CKPT_BAD_PICKLE", f"a damaged pickle: {str(error)[:100]}") from error
    return machine.pop()


class _Machine:
    """The virtual machine that pickles are written for, with its stack, marks and memo."""

    def __init__(
        self, resolve: Callable[[str, str], object], persistent: Callable[[object], object], work: Work
    ) -> None:
        self.work = work
        self.resolve = resolve
        self.persistent = persistent
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[object, object] = {}

    def step(self, opcode: str, argument: object) -> None:
        self.work.spend(1)
        if opcode in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif opcode in _PUSH_NEW:
            self.stack.append(_PUSH_NEW[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in _NOTHING_TO_DO:
            raise PickleFault("CKPT_BAD_PICKLE", f"the pickle opcode {opcode}, which no weights file uses")

    def pop(self) -> object:
        self.peek()
        return self.stack.pop()

    def peek(self) -> object:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) <= floor:
            raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: its stack runs empty")
        return self.stack[-1]

    def pop_mark(self) -> Arguments:
        if not self.marks:
            raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: a mark is missing")
        mark = self.marks.pop()
        items = tuple(self.stack[mark:])
        del self.stack[mark:]
        return items

    def pop_tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def mark(self, _: object) -> None:
        self.marks.append(len(self.stack))

    def discard(self, _: object) -> None:
        """Carry out POP, which removes a mark where that is on top of the stack."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def remember(self, index: object) -> None:
        self.memo[index] = self.peek()

    def memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.peek()

    def recall(self, index: object) -> None:
        if index not in self.memo:
            raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: it recalls an object that it did not store")
        self.stack.append(self.memo[index])

    def append(self, items: Arguments) -> None:
        target = self.peek()
        if isinstance(target, list):
            target.extend(items)

    def set_items(self, items: Arguments) -> None:
        target = self.peek()
        if isinstance(target, dict):
            # Text keys only: a hostile key of nested tuples would take forever to hash.
            target.update({key: value for key, value in pairs_of(items) if isinstance(key, str)})

    def set_item(self, _: object) -> None:
        value, key = self.pop(), self.pop()
        self.set_items((key, value))

    def set_attributes(self, _: object) -> None:
        """Carry out BUILD: no attributes are needed but the parameters of a table, a module of PyTorch's."""
        attributes, target = self.pop(), self.peek()
        parameters = attributes.get("_parameters") if isinstance(attributes, dict) else None
        if isinstance(target, ParameterTable) and isinstance(parameters, dict):
            self.work.spend(len(parameters))
            target.update(parameters)

    def new_dict(self, _: object) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def frozen_set(self, _: object) -> None:
        self.pop_mark()
        self.stack.append(_inert_set())

    def global_(self, argument: object) -> None:
        module, _, name = str(argument).partition(" ")
        self.stack.append(self._resolve(module, name))

    def stack_global(self, _: object) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: a class whose name is not a text")
        self.stack.append(self._resolve(module, name))

    def inst(self, argument: object) -> None:
        arguments = self.pop_mark()
        self.global_(argument)
        self._call(self.pop(), arguments)

    def obj(self, _: object) -> None:
        items = self.pop_mark()
        if not items:
            raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: an object without a class")
        self._call(items[0], items[1:])

    def reduce(self, _: object) -> None:
        arguments, function = self.pop(), self.pop()
        self._call(function, arguments)

    def new_object_with_names(self, _: object) -> None:
        self.pop()
        self.reduce(None)

    def persistent_object(self, argument: object) -> None:
        self.stack.append(self.persistent(argument))

    def _resolve(self, module: str, name: str) -> object:
        if len(module) + len(name) > MAX_NAME:
            raise PickleFault("CKPT_BAD_PICKLE", f"a class name of {len(module) + len(name)} characters")
        return self.resolve(module, name)

    def _call(self, function: object, arguments: object) -> None:
        if not isinstance(arguments, tuple):
            raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: a call without its arguments")
        # a pickle may recall one long list as often as it likes, and have it read each time
        self.work.spend(len(arguments))
        self.work.spend(sum(len(item) for item in arguments if isinstance(item, (list, tuple))))
        if isinstance(function, Known):
            self.stack.append(function.build(arguments))
        elif isinstance(function, Inert):
            self.stack.append(function)
        else:
            raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: a call of an object that is not a function")


def pairs_of(items: Arguments) -> list[tuple[object, object]]:
    """Split a sequence into pairs.

    Args:
        items: key, value, key, value, ...

    Returns:
        [(key, value), ...].

    Raises:
        PickleFault: the number of items is odd.
    """
    if len(items) % 2:
        raise PickleFault("CKPT_BAD_PICKLE", "a damaged pickle: a key without a value")
    return list(zip(items[::2], items[1::2], strict=True))


def _inert_set() -> Inert:
    return Inert("builtins.set")


_PUSH_ARGUMENT = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    )
)
_PUSH_NEW: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": _inert_set,
}
_NOTHING_TO_DO = frozenset(("PROTO", "FRAME", "STOP"))
_ACTIONS: dict[str, Callable[[_Machine, object], object]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.discard,
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.peek()),
    "PUT": _Machine.remember,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.recall,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "TUPLE": lambda machine, _: machine.stack.append(machine.pop_mark()),
    "TUPLE1": lambda machine, _: machine.pop_tuple(1),
    "TUPLE2": lambda machine, _: machine.pop_tuple(2),
    "TUPLE3": lambda machine, _: machine.pop_tuple(3),
    "LIST": lambda machine, _: machine.stack.append(list(machine.pop_mark())),
    "DICT": _Machine.new_dict,
    "FROZENSET": _Machine.frozen_set,
    "APPEND": lambda machine, _: machine.append((machine.pop(),)),
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.pop_mark(),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": _Machine.inst,
    "OBJ": _Machine.obj,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_object_with_names,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.set_attributes,
    "PERSID": _Machine.persistent_object,
    "BINPERSID": lambda machine, _: machine.persistent_object(machine.pop()),
}
