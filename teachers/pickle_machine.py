"""The machine that reads a pickle without running it: it keeps the stack, and makes data or records, never calls.

Everything that a pickle can ask for ends in `_called` or `_made`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from teachers.pickle_values import KNOWN, STORAGES, Array, Dtype, Name, NotDataError, Object, Storage, filled

MOST = 10_000_000
"""Instructions: each may take memory that the file does not."""

Stored = Callable[[str, int, int], memoryview]


class Source:
    """A file for `pickletools` whose longer pieces are where they lie, not copies."""

    def __init__(self, view: memoryview, start: int = 0) -> None:
        self._view, self._at = view, start

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._at

    def read(self, count: int) -> bytes | memoryview:
        """The next bytes, or what there is of them."""
        piece = self._view[self._at : self._at + count]
        self._at += len(piece)
        return piece if count > 256 else bytes(piece)

    def readline(self) -> bytes:
        """The next bytes up to a newline."""
        length, found = 256, -1
        while found < 0:
            piece = bytes(self._view[self._at : self._at + length])
            found = piece.find(b"\n")
            if found < 0 and len(piece) < length:
                raise NotDataError("ends within a line")
            length *= 4
        self._at += found + 1
        return piece[: found + 1]


_CONSTANTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "FLOAT", "BINFLOAT",
}  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
_GATHERED: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple, "LIST": list, "FROZENSET": frozenset, "DICT": lambda items: dict(_pairs(items)),
}  # fmt: skip
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


class Machine:
    """One pickle. stored: (key, count, itemsize) -> the bytes of a storage of torch; nested: how bytes within it that
    torch wrote are read; dry: make nothing, only go to the end and ask for storages."""

    def __init__(
        self,
        source: Source,
        stored: Stored | None = None,
        nested: Callable[[memoryview], Any] | None = None,
        dry: bool = False,
    ) -> None:
        self._source, self._stored, self._nested, self._dry = source, stored, nested, dry
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[Any, Storage] = {}

    def run(self) -> Any:
        """The value at the end."""
        for count, (operation, argument, _) in enumerate(pickletools.genops(self._source)):  # type: ignore[arg-type]
            if count > MOST:
                raise NotDataError(f"is a pickle of more than {MOST} instructions")
            name = operation.name
            if name == "STOP":
                value = self._stack.pop()
                return value.tensor if isinstance(value, Array) else value
            if name in _CONSTANTS:
                self._stack.append(argument)
            elif name in _EMPTY:
                self._stack.append(_EMPTY[name]())
            elif name in _GATHERED:
                self._stack.append(_GATHERED[name](self._gathered()))
            elif name in _SHORT_TUPLES:
                self._stack.append(tuple(self._popped(_SHORT_TUPLES[name])))
            else:
                method = getattr(self, f"_do_{name.lower()}", None)
                if method is None:
                    raise NotDataError(f"has the instruction {name}, which is not data")
                method(argument)
        raise NotDataError("ends without an end")

    def _popped(self, count: int) -> list[Any]:
        if count > len(self._stack) - (self._marks[-1] if self._marks else 0):
            raise NotDataError("takes more than it has")
        values = self._stack[-count:]
        del self._stack[-count:]
        return [_settled(value) for value in values]

    def _gathered(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return [_settled(value) for value in values]

    # what moves the stack

    def _do_proto(self, _: Any) -> None:
        pass

    _do_frame = _do_proto

    def _do_mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _do_pop(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _do_pop_mark(self, _: Any) -> None:
        self._gathered()

    def _do_dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _do_put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _do_binput = _do_long_binput = _do_put

    def _do_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _do_get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _do_binget = _do_long_binget = _do_get

    # what fills containers

    def _do_append(self, _: Any) -> None:
        self._extend(self._popped(1))

    def _do_appends(self, _: Any) -> None:
        self._extend(self._gathered())

    def _extend(self, values: list[Any]) -> None:
        holder = self._stack[-1]
        if not self._dry:
            _of(holder.elements if isinstance(holder, Object) else holder, list).extend(values)

    def _do_setitem(self, _: Any) -> None:
        self._update(self._popped(2))

    def _do_setitems(self, _: Any) -> None:
        self._update(self._gathered())

    def _update(self, items: list[Any]) -> None:
        holder = self._stack[-1]
        if not self._dry:
            _of(holder.entries if isinstance(holder, Object) else holder, dict).update(_pairs(items))

    def _do_additems(self, _: Any) -> None:
        values = self._gathered()
        if not self._dry:
            _of(self._stack[-1], set).update(values)

    # names, and what they are asked to make

    def _do_global(self, both: str) -> None:
        module, name = both.split(" ", 1)
        self._stack.append(Name(_RENAMED.get(module, module), name))

    def _do_stack_global(self, _: Any) -> None:
        module, name = self._popped(2)
        self._do_global(f"{_of(module, str)} {_of(name, str)}")

    def _do_reduce(self, _: Any) -> None:
        function, args = self._popped(2)
        self._stack.append(self._called(function, args))

    def _do_newobj(self, _: Any) -> None:
        kind, args = self._popped(2)
        self._stack.append(self._made(kind, args))

    def _do_newobj_ex(self, _: Any) -> None:
        kind, args, named = self._popped(3)
        made = self._made(kind, args)
        if named and isinstance(made, Object):
            made.entries.update(named)
        self._stack.append(made)

    def _do_obj(self, _: Any) -> None:
        kind, *args = self._gathered()
        self._stack.append(self._made(kind, tuple(args)))

    def _do_inst(self, both: str) -> None:
        args = tuple(self._gathered())
        self._do_global(both)
        self._stack.append(self._made(self._stack.pop(), args))

    def _made(self, kind: Any, args: Any) -> Any:
        """An object of a class: one that is known, or a record. Nothing runs when it is made."""
        if _of(kind, Name) in KNOWN:
            return self._called(kind, args)
        return Object(kind, _of(args, tuple))

    def _called(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Name):
            raise NotDataError(f"asks to call a {type(function).__name__}")
        if function == Name("torch.storage", "_load_from_bytes") and self._nested:
            return self._nested(memoryview(*args))
        if function not in KNOWN:
            raise NotDataError(f"asks to call {function}")
        return None if self._dry else KNOWN[function](*_of(args, tuple))

    def _do_build(self, _: Any) -> None:
        (state,) = self._popped(1)
        made = self._stack[-1]
        if isinstance(made, Object):
            made.state = state
        elif isinstance(made, Array):
            if not self._dry:
                filled(made, *_of(state, tuple)[1:])
        elif isinstance(made, Dtype):
            made.order = ">" if _of(state, tuple)[1] == ">" else "<"
        elif isinstance(made, Name):
            raise NotDataError(f"asks to change {made}")
        # attributes of tensors and of ordered dicts (hooks, versions) are no data

    def _do_persid(self, key: Any) -> None:
        if self._stored is None:
            raise NotDataError("refers to something outside of it")
        if not isinstance(key, tuple) or key[:1] not in (("storage",), ("module",)):
            raise NotDataError(f"refers to {key!r}")
        if key[0] == "module":
            self._stack.append(_of(key[1], Name))
            return
        _, kind, name, _, count, *view = key
        dtype = (
            STORAGES.get(kind.name) if isinstance(kind, Name) and kind.module in ("torch", "torch.storage") else None
        )
        if dtype is None or (view and view[0] is not None) or type(count) is not int or count < 0:
            raise NotDataError(f"has numbers of the type {kind}")
        if (name, dtype) not in self._storages:
            data = self._stored(str(name), count, dtype.itemsize)
            if not self._dry and len(data) != count * dtype.itemsize:
                raise NotDataError(f"has {len(data)} bytes where {count} numbers are said")
            self._storages[name, dtype] = Storage(data, dtype)
        self._stack.append(self._storages[name, dtype])

    def _do_binpersid(self, _: Any) -> None:
        self._do_persid(self._popped(1)[0])


def _settled(value: Any) -> Any:
    """An array as its tensor, once it goes somewhere."""
    return value.tensor if isinstance(value, Array) else value


def _of(value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise NotDataError(f"takes a {type(value).__name__} for a {kind.__name__}")
    return value
