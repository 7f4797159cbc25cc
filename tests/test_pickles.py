"""Pickles are read without running anything, and what is hostile in them leaves no mark."""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from teachers.errors import CheckpointError
from teachers.pickle_values import KNOWN, Name, Object
from teachers.pickles import loads, read_pickle


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and torch.equal(found, wanted)
    if isinstance(wanted, np.ndarray):
        return same(found, torch.from_numpy(wanted.astype(wanted.dtype.newbyteorder("="))))
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, (list, tuple)):
        return type(found) is type(wanted) and all(same(a, b) for a, b in zip(found, wanted, strict=True))
    return bool(found == wanted)


VALUES: dict[str, Any] = {
    "numbers": [0, -1, 255, 65536, 2**40, -(2**70), 1.5, float("inf"), True, False, None, 1 + 2j],
    "texts": ["", "a\nb'\"\\", "\u00e9\u4e16", "x" * 1000, b"", b"\x00\xff"],
    "containers": {"l": [[], [1]], "t": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "s": {1, 2}, "f": frozenset({3})},
    "dicts": OrderedDict(a=1, b=defaultdict(list, c=[2])),
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns first": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "big-endian": np.arange(5, dtype=">i4"),
    "many": np.arange(5000, dtype=np.int64),
    "none": np.zeros((0, 3), np.float16),
    "bools": np.array([True, False]),
    "numpy numbers": [np.float64(0.5), np.int64(3), np.bool_(True)],
    "tensors": {
        "t": torch.arange(6.0).view(2, 3).t(),
        "half": torch.ones(3, dtype=torch.float16),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "zero": torch.tensor(2),
        "empty": torch.empty(0, 4),
        "part": torch.arange(100)[7:90:5],
    },
    "shared": (lambda a: [a, a])(np.arange(4.0)),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("what", VALUES)
def test_plain_values_come_back_in_every_protocol(what: str, protocol: int) -> None:
    value = VALUES[what]
    assert same(loads(pickle.dumps(value, protocol)), value)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("b", torch.arange(3))


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_checkpoints_with_classes_of_anywhere(zipped: bool, tmp_path: Path) -> None:
    net = Net()
    tied = torch.arange(10.0)
    held = {"net": net, "state": net.state_dict(), "args": argparse.Namespace(lr=0.1, out=PurePosixPath("a/b")),
            "tied": [tied, tied[2:5]], "dtype": torch.float32, "device": torch.device("cpu"),
            "size": torch.Size([1])}  # fmt: skip
    torch.save(held, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_pickle(tmp_path / "a.pt")
    assert same(found["state"], dict(net.state_dict()))
    assert isinstance(found["net"], Object)
    assert same(found["net"].state["_modules"]["layer"].state["_parameters"], dict(net.layer.named_parameters()))
    assert found["args"].state == {"lr": 0.1, "out": "a/b"}
    assert found["tied"][0].data_ptr() + 8 == found["tied"][1].data_ptr() and found["tied"][1].tolist() == [2, 3, 4]
    assert (found["dtype"], found["device"], found["size"]) == (Name("torch", "float32"), "cpu", (1,))


def test_large_tensors_stay_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "a.pt")
    monkeypatch.setattr(torch.Tensor, "clone", lambda *_: pytest.fail("copied"))
    assert read_pickle(tmp_path / "a.pt")["a"][999] == 999


def test_arrays_of_jax_need_no_jax() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    function, args, state = array.__reduce__()
    stream = io.BytesIO()
    pickler = pickle._Pickler(stream, 4)  # type: ignore[attr-defined]
    pickler.write(pickle.PROTO + b"\x04" + pickle.GLOBAL + b"jax._src.array\n_reconstruct_array\n")
    pickler.save((function, args, state, {"weak_type": False}))
    pickler.write(pickle.REDUCE + pickle.STOP)
    assert same(loads(stream.getvalue()), array)


# --- what is hostile


def asked(module: str, name: str, *args: Any, how: str = "reduce") -> bytes:
    """A pickle that asks for module.name(*args)."""
    body = pickle.dumps(args, 2)[2:-1]
    name_ = f"c{module}\n{name}\n".encode()
    parts = "".join(f"V{a}\n" for a in args).encode()
    return {
        "reduce": b"\x80\x02" + name_ + body + b"R.",
        "stack": b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93"
        + body + b"R.",
        "inst": b"(" + parts + f"i{module}\n{name}\n.".encode(),
        "obj": b"(" + name_ + parts + b"o.",
        "newobj": b"\x80\x02" + name_ + body + b"\x81.",
        "newobj_ex": b"\x80\x04" + name_ + body + b"}\x92.",
        "nested": b"\x80\x02]" + name_ + body + b"Ra.",
    }[how]  # fmt: skip


CALLS = {
    "os.system": ("posix", "system", "touch {}"),
    "eval": ("builtins", "eval", "open('{}', 'w')"),
    "exec of Python 2": ("__builtin__", "exec", "open('{}', 'w')"),
    "getattr": ("builtins", "getattr", "x", "upper"),
    "import": ("builtins", "__import__", "os"),
    "touch": ("pathlib", "Path.touch", "{}"),
    "torch.load": ("torch", "load", "{}"),
    "another tensor": ("torch._utils", "_rebuild_sparse_tensor", "{}"),
    "popen": ("subprocess", "Popen", "touch {}"),
    "apply": ("functools", "partial", "x"),
    "np.load": ("numpy", "load", "{}"),
    "attributes": ("torch._utils", "_rebuild_tensor_v2.__globals__", "x"),
    "of a jit": ("torch.jit", "load", "{}"),
}


@pytest.mark.parametrize("how", ["reduce", "stack", "nested"])
@pytest.mark.parametrize("what", CALLS)
def test_a_call_is_an_error_that_names_it(what: str, how: str, tmp_path: Path) -> None:
    module, name, *args = CALLS[what]
    file = tmp_path / "x.pkl"
    file.write_bytes(asked(module, name, *(a.format(tmp_path / "mark") for a in args), how=how))
    wanted = f"{module.replace('__builtin__', 'builtins')}.{name}"
    with pytest.raises(CheckpointError, match=rf"x\.pkl: asks to call {wanted}; code in a checkpoint is never run"):
        read_pickle(file)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("how", ["inst", "obj", "newobj", "newobj_ex"])
def test_an_object_of_an_unknown_class_is_a_record(how: str, tmp_path: Path) -> None:
    found = loads(asked("subprocess", "Popen", f"touch {tmp_path}/mark", how=how))
    assert isinstance(found, Object) and str(found.kind) == "subprocess.Popen"
    assert not (tmp_path / "mark").exists()


def test_a_record_cannot_be_called() -> None:
    made = b"\x80\x02cos\nPopen\n)\x81"
    with pytest.raises(ValueError, match="asks to call a Object"):
        loads(made + b"(X\x01\x00\x00\x00xtR.")
    assert loads(made + b"}X\x0c\x00\x00\x00__setstate__cposix\nsystem\nsbX\x01\x00\x00\x00xb.").state == "x"


def test_what_is_known_cannot_be_changed() -> None:
    before = dict(KNOWN)
    for name in ("collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "numpy\ndtype", "os\nsystem"):
        with pytest.raises(ValueError, match="asks to change"):
            loads(b"\x80\x02c" + name.encode() + b"\n}X\x01\x00\x00\x00ycos\nsystem\nsb.")
    assert before == KNOWN


def zip_of(pkl: bytes, data: bytes = b"", method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        # a fixed date: the time of now would be read as operations of a pickle where one is expected
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pkl, zipfile.ZIP_STORED)
        archive.writestr(zipfile.ZipInfo("archive/data/0"), data, method)
    return stream.getvalue()


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 4) -> bytes:
    """data.pkl of a tensor in a storage of `count` float32."""
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + long(count) + b"tQ"
    ints = b"".join(b"(" + b"".join(map(long, part)) + b"t" for part in (size, stride))
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + pid + long(offset) + ints + b"\x89}tR."


def long(number: int) -> bytes:
    return pickle.dumps(number, 2)[2:-1]


def array_of(shape: tuple[int, ...], dtype: str, data: Any) -> bytes:
    body = pickle.dumps((1, shape), 2)[2:-2]
    head = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85c_codecs\nencode\nX\x01\x00\x00\x00b"
    )
    head += b"X\x06\x00\x00\x00latin1\x86R\x87R"
    return head + b"(" + body[:0] + long(1) + b"".join([b"(", *map(long, shape), b"t"]) + (
        b"cnumpy\ndtype\nX" + struct.pack("<I", len(dtype)) + dtype.encode() + b"\x85R\x89"
    ) + pickle.dumps(data, 2)[2:-1] + b"tb."  # fmt: skip


