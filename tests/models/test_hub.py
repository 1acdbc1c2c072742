"""Whether a model is there, asked of folders and of a hub that answers as a test says: in seconds, with the nearest name."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from asyncrl.errors import ConfigError
from asyncrl.learn.policies import locate
from asyncrl.models import hub
from asyncrl.models.hub import require_model


@pytest.fixture
def answering() -> Iterator[Callable[[int], str]]:
    """Starts a hub that answers with a status, 0 for one that never does; returns its address."""
    ended, servers = threading.Event(), []

    def start(status: int) -> str:
        class Hub(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not status:
                    ended.wait(60)
                    return
                self.send_response(status)
                self.send_header("X-Error-Code", "RepoNotFound" if status == 404 else "")
                self.end_headers()
                self.wfile.write(b'{"id": "some/model"}')

            def log_message(self, *words: object) -> None: ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Hub))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    ended.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model in it and a run's folder."""
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    (tmp_path / "models" / "qwen" / "config.json").write_text("{}")
    (tmp_path / "runs" / "sums").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("status", "name", "words"),
    [
        (
            404,
            "models/qwne",
            "model.path='models/qwne' is no folder here (did you mean ./models/qwen?), and Hugging Face has no",
        ),
        (404, "modls/qwen", "(did you mean ./models/qwen?)"),
        (404, "runs/nope", "(runs/ holds sums)"),
        (404, "some/model", "model.path='some/model' is no folder here, and Hugging Face has no model of that name"),
        (0, "runs/sum", "(did you mean ./runs/sums?), and Hugging Face, whose cache here does not hold it, can't be asked"),
    ],
)
def test_what_is_nowhere_is_told_with_the_nearest_folder(
    folder: Path, answering: Callable[[int], str], monkeypatch: pytest.MonkeyPatch, status: int, name: str, words: str
) -> None:
    monkeypatch.setattr(hub, "ANSWER_S", 0.2 if not status else 30.0)
    with pytest.raises(ConfigError) as caught:
        require_model(name, "model.path", endpoint=answering(status))
    assert words in str(caught.value)


@pytest.mark.parametrize("status", [200, 500])  # a hub in trouble is no reason to refuse: loading will tell
def test_a_hugging_face_id_passes(folder: Path, answering: Callable[[int], str], status: int) -> None:
    assert require_model("some/model", "model.path", endpoint=answering(status)) == "some/model (Hugging Face)"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./models/qwne", "'./models/qwne' is no folder here (did you mean ./models/qwen?), and Hugging Face has no model"),
        ("runs/sums/step_3/policy", "model.path='runs/sums/step_3/policy' is no folder here, and Hugging Face has no model"),
        ("{folder}/models/qwne", "does not exist (did you mean ./models/qwen?): nothing could be loaded"),
        ("{folder}/models", "has no config.json: nothing could be loaded"),
    ],
)
def test_what_looks_like_a_path_is_not_asked_for(folder: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_model(name.format(folder=folder), "model.path")  # without a hub in reach
    assert words in str(caught.value)


def test_a_tokenizer_may_be_any_of_its_files(folder: Path) -> None:
    assert require_model("models/qwen", "model.tokenizer", "tokenizer_config.json", "config.json") == "models/qwen"


def test_eval_of_a_run_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model='\./runs/smus' is no folder here \(did you mean \./runs/sums\?\)"):
        locate("./runs/smus")
