"""KV by NVIDIA's NIXL: over NVLink, RDMA or TCP, whatever its UCX finds between two workers.

https://github.com/ai-dynamo/nixl. The collector reads out of the giver's memory. Installed by
`pip install --no-deps nixl nixl-cu12` beside the extra `nixl`; without a GPU and
without RDMA it works over TCP and shared memory (`UCX_TLS`), as the tests have it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from collections.abc import AsyncGenerator, Generator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio
import msgspec
from msgspec import Struct

from origin_gpu.kv_ways import Refused

POLL_S = 0.0005  # between looks at a transfer under way
UNDONE_S = 10.0  # that a transfer nobody wants any more may take to end
_MAP_FIXED = 0x10  # Linux
_ZEROS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class NotInstalled(Exception):
    """NIXL is not there, or does not work here. The message says what to do."""


class _Told(Struct, frozen=True):
    """Where a collector reads."""

    agent: bytes  # metadata of the giver's agent, with the memory registered
    address: int
    num_bytes: int


class Nixl:
    """One agent a process. Raises `NotInstalled`."""

    kind = "nixl"
    lasting = False  # what lies there after the loan is read as if it were KV

    def __init__(self) -> None:
        api = _api()
        try:
            name = f"edgefire-{os.getpid()}-{secrets.token_hex(4)}"
            self._agent = api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
        except Exception as exc:
            raise NotInstalled(f"NIXL does not start: {exc}") from exc
        self._undone: list[object] = []  # memory that a transfer may still write to

    def about(self) -> bytes:
        return b""

    def fits(self, about: bytes) -> bool:
        return True

    @asynccontextmanager
    async def lend(self, path: Path, num_bytes: int, about: bytes) -> AsyncGenerator[bytes, None]:
        with (
            _mapped(path, num_bytes, outlasting=True) as address,
            self._registered(address, num_bytes) as memory,
        ):
            try:
                agent = self._agent.get_partial_agent_metadata(memory, inc_conn_info=True)
            except Exception as exc:
                raise Refused(f"NIXL: {exc}") from exc
            yield msgspec.msgpack.encode(_Told(agent, address, num_bytes))

    async def take(self, said: bytes, num_bytes: int, into: Path) -> None:
        try:
            told = msgspec.msgpack.decode(said, type=_Told)
        except msgspec.DecodeError as exc:
            raise Refused(f"NIXL: {exc}") from exc
        if told.num_bytes != num_bytes:
            raise Refused(f"NIXL: {told.num_bytes} bytes lent, not {num_bytes}")
        _make(into, num_bytes)
        with ExitStack() as memory:
            memory.enter_context(_removing(into))
            address = memory.enter_context(_mapped(into, num_bytes))
            memory.enter_context(self._registered(address, num_bytes))
            transfer = self._begin(told, address)
            try:
                await transfer.wait_ended()
            finally:
                if not transfer.ended:  # cancelled
                    with anyio.move_on_after(UNDONE_S, shield=True):
                        await transfer.wait_ended()
                if not transfer.ended:  # it may still write: what it writes to has to stay
                    self._undone.append(memory.pop_all())
            if transfer.state != "DONE":
                raise Refused("NIXL: the transfer failed")

    def _begin(self, told: _Told, address: int) -> _Transfer:
        agent = self._agent
        try:
            name = agent.add_remote_agent(told.agent)
            here = agent.get_xfer_descs([(address, told.num_bytes, 0)], "DRAM")
            there = agent.get_xfer_descs([(told.address, told.num_bytes, 0)], "DRAM")
            handle = agent.initialize_xfer("READ", here, there, name)
            return _Transfer(agent, handle, agent.transfer(handle))
        except Exception as exc:
            raise Refused(f"NIXL: {exc}") from exc

    @contextmanager
    def _registered(self, address: int, num_bytes: int) -> Generator[Any, None, None]:
        try:
            memory = self._agent.register_memory([(address, num_bytes, 0, "")], "DRAM")
        except Exception as exc:
            raise Refused(f"NIXL: {exc}") from exc
        try:
            yield memory
        finally:
            with suppress(Exception):
                self._agent.deregister_memory(memory)


def _api() -> Any:
    """Its module: `nixl` chooses the one for the CUDA that is here; alone one of those will do."""
    for name in ("nixl", "nixl_cu13", "nixl_cu12"):
        with suppress(ImportError):
            return import_module(f"{name}._api")
    raise NotInstalled("NIXL is missing: pip install --no-deps nixl nixl-cu12")


class _Transfer:
    """One under way."""

    def __init__(self, agent: Any, handle: Any, state: str) -> None:
        self._agent, self._handle = agent, handle
        self.state = state

    @property
    def ended(self) -> bool:
        return self.state in {"DONE", "ERR"}

    async def wait_ended(self) -> None:
        while not self.ended:
            await anyio.sleep(POLL_S)
            try:
                self.state = self._agent.check_xfer_state(self._handle)
            except Exception:  # noqa: BLE001  the other end is gone, most likely
                self.state = "ERR"
        with suppress(Exception):
            self._handle.release()


@contextmanager
def _removing(path: Path) -> Generator[None, None, None]:
    """A file that stays if all goes well."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def _mapped(path: Path, num_bytes: int, *, outlasting: bool = False) -> Generator[int, None, None]:
    """The address of a file in memory. Outlasting, zeros are there ever after if the block fails.

    For a collector that was given up may read on, and UCX over TCP reads for it in this process:
    it was a segmentation fault (2026-11-27). The zeros take addresses, and no memory.
    """
    with path.open("r+b") as file:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = _map(num_bytes, access, mmap.MAP_SHARED, handle=file.fileno())
    try:
        yield address
    except BaseException:
        if outlasting:
            _map(num_bytes, mmap.PROT_READ, _ZEROS | _MAP_FIXED, address=address)
        else:
            _munmap(address, num_bytes)
        raise
    _munmap(address, num_bytes)


def _map(
    num_bytes: int, access: int, flags: int, *, address: int | None = None, handle: int = -1
) -> int:
    """As mmap(2): that of Python never lets go of an address without a hole. Raises OSError."""
    found: int = _mmap(address, num_bytes, access, flags, handle, 0)
    if found == ctypes.c_void_p(-1).value:
        raise OSError(number := ctypes.get_errno(), os.strerror(number))
    return found


def _make(path: Path, num_bytes: int) -> None:
    """A new file of so many bytes, with room for them: a mapping without is a signal."""
    with path.open("xb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError:
            path.unlink()
            raise
