"""Nobody without a server's key can use it, and nobody learns the key: neither from files, arguments and the environment, nor
from errors and logs. The same with a real server: test_engine.py."""

import asyncio
import json
import logging
import os
import stat
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from asyncrl.config import EngineSpec, LimitsSpec, SGLangSpec
from asyncrl.errors import ConfigError, Unavailable
from asyncrl.generate.sglang.engine import SGLangEngine
from asyncrl.generate.sglang.keys import PrivateFolder, RunningServer, read_key, running_servers
from asyncrl.generate.sglang.server import LaunchCommand, SGLangServer
from asyncrl.generate.sglang.transfer import SharedMemory
from asyncrl.types import Version

WAIT_S = 20.0
KEY = "a-key-of-the-user's"
FACTS = {"tp_size": 1}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text(f"{KEY}\n")
    return path


# --------------------------------------------------------------------------------------------- a key in files


def test_a_new_key_lies_where_only_this_user_can_read_it() -> None:
    folder, other = PrivateFolder(), PrivateFolder()
    assert stat.S_IMODE(os.stat(folder.path).st_mode) == 0o700
    assert stat.S_IMODE(folder.config.stat().st_mode) == 0o600
    assert json.loads(folder.config.read_text()) == {"api-key": folder.key}  # JSON is YAML
    assert len(folder.key) == 64
    assert folder.key != other.key
    for made in (folder, other, other):
        made.close()
    assert not folder.path.exists()


def test_a_key_file_is_read(key_file: Path) -> None:
    assert read_key(str(key_file)) == KEY
    servers = running_servers(SGLangSpec(urls=("http://10.0.0.7:1", "http://10.0.0.8:1"), api_key_file=str(key_file)))
    assert servers == [RunningServer("http://10.0.0.7:1", KEY), RunningServer("http://10.0.0.8:1", KEY)]
    assert KEY not in repr(servers)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_file_that_others_can_read_is_refused(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(ConfigError, match=rf"has mode {mode:o}: other users.*chmod 600") as refusal:
        read_key(str(key_file))
    assert KEY not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "\n", "two words", "a\nb", "schlüssel", "\0"])
def test_a_key_file_without_a_key_is_refused(key_file: Path, text: str) -> None:
    key_file.write_text(text)
    with pytest.raises(ConfigError, match="does not hold one word of printable ASCII"):
        read_key(str(key_file))
    with pytest.raises(ConfigError, match=r"can't be read on this machine \(No such file or directory\)"):
        read_key(str(key_file.parent / "other"))


def test_servers_without_a_key_are_for_this_machine_only_and_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for local in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "https://127.3.2.1"):
        with caplog.at_level(logging.WARNING):
            assert running_servers(SGLangSpec(urls=(local,))) == [RunningServer(local)]
        assert f"{local} has no key: any user of this machine can run code with it" in caplog.text
        caplog.clear()
    for far in (
        "http://10.0.0.7:30000",
        "http://node-3:30000",
        "http://0.0.0.0:1",
        "http://[2001:db8::1]:1",
        "http://127.evil.net",
        "http://[127.0.0.1",
    ):
        with pytest.raises(ConfigError, match=r"whoever reaches a server that has no key can run code.*--api-key"):
            SGLangSpec(urls=(far,))


def test_a_key_file_that_could_not_be_used_is_refused() -> None:
    with pytest.raises(ConfigError, match="without urls: it would be ignored"):
        SGLangSpec(api_key_file="/key")
    with pytest.raises(ConfigError, match="is relative, and actors work in another folder"):
        SGLangSpec(urls=("http://127.0.0.1:1",), api_key_file="key")


# --------------------------------------------------------------------------------------- servers and their keys

SERVER = """
import json, os, sys
from aiohttp import web

# A server that gets its key as SGLang does, prints what it should not, and answers to nobody else.
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
key = json.load(open(options["--config"]))["api-key"]
print("my key is", key, flush=True)

async def respond(request):
    if request.path == "/health":
        return web.Response()
    if request.path == "/die":
        print("server_args", key, flush=True)
        os._exit(3)
    if request.headers.get("authorization") != "Bearer " + key and "--open" not in options:
        return web.json_response({"error": "Unauthorized"}, status=401)
    return web.json_response({"tp_size": 1, "told": key, "success": request.path != "/fail"})

app = web.Application()
app.router.add_route("*", "/{path:.*}", respond)
web.run_app(app, host="127.0.0.1", port=int(options["--port"]), print=None)
"""


def start(log: Path, *arguments: str) -> SGLangServer:
    return SGLangServer(LaunchCommand((sys.executable, "-c", SERVER, *arguments), {}, log), SharedMemory)


