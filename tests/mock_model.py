"""A model server on loopback for real coding programs: it answers each turn of a conversation by a script.

It speaks Anthropic Messages (claude), OpenAI Responses (codex) and Chat Completions (opencode, kilo, cline, qwen, copilot,
aider), and Gemini (gemini), as far as these programs need them. No key, no network.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# One turn: {"sh": command}, {"read": path}, {"write": path, "content": text} or {"text": words}; with {"tool": name,
# "arguments": JSON} beside it that tool of the service is used, where the program has it.
Step = dict[str, str]
Tools = dict[str, dict[str, Any]]  # what a program offers its model: name, JSON schema of the input
Turn = tuple[str, Any]  # ("text", words) or (name of a tool, its input)

WORK: list[Step] = [  # what our prompt asks for, its commands as they stand in it
    {"tool": "brief", "arguments": "{}", "read": "{brief}"},
    {"write": "hello.py", "content": "def hello(name):\n    return f'hello {name}'\n"},
    {"tool": "publish_event", "arguments": '{"event_type": "progress", "data": {"message": "half"}}', "sh": "{event}"},
    {
        "tool": "store_result",
        "arguments": '{"status": "success", "files_modified": ["hello.py"], "decisions": ["greeted by name"]}',
        "sh": "{result}",
    },
    {"text": "I greeted by name and stored my result."},
]
SHELLS = ("Bash", "exec_command", "shell_command", "shell", "run_shell_command", "bash", "run_commands")
READERS = ("Read", "read_file", "read", "view", "read_files")
WRITERS = ("Write", "write_file", "write", "create", "editor")
PATHS, CONTENTS = ("file_path", "filePath", "absolute_path", "path", "files"), ("content", "file_text", "new_text")


class MockModel:
    """The server while it runs. ``scripts`` are the steps by name: a task holds ``Follow script NAME``, else WORK is followed.

    ``requests`` are the bodies that arrived, and ``turns`` what was answered: (script, number of the step, turn).
    """

    def __init__(self, scripts: dict[str, list[Step]] | None = None) -> None:
        self.scripts = scripts or {}
        self.requests: list[str] = []
        self.turns: list[tuple[str, int, Turn]] = []
        self.before_turn: Callable[[str, int], None] = lambda name, number: None  # the script, and the step to come
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"model": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> MockModel:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join(10)

    def turn(self, conversation: list[tuple[str, str]], tools: Tools) -> Turn:
        """What the model says next after these messages: (role, text), its own those of "assistant" or "model"."""
        text = "\n".join(words for role, words in conversation if role == "user")
        if "*file listing*" in text:  # aider, whose model edits by what it says
            return "text", f"hello.py\n```\n{WORK[1]['content']}```\n"
        if not tools:  # a title, a summary
            return "text", "ok"
        begin = next((at for at, (_, words) in enumerate(conversation) if "in a team of agents" in words), 0)
        answered = sum(role in ("assistant", "model") for role, _ in conversation[begin:])
        name = match[1] if (match := re.search(r"Follow script (\w+)", text)) else "work"
        facts = facts_of(text)
        steps = [
            {
                key: re.sub(r"\{(\w+)\}", lambda match: facts.get(match[1], match[0]), value)
                for key, value in step.items()
            }
            for step in self.scripts.get(name, WORK)
        ]
        # What this prompt does not ask for, and no tool does, is left out.
        steps = [step for step in steps if "" not in step.values() or own_tool(step, tools)]
        self.before_turn(name, answered)
        step = steps[answered] if answered < len(steps) else {"text": "DONE"}
        turn = as_turn(step, tools, facts["root"])
        self.turns.append((name, answered, turn))
        return turn


def facts_of(text: str) -> dict[str, str]:
    """What a prompt of ours says, and the working directory of which programs tell their model."""
    folder = match[1] if (match := re.search(r"curl -sS -K (/\S+)/curl ", text)) else "/nowhere"
    issue = match[1] if (match := re.search(r"works on issue (\S+) of", text)) else ""
    facts = {"issue": issue, "folder": folder, "brief": f"{folder}/context.json"}
    if match := re.search(rf"{re.escape(folder)}/[\w.-]*brief[\w.-]*", text):
        facts["brief"] = match[0].rstrip(".")
    for name, path in (("result", "/results"), ("event", "/events/progress")):
        match = re.search(rf"^ *(curl -sS [^\n]*{path} -d '.*?\}}\}}')", text, re.MULTILINE | re.DOTALL)
        facts[name] = match[1] if match else ""
    root = re.search(
        r"(?i)working (?:directory[^\n]*?|in the following directories):\s*-? ?(/\S+)|<cwd>([^<]+)</cwd>", text
    )
    return facts | {"root": next(filter(None, root.groups())).rstrip("/.") if root else ""}


def own_tool(step: Step, tools: Tools) -> str:
    """The service's tool of a step by the name that the program gives it; empty where it has none."""
    pattern = re.compile(rf"(.*[_/])?cco[_/-]+{step.get('tool', '-')}")
    return next((name for name in tools if pattern.fullmatch(name)), "")


