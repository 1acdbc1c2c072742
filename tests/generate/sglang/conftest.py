"""A real SGLang server on CPU (deploy/sglang-cpu), for the whole session, and the tiny random model that it serves."""

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from aiohttp import web
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncrl.generate.sglang.process import free_port

START_S = 120.0
COMMAND = "sglang-cpu-server"

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[..., AbstractContextManager[tuple[str, int]]]


@pytest.fixture(scope="session")
def answering() -> Callable[[Respond], AbstractAsyncContextManager[str]]:
    """answering(respond): a server that gives `respond` to everything; yields its address."""

    @asynccontextmanager
    async def serve(respond: Respond) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", respond)
        runner, port = web.AppRunner(app, shutdown_timeout=0.1), free_port()
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            yield f"http://127.0.0.1:{port}"
        finally:
            await runner.cleanup()

    return serve


@pytest.fixture(scope="session")
def sglang_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen3: 0.85M parameters, fp32, vocabulary 512, tied embeddings, lively (not flat) logits."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    folder = tmp_path_factory.mktemp("sglang-model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def serve_sglang(sglang_on_cpu: None, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """serve_sglang(model, *arguments) is a context: (URL, pid of the process group) of a server that is gone at its end."""

    @contextmanager
    def serve(model: Path, *arguments: str, dtype: str = "float32") -> Iterator[tuple[str, int]]:
        port = free_port()
        options = {
            "--model-path": str(model),
            "--dtype": dtype,
            "--port": str(port),
            "--max-total-tokens": "65536",
            "--max-running-requests": "64",
            "--mem-fraction-static": "0.3",
        }
        command = [COMMAND, *(part for option in options.items() for part in option), "--skip-tokenizer-init", *arguments]
        log = tmp_path_factory.mktemp("sglang-log") / "server.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        try:
            _until_ready(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            _kill(process)

    return serve


@pytest.fixture(scope="session")
def sglang_server(serve_sglang: Serve, sglang_model: Path) -> Iterator[str]:
    """URL of a running server of `sglang_model`, without a radix cache."""
    with serve_sglang(sglang_model, "--disable-radix-cache") as (url, _):
        yield url


def _until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):  # it does not listen yet, or is still loading
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            pytest.fail(f"the SGLang server is not up (exit code {process.poll()}, after at most {START_S:g} s):\n{tail}")
        time.sleep(0.2)  # between two polls of a process that tells nothing by itself


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