def test_a_server_that_is_started_has_a_key_that_no_argument_environment_or_error_shows(tmp_path: Path) -> None:
    async def run() -> None:
        server = start(tmp_path / "log")
        key = server.client.key
        try:
            await server.open(WAIT_S)
            told = []
            for pid in server.pids():
                for what in ("cmdline", "environ"):
                    with suppress(ProcessLookupError, FileNotFoundError):  # one of them may end meanwhile
                        told.append(Path(f"/proc/{pid}/{what}").read_bytes())
            assert any(b"python" in text for text in told)
            assert all(key.encode() not in text for text in told)
            assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600  # it may print its arguments
            with pytest.raises(Unavailable, match=r"status 200: .*\[redacted\]") as refusal:
                await server.client.post("/fail", {}, WAIT_S)
            assert key not in str(refusal.value)
            with pytest.raises(Unavailable):
                await server.client.post("/die", {}, WAIT_S)
            async with asyncio.timeout(WAIT_S):
                while server._process is not None and server._process.alive():
                    await asyncio.sleep(0.01)
            with pytest.raises(Unavailable, match=r"died; the end of its log:[^$]*server_args \[redacted\]") as death:
                server.check_alive()
            assert key not in str(death.value)
        finally:
            folder = Path(server._folder.path)  # type: ignore[union-attr]
            await server.close()
        assert not folder.exists()

    asyncio.run(run())


def test_a_server_that_takes_requests_without_its_key_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        server = start(tmp_path / "log", "--open", "yes")
        try:
            with pytest.raises(ConfigError, match=r"takes requests without its key: .*--admin-api-key alone leaves this open"):
                await server.open(WAIT_S)
        finally:
            await server.close()

    asyncio.run(run())


Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


def attached(answering: Any, respond: Respond, key: str, check: Callable[[SGLangServer], Awaitable[None]]) -> None:
    """Runs `check` with a server that is found running, which `respond`s."""

    async def run() -> None:
        async with answering(respond) as url:
            server = SGLangServer(RunningServer(url, key), SharedMemory)
            try:
                await check(server)
            finally:
                await server.close()

    asyncio.run(run())


async def guarded(request: web.Request) -> web.StreamResponse:
    if request.path != "/health" and request.headers.get("authorization") != f"Bearer {KEY}":
        return web.json_response({"error": "Unauthorized"}, status=401)
    return web.json_response(FACTS)


async def guarded_by_host(request: web.Request) -> web.StreamResponse:
    """As SGLang over a starlette that builds the URL from the Host header, and has its check go by the URL's path."""
    return web.json_response(FACTS) if request.host.endswith("/health?") else await guarded(request)


def test_a_running_server_takes_the_key_of_the_file_and_no_other(answering: Any) -> None:
    async def opens(server: SGLangServer) -> None:
        await server.open(WAIT_S)
        assert server.facts.tp_size == 1

    async def refused(server: SGLangServer) -> None:
        words = "refuses the key that it was sent" if server.client.key else "asks for a key"
        with pytest.raises(ConfigError, match=f"status 401: the server {words}.*set engine.sglang.api_key_file") as refusal:
            await server.open(WAIT_S)
        assert "another-key" not in str(refusal.value)

    attached(answering, guarded, KEY, opens)
    attached(answering, guarded, "another-key", refused)
    attached(answering, guarded, "", refused)


def test_a_guard_that_a_host_header_opens_is_none(answering: Any) -> None:
    async def refused(server: SGLangServer) -> None:
        with pytest.raises(ConfigError, match=r"takes requests without its key: .*a newer starlette"):
            await server.open(WAIT_S)

    attached(answering, guarded_by_host, KEY, refused)


def test_a_server_in_several_parts_is_refused(answering: Any) -> None:
    for parts in ({"dp_size": 2}, {"pp_size": 4}):

        async def respond(request: web.Request, parts: dict[str, int] = parts) -> web.StreamResponse:
            return web.json_response(FACTS | parts)

        async def refused(server: SGLangServer) -> None:
            with pytest.raises(ConfigError, match=r"data parallel ., pipeline parallel .: weights would reach only a part"):
                await server.open(WAIT_S)

        attached(answering, respond, "", refused)


def test_an_engine_whose_servers_take_another_key_ends_with_that_reason(answering: Any) -> None:
    async def check(server: SGLangServer) -> None:
        engine = SGLangEngine(
            [partial(SGLangServer, RunningServer(server.at.url, "another-key"), SharedMemory)],
            EngineSpec(kind="sglang"),
            LimitsSpec(),
            max_length=64,
            vocabulary=100,
        )
        engine.start()
        try:
            with pytest.raises(ConfigError, match="refuses the key that it was sent"):
                await asyncio.to_thread(engine.update_weights, Version(1, 1), {"w": torch.zeros(2)})
        finally:
            await asyncio.to_thread(engine.close)

    attached(answering, guarded, KEY, check)