inner = io.BytesIO()
torch.save(torch.arange(4.0).untyped_storage(), inner, _use_new_zipfile_serialization=False)
GOOD = inner.getvalue()


def in_torch(content: bytes) -> bytes:
    return b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(content)) + content + b"\x85R."


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a module within a tensor": (lambda: in_torch(GOOD.replace(b"ctorch.storage\nUntypedStorage", b"cos\nsystem")),
                                 "os.system|posix.system|no numbers|type"),
    "code within a tensor": (lambda: in_torch(asked("posix", "system", "true")), "a form that torch does not write"),
    "code behind a tensor's head": (lambda: in_torch(GOOD[:15] + asked("posix", "system", "true") * 4), "posix.system"),
    "torch within torch": (lambda: in_torch(GOOD[:15] + in_torch(GOOD)), "asks to call torch.storage._load_from_bytes"),
    "a zip within a pickle": (lambda: in_torch(zip_of(asked("posix", "system", "true"))), "does not write"),
    "code in a zip": (lambda: zip_of(asked("posix", "system", "true")), "asks to call posix.system"),
    "a program in a zip": (lambda: zip_of(b"").replace(b"archive/data/0", b"archive/code/0"), "TorchScript"),
    "packed": (lambda: zip_of(tensor((4,), (1,)), bytes(2**20), zipfile.ZIP_DEFLATED), "compressed"),
    "beyond its storage": (lambda: zip_of(tensor((5,), (1,)), bytes(16)), r"shape \[5\] in 4 numbers"),
    "before its storage": (lambda: zip_of(tensor((2,), (1,), -1), bytes(16)), r"shape \(2,\), .*offset -1"),
    "behind its storage": (lambda: zip_of(tensor((2,), (1,), 3), bytes(16)), r"shape \[2\] in 4 numbers"),
    "blown up": (lambda: zip_of(tensor((2**20, 2**20), (0, 0)), bytes(16)), "in 4 numbers"),
    "negative": (lambda: zip_of(tensor((2, 2), (1, -1)), bytes(16)), r"shape \(2, 2\), strides \(1, -1\)"),
    "less than said": (lambda: zip_of(tensor((4,), (1,), count=2**40), bytes(16)), "16 bytes where"),
    "an array of objects": (lambda: array_of((1,), "O8", ["x"]), "O8"),
    "objects as numbers": (lambda: array_of((1,), "f8", ["x"]), "an array of objects"),
    "an array of nothing": (lambda: array_of((2**30, 2**30), "f8", b""), "in 0 numbers"),
    "an array of text": (lambda: array_of((1,), "U9", b"x" * 36), "U9"),
    "an array of wide numbers": (lambda: array_of((1,), "f999999999", b""), "cut short|understood"),
    "memory by number": (lambda: asked("builtins", "bytearray", 2**45), "encode"),
    "memory by index": (lambda: b"\x80\x02Nr\xff\xff\xff\x7f" + b"0j\xfe\xff\xff\x7f.", "damaged"),
    "memory by length": (lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"x.", "damaged"),
    "a register of copyreg": (lambda: b"\x80\x02\x82\x01.", "instruction EXT1"),
    "something outside": (lambda: b"Pposix\n.", "outside of it"),
    "stack underflow": (lambda: b"\x80\x02R.", "more than it has"),
    "no end": (lambda: b"\x80\x02N", "damaged"),
    "unhashable": (lambda: b"\x80\x02}]Ns.", "damaged"),
    "nothing": (lambda: b"", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_data_is_refused_at_once(what: str, tmp_path: Path) -> None:
    make, reason = HOSTILE[what]
    content = make()
    (tmp_path / "x.pkl").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=reason):
        read_pickle(tmp_path / "x.pkl")
    with pytest.raises(ValueError):
        loads(content)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def test_a_file_of_instructions_alone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachers.pickle_machine.MOST", 1000)
    with pytest.raises(ValueError, match="more than 1000 instructions"):
        loads(b"]" * 5000 + b".")


def test_every_instruction_is_known_or_refused() -> None:
    from teachers.pickle_machine import _CONSTANTS, _EMPTY, _GATHERED, _SHORT_TUPLES, Machine

    done = {*_CONSTANTS, *_EMPTY, *_GATHERED, *_SHORT_TUPLES, "STOP"}
    others = {
        o.name for o in pickletools.opcodes if o.name not in done and not hasattr(Machine, f"_do_{o.name.lower()}")
    }
    assert others == {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere_is_refused(zipped: bool, tmp_path: Path) -> None:
    torch.save(
        {"a": torch.arange(30.0), "b": torch.ones(2, 2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped
    )
    whole = (tmp_path / "a.pt").read_bytes()
    for end in range(1, len(whole), 7):
        (tmp_path / "b.pt").write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"b\.pt: "):
            read_pickle(tmp_path / "b.pt")
