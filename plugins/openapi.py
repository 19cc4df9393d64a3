"""The interface as an OpenAPI 3.1 document, made from the routes and the types that validate and shape what they carry.

The service answers it under /openapi.json; ``cco schema`` prints it, and writes it with a JSON Schema for each type.
"""

from __future__ import annotations

import argparse
import http.client
import inspect
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from cco_sidecar import (
    EVENT_TYPE,
    GOOD,
    IDENTIFIER,
    Command,
    Endpoint,
    ErrorAnswer,
    Route,
    __version__,
    add_commands,
    arg,
    hookimpl,
    routes,
)


@hookimpl
def register_routes() -> list[Route]:
    return [DOCUMENT]


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, {
        "schema": Command("print the OpenAPI document", command_schema, [
            arg("--write", metavar="DIR", help="write it and the JSON Schemas there")]),
    })  # fmt: skip


class GetOpenAPI(Endpoint):
    """This interface as an OpenAPI 3.1 document."""

    public = True
    answers = {200: dict[str, Any]}

    async def respond(self) -> dict[str, Any]:
        return openapi(self.application.settings["table"])


DOCUMENT = Route("GET", "/openapi.json", GetOpenAPI)


def command_schema(options: argparse.Namespace) -> int:
    documents = {"openapi.json": openapi([*routes(), DOCUMENT])}
    for route in routes():
        for shape in (*route.endpoint.answers.values(), route.endpoint.body):
            if is_struct(shape):
                schema = msgspec.json.schema(shape)
                documents[f"{shape.__name__}.schema.json"] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    if options.write is None:
        print(json.dumps(documents["openapi.json"], indent=2))
        return GOOD
    folder = Path(options.write)
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    print(f"{len(documents)} documents written to {folder}")
    return GOOD


def openapi(table: list[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the routes, from the types that validate and shape what they carry."""
    shapes = {ErrorAnswer} | {shape for row in table for shape in (*row.endpoint.answers.values(), row.endpoint.body) if is_struct(shape)}
    _, components = msgspec.json.schema_components(sorted(shapes, key=lambda s: s.__name__), ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for row in table:
        paths.setdefault(row.path, {})[row.method.lower()] = describe_operation(row)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Orchestration Sidecar", "version": __version__, "description": "Coordination of coding agents on one repository."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}},
        "security": [{"bearer": []}],
    }


def is_struct(shape: Any) -> bool:
    return isinstance(shape, type) and issubclass(shape, msgspec.Struct)


def describe_operation(row: Route) -> dict[str, Any]:
    endpoint = row.endpoint
    answers = {str(status): describe_answer(status, shape) for status, shape in endpoint.answers.items()}
    statuses = {400, 403, 404, 405, 500, *endpoint.problems, *(() if endpoint.public else (401, 429))} | ({413, 415} if endpoint.body else set())
    for status in sorted(statuses):
        answers.setdefault(str(status), {"description": "Not Modified"} if status == 304 else describe_answer(status, ErrorAnswer))
    operation: dict[str, Any] = {
        "operationId": endpoint.__name__,
        "summary": (inspect.getdoc(endpoint) or "").partition("\n\n")[0],
        "parameters": describe_parameters(row),
        "responses": answers,
    }
    if endpoint.body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference_to(endpoint.body)}}}
    if endpoint.public:
        operation["security"] = []
    if endpoint.permission:
        operation["x-permission"] = endpoint.permission
    return operation


def describe_answer(status: int, shape: Any) -> dict[str, Any]:
    schema = reference_to(shape) if is_struct(shape) else {"type": "object"}
    return {"description": http.client.responses[status], "content": {"application/json": {"schema": schema}}}


def reference_to(shape: Any) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{shape.__name__}"}


def path_pattern(name: str) -> str:
    return EVENT_TYPE if name == "event_type" else IDENTIFIER


def describe_parameters(row: Route) -> list[dict[str, Any]]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "pattern": f"^{path_pattern(name)}$"}}
        for name in re.findall(r"\{(\w+)\}", row.path)
    ]
    properties = msgspec.json.schema(row.endpoint.query_type)["$defs"][row.endpoint.query_type.__name__].get("properties", {})
    in_query = [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in properties.items()]
    in_header = [{"name": "Idempotency-Key", "in": "header", "required": False, "schema": {"type": "string", "minLength": 1, "maxLength": 255}}]
    return in_path + in_query + (in_header if row.endpoint.idempotent else [])
