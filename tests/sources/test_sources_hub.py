"""Hub models, against a local server that speaks the Hub's endpoints as huggingface_hub uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One public repository org/tiny, one gated org/gated; branch main is COMMIT."""

    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, str | None]]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((path, self.headers.get("Range")))  # type: ignore[attr-defined]
        if "org/gated" in path:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if "org/tiny" not in path:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})
        if path.startswith("/api/models/org/tiny/tree"):
            entries = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in TINY.iterdir()
            ]
            return self._send(200, json.dumps(entries).encode(), {})
        if path.startswith("/api/models/org/tiny"):
            revision = path.partition("/revision/")[2]
            if revision not in ("", "main", COMMIT):
                return self._send(
                    404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"}
                )
            files = [{"rfilename": p.name, "size": p.stat().st_size} for p in TINY.iterdir()]
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0}
            return self._send(200, json.dumps(info).encode(), {})
        name = path.rpartition("/")[2]
        return self._file(TINY / name, body)

    def _file(self, path: Path, body: bool) -> None:
        data = path.read_bytes()
        headers = {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        ranged = self.headers.get("Range")
        if ranged and body:
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1, len(data)) if last else len(data)
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
            return self._send(206, data[int(first) : stop], headers)
        return self._send(200, data, headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def qbuild(tmp_path: Path, port: int, *words: str) -> tuple[int, dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "qbuild", *words, "target=gguf/q8_0", "format=json", f"store.dir={tmp_path}/store"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    return done.returncode, json.loads(done.stdout)


def test_a_plan_reads_headers_only(hub: Any, tmp_path: Path) -> None:
    code, plan = qbuild(tmp_path, hub.server_port, "plan", "model.source=org/tiny")
    assert code == 0, plan
    assert plan["targets"]["q8_0"]["verdicts"] == {"run": 29}
    ranges = [r for path, r in hub.requests if path.endswith("model.safetensors")]
    assert ranges
    assert all(ranges), "weights were asked for whole"
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_build_pins_the_commit_and_equals_a_local_build(hub: Any, tmp_path: Path) -> None:
    code, result = qbuild(tmp_path, hub.server_port, "model.source=org/tiny", f"out={tmp_path}/out")
    assert code == 0, result
    assert result["model"]["revision"] == COMMIT
    assert Path(result["targets"]["q8_0"]["path"]).name == "tiny-Q8_0.gguf"
    code, again = qbuild(tmp_path, 9, "model.source=org/tiny", f"out={tmp_path}/out", "offline=true")
    assert code == 0, again
    assert again["totals"]["computed"] == 0


@pytest.mark.parametrize(
    ("source", "words", "fact", "remedy"),
    [
        ("org/gated", [], "gated", "HF_TOKEN"),
        ("org/missing", [], "not on the Hub", "spelling"),
        ("org/tiny", ["model.revision=nope"], "no revision", "model.revision="),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "build"])
def test_what_the_hub_refuses_is_explained(
    hub: Any, tmp_path: Path, verb: str, source: str, words: list[str], fact: str, remedy: str
) -> None:
    code, document = qbuild(tmp_path, hub.server_port, verb, f"model.source={source}", *words)
    assert code == 4, document
    assert fact in document["error"]["fact"]
    assert remedy in document["error"]["remedy"]


@pytest.mark.parametrize("words", [[], ["offline=true"]])
@pytest.mark.parametrize("verb", ["plan", "build"])
def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, verb: str, words: list[str]) -> None:
    code, document = qbuild(tmp_path, 9, verb, "model.source=org/tiny", *words)
    assert code == 4, document
    assert "model.source=DIRECTORY" in document["error"]["remedy"]