def as_turn(step: Step, tools: Tools, root: str) -> Turn:
    """A step by the tools that a program offers: a shell where it has no tool to read or write."""

    def tool(names: tuple[str, ...]) -> str:
        return next((name for name in names if name in tools), "")

    def key(name: str, names: tuple[str, ...]) -> str:
        return next((key for key in names if key in tools[name].get("properties", {})), names[0])

    if name := own_tool(step, tools):
        return name, json.loads(step["arguments"])
    if "text" in step:
        return "text", step["text"]
    if not step.keys() & {"sh", "read", "write"}:
        return "text", f"There is no tool {step['tool']}"
    if "read" in step and (name := tool(READERS)):
        path = key(name, PATHS)
        return name, {path: [{"path": step["read"]}] if path == "files" else step["read"]}
    if "write" in step and (name := tool(WRITERS)):
        path = f"{root}/{step['write']}" if root else step["write"]
        return name, {key(name, PATHS): path, key(name, CONTENTS): step["content"]}
    command = step.get("sh") or (
        f"cat {shlex.quote(step['read'])}" if "read" in step
        else f"printf %s {shlex.quote(step['content'])} > {shlex.quote(step['write'])}"
    )  # fmt: skip
    name = tool(SHELLS)
    if not name:
        return "text", f"There is no shell for: {command}"
    schema = tools[name].get("properties", {})
    if "cmd" in schema:
        beyond = {"sandbox_permissions": "require_escalated", "justification": "to work outside of the sandbox"}
        return name, {"cmd": command} | (beyond if "beyond" in step else {})
    if "commands" in schema:
        return name, {"commands": [command]}
    if schema.get("command", {}).get("type") == "array":
        return name, {"command": ["bash", "-lc", command]}
    extra = {"description": "run a command", "is_background": False}
    return name, {"command": command} | {word: value for word, value in extra.items() if word in schema}


