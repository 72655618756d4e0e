"""A Hugging Face hub on this machine: a server of a folder, with the answers of the real one to what goes wrong.

`HF_ENDPOINT` has to name it before huggingface_hub is imported, so that what uses it runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789" * 4
GATED, MISSING = "someone/gated", "someone/missing"


@contextmanager
def small_hub(folder: Path, commits: dict[str, str] | None = None) -> Iterator[str]:
    """The address of a hub that serves `folder/owner/name` as the data set owner/name, at one commit each.

    `commits` names those that are not COMMIT; GATED is there and closed; all others are missing.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer()

        def _answer(self) -> None:
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            is_api = parts[0] == "api"
            parts = parts[1:] if is_api else parts
            if parts[0] != "datasets" or len(parts) < 3:
                return self._fail(404, "RepoNotFound")
            hub, rest = "/".join(parts[1:3]), parts[3:]
            if hub == GATED:
                return self._fail(403 if "Authorization" in self.headers else 401, "GatedRepo")
            place = folder / hub
            if not place.is_dir():
                return self._fail(401, "RepoNotFound")
            commit = (commits or {}).get(hub, COMMIT)
            if len(rest) > 1 and rest[1] not in ("main", commit):
                return self._fail(404, "RevisionNotFound")
            names = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
            files = {name: (place / name).read_bytes() for name in names}
            if not is_api:
                name = "/".join(rest[2:])
                if rest[0] != "resolve" or name not in files:
                    return self._fail(404, "EntryNotFound")
                etag = hashlib.sha1(files[name]).hexdigest()
                return self._send(files[name], {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            if rest[:1] == ["tree"]:
                below = "/".join(rest[2:])
                return self._send_json(
                    [each for each in self._with_folders(entries) if self._is_shown(str(each["path"]), below)]
                )
            if rest[:1] == ["paths-info"]:
                asked = json.loads(self.body).get("paths", [])
                return self._send_json(
                    [each for each in self._with_folders(entries) if each["path"] in asked]
                )
            self._send_json(
                {
                    "id": hub,
                    "sha": commit,
                    "private": False,
                    "siblings": [{"rfilename": name} for name in files],
                }
            )

        def _with_folders(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
            folders = {str(up) for each in entries for up in Path(each["path"]).parents if str(up) != "."}
            return entries + [
                {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders
            ]

        def _is_shown(self, path: str, below: str) -> bool:
            inside = path.startswith(f"{below}/") if below else True
            deep = "recursive=true" in self.path.lower()
            return inside and (deep or "/" not in path.removeprefix(f"{below}/"))

        def _send_json(self, value: Any) -> None:
            self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, data: bytes, headers: dict[str, str]) -> None:
            first, last, status = 0, len(data), 200
            asked = self.headers.get("Range", "")
            if asked.startswith("bytes="):
                start, _, stop = asked.removeprefix("bytes=").partition("-")
                first, last, status = int(start), int(stop) + 1 if stop else last, 206
            body = data[first:last]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
