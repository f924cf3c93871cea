"""A local server with the part of the Hugging Face hub's HTTP interface that uploads use, without Xet (HF_HUB_DISABLE_XET=1).

It accepts one token and records the requests: `created` has those to create a repository, `files` the committed
contents by path, and `commits` the commit messages.
"""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_right"


class Hub:
    def __init__(self):
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}  # large files by their sha256
        self.refuse_commits = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(*hub.get(self.path, self.headers))

            def do_POST(self):
                self.answer(*hub.post(self.path, self.body(), self.headers))

            def do_PUT(self):
                hub.objects[self.path.rpartition("/")[2]] = self.body()
                self.answer(200, {})

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers["Content-Length"]))

            def answer(self, status: int, content: dict):
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def get(self, path: str, headers) -> tuple[int, dict]:
        if headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        return (200, {"name": "me", "type": "user"}) if path == "/api/whoami-v2" else (404, {})

    def post(self, path: str, body: bytes, headers) -> tuple[int, dict]:
        if headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/validate-yaml":  # of a card's metadata
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.url}/me/{self.created[-1]['name']}"}
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if file.endswith(".safetensors") else "regular" for file in files]
            return 200, {
                "files": [
                    {"path": file, "uploadMode": mode, "shouldIgnore": False}
                    for file, mode in zip(files, modes, strict=True)
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.url}/objects/{item['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path and not self.refuse_commits:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                self.record(**json.loads(line))
            return 200, {
                "commitUrl": f"{self.url}/{name}/commit/1",
                "commitOid": "1",
                "commitMessage": self.commits[-1],
            }
        return 503, {"error": "out of order"}

    def record(self, key: str, value: dict) -> None:
        """Record one line of a commit: its header, a small file, or the name of a large one."""
        if key == "header":
            self.commits.append(value["summary"])
        elif key == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        else:
            self.files[value["path"]] = self.objects[value["oid"]]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
