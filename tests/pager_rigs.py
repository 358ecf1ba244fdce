"""Pagers over every backend for one suite of tests: host threads, a file, a fake CUDA driver, a real GPU."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import chunkft.streaming.pager as pager_module
from chunkft.streaming import Pager
from chunkft.streaming.files import PageFile
from chunkft.streaming.place import Place

ODD = [1, 300, 4096, 70_001, 257]
ROOT = Path(__file__).parent.parent


class Rig:
    """A backend under test. `settle` waits until the host may touch slots that were acquired."""

    name = "host"

    def __init__(self, tmp_path: Path) -> None:
        self._tmp_path = tmp_path
        self._made = 0

    def pager(self, pages: Any, **options: Any) -> Pager:
        return Pager(pages, **self.options() | options)

    def options(self) -> dict[str, Any]:
        return {"device": "cpu"}

    def settle(self) -> None:
        return

    def read(self, tensor: torch.Tensor) -> bytes:
        self.settle()
        return bytes(tensor.cpu().numpy())

    def write(self, tensor: torch.Tensor, content: bytes) -> None:
        self.settle()
        tensor.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))


class FileRig(Rig):
    name = "file"

    def options(self) -> dict[str, Any]:
        self._made += 1
        return {"device": "cpu", "state_dir": self._tmp_path / f"state{self._made}"}


class CudaRig(Rig):
    name = "cuda"

    def options(self) -> dict[str, Any]:
        return {"device": "cuda"}


class CudaFileRig(FileRig):
    name = "cuda-file"

    def options(self) -> dict[str, Any]:
        return super().options() | {"device": "cuda"}


def fake_library() -> Path | None:
    """The fake driver of the C++ tests, if it was built."""
    if "CHUNKFT_FAKECUDA_LIBRARY" in os.environ:
        return Path(os.environ["CHUNKFT_FAKECUDA_LIBRARY"])
    built = sorted(
        (ROOT / "build").glob("core-*/libchunkft_fakecuda.so"), key=lambda path: path.stat().st_mtime
    )
    plain = [path for path in built if path.parent.name.count("-") == 1]
    return plain[-1] if plain else None


class _Range(ctypes.Structure):
    """`struct fakecuda_range`."""

    _fields_ = (("address", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("write", ctypes.c_int))


class FakeCudaRig(Rig):
    """Slots are CPU tensors that the fake driver takes for device memory; its checker sees every copy and wait."""

    name = "fakecuda"

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self._library = fake_library()
        self.driver = ctypes.CDLL(str(self._library))
        self.driver.fakecuda_violation.restype = ctypes.c_char_p
        self.driver.fakecuda_violations.restype = ctypes.c_size_t
        self.driver.fakecuda_declare_device.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._slots: list[torch.Tensor] = []
        self.busy_slots = False

    def start(self) -> None:
        driver = self.driver
        driver.fakecuda_reset(ctypes.c_uint64(7))
        context = self._context = ctypes.c_void_p()
        self.stream = ctypes.c_void_p()
        for result in (
            driver.cuInit(0),
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0),
        ):
            assert result == 0
        self.call("cuStreamCreate", ctypes.byref(self.stream), 1)

    def stop(self) -> None:
        found = [self.driver.fakecuda_violation(i) for i in range(self.driver.fakecuda_violations())]
        self.driver.fakecuda_reset(ctypes.c_uint64(0))
        assert not found, b"\n".join(found).decode()

    def call(self, function: str, *arguments: Any) -> None:
        """Calls the driver, from any thread."""
        assert self.driver.cuCtxPushCurrent_v2(self._context) == 0
        assert getattr(self.driver, function)(*arguments) == 0
        assert self.driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 0

    def options(self) -> dict[str, Any]:
        return {"device": "cuda"}

    def settle(self) -> None:
        self.call("cuStreamSynchronize", self.stream)

    def place(self, device: Any) -> Place:
        rig = self

        class Fence:
            """As torch's events: recorded on the caller's stream, waited for by any thread."""

            def __init__(self) -> None:
                self.event = ctypes.c_void_p()
                rig.call("cuEventCreate", ctypes.byref(self.event), 2)

            def record(self) -> None:
                rig.call("cuEventRecord", self.event, rig.stream)

            def synchronize(self) -> None:
                rig.call("cuEventSynchronize", self.event)

        return Place(
            torch.device("cuda", 0), "cuda", self._empty, lambda: self.stream.value, self.settle, Fence
        )

    def _empty(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            slot = torch.empty(nbytes, dtype=torch.uint8)
        self.driver.fakecuda_declare_device(slot.data_ptr(), nbytes)
        self._slots.append(slot)
        if self.busy_slots:
            self.launch_write(slot)
        return slot

    def launch_write(self, slot: torch.Tensor) -> None:
        """Gives the caller's stream work that writes to a slot, as a former owner of its memory may have."""
        written = _Range(slot.data_ptr(), slot.nbytes, 1)
        launched = self.driver.fakecuda_launch(
            self.stream,
            b"former owner",
            ctypes.byref(written),
            ctypes.c_size_t(1),
            None,
            None,
            ctypes.c_double(1),
        )
        assert launched == 0


class FakeCudaFileRig(FakeCudaRig):
    """The checker also learns when threads read host memory into the file, and fill it from there."""

    name = "fakecuda-file"

    def watch(self, monkeypatch: Any) -> None:
        for name, touch in (
            ("write", self.driver.fakecuda_host_read),
            ("read", self.driver.fakecuda_host_write),
        ):
            monkeypatch.setattr(PageFile, name, self._watched(getattr(PageFile, name), touch))

    def _watched(self, method: Callable[..., None], touch: Any) -> Callable[..., None]:
        def watched(file: PageFile, page: int, buffer: memoryview) -> None:
            address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
            touch(ctypes.c_void_p(address), ctypes.c_size_t(file.sizes[page]), b"file")
            method(file, page, buffer)

        return watched

    def options(self) -> dict[str, Any]:
        self._made += 1
        return {"device": "cuda", "state_dir": self._tmp_path / f"state{self._made}"}


RIGS: dict[str, Callable[[Path], Rig]] = {
    rig.name: rig for rig in (Rig, FileRig, FakeCudaRig, FakeCudaFileRig, CudaRig, CudaFileRig)
}


def names() -> list[str]:
    """The rigs to test; those of a GPU only where there is one."""
    return [name for name in RIGS if torch.cuda.is_available() or not name.startswith("cuda")]


def missing(name: str) -> str | None:
    """Why a rig cannot be had here."""
    if name.startswith("fake") and fake_library() is None:
        return "needs the fake driver: make core-test"
    return None


@contextmanager
def opened(name: str, tmp_path: Path, monkeypatch: Any) -> Iterator[Rig]:
    """A rig, ready for use; the fake driver is asked afterwards whether it saw a race."""
    rig = RIGS[name](tmp_path)
    if isinstance(rig, FakeCudaRig):
        monkeypatch.setenv("CHUNKFT_LIBCUDA", str(rig._library))
        monkeypatch.setattr(pager_module, "place_of", rig.place)
        rig.start()
        if isinstance(rig, FakeCudaFileRig):
            rig.watch(monkeypatch)
        yield rig
        rig.stop()
    else:
        yield rig


def noise(nbytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def fill(rig: Rig, pager: Pager, seed: int = 0) -> list[bytes]:
    contents = [noise(size, seed + page) for page, size in enumerate(pager.pages)]
    for page, content in enumerate(contents):
        rig.write(pager.acquire(page, load=False), content)
        pager.release(page)
    return contents
