"""A judge behind real HTTP: it scores by a rule, and sometimes refuses or talks nonsense."""

import json
import re
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Fault = Callable[[int, str], tuple[int, str] | None]
"""Given the request's number, from 1, and its prompt: a status and body instead of scores, or None."""


def score_by_rule(aspect: str, text: str) -> int:
    return (len(aspect) + sum(map(ord, text))) % 5


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that stops at the first refusal leaves its other requests unread: that is no fault."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class JudgeServer:
    """Chat completions at `url`; `prompts` are the first messages it got, `bodies` all that it got."""

    def __init__(self, fault: Fault = lambda number, prompt: None) -> None:
        self.prompts: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.fault = fault
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler) -> None:
                sent = handler.rfile.read(int(handler.headers["Content-Length"]))
                if len(sent) < int(handler.headers["Content-Length"]):
                    raise ConnectionError("it left before it had said all")
                body = json.loads(sent)
                prompt = body["messages"][0]["content"]
                with lock:
                    self.bodies.append(body | {"path": handler.path, "key": handler.headers["Authorization"]})
                    self.prompts.append(prompt)
                    number = len(self.prompts)
                status, text = self.fault(number, prompt) or (200, completion(answer(prompt)))
                handler.send_response(status)
                handler.send_header("Content-Type", "application/json")
                handler.send_header("Content-Length", str(len(text.encode())))
                handler.send_header("retry-after-ms", "1")
                handler.end_headers()
                handler.wfile.write(text.encode())

            def log_message(handler, *arguments: Any) -> None:
                """Nothing."""

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(content: str) -> str:
    """A response's body."""
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
    )


def answer(prompt: str) -> str:
    """The scores that the prompt asks for."""
    aspect = re.search(r"Aspect: \*\*(\w+)\*\*", prompt)
    segments = [json.loads(line) for line in re.findall(r'^\{"segment": .*\}$', prompt, re.MULTILINE)]
    assert aspect
    return entries([score_by_rule(aspect[1], segment["text"]) for segment in segments if "text" in segment])


def entries(scores: Sequence[Any]) -> str:
    return json.dumps({"segments": [{"segment": n, "score": score} for n, score in enumerate(scores, 1)]})
