"""ComfyUI's server as a program, with a copy of this pack in it, for the tests that talk to it or open its page."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from comfyui_host import REPOSITORY, STUBS
from PIL import Image


class Server:
    """A running ComfyUI. `base` is its base folder; `arguments` are further ones of its command line."""

    def __init__(self, comfyui: Path, base: Path, *arguments: str) -> None:
        self.base, self.log = base, base / "log.txt"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        command = [
            sys.executable, str(comfyui / "main.py"), "--cpu", "--base-directory", str(base),
            "--listen", "127.0.0.1", "--port", self.url.rsplit(":", 1)[1],
            "--extra-model-paths-config", str(base / "extra_model_paths.yaml"),
            "--database-url", f"sqlite:///{base}/user.db", "--disable-auto-launch", "--disable-api-nodes",
            *arguments,
        ]  # fmt: skip
        self._file = self.log.open("w")
        self._process = subprocess.Popen(
            command, stdout=self._file, stderr=subprocess.STDOUT, cwd=base,
            env=os.environ | {"PYTHONPATH": str(STUBS), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    def wait_until_ready(self, seconds: float = 240) -> None:
        self._wait(lambda: self._answers(), seconds, "start")

    def _answers(self) -> bool:
        try:
            self.get("/system_stats")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def _wait(self, done: Any, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert self._process.poll() is None, f"ComfyUI stopped:\n{self.log.read_text()[-4000:]}"
            assert time.monotonic() < end, f"ComfyUI did not {what} within {seconds} s:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.3)

    def get(self, path: str) -> Any:
        return json.loads(self.fetch(self.url + path))

    def fetch(self, address: str) -> bytes:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.read()

    def post(self, path: str, content: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queues a prompt and returns its id."""
        try:
            return json.loads(self.post("/prompt", {"prompt": prompt}))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"ComfyUI refused the prompt: {error.read().decode()}") from None

    def result(self, prompt_id: str, seconds: float = 300) -> dict[str, Any]:
        """What the history says of a prompt, once it is there."""
        self._wait(lambda: prompt_id in self.get("/history"), seconds, "finish")
        return self.get(f"/history/{prompt_id}")[prompt_id]

    def pictures(self, result: dict[str, Any]) -> list[Image.Image]:
        assert result["status"]["status_str"] == "success", result["status"]
        files = [file for output in result["outputs"].values() for file in output.get("images", [])]
        return [Image.open(io.BytesIO((self.base / "output" / file["filename"]).read_bytes())) for file in files]

    def run(self, prompt: dict[str, Any], seconds: float = 300) -> list[Image.Image]:
        """Queues a prompt, waits, and returns the pictures it saved."""
        return self.pictures(self.result(self.queue(prompt), seconds))

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._file.close()


def copy_pack(target: Path) -> None:
    """What a user has in custom_nodes."""
    for part in ("nodes", "sun", "web", "locales", "example_workflows"):
        shutil.copytree(REPOSITORY / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("__init__.py", "install.py"):
        shutil.copy(REPOSITORY / part, target / part)
