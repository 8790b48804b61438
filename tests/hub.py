"""A stand-in of the Hugging Face Hub on the loopback interface: as much as masks need.

Written after what huggingface_hub asks: repositories are made, small files come inside a commit,
others by Git LFS before it, and files are read by their resolved address.
"""

import base64
import hashlib
import json
import threading
import time
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request, Response

from dam_vllm.server import free_port

TOKEN = "hf_secret"
COMMIT = "0" * 39


class Hub:
    """Repositories by id: files by path. Those in `gated` are refused, `down` answers nothing."""

    def __init__(self):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.repositories, self.private, self.objects = {}, {}, {}
        self.gated, self.down, self.commits = set(), False, 0
        self.app = FastAPI()
        self._routes()

    @contextmanager
    def running(self):
        """Serves."""
        config = uvicorn.Config(self.app, port=self.port, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join()

    def _routes(self):
        app = self.app

        @app.middleware("http")
        async def guard(request, following):
            if self.down:
                return Response(status_code=500, content="out of order")
            writes = request.method not in ("GET", "HEAD") and "/objects/" not in request.url.path
            if writes and request.headers.get("authorization") != f"Bearer {TOKEN}":
                return Response(status_code=401)
            return await following(request)

        @app.post("/api/repos/create")
        async def create(request: Request):
            asked = await request.json()
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.repositories
            self.repositories.setdefault(name, {})
            self.private.setdefault(name, asked.get("private") or asked.get("visibility"))
            url = f"{self.url}/{name}"
            return Response(json.dumps({"url": url}), status_code=409 if known else 200)

        @app.post("/api/validate-yaml")
        async def validate(request: Request):
            assert (await request.json())["content"].startswith("---\n")
            return {"errors": [], "warnings": []}

        @app.post("/api/models/{owner}/{name}/preupload/main")
        async def preupload(owner: str, name: str, request: Request):
            files = (await request.json())["files"]
            modes = {True: "lfs", False: "regular"}
            return {"files": [
                {"path": each["path"], "shouldIgnore": False,
                 "uploadMode": modes[each["path"].endswith(".safetensors")]}
                for each in files
            ]}  # fmt: skip

        @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
        async def batch(owner: str, name: str, request: Request):
            asked = (await request.json())["objects"]
            return {"transfer": "basic", "objects": [
                each | {"actions": {"upload": {"href": f"{self.url}/objects/{each['oid']}"}}}
                for each in asked
            ]}  # fmt: skip

        @app.put("/objects/{oid}")
        async def put(oid: str, request: Request):
            content = await request.body()
            assert hashlib.sha256(content).hexdigest() == oid
            self.objects[oid] = content

        @app.post("/api/models/{owner}/{name}/commit/main")
        async def commit(owner: str, name: str, request: Request):
            files = self.repositories[f"{owner}/{name}"]
            for line in (await request.body()).splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if entry["key"] == "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
            self.commits += 1
            oid = f"{COMMIT}{self.commits}"
            url = f"{self.url}/{owner}/{name}/commit/{oid}"
            return {"commitUrl": url, "commitOid": oid}

        @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
        async def resolve(owner: str, name: str, revision: str, path: str):
            name = f"{owner}/{name}"
            code = None
            if name in self.gated:
                return Response(status_code=403, headers={"X-Error-Code": "GatedRepo"})
            if name not in self.repositories:
                code = "RepoNotFound"
            elif revision not in ("main", f"{COMMIT}{self.commits}"):
                code = "RevisionNotFound"
            elif path not in self.repositories[name]:
                code = "EntryNotFound"
            commit = {"X-Repo-Commit": f"{COMMIT}{self.commits}"}
            if code is not None:
                return Response(status_code=404, headers={"X-Error-Code": code} | commit)
            content = self.repositories[name][path]
            tag = hashlib.sha256(content).hexdigest()
            return Response(content, headers={"ETag": f'"{tag}"'} | commit)