def flat(content: Any) -> str:
    """The text in a message, whatever its API."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(map(flat, content))
    names = ("text", "content", "output", "parts", "functionResponse", "response")
    return "\n".join(flat(content[name]) for name in names if content.get(name)) if isinstance(content, dict) else ""


Answer = tuple[Any, list[tuple[str, Any]]]  # as one document, and as events


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: MockModel

    def log_message(self, format: str, *values: Any) -> None:
        pass

    def do_GET(self) -> None:
        names = ("mock-model", "claude-mock", "gemini-mock")
        data = [{"id": name, "object": "model", "created": 1, "owned_by": "mock", "type": "model"} for name in names]
        self._send({"object": "list", "data": data, "models": [], "has_more": False})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        content = self._content()
        self.model.requests.append(content)
        body = json.loads(content or "{}")
        path = self.path.partition("?")[0]
        apis: dict[str, Callable[[Any], Answer]] = {
            "/messages": self._anthropic, "/responses": self._responses, "/chat/completions": self._chat,
            ":generateContent": self._gemini, ":streamGenerateContent": self._gemini,
        }  # fmt: skip
        answer = next((api for end, api in apis.items() if path.endswith(end)), None)
        if answer is None:
            counted = {"input_tokens": 1000, "totalTokens": 1000}  # of tokens; telemetry reads no answer
            return self._send(counted)
        document, events = answer(body)
        if body.get("stream") or path.endswith("streamGenerateContent"):
            return self._stream(events)
        self._send(document)

    def _content(self) -> str:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode(errors="replace")

    def _send(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    def _stream(self, events: list[tuple[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for name, value in events:
            text = value if isinstance(value, str) else json.dumps(value)
            self.wfile.write(f"{f'event: {name}{chr(10)}' if name else ''}data: {text}\n\n".encode())
        self.close_connection = True

    def _anthropic(self, body: Any) -> Answer:
        messages = body["messages"]
        tools = {tool["name"]: tool.get("input_schema", {}) for tool in body.get("tools", []) if "name" in tool}
        said = [("user", flat(body.get("system", ""))), *((item["role"], flat(item["content"])) for item in messages)]
        kind, given = self.model.turn(said, tools)
        usage = {
            "input_tokens": 1000,
            "output_tokens": 50,
            "cache_read_input_tokens": 300,
            "cache_creation_input_tokens": 200,
        }
        if kind == "text":
            block, reason = {"type": "text", "text": given}, "end_turn"
            empty, delta = {"text": ""}, {"type": "text_delta", "text": given}
        else:
            block = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": kind, "input": given}
            empty, delta = {"input": {}}, {"type": "input_json_delta", "partial_json": json.dumps(given)}
            reason = "tool_use"
        whole = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": body["model"],
                 "content": [block], "stop_reason": reason, "stop_sequence": None, "usage": usage}  # fmt: skip
        return whole, [(event["type"], event) for event in (
            {"type": "message_start", "message": whole | {"content": [], "stop_reason": None}},
            {"type": "content_block_start", "index": 0, "content_block": block | empty},
            {"type": "content_block_delta", "index": 0, "delta": delta},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": {"output_tokens": 50}},
            {"type": "message_stop"},
        )]  # fmt: skip

    def _responses(self, body: Any) -> Answer:
        items = body["input"] if isinstance(body["input"], list) else [{"role": "user", "content": body["input"]}]
        offered = [(tool, "") for tool in body.get("tools", [])]
        offered = [(inner, f"{tool['name']}/") for tool, _ in offered for inner in tool.get("tools", ())] + offered
        tools = {within + (tool.get("name") or tool["type"]): tool.get("parameters", {}) for tool, within in offered}
        own = ("function_call", "custom_tool_call", "local_shell_call")
        conversation = [("user", body.get("instructions") or "")]
        for item in items:
            mine = item.get("type") in own or item.get("role") == "assistant"
            conversation += [] if item.get("type") == "reasoning" else [("model" if mine else "user", flat(item))]
        kind, given = self.model.turn(conversation, tools)
        ident = uuid.uuid4().hex
        item: dict[str, Any] = {"type": "function_call", "id": f"fc_{ident}", "call_id": f"call_{ident}", "name": kind,
                                "arguments": json.dumps(given), "status": "completed"}  # fmt: skip
        if "/" in kind:
            item["namespace"], item["name"] = kind.split("/")
        if kind == "text":
            content = [{"type": "output_text", "text": given, "annotations": []}]
            item = {
                "type": "message",
                "id": f"msg_{ident}",
                "role": "assistant",
                "status": "completed",
                "content": content,
            }
        usage = {"input_tokens": 1000, "input_tokens_details": {"cached_tokens": 300}, "output_tokens": 50,
                 "output_tokens_details": {"reasoning_tokens": 7}, "total_tokens": 1050}  # fmt: skip
        whole = {"id": f"resp_{ident}", "object": "response", "created_at": 1, "status": "completed", "error": None,
                 "model": body.get("model"), "output": [item], "usage": usage, "tools": [], "metadata": {}}  # fmt: skip
        events = [
            {"type": "response.created", "response": whole | {"status": "in_progress", "output": [], "usage": None}},
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": whole},
        ]
        return whole, [(event["type"], event | {"sequence_number": number}) for number, event in enumerate(events)]

    def _chat(self, body: Any) -> Answer:
        messages = body["messages"]
        functions = [tool["function"] for tool in body.get("tools") or [] if tool.get("function")]
        tools = {function["name"]: function.get("parameters", {}) for function in functions}
        conversation = [
            ("model" if item["role"] == "assistant" else "user", flat(item.get("content") or "")) for item in messages
        ]
        kind, given = self.model.turn(conversation, tools)
        said: dict[str, Any] = {"role": "assistant", "content": given}
        if kind != "text":
            function = {"name": kind, "arguments": json.dumps(given)}
            call = {"index": 0, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
            said = {"role": "assistant", "content": None, "tool_calls": [call]}
        reason = "stop" if kind == "text" else "tool_calls"
        usage = {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050}
        head = {"id": "chatcmpl-1", "created": 1, "model": body.get("model"), "object": "chat.completion.chunk"}
        whole = head | {"object": "chat.completion", "usage": usage,
                        "choices": [{"index": 0, "message": said, "finish_reason": reason}]}  # fmt: skip
        return whole, [
            ("", head | {"choices": [{"index": 0, "delta": said, "finish_reason": None}]}),
            ("", head | {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}),
            ("", head | {"choices": [], "usage": usage}),
            ("", "[DONE]"),
        ]

    def _gemini(self, body: Any) -> Answer:
        contents = body.get("contents", [])
        functions = [item for group in body.get("tools") or [] for item in group.get("functionDeclarations", [])]
        tools = {item["name"]: item.get("parametersJsonSchema") or item.get("parameters") or {} for item in functions}
        conversation = [("user", flat(body.get("systemInstruction") or {}))]
        conversation += [(item.get("role", "user"), flat(item)) for item in contents]
        kind, given = self.model.turn(conversation, tools)
        as_json = (body.get("generationConfig") or {}).get("responseMimeType") == "application/json"
        said = (
            {"text": "{}" if as_json else given} if kind == "text" else {"functionCall": {"name": kind, "args": given}}
        )
        usage = {"promptTokenCount": 1000, "candidatesTokenCount": 50, "totalTokenCount": 1050}
        candidate = {"content": {"role": "model", "parts": [said]}, "finishReason": "STOP", "index": 0}
        whole = {"candidates": [candidate], "modelVersion": "mock", "usageMetadata": usage}
        return whole, [("", whole)]
