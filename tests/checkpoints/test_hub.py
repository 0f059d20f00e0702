"""Names in a hub: one that answers, one that is silent, and the cache."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch

from geffect.checkpoints.folders import positions_of, tokenizer_of
from geffect.checkpoints.loading import Loader, model_of
from tests.utils import shallow as tiny
from tests.utils.chat import make_tokenizer

NAME = "someone/words"
COMMIT = "0" * 40
EMBEDDING = "base_model.model.model.embed_tokens.weight"


class Hub(ThreadingHTTPServer):
    """A hub with the files of a folder; without one it hangs up on everybody."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Answer)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.asked.append(self.path)
        folder, name = self.server.folder, self.path.rpartition("/")[2]
        if folder is None:
            self.close_connection = True
            return
        file = folder / name
        there = file.is_file() and f"/{NAME}/" in self.path
        content = file.read_bytes() if there else b""
        self.send_response(200 if there else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(content)))
        if not there:
            known = f"/{NAME}/" in self.path
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """The folder of a tokenizer and of a model."""
    make_tokenizer().save_pretrained(tmp_path / "words")
    tiny.llama().save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def hub(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(words) as served:
        constants = huggingface_hub.constants
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.address + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        thread = threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def test_a_name_is_had_from_the_hub_and_then_from_its_cache(hub: Hub, tmp_path: Path) -> None:
    for silent in (False, True):
        if silent:
            hub.folder = None
            hub.asked.clear()
        # A base that is gone does not hide the next one.
        assert tokenizer_of([tmp_path / "gone", NAME]).eos_token == "<eos>"
        assert positions_of(NAME) == tiny.llama().config.max_position_embeddings
        weight = model_of(NAME).get_input_embeddings().weight
        assert torch.equal(weight, tiny.llama().get_input_embeddings().weight)
    assert len(hub.asked) == 1


READERS: list[Callable[[str], object]] = [lambda name: tokenizer_of([name]), positions_of, model_of]


@pytest.mark.parametrize("read", READERS, ids=["tokenizer", "configuration", "model"])
def test_a_silent_hub_that_nothing_is_known_of_is_asked_once(
    read: Callable[[str], object], hub: Hub
) -> None:
    hub.folder = None
    says = r"^`someone/words` should be a folder, or .* Found no .* no answer .*: .*\. Check the"
    with pytest.raises(FileNotFoundError, match=says) as error:
        read(NAME)
    assert len([path for path in hub.asked if NAME in path]) == 1
    assert "\n" not in str(error.value)


def test_the_base_that_an_adapter_names(hub: Hub, adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "checkpoint-8", tmp_path / "checkpoint-8")
    config = tmp_path / "checkpoint-8" / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": NAME})
    )
    model = Loader().load(tmp_path / "checkpoint-8")
    assert torch.equal(model.get_parameter(EMBEDDING), tiny.llama().get_input_embeddings().weight)
    with pytest.raises(FileNotFoundError, match="`someone/others` should be a folder"):
        hub.folder = None
        Loader(base="someone/others").load(tmp_path / "checkpoint-8")


def test_what_the_hub_says_of_a_name_is_told(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match=r"Found no `tokenizer_config.json` in `no/words`"):
        tokenizer_of(["no/words"])
    with pytest.raises(OSError, match="no/words is not a local folder"):
        positions_of("no/words")


def test_what_is_no_name_of_a_hub_is_asked_nobody(hub: Hub, tmp_path: Path) -> None:
    for read in READERS:
        with pytest.raises(FileNotFoundError, match="gone` should be a folder, or a name"):
            read(str(tmp_path / "gone"))
    assert not [path for path in hub.asked if "gone" in path]
