"""`hf-pdecay compress` and `decompress`, and the Hub, which a server of this machine stands for."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hf_pdecay import compress, push_to_hub
from hf_pdecay.cli.main import main

from ..helpers.storage_models import files_of, saved


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    saved("gpt2", tmp_path / "plain")
    (tmp_path / "plain" / "pytorch_model.bin").write_bytes(b"")
    plain, small, back = (str(tmp_path / name) for name in ("plain", "small", "back"))
    assert main(["compress", plain, small, "--zstd", "--max-shard-size", "5KB"]) == 0
    out = capsys.readouterr().out
    assert "Left out, weights in other formats: pytorch_model.bin" in out
    rows = {
        words[0]: words[1:]
        for line in out.splitlines()
        if len(words := line.replace("│", " ").replace("┃", " ").split()) > 3
    }
    size = sum(file.stat().st_size for file in Path(small).glob("*.safetensors"))
    assert rows["all"] == ["28", "114,176", f"{size:,}", f"{size / 114176:.1%}"]
    assert len(list(Path(small).glob("*.safetensors"))) > 1
    assert main(["decompress", small, back]) == 0
    assert "114,176" in capsys.readouterr().out
    for way, source in (("compress", plain), ("decompress", small)):
        assert main([way, source, back]) == 2
        assert f"hf-pdecay {way}: Invalid out: {back!r} is there and not empty" in capsys.readouterr().err
        assert main([way, source, back, "--overwrite"]) == 0


def test_what_cannot_be_done_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("gpt2", tmp_path / "plain")
    for number in (8, 12, 16):
        saved("gpt2", tmp_path / "run" / f"checkpoint-{number}")
        if number < 16:  # the last one is not whole
            (tmp_path / "run" / f"checkpoint-{number}" / "trainer_state.json").write_text('{"global_step": 8}')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for words, sentence in (
        (
            ["decompress", str(tmp_path / "plain"), str(tmp_path / "out")],
            "are not compressed",
        ),
        (
            ["compress", str(tmp_path / "plain"), str(tmp_path / "out"), "--max-shard-size", "big"],
            "max_shard_size='big'",
        ),
        (["compress", str(tmp_path / "none"), str(tmp_path / "out")], "is not a folder here"),
        (
            ["compress", str(tmp_path / "run"), str(tmp_path / "out")],
            f"only checkpoints of a run; the newest whole one is {str(tmp_path / 'run' / 'checkpoint-12')!r}.",
        ),
        (
            ["compress", str(tmp_path / "adapter"), str(tmp_path / "out")],
            "it is an adapter, and a whole model is needed",
        ),
        (
            ["compress", str(tmp_path / "empty"), str(tmp_path / "out")],
            "has no config.json; name the folder of a model",
        ),
    ):
        assert main(words) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files takes: it commits what it is sent."""

    files: dict[str, bytes]
    seen: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.seen.append(self.path)
        host = f"http://{self.headers['host']}"
        if self.path == "/api/repos/create":
            name = "/".join(filter(None, (json.loads(body).get("organization"), json.loads(body)["name"])))
            self.answer({"url": f"{host}/{name}", "name": name})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{host}/me/small/commit/1234", "commitOid": "1234", "success": True})
        else:
            self.answer({})

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.answer({"name": "me", "type": "user", "id": "me/small", "sha": "1" * 40, "siblings": []})

    def answer(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("OneHub", (Hub,), {"files": {}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_push_to_hub(tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    address, handler = hub
    saved("gpt2", tmp_path / "plain")
    (tmp_path / "plain" / "README.md").write_text("---\nlicense: mit\n---\n# card\n")
    words = ["compress", str(tmp_path / "plain"), str(tmp_path / "small"), "--push-to-hub", "me/small"]
    env = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_of_a_test",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "hf_pdecay", *words], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr + str(handler.seen)
    assert done.stdout.split()[-1] == f"{address}/me/small/commit/1234"
    assert handler.files == files_of(tmp_path / "small")


def test_only_a_models_folder_is_pushed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json; name the folder of a model"):
        push_to_hub(tmp_path, "me/small")


def test_a_name_on_the_hub_is_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download itself is huggingface_hub's; what it is asked for is ours."""
    import huggingface_hub

    saved("gpt2", tmp_path / "plain")
    asked: list[tuple[str, list[str]]] = []

    def fetched(name: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        assert revision is None
        asked.append((name, ignore_patterns))
        return str(tmp_path / "plain")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.chdir(tmp_path)
    compress("me/plain", tmp_path / "small")
    assert asked[0][0] == "me/plain" and "*.bin" in asked[0][1] and "*.safetensors" not in asked[0][1]
    assert (tmp_path / "small" / "model.safetensors").is_file()
