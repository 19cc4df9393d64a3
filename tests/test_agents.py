"""Agents are real processes: started with all they need, watched, ended with everything they started, adopted after a
crash.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import jwt
import psutil
import pytest
import requests
from agent_harness import (
    COMMAND,
    SAMPLE,
    agents_left,
    alive,
    folder_of,
    keepers,
    nothing_left,
    output,
    request,
    says,
    spawn,
    state,
    status,
    tree,
)  # fmt: skip
from conftest import PROJECT, Client, Service, body_of, git_alone, plugin, serving, until

from cco_sidecar import iso, json_size

__all__ = ["nothing_left"]
keeper = plugin("keeper")


@pytest.fixture(scope="module")
def service(setup: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for the tests of this module, with the sample agent as its agents."""
    command = json.dumps([*SAMPLE, "{task}", "{agent_type}", "{issue_id}", "{context_file}"])
    environment = {"CCO_SIDECAR_LOG_LEVEL": "info", "INHERITED": "yes"}
    with serving(
        tmp_path_factory.mktemp("agents"), "--agent-command", command, "--max-agents", "60", env=environment
    ) as running:
        yield running


ENVIRONMENTS = {  # what a request sets, by kind
    "harmless": """
        PYTHON_VERSION API_BASE_URL NODE_ENV NODE_VERSION JAVA_VERSION RUBY_VERSION PERL_VERSION DATABASE_URL LOG_LEVEL DEBUG CI TZ LANG
        LC_ALL TERM PORT GOOS GOARCH RUST_LOG RUST_BACKTRACE GIT_AUTHOR_NAME GIT_COMMITTER_EMAIL DJANGO_SETTINGS_MODULE RAILS_ENV
        ANTHROPIC_MODEL OPENAI_API_KEY AWS_REGION FEATURE_FLAGS SERVICE_HOST ENVIRONMENT SRC DATA_PATH NPM_TOKEN DOCKER_TAG
        HOST REDIS_URL DB_HOST SMTP_HOST ALLOWED_HOSTS SITE_URL API_URL BACKEND_BASE_URL USERS_SERVICE_BASE_URL VITE_API_URL APP_BASE_URL
        GITHUB_REDIRECT_URL FEATURE_RUNNER TEST_CMD APP_CONFIG GO_VERSION CARGO_REGISTRY_TOKEN STRIPE_API_KEY GOOGLE_CLOUD_PROJECT LOG_PATH
        PGUSER PGPORT KNOWLEDGE_BASE_ID STRIPE_CREDIT ENABLE_REFRESH UPLOAD_PATH CACHE_DRIVER DATA_DIR TF_VAR_region FLASK_APP SENTRY_DSN""",
    "where programs and settings are found": """
        PATH PATHEXT HOME XDG_CONFIG_HOME XDG_DATA_DIRS SHELL COMSPEC JAVA_HOME CARGO_HOME GOROOT PYENV_ROOT KUBECONFIG AWS_CONFIG_FILE
        RIPGREP_CONFIG_PATH CLAUDE_CONFIG_DIR CODEX_HOME DOCKER_CONFIG WGETRC""",
    "loaders": "LD_AUDIT DYLD_FRAMEWORK_PATH GCONV_PATH GLIBC_TUNABLES OPENSSL_CONF OPENSSL_MODULES",
    "shells": "BASH_ENV ENV bash_env ZDOTDIR SHELLOPTS PS4 PROMPT_COMMAND IFS CDPATH FPATH BASH_FUNC_ls%% PSMODULEPATH",
    "programs": """
        EDITOR VISUAL PAGER MANPAGER BROWSER LESSOPEN SSH_ASKPASS SUDO_ASKPASS RSYNC_RSH SVN_SSH FZF_DEFAULT_COMMAND RUSTC_WRAPPER
        CMAKE_C_COMPILER_LAUNCHER CC CXX LD MAKEFLAGS GOFLAGS RUSTFLAGS TAR_OPTIONS SSH_AUTH_SOCK""",
    "git": """
        GIT_SSH_COMMAND GIT_SSH GIT_EDITOR GIT_SEQUENCE_EDITOR GIT_PAGER GIT_ASKPASS GIT_PROXY_COMMAND GIT_EXTERNAL_DIFF GIT_EXEC_PATH
        GIT_TEMPLATE_DIR GIT_CONFIG_GLOBAL GIT_CONFIG_COUNT GIT_CONFIG_KEY_0 GIT_CONFIG_PARAMETERS GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE
        GIT_SSL_NO_VERIFY GIT_TRACE GIT_ALLOW_PROTOCOL""",
    "interpreters": """
        NODE_PATH NODE_OPTIONS NODE_REPL_EXTERNAL_MODULE ELECTRON_RUN_AS_NODE TS_NODE_PROJECT BUN_INSPECT_PRELOAD PYTHONPATH PYTHONINSPECT
        PERL5OPT PERL5LIB PERL5DB PERLLIB RUBYOPT RUBYLIB GEM_PATH BUNDLE_GEMFILE JAVA_TOOL_OPTIONS _JAVA_OPTIONS JDK_JAVA_OPTIONS CLASSPATH
        MAVEN_OPTS GRADLE_USER_HOME PHPRC PHP_INI_SCAN_DIR LUA_INIT LUA_INIT_5_4 LUA_CPATH R_PROFILE_USER JULIA_LOAD_PATH ERL_AFLAGS
        DOTNET_STARTUP_HOOKS CORECLR_PROFILER PYTEST_ADDOPTS PYTEST_PLUGINS COVERAGE_PROCESS_START VIMINIT TCLLIBPATH""",
    "package managers": """
        npm_config_registry NPM_CONFIG_SCRIPT_SHELL YARN_RC_FILENAME PIP_INDEX_URL PIP_CONFIG_FILE UV_INDEX_URL POETRY_REPOSITORIES_X_URL
        GOPROXY CARGO_REGISTRIES_X_INDEX RUSTUP_TOOLCHAIN CONDA_EXE""",
    "traffic": """
        HTTP_PROXY https_proxy ALL_PROXY no_proxy FTP_PROXY SSL_CERT_FILE SSLKEYLOGFILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
        NODE_EXTRA_CA_CERTS NODE_TLS_REJECT_UNAUTHORIZED HOSTALIASES DOCKER_HOST OTEL_EXPORTER_OTLP_ENDPOINT GH_HOST""",
    "models": """
        ANTHROPIC_BASE_URL ANTHROPIC_BEDROCK_BASE_URL ANTHROPIC_UNIX_SOCKET ANTHROPIC_CUSTOM_HEADERS OPENAI_BASE_URL OPENAI_API_BASE
        OPENAI_HOST AZURE_OPENAI_ENDPOINT GOOGLE_GEMINI_BASE_URL GOOGLE_VERTEX_BASE_URL CODE_ASSIST_ENDPOINT AWS_ENDPOINT_URL_BEDROCK_RUNTIME
        OLLAMA_HOST DEEPSEEK_API_BASE OPENROUTER_BASE_URL CLAUDE_CODE_USE_BEDROCK OPENCODE_CONFIG_CONTENT AIDER_LINT_CMD GOOSE_PROVIDER CLINE_DIR KILO_DB
        COPILOT_API_URL""",
    "interfaces of others": """
        CHATGPT_BASE_URL KIMI_BASE_URL SAMBANOVA_API_BASE TRACELOOP_BASE_URL MINIMAX_API_HOST WATSONX_URL SOURCEGRAPH_ENDPOINT
        CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE GOOGLE_CLOUD_UNIVERSE_DOMAIN LANGSMITH_ENDPOINT LANGFUSE_HOST JAEGER_AGENT_HOST
        STRIPE_API_URL ELECTRON_MIRROR PUPPETEER_DOWNLOAD_HOST SHARP_DIST_BASE_URL NOMAD_ADDR PGHOSTADDR PGSERVICE GONOPROXY""",
    "paths of libraries and plugins": """
        LADSPA_PATH GI_TYPELIB_PATH QML2_IMPORT_PATH QT_PLUGIN_PATH VK_DRIVERS_PATH GTK_MODULES PKCS11_MODULE OCL_ICD_FILENAMES ERL_LIBS
        HELM_PLUGINS TF_PLUGIN_CACHE_DIR PRISMA_SCHEMA_ENGINE_LIBRARY OCAMLPATH CPLUS_INCLUDE_PATH HGRCPATH JULIA_DEPOT_PATH""",
    "files of settings": """
        JJ_CONFIG RUFF_CONFIG KRB5_CONFIG BABEL_CONFIG_FILE GROOVY_CONF PYLINTRC ACKRC SWCRC OCTAVE_INITFILE PGPASSFILE GNUPGHOME
        AWS_SHARED_CREDENTIALS_FILE AWS_CREDENTIAL_PROCESS MYSQL_HOME MAVEN_BASEDIR""",
    "flags": "MAVEN_ARGS TF_CLI_ARGS_plan CGO_LDFLAGS FFLAGS CFLAGS_x86_64 MIRIFLAGS XZ_OPT SBT_OPTS VSCODE_INSPECTOR_OPTIONS GHCRTS",
    "bare tools": """
        NM RANLIB STRIP FC OBJCOPY OBJDUMP HOSTCC CC_FOR_BUILD PYTHON PYTHON3 CLOUDSDK_PYTHON JAVACMD SWIFT_EXEC GOCACHEPROG DIFFPROG P4DIFF MERGE
        CHROMEDRIVER_BIN CYPRESS_RUN_BINARY PUPPETEER_EXECUTABLE_PATH npm_execpath CCACHE_PREFIX RUSTFMT HGEDITOR CVS_RSH""",
}
SESSION_MARKERS = """
    CLAUDECODE CLAUDE_CODE CLAUDE_CODE_ENTRYPOINT CLAUDE_CODE_SSE_PORT CLAUDE_CODE_SESSION_ACCESS_TOKEN CLAUDE_CODE_CHILD_SESSION
    CLAUDE_PROJECT_DIR CLAUDE_ENV_FILE CODEX_SANDBOX CODEX_SANDBOX_NETWORK_DISABLED CODEX_THREAD_ID CODEX_CI
    CODEX_INTERNAL_ORIGINATOR_OVERRIDE GEMINI_CLI GEMINI_CLI_IDE_SERVER_PORT QWEN_CODE CURSOR_AGENT CURSOR_TRACE_ID OPENCODE
    OPENCODE_PID OPENCODE_CLIENT AI_AGENT AUGMENT_AGENT CLINE_ACTIVE GOOSE_TERMINAL AMP_THREAD_ID COPILOT_CLI ANTIGRAVITY_AGENT
    NOTIFY_SOCKET LISTEN_FDS WATCHDOG_USEC QWEN_SESSION_ID GEMINI_SANDBOX SANDBOX CLINE_TASK_ID KILO_TASK_ID ANTIGRAVITY_CONVERSATION_ID
    AGENT_SESSION_ID AGENT_SANDBOX KIRO_AGENT CRUSH CRUSH_SESSION ROO_ACTIVE JUNIE_SESSION AMAZON_Q_SESSION JULES_SESSION_ID WARP_SESSION_ID
    FACTORY_DROID DROID_SESSION_ID WINDSURF_SESSION CONTINUE_SESSION_ID GIT_QUARANTINE_PATH GIT_REFLOG_ACTION GIT_PUSH_OPTION_COUNT
    GIT_ALTERNATE_OBJECT_DIRECTORIES GIT_INTERNAL_SUPER_PREFIX INVOCATION_ID JOURNAL_STREAM MAINPID SYSTEMD_EXEC_PID NODE_CHANNEL_FD
    NODE_UNIQUE_ID VSCODE_IPC_HOOK_CLI VSCODE_PID MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES"""
KEPT_OF_A_SESSION = """
    CLAUDE_CODE_OAUTH_TOKEN CLAUDE_CODE_USE_BEDROCK CLAUDE_CONFIG_DIR CODEX_HOME CODEX_API_KEY ANTHROPIC_API_KEY OPENAI_BASE_URL
    GEMINI_API_KEY CURSOR_API_KEY OPENCODE_CONFIG GOOSE_PROVIDER AIDER_MODEL COPILOT_GITHUB_TOKEN HTTPS_PROXY
    GEMINI_MODEL QWEN_API_KEY ROO_API_KEY FACTORY_API_KEY REPLIT_DB_URL CRUSH_GLOBAL_CONFIG XDG_SESSION_ID XDG_SESSION_TYPE
    DBUS_SESSION_BUS_ADDRESS DESKTOP_SESSION SESSION_MANAGER TERM_SESSION_ID ITERM_SESSION_ID GNOME_DESKTOP_SESSION_ID AWS_SESSION_TOKEN
    SLURM_ARRAY_TASK_ID PAYPAL_SANDBOX CONTINUE GIT_SSH_COMMAND NODE_ENV"""


# -- what a spawn answers and gives


def test_a_spawn_answers_for_a_process_that_runs(service: Service, architect: Client, issue: str) -> None:
    spawned = spawn(architect, "hang", issue, priority="high")
    assert spawned["agent_id"].startswith("python-specialist-")
    assert spawned["spawned"] is spawned["context_injected"] is True
    assert psutil.Process(spawned["process_id"]).cmdline()[: len(SAMPLE)] == SAMPLE
    assert spawned["timestamp"].endswith("Z")
    assert spawned["environment_ignored"] == []
    claims = jwt.decode(spawned["jwt_token"], options={"verify_signature": False})
    assert (claims["sub"], claims["agent_type"], claims["project_id"]) == (
        spawned["agent_id"],
        "python-specialist",
        PROJECT,
    )
    assert set(claims["permissions"]) == {"read_context", "write_results", "publish_events"}
    followed = architect.get(spawned["webhook_url"]).json()
    assert followed["agent_id"] == spawned["agent_id"]
    assert (followed["state"], followed["pid"], followed["exit_code"]) == ("running", spawned["process_id"], None)
    assert followed["ended_at"] is None


def test_the_token_of_an_agent_speaks_only_for_it(service: Service, architect: Client, issue: str) -> None:
    spawned = spawn(architect, "hang", issue)
    agent = Client(service.url, spawned["jwt_token"])
    body = body_of(issue) | {"agent_id": spawned["agent_id"]}
    assert agent.post("/api/results", body).status_code == 201
    for wrong in ({"agent_id": "somebody-else"}, {"agent_type": "test-engineer"}):
        answer = agent.post("/api/results", body | wrong)
        assert (answer.status_code, answer.json()["code"]) == (403, "AUTH_003")
    answer = agent.post("/api/events/progress", {"publisher": "somebody-else", "topic": "t", "data": {}})
    assert (answer.status_code, answer.json()["code"]) == (403, "AUTH_003")
    assert agent.post("/api/agents/spawn", request()).status_code == 403


@pytest.mark.needs_plugin("agents/environment refuses them")
@pytest.mark.parametrize("environment", [
    {"LONG": "x" * 200_000}, {"LONG": "x" * (128 * 1024 - 5)}, {"WIDE": "ä" * 70_000}, {"N" * 140_000: ""},
    {"A\nB": "x"}, {"A B": "x"}, {"A\tB": ""}, {"\x7f": "x"}, {"\x1b[31m": "x"},
])  # fmt: skip
def test_variables_that_no_program_can_have_are_a_fault_of_the_request(
    architect: Client, issue: str, environment: dict[str, str]
) -> None:
    answer = architect.post(
        "/api/agents/spawn", {"agent_type": "qa-engineer", "issue_id": issue, "environment": environment}
    )
    assert (answer.status_code, answer.json()["code"]) == (400, "REQ_001"), answer.text[:300]
    assert "environment" in answer.json()["message"]


def test_the_environment_holds_what_an_agent_needs(service: Service, architect: Client, issue: str) -> None:
    asked = {
        "PYTHON_VERSION": "3.11", "API_BASE_URL": "http://localhost:8000", "PROJECT_ROOT": "/elsewhere", "JWT_TOKEN": "x", "TASK": "hang",
        "LD_PRELOAD": "x.so", "DYLD_LIBRARY_PATH": "x", "PATH": "x", "NODE_OPTIONS": "x", "PYTHONPATH": "x", "PYTHONSTARTUP": "x",
        "agent_id": "x", "APP_EMPTY": "",
    }  # fmt: skip
    spawned = spawn(architect, "report", issue, environment=asked)
    state(architect, spawned["agent_id"], "completed")
    environment = json.loads(output(architect, spawned["agent_id"]))["environment"]
    folder = folder_of(service, spawned["agent_id"])
    own = {
        "AGENT_ID": spawned["agent_id"], "AGENT_TYPE": "python-specialist", "ISSUE_ID": issue, "PROJECT_ID": PROJECT,
        "PROJECT_ROOT": str(service.root), "SIDECAR_URL": f"{service.url}/api", "JWT_TOKEN": spawned["jwt_token"][::60],
        "CCO_TOKEN_FILE": str(folder / "token"), "CCO_CONTEXT_FILE": str(folder / "context.json"), "TASK": "report",
    }  # fmt: skip
    assert own.items() <= environment.items()
    assert (environment["PYTHON_VERSION"], environment["API_BASE_URL"], environment["APP_EMPTY"]) == (
        "3.11",
        "http://localhost:8000",
        "",
    )
    assert environment["INHERITED"] == "yes"
    assert not [name for name in environment if name.startswith("CCO_SIDECAR_")]
    assert environment["PATH"] != "x"
    assert environment.get("PYTHONPATH") != "x"
    assert not {"LD_PRELOAD", "DYLD_LIBRARY_PATH", "NODE_OPTIONS", "PYTHONSTARTUP", "agent_id"} & {
        k for k, v in environment.items() if v[:1] == "x"
    }
    assert spawned["environment_ignored"] == sorted(set(asked) - {"PYTHON_VERSION", "API_BASE_URL", "APP_EMPTY"})


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.needs_plugin("agents/environment lets all pass that is harmless"))
        if kind == "harmless"
        else kind
        for kind in ENVIRONMENTS
    ],
)
def test_what_runs_other_code_or_diverts_traffic_is_passed_over_and_listed(
    architect: Client, issue: str, kind: str
) -> None:
    names = ENVIRONMENTS[kind].split()
    spawned = spawn(architect, "report", issue, environment=dict.fromkeys(names, "from the request"))
    state(architect, spawned["agent_id"], "completed")
    environment = json.loads(output(architect, spawned["agent_id"]))["environment"]
    arrived = {name for name in names if environment.get(name) == "from the request"}
    wanted = set(names) if kind == "harmless" else set()
    assert (arrived, spawned["environment_ignored"]) == (wanted, sorted(set(names) - wanted))


@pytest.mark.needs_plugin("agents/environment allows names")
def test_the_configuration_allows_a_name_that_is_passed_over_and_none_that_is_the_agents_own(
    make_service: Callable[..., Service], repository: Path
) -> None:
    (repository / "cco.toml").write_text("agent-environment = ['HTTPS_PROXY', 'JWT_TOKEN', 'CODEX_CI']\n")
    service = make_service(*COMMAND, env={"CODEX_CI": "inherited"})
    asked = {"HTTPS_PROXY": "http://proxy:1", "HTTP_PROXY": "x", "JWT_TOKEN": "x"}
    spawned = spawn(service.client(), "report", environment=asked)
    state(service.client(), spawned["agent_id"], "completed")
    environment = json.loads(output(service.client(), spawned["agent_id"]))["environment"]
    assert environment["HTTPS_PROXY"] == "http://proxy:1" and environment["CODEX_CI"] == "inherited"
    assert environment["JWT_TOKEN"] == spawned["jwt_token"][::60]
    assert spawned["environment_ignored"] == ["HTTP_PROXY", "JWT_TOKEN"]


@pytest.mark.needs_plugin("agents/environment knows the marks of programs")
def test_markers_of_the_session_that_the_service_was_started_from_are_not_passed_on(
    make_service: Callable[..., Service],
) -> None:
    kept = dict.fromkeys(KEPT_OF_A_SESSION.split(), "kept")
    service = make_service(*COMMAND, env=dict.fromkeys(SESSION_MARKERS.split(), "a marker") | kept)
    spawned = spawn(service.client(), "report")
    state(service.client(), spawned["agent_id"], "completed")
    environment = json.loads(output(service.client(), spawned["agent_id"]))["environment"]
    assert [name for name, value in environment.items() if value == "a marker"] == []
    assert {name: environment.get(name) for name in kept} == kept


@pytest.mark.needs_plugin("_program.py undoes what the parent left")
def test_agents_hear_signals_and_exit_codes_are_true_whatever_the_services_parent_left(
    repository: Path, tmp_path: Path, setup: str
) -> None:
    """Started by a parent that blocks every signal it can and lets the system forget how its children ended."""
    service = Service(repository, tmp_path / "storage", *COMMAND)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ignored = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGCHLD, signal.SIGTERM)}
    try:
        service.start()
    finally:
        for number, handler in ignored.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        architect = service.client()
        assert state(architect, spawn(architect, "fail")["agent_id"])["exit_code"] == 3
        git = architect.get("/api/context/issue-1/python-specialist").json()["context"]["git_context"]
        assert git["branch"] == "main" and len(git["recent_commits"]) == 2
        spawned = spawn(architect, "hang")
        says(architect, spawned["agent_id"], "hanging")
        architect.end(spawned)
        assert state(architect, spawned["agent_id"])["signal"] == signal.SIGTERM
    finally:
        assert service.stop() == 0, service.log


def test_the_agent_works_in_the_projects_root(service: Service, architect: Client, issue: str) -> None:
    spawned = spawn(architect, "report", issue)
    state(architect, spawned["agent_id"], "completed")
    assert Path(json.loads(output(architect, spawned["agent_id"]))["cwd"]).resolve() == service.root.resolve()


def test_the_files_of_an_agent_are_its_users_alone(service: Service, architect: Client, issue: str) -> None:
    spawned = spawn(architect, "hang", issue)
    says(architect, spawned["agent_id"], "hanging")
    folder = folder_of(service, spawned["agent_id"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes.keys() > {"context.json", "prompt", "token"} and set(modes.values()) == {0o600}
    assert (folder / "token").read_text() == spawned["jwt_token"]


@pytest.mark.needs_plugin("agents/requirements leaves the other sections out")
@pytest.mark.parametrize(
    ("asked", "sections"),
    [
        (
            ["project_structure", "previous_decisions", "security_policies"],
            {"project_structure", "previous_agent_outputs", "relevant_files"},
        ),
        (["previous_results"], {"previous_agent_outputs"}),
        (["git_history"], {"git_context"}),
        (["git_context"], {"git_context"}),
        (["all_files"], {"relevant_files"}),
        (["source_files", "test_files"], {"relevant_files"}),
        (["dependency_manifests"], {"relevant_files"}),
        (["dependencies"], {"metadata"}),
        (["project_metadata", "metadata"], {"metadata"}),
        ([], {"project_structure", "relevant_files", "git_context", "previous_agent_outputs", "metadata"}),
    ],
)
def test_the_context_file_holds_what_was_required(
    service: Service, architect: Client, issue: str, asked: list[str], sections: set[str]
) -> None:
    spawned = spawn(architect, "succeed", issue, context_requirements=asked)
    context = json.loads((folder_of(service, spawned["agent_id"]) / "context.json").read_text())
    assert set(context["context"]) == sections
    assert (context["issue_id"], context["agent_type"]) == (issue, "python-specialist")
    assert context["file_count"] == len(context["context"].get("relevant_files", []))
    size = json_size(context["context"])
    assert (context["total_size_bytes"], context["estimated_tokens"]) == (size, -(-size // 4))
    state(architect, spawned["agent_id"])


@pytest.mark.needs_plugin("agents/requirements leaves out sections")
@pytest.mark.parametrize(("asked", "redactions"), [
    (["metadata"], 0), (["metadata", "git_context"], 0), (["metadata", "source_files"], 2), ([], 2),
])  # fmt: skip
def test_only_redactions_in_what_the_context_file_holds_are_counted(
    make_service: Callable[..., Service], repository: Path, asked: list[str], redactions: int
) -> None:
    for name in ("one.py", "other.py"):
        (repository / name).write_text(f"key = 'AKIA{'QWERTYUIOPASDFGH'}'\n")
    service = make_service(*COMMAND)
    spawned = spawn(service.client(), "succeed", "issue-1", context_requirements=asked)
    context = json.loads((folder_of(service, spawned["agent_id"]) / "context.json").read_text())["context"]
    assert context["metadata"]["redactions"] == redactions
    state(service.client(), spawned["agent_id"])


def test_a_context_has_what_is_required_of_it(service: Service, architect: Client, issue: str) -> None:
    required = ["project_structure", "git_context", "metadata"]
    spawned = spawn(architect, "succeed", issue, context_requirements=required)
    context = json.loads((folder_of(service, spawned["agent_id"]) / "context.json").read_text())
    assert context["context"].keys() >= set(required)
    state(architect, spawned["agent_id"])


def test_agents_on_one_issue_are_given_contexts_for_their_own_tasks(
    service: Service, architect: Client, issue: str
) -> None:
    tasks = ["hang while save_cookie stores a cookie", "hang while greet says hello"]
    cookies, greeter = (Client(service.url, spawn(architect, task, issue)["jwt_token"]) for task in tasks)
    elsewhere = Client(service.url, spawn(architect, tasks[0], f"{issue}-other")["jwt_token"])

    def best(client: Client, **query: str) -> str:
        answer = client.get(f"/api/context/{issue}/python-specialist", **query)
        path: str = answer.json()["context"]["relevant_files"][0]["path"]
        again = client.request(
            "GET", f"/api/context/{issue}/python-specialist", params=query,
            headers={"If-None-Match": answer.headers["ETag"]},
        )  # fmt: skip
        assert again.status_code == 304
        return path

    until(lambda: best(architect, task="save_cookie") == "src/session_store.py")  # the index is made
    assert best(cookies) == "src/session_store.py"
    assert best(cookies, task="greet says hello") == "src/greeting.py"
    latest = {best(client) for client in (greeter, elsewhere, architect)}
    assert latest == {"src/greeting.py"}


@pytest.mark.needs_plugin("agents/requirements refuses them")
def test_an_unknown_requirement_is_refused_and_named(service: Service, architect: Client, issue: str) -> None:
    before = architect.get("/status").json()["agents"]["spawned_total"]
    answer = architect.post(
        "/api/agents/spawn", request("succeed", issue, context_requirements=["project_structure", "horoscope"])
    )
    assert (answer.status_code, answer.json()["code"]) == (400, "REQ_001")
    assert "horoscope" in answer.json()["message"]
    assert architect.get("/status").json()["agents"]["spawned_total"] == before


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"issue_id": "issue-1"}, "REQ_001"),
        ({"agent_type": "python-specialist"}, "REQ_001"),
        ({"agent_type": "fortune-teller", "issue_id": "issue-1"}, "AGT_002"),
        ({"agent_type": "python-specialist", "issue_id": "../etc"}, "REQ_001"),
        ({"agent_type": "python-specialist", "issue_id": "issue-1", "environment": {"A": 1}}, "REQ_001"),
        ({"agent_type": "python-specialist", "issue_id": "issue-1", "environment": {"A=B": "1"}}, "REQ_001"),
        ({"agent_type": "python-specialist", "issue_id": "issue-1", "task": "a\0b"}, "REQ_001"),
    ],
)
def test_a_bad_spawn_is_refused(architect: Client, body: dict[str, Any], code: str) -> None:
    answer = architect.post("/api/agents/spawn", body)
    assert (answer.status_code, answer.json()["code"]) == (400, code)


def test_only_architects_spawn_and_end(architect: Client, coder: Client, issue: str, setup: str) -> None:
    spawned, path = spawn(architect, "hang", issue), "/api/agents/"
    answers = [coder.post(path + "spawn", request())]
    if setup != "alone":
        answers.append(coder.delete(path + spawned["agent_id"]))
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (403, "AUTH_003")
        assert "spawn_agents" in answer.text
    assert status(coder, spawned["agent_id"])["state"] == "running"


def test_the_command_is_never_read_by_a_shell(service: Service, architect: Client, issue: str) -> None:
    task = """report ; touch pwned $(touch pwned) `touch pwned` 'single' "double" {agent_type} | > pwned"""
    spawned = spawn(architect, task, issue)
    state(architect, spawned["agent_id"], "completed")
    context_file = str(folder_of(service, spawned["agent_id"]) / "context.json")
    assert json.loads(output(architect, spawned["agent_id"]))["argv"] == [
        task,
        "python-specialist",
        issue,
        context_file,
    ]
    assert not list(service.root.rglob("pwned"))


def test_a_storage_that_was_moved_away_is_not_begun_anew_by_a_spawn(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND)
    architect, away = service.client(), service.storage.with_name("away")
    stored = architect.store(issue="issue-1")
    service.storage.rename(away)
    body = {"agent_type": "python-specialist", "issue_id": "issue-1", "task": "succeed"}
    refused = [architect.post("/api/agents/spawn", body), architect.post("/api/results", body_of("issue-1"))]
    assert [answer.status_code for answer in refused] == [500, 500]
    assert not service.storage.exists()
    away.rename(service.storage)
    (service.storage / "agents").rmdir()  # as cleaners of empty folders do
    agent = until(lambda: architect.post("/api/agents/spawn", body).json().get("agent_id"))
    until(lambda: architect.get(f"/api/agents/{agent}/status").json()["state"] == "completed")
    output, *_ = architect.get("/api/context/issue-1/qa-engineer").json()["context"]["previous_agent_outputs"]
    assert output["result_id"] == stored["id"]


# -- no command


def test_without_a_command_a_spawn_says_how_to_configure_one(
    setup: str, make_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = make_service(env={"PATH": git_alone(tmp_path)})
    architect = service.client()
    answer = architect.post("/api/agents/spawn", request())
    assert (answer.status_code, answer.json()["code"]) == (500, "AGT_001")
    message = answer.json()["message"]
    assert "--agent-command" in message and ("cco.toml" in message) is (setup != "alone")
    assert list((service.storage / "agents").iterdir()) == []
    counted = architect.get("/status").json()["agents"]
    assert (counted["active"], counted["failed"]) == (0, 1)
    assert not agents_left()


def test_a_command_that_does_not_exist_is_said(setup: str, make_service: Callable[..., Service]) -> None:
    service = make_service("--agent-command", "no-such-program-anywhere {task}")
    architect = service.client()
    key = {} if setup == "alone" else {"Idempotency-Key": "again"}
    for _ in range(2):  # a failure is not remembered: the repeat tries again
        answer = architect.post("/api/agents/spawn", request(), headers=key)
        assert (answer.status_code, answer.json()["code"]) == (500, "AGT_001")
        assert "no-such-program-anywhere" in answer.json()["message"]
        assert "Idempotent-Replay" not in answer.headers
    assert list((service.storage / "agents").iterdir()) == []
    counted = architect.get("/status").json()["agents"]
    assert (counted["active"], counted["failed"]) == (0, 2)


# -- how many


def test_no_more_agents_run_than_are_allowed_however_many_are_asked_for(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND, "--max-agents", "3", "--stop-agents")
    token = service.token()
    headers = {"Authorization": f"Bearer {token}"}
    with ThreadPoolExecutor(50) as pool:
        answers = list(
            pool.map(
                lambda _: requests.post(f"{service.url}/api/agents/spawn", json=request(), headers=headers, timeout=60),
                range(50),
            )
        )
    assert sorted(answer.status_code for answer in answers) == [201] * 3 + [429] * 47
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["code"] == "AGT_003"
            assert answer.json()["retry_after_seconds"] == int(answer.headers["Retry-After"]) >= 1
    architect = Client(service.url, token)
    assert architect.get("/status").json()["agents"]["active"] == 3
    first = next(answer.json() for answer in answers if answer.status_code == 201)
    architect.end(first)
    until(lambda: status(architect, first["agent_id"])["ended_at"])
    until(lambda: architect.get("/status").json()["agents"]["active"] == 2)
    spawn(architect)


# -- how they end


@pytest.mark.any_storage
@pytest.mark.parametrize(
    ("task", "ends_as", "exit_code", "by_signal", "events"),
    [
        ("succeed", "completed", 0, None, ["agent_exited"]),
        ("fail", "failed", 3, None, ["agent_exited", "agent_failed"]),
        ("die", "failed", -signal.SIGKILL, int(signal.SIGKILL), ["agent_exited", "agent_failed"]),
    ],
)
def test_an_end_is_recorded_and_told(
    architect: Client, issue: str, task: str, ends_as: str, exit_code: int, by_signal: int | None, events: list[str]
) -> None:
    spawned = spawn(architect, task, issue)
    ended = state(architect, spawned["agent_id"])
    assert (ended["state"], ended["exit_code"], ended["signal"]) == (ends_as, exit_code, by_signal)
    assert ended["started_at"] <= ended["ended_at"]
    told = architect.wait("*", filter=f"agent_id:{spawned['agent_id']}", timeout=20_000)["events"]
    assert [event["event_type"] for event in told] == events
    for event in told:
        assert event["topic"] == "coordination"
        facts = {
            "agent_id": spawned["agent_id"],
            "agent_type": "python-specialist",
            "issue_id": issue,
            "state": ends_as,
            "exit_code": exit_code,
        }
        names = "signal pid started_at ended_at reason".split()
        if "usage" in ended:  # alone nothing is measured, and no output shown
            names += "output_tail result_id model requests".split()
            names += "input_tokens output_tokens cached_tokens cost_usd denials".split()
            facts |= {name: ended["usage"][name] for name in ("cpu_seconds", "peak_memory_bytes")}
        facts |= {name: ended[name] for name in names}
        assert event["data"] == facts


def test_an_ended_agent_is_no_zombie(service: Service, architect: Client, issue: str) -> None:
    spawned = spawn(architect, "succeed", issue)
    state(architect, spawned["agent_id"], "completed")
    assert service.process
    service_process = psutil.Process(service.process.pid)
    until(lambda: len(children := service_process.children()) == len(alive(children)))  # alive is who is no zombie
    assert not psutil.pid_exists(spawned["process_id"])


@pytest.mark.needs_plugin("agents/end orders it")
@pytest.mark.parametrize(
    ("task", "ready", "size"),
    [("family", "family", 4), ("escape_and_hang", "escaped", 2)],
    ids=["family", "setsid grandchild without parent"],
)
def test_an_ordered_end_takes_the_whole_tree(
    service: Service, architect: Client, issue: str, task: str, ready: str, size: int
) -> None:
    spawned = spawn(architect, task, issue)
    says(architect, spawned["agent_id"], ready)
    members = until(
        lambda: (
            len(found := [p for p in agents_left() if p.environ().get("AGENT_ID") == spawned["agent_id"]]) >= size
            and found
        )
    )
    answer = architect.delete(f"/api/agents/{spawned['agent_id']}")
    assert (answer.status_code, answer.json()["ending"]) == (202, True)
    until(lambda: not alive(members))
    ended = state(architect, spawned["agent_id"])
    assert (ended["state"], ended["exit_code"], ended["signal"]) == ("killed", -signal.SIGTERM, signal.SIGTERM)
    again = architect.delete(f"/api/agents/{spawned['agent_id']}")
    assert (again.status_code, again.json()["ending"]) == (202, False)


def test_what_an_agent_leaves_behind_is_ended_with_it(service: Service, architect: Client, issue: str) -> None:
    spawned = spawn(architect, "escape", issue)
    assert state(architect, spawned["agent_id"])["state"] == "completed"
    assert not [p for p in agents_left() if p.environ().get("AGENT_ID") == spawned["agent_id"]]


@pytest.mark.needs_plugin("agents/end orders it")
def test_who_ignores_sigterm_is_killed_after_a_grace(architect: Client, issue: str) -> None:
    spawned = spawn(architect, "ignore", issue)
    says(architect, spawned["agent_id"], "ignoring")
    members = tree(spawned["process_id"])
    assert len(members) == 2
    architect.delete(f"/api/agents/{spawned['agent_id']}")
    until(lambda: not alive(members))
    ended = state(architect, spawned["agent_id"])
    assert (ended["state"], ended["signal"]) == ("killed", signal.SIGKILL)


@pytest.mark.needs_plugin("agents/end orders it")
@pytest.mark.parametrize(
    ("task", "asked_before"), [("ignore", False), ("ignore", True), ("hang", False), ("family", False)]
)
def test_an_end_by_force_leaves_no_grace(
    make_service: Callable[..., Service], tmp_path: Path, task: str, asked_before: bool
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/patient.py").write_text("import cco_sidecar\ncco_sidecar.Running.grace = 600.0\n")
    architect = make_service(*COMMAND, "--plugins", str(tmp_path / "more")).client()
    spawned = spawn(architect, task)
    says(architect, spawned["agent_id"], {"ignore": "ignoring", "hang": "hanging"}.get(task, task))
    members, path = tree(spawned["process_id"]), f"/api/agents/{spawned['agent_id']}"
    if asked_before:
        assert architect.delete(path).json()["ending"]
        time.sleep(0.3)
        assert alive(members)
    answer = architect.delete(f"{path}?force=true")
    assert answer.status_code == 202 and answer.json()["ending"]
    until(lambda: not alive(members))
    ended = state(architect, spawned["agent_id"])
    assert (ended["state"], ended["signal"]) == ("killed", signal.SIGKILL)
    assert architect.delete(f"{path}?force=true").json()["ending"] is False


def test_the_time_limit_ends_an_agent(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND, "--agent-timeout", "1")
    architect = service.client()
    spawned = spawn(architect, "family")
    ended = state(architect, spawned["agent_id"])
    assert ended["state"] == "timeout"
    assert not agents_left()
    told = architect.wait("*", filter=f"agent_id:{spawned['agent_id']}", timeout=20_000)["events"]
    assert [(event["event_type"], event["data"]["state"]) for event in told] == [
        ("agent_exited", "timeout"),
        ("agent_failed", "timeout"),
    ]
    assert architect.get("/status").json()["agents"]["failed"] == 1


def test_nothing_is_known_of_an_unknown_agent(architect: Client) -> None:
    for answer in (
        architect.get("/api/agents/nobody/status"),
        architect.delete("/api/agents/nobody"),  # alone it is the path that is unknown
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "REQ_002")


# -- asking


@pytest.mark.needs_plugin("agents/logs reads them")
def test_logs_are_read_whole_by_tail_and_onwards(architect: Client, issue: str) -> None:
    spawned = spawn(architect, "write", issue)
    ended = state(architect, spawned["agent_id"], "completed")
    assert ended["output_tail"][-1] == "line 19999"
    path = f"/api/agents/{spawned['agent_id']}/logs"
    whole = architect.get(path).json()
    assert whole["agent_id"] == spawned["agent_id"]
    assert whole["text"] == "".join(f"line {number}\n" for number in range(20_000))
    assert architect.get(path, tail=2).json()["text"] == "line 19998\nline 19999\n"
    assert architect.get(path, since=whole["next_offset"] - 11).json() == {
        "agent_id": spawned["agent_id"], "text": "line 19999\n", "next_offset": whole["next_offset"], "offset": whole["next_offset"] - 11,
    }  # fmt: skip
    assert architect.get(path, since=whole["next_offset"]).json()["text"] == ""
    assert architect.get(path, tail=0).status_code == 400


SECRET_TEXTS = {  # what an agent prints, and what is left of it
    "a token": ("gh" + "p_aB3xY7pQ9rT2vW5z8mN4cD6fG1hJ0kL2sE9u ", "[REDACTED] "),
    "a web token": (
        "Bearer eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiJhZ2VudCJ9." + "x1Y2z3" * 7 + " ",
        "Bearer [REDACTED] ",
    ),
    "a password": ("postgres://app:Zq9-blue_sky.77@db.example/x ", "postgres://app:[REDACTED]@db.example/x "),
    "an assignment": ("client_secret = '" + "aB3xY7pQ9rT2vW5z" + "8mN4' ", "client_secret = '[REDACTED]' "),
    "a key of a service": ("\nsk_" + "live_51H8xJ2KqLm9NoPqRsTuVwXyZ \n", "\n[REDACTED] \n"),
}
PRINTS = [sys.executable, "-c", "import os, sys; sys.stdout.write(open(os.environ['TASK']).read())"]


@pytest.fixture(scope="module")
def printer(setup: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Its agents print the file that their task names."""
    command = json.dumps(PRINTS)
    with serving(tmp_path_factory.mktemp("printer"), "--agent-command", command) as running:
        yield running


def printed(service: Service, path: Path, content: str) -> tuple[Client, str]:
    """(a client, the path of the log) of an agent that has printed ``content``."""
    path.write_text(content)
    client = service.client()
    agent = spawn(client, str(path))["agent_id"]
    assert state(client, agent, "completed")
    return client, f"/api/agents/{agent}/logs"


def words(text: str) -> list[str]:
    """Without quotes: one before a secret is taken for its part where it stands on the page before."""
    return text.replace("'", "").split()


@pytest.mark.needs_plugin("agents/logs reads them")
@pytest.mark.parametrize("kind", SECRET_TEXTS)
def test_no_secret_is_cut_in_two_by_a_pages_end(printer: Service, tmp_path: Path, kind: str) -> None:
    secret, left = SECRET_TEXTS[kind]
    number = 150_000 // len(secret)
    client, path = printed(printer, tmp_path / "text", (secret * 10 + "\n") * number)
    pages, since = [], 0
    while (page := client.get(path, since=since).json())["text"]:
        pages.append(page["text"])
        assert page["next_offset"] > since
        since = page["next_offset"]
    assert len(pages) > 1 and words("".join(pages)) == words(left * 10 * number)


@pytest.mark.needs_plugin("agents/logs reads them")
@pytest.mark.parametrize("kind", [*SECRET_TEXTS, "a private key"])
def test_no_rest_of_a_secret_is_had_by_an_offset_within_it(printer: Service, tmp_path: Path, kind: str) -> None:
    block = "-----BEGIN RSA " + "PRIVATE KEY-----\n" + "MIIEvQIBADANBgkqhkiG9w0B\n" * 3
    secret = SECRET_TEXTS[kind][0] if kind in SECRET_TEXTS else block + "-----END RSA PRIVATE KEY-----\n"
    client, path = printed(printer, tmp_path / "text", f"before {secret}after\n")
    end = client.get(path).json()["next_offset"]
    pieces = {secret[at : at + 8] for at in range(len(secret) - 8)}
    open_pieces = {piece for piece in pieces if piece in client.get(path).json()["text"] or "-----" in piece}
    for since in range(end - len(secret) - len("after\n"), end - len("after\n")):
        text = client.get(path, since=since).json()["text"]
        assert text.endswith("after\n") and [piece for piece in pieces - open_pieces if piece in text] == []


@pytest.mark.needs_plugin("agents/logs reads them")
def test_a_word_that_an_agent_has_not_written_to_its_end_is_held_back(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    code = "import os, pathlib, time\nfolder = pathlib.Path(os.environ['TASK'])\n"
    code += "print((folder / 'half').read_text(), end='', flush=True)\n"
    code += "while not (folder / 'go').exists(): time.sleep(0.01)\nprint((folder / 'go').read_text() + 'done', end='')"
    client = make_service("--agent-command", json.dumps([sys.executable, "-c", code])).client()
    for kind, (secret, left) in SECRET_TEXTS.items():
        folder, middle = tmp_path / kind, len(secret) // 2 + 8
        folder.mkdir()
        (folder / "half").write_text(f"begun {secret[:middle]}")
        (folder / "rest").write_text(secret[middle:])
        agent = spawn(client, str(folder))["agent_id"]
        says(client, agent, "begun ")
        first = client.get(f"/api/agents/{agent}/logs").json()
        (folder / "rest").rename(folder / "go")
        state(client, agent, "completed")
        second = client.get(f"/api/agents/{agent}/logs", since=first["next_offset"]).json()["text"]
        assert words(first["text"] + second) == words(f"begun {left}done"), kind


def test_both_streams_are_in_the_log(architect: Client, issue: str) -> None:
    spawned = spawn(architect, "fail", issue)
    state(architect, spawned["agent_id"])
    assert output(architect, spawned["agent_id"]) == "something went wrong\n"


@pytest.mark.parametrize("what", ["a pipe", "a folder", "a terminal", "itself"])
def test_an_agent_that_spoils_its_own_output_is_answered_for_and_ends(
    service: Service, architect: Client, issue: str, what: str
) -> None:
    target = {"a terminal": "/dev/tty", "itself": "output.log"}.get(what, what)
    agent_id = spawn(architect, "mislead", issue, environment={"TEST_WITH": target})["agent_id"]
    until(lambda: (folder_of(service, agent_id) / "misled").exists())
    assert architect.get(f"/api/agents/{agent_id}/status", timeout=5).status_code == 200
    assert state(architect, agent_id)["state"] == "completed"


@pytest.mark.needs_plugin("agents/end orders it")
def test_status_counts_the_agents(make_service: Callable[..., Service]) -> None:
    architect = make_service(*COMMAND, "--stop-agents").client()
    ended = [spawn(architect, task)["agent_id"] for task in ("succeed", "fail")]
    for agent_id in ended:
        state(architect, agent_id)
    running = [spawn(architect, "hang")["agent_id"], spawn(architect, "hang", agent_type="test-engineer")["agent_id"]]
    architect.delete(f"/api/agents/{running[0]}")
    state(architect, running[0], "killed")
    counted = architect.get("/status").json()["agents"]  # at once: what an agent's own status says is counted
    assert counted["active"] == 1
    assert (counted["completed"], counted["failed"], counted["killed"], counted["spawned_total"]) == (1, 1, 1, 4)
    assert counted["by_type"] == {"test-engineer": 1}
    assert counted["avg_execution_time_ms"] > 0
    assert architect.get("/health").json()["checks"]["active_agents"] == 1


# -- tokens


@pytest.mark.parametrize(
    "path", ["/api/results", "/api/events/late", "/api/agents/spawn", "/api/cache/context/issue-1", "/status"]
)
def test_a_body_that_comes_after_the_agents_end_changes_nothing(
    service: Service, architect: Client, issue: str, path: str
) -> None:
    spawned = spawn(architect, "hang", issue, agent_type="chief-architect")
    whose = {"agent_id": spawned["agent_id"], "agent_type": "chief-architect", "issue_id": issue, "project_id": PROJECT}
    bodies = {
        "/api/results": whose | {"result": {"status": "success"}},
        "/api/events/late": {"publisher": spawned["agent_id"], "topic": "test", "data": {}},
        "/api/agents/spawn": request("exit 0", issue),
    }
    content = json.dumps(bodies.get(path, {})).encode()
    method = {"/status": "GET", "/api/cache/context/issue-1": "DELETE"}.get(path, "POST")
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=30)
    connection.putrequest(method, path)
    for name, value in {"Authorization": f"Bearer {spawned['jwt_token']}", "Content-Length": len(content)}.items():
        connection.putheader(name, str(value))
    connection.endheaders(content[:-1])
    architect.end(spawned)
    until(lambda: status(architect, spawned["agent_id"])["ended_at"])
    connection.send(content[-1:])
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["code"]) == (401, "AUTH_001")
    connection.close()


@pytest.mark.needs_plugin("tokens/renewal renews them in their files")
@pytest.mark.parametrize("seconds", [-90_000, -3_700, -130, 3_700])
def test_an_agents_token_is_good_when_the_clock_was_set(
    make_service: Callable[..., Service], tmp_path: Path, seconds: int
) -> None:
    """By a clock that was set back a token is from the future, and refused as forged."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/clock.py").write_text(
        "import os, time, cco_sidecar\noriginal = time.time\n"
        f"time.time = lambda: original() + ({seconds} if os.path.exists({str(tmp_path / 'set')!r}) else 0)\n"
    )
    service = make_service(*COMMAND, "--plugins", str(tmp_path / "plugins"))
    token_file = folder_of(service, spawn(service.client(), "hang")["agent_id"]) / "token"
    assert claims_of(token_file)["iat"] > time.time() - 60
    (tmp_path / "set").touch()
    until(lambda: abs(claims_of(token_file)["iat"] - time.time() - seconds) < 60)


def claims_of(token_file: Path) -> dict[str, Any]:
    return jwt.decode(token_file.read_text(), options={"verify_signature": False})


@pytest.mark.needs_plugin("tokens/renewal renews them in their files")
def test_a_token_that_expired_while_the_service_was_down_is_renewed_and_may_no_more_than_before(
    make_service: Callable[..., Service],
) -> None:
    service = make_service(*COMMAND, "--token-ttl", "1", "--stop-agents")
    spawned = spawn(service.client(issue_id="issue-1"), "hang", permissions=["read_context"])
    first = jwt.decode(spawned["jwt_token"], options={"verify_signature": False})
    service.kill()
    token_file = folder_of(service, spawned["agent_id"]) / "token"
    until(lambda: first["exp"] + 0.1 < time.time())
    stale = token_file.read_text()
    service.start()
    renewed = until(lambda: (text := token_file.read_text()) != stale and text)
    claims = jwt.decode(renewed, options={"verify_signature": False})
    assert claims["exp"] > first["exp"]
    for name in ("sub", "agent_type", "project_id", "permissions", "issue_id", "bound"):
        assert claims[name] == first[name]


# -- stops and crashes of the service


ENDS = [("succeed", "completed", 0, None), ("fail", "failed", 3, None), ("die", "failed", -9, 9)]


def spawn_waiting(client: Client, then: str, gate: Path) -> str:
    """An agent that ends in this way when the gate is there."""
    agent_id: str = spawn(client, "wait", environment={"TEST_GATE": str(gate), "TEST_THEN": then})["agent_id"]
    says(client, agent_id, "waiting")
    return agent_id


def seconds_of(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


@pytest.mark.any_storage
@pytest.mark.needs_plugin("agents/keeper knows exit codes over restarts")
def test_after_a_kill_of_the_service_its_agents_go_on_and_are_adopted(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND)
    architect = service.client()
    running, gone, stored = (spawn(architect, task)["agent_id"] for task in ("hang", "hang", "store_and_hang"))
    says(architect, stored, "stored")
    url, pids = service.url, {agent_id: status(architect, agent_id)["pid"] for agent_id in (running, gone, stored)}
    service.kill()
    for agent_id in (gone, stored):
        process = psutil.Process(pids[agent_id])
        process.kill()
        until(lambda process=process: not alive([process]))
    assert alive([psutil.Process(pids[running])])
    service.start()
    assert service.url == url  # so the adopted agent still reaches it
    architect = service.client()
    assert status(architect, running)["state"] == "running"
    for agent_id in (gone, stored):  # their keeper has gone on, and written down how they ended
        assert (state(architect, agent_id)["state"], status(architect, agent_id)["exit_code"]) == (
            "failed",
            -signal.SIGKILL,
        )
    counted = until(lambda: (found := architect.get("/status").json()["agents"])["active"] == 1 and found)
    assert (counted["completed"], counted["failed"], counted["spawned_total"]) == (0, 2, 3)
    told = architect.wait("agent_failed", timeout=20_000)["events"]
    assert {event["data"]["agent_id"]: event["data"]["state"] for event in told} == {gone: "failed", stored: "failed"}
    architect.delete(f"/api/agents/{running}")
    state(architect, running, "killed")
    assert not alive([psutil.Process(pids[running])] if psutil.pid_exists(pids[running]) else [])


@pytest.mark.needs_plugin("agents/keeper knows exit codes over restarts")
def test_another_process_with_the_agents_number_is_not_taken_for_it(make_service: Callable[..., Service]) -> None:
    """The ledger's pid is made that of this test, which lives, but did not start when the agent did."""

    service = make_service(*COMMAND)
    agent_id = spawn(service.client(), "hang")["agent_id"]
    pid = status(service.client(), agent_id)["pid"]
    service.kill()
    psutil.Process(pid).kill()
    database = service.storage / "sidecar.db"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        assert connection.execute("update agent set pid = ? where id = ?", (os.getpid(), agent_id)).rowcount == 1
    service.start()
    ended = state(service.client(), agent_id)
    assert (ended["state"], ended["signal"]) == ("failed", signal.SIGKILL)


@pytest.mark.needs_plugin("agents/keeper knows exit codes over restarts")
@pytest.mark.parametrize(
    ("down", "moment"),
    [
        (Service.stop, "while no service runs"),
        (Service.kill, "while no service runs"),
        (Service.kill, "after the restart"),
        (Service.stop, "after two restarts"),
    ],
)
def test_exit_codes_are_known_over_a_restart(
    make_service: Callable[..., Service], tmp_path: Path, down: Callable[[Service], Any], moment: str
) -> None:
    service, gate = make_service(*COMMAND), tmp_path / "gate"
    agents = {task: spawn_waiting(service.client(), task, gate) for task, *_ in ENDS}
    pids = [status(service.client(), agent_id)["pid"] for agent_id in agents.values()]
    down(service)
    if moment == "while no service runs":
        gate.touch()
        until(lambda: not any(map(psutil.pid_exists, pids)))
    service.start()
    if moment == "after two restarts":
        agents["another"] = spawn_waiting(service.client(), "fail", gate)  # of a second keeper
        down(service)
        service.start()
    gate.touch()
    for (_, *known), agent_id in zip([*ENDS, ENDS[1]], agents.values(), strict=False):
        ended = state(service.client(), agent_id)
        assert [ended["state"], ended["exit_code"], ended["signal"]] == known
        assert ended["usage"]["cpu_seconds"] > 0 and ended["usage"]["peak_memory_bytes"] > 1_000_000
        written = json.loads((folder_of(service, agent_id) / "exit").read_text())  # by the keeper, at the end itself
        assert seconds_of(ended["ended_at"]) == int(written["time"])
    assert service.client().get("/status").json()["agents"]["failed"] == len(agents) - 1


@pytest.mark.needs_plugin("agents/keeper knows exit codes over restarts")
@pytest.mark.parametrize("down", [None, Service.kill, Service.stop])
def test_how_an_agent_ended_is_known_once_its_keeper_goes_on_that_was_stopped(
    make_service: Callable[..., Service], tmp_path: Path, down: Callable[[Service], Any] | None
) -> None:
    """One keeper goes on, that of another agent is killed."""
    (tmp_path / "plugins").mkdir()
    names = "import cco_sidecar\nfrom cco_sidecar_plugins.agents.keeper import KeptProcesses\n"
    (tmp_path / "plugins/soon.py").write_text(f"{names}KeptProcesses.KEEPER_SECONDS, KeptProcesses.PATIENCE = 0.1, 8\n")
    service, gate = make_service(*COMMAND, "--plugins", str(tmp_path / "plugins")), tmp_path / "gate"
    lost = spawn_waiting(service.client(), "fail", gate)
    (killed,) = keepers(service)
    service.kill()
    service.start()
    known = {spawn_waiting(service.client(), task, gate): ends for task, *ends in ENDS}
    (stopped,) = set(keepers(service)) - {killed}
    for process in (killed, stopped):
        process.suspend()
    if down:
        down(service)
    gate.touch()
    if down:
        service.start()
    client = service.client()
    for agent_id in (lost, *known):
        until(lambda agent_id=agent_id: f"agent {agent_id} has ended, and its keeper" in service.log)
        assert status(client, agent_id)["state"] == "running"
    killed.kill()
    assert state(client, lost)["state"] == "lost"
    stopped.resume()
    for agent_id, ends in known.items():
        ended = state(client, agent_id)
        assert [ended["state"], ended["exit_code"], ended["signal"]] == ends


@pytest.mark.needs_plugin("agents/keeper knows exit codes over restarts")
def test_an_end_at_the_moment_of_a_kill_is_known(make_service: Callable[..., Service], tmp_path: Path) -> None:
    """Agents end one after the other while the service is killed in between, three times."""
    service, known = make_service(*COMMAND, "--max-agents", "60"), {}
    for number in range(3):
        gates = {}
        for index in range(9):
            gate = tmp_path / f"gate-{number}-{index}"
            task, *known_end = ENDS[index % 3]
            gates[gate] = agent_id = spawn_waiting(service.client(), task, gate)
            known[agent_id] = known_end
        for index, gate in enumerate(gates):
            gate.touch()
            time.sleep(0.02 * number)  # the moments are the point here
            if index == 4:
                service.kill()
        service.start()
    for agent_id, ends in known.items():
        ended = state(service.client(), agent_id)
        assert [ended["state"], ended["exit_code"], ended["signal"]] == ends, ended


@pytest.mark.needs_plugin("agents/keeper knows exit codes over restarts")
@pytest.mark.parametrize(
    "function", ["keeper.KeptProcesses._on_exit", "keeper.KeptProcesses._hear_keeper", "cco_sidecar.end_agent"]
)
def test_a_kill_between_an_end_and_its_record_loses_nothing(
    make_service: Callable[..., Service], tmp_path: Path, function: str
) -> None:
    """The service kills itself on the way from the keeper's word to the ledger; the next run goes the whole way."""
    (tmp_path / "faults").mkdir()
    names = "import os, signal\nfrom pathlib import Path\nimport cco_sidecar\nfrom cco_sidecar_plugins.agents import keeper\n"
    names += f"FAULT, whole = Path({str(tmp_path / 'fault')!r}), {function}\n"
    code = f"lambda *_: os.kill(os.getpid(), signal.SIGKILL) if FAULT.exists() else whole(*_)\n{function} = fault\n"
    (tmp_path / "faults/fault.py").write_text(f"{names}fault = {code}")
    service, gate = make_service(*COMMAND, "--plugins", str(tmp_path / "faults")), tmp_path / "gate"
    agents = [spawn_waiting(service.client(), task, gate) for task, *_ in ENDS]
    (tmp_path / "fault").touch()
    gate.touch()
    assert service.process and service.process.wait(120) == -signal.SIGKILL
    (tmp_path / "fault").unlink()
    service.start()
    for agent_id, (_, *known) in zip(agents, ENDS, strict=True):
        ended = state(service.client(), agent_id)
        assert [ended["state"], ended["exit_code"], ended["signal"]] == known
        told = service.client().wait("agent_exited", filter=f"agent_id:{agent_id}", since="earliest", timeout=0)[
            "events"
        ]
        assert [event["data"]["exit_code"] for event in told] == known[1:2]


FAULTY = """
from pathlib import Path
from cco_sidecar import Agents, hookimpl

@hookimpl
def part_class(base):
    def check():
        if Path(FAULT).exists():
            with open(FAULT, "a") as counted:
                counted.write(".")
            raise TimeoutError

    class Faulty(base):
        async def tend(self, running):
            check()
            await super().tend(running)

        async def judge(self, running):
            check()
            await super().judge(running)

    return Faulty if issubclass(base, Agents) else None
"""


def test_an_agent_that_cannot_be_looked_after_for_a_while_ends_in_its_time_and_is_recorded_later(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/faulty.py").write_text(f"FAULT = {str(fault)!r}\n{FAULTY}")
    service = make_service(*COMMAND, "--plugins", str(tmp_path / "plugins"), "--agent-timeout", "1")
    agent_id = spawn(service.client())["agent_id"]
    until(lambda: not agents_left())
    until(lambda: f"agent {agent_id}: record is tried again: TimeoutError" in service.log)
    until(lambda: len(fault.read_text()) > 4)
    assert service.log.count("record is tried again") == 1
    assert status(service.client(), agent_id)["state"] == "running"
    fault.unlink()
    assert state(service.client(), agent_id)["state"] == "timeout"
    told = service.client().wait("agent_exited", filter=f"agent_id:{agent_id}", since="earliest", timeout=0)["events"]
    assert [event["data"]["state"] for event in told] == ["timeout"]


@pytest.mark.needs_plugin("agents/end orders it")
@pytest.mark.parametrize(
    "fault", ["raise sqlite3.OperationalError('database or disk is full')", "raise OSError(5, 'Input/output error')",
              "time.sleep(0.05)"],
)  # fmt: skip
def test_an_agent_is_ended_by_order_also_where_nothing_can_be_written(
    make_service: Callable[..., Service], tmp_path: Path, fault: str
) -> None:
    """It may be this agent that fills the disk."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/fault.py").write_text(f"""
import os, sqlite3, time, cco_sidecar
commit = cco_sidecar.Records.commit
def faulty(self, *more):
    end = time.monotonic() + 20
    while os.path.exists({str(tmp_path / "fault")!r}) and time.monotonic() < end:
        {fault}
    return commit(self, *more)
cco_sidecar.Records.commit = faulty
""")
    service = make_service(*COMMAND, "--plugins", str(tmp_path / "plugins"))
    agent_id = spawn(service.client(), "hang")["agent_id"]
    (tmp_path / "fault").touch()
    assert service.client().delete(f"/api/agents/{agent_id}").status_code == 202
    until(lambda: not agents_left())
    if "raise" in fault:  # else the write waits, and has not failed
        until(lambda: "it has ended (killed" in (status(service.client(), agent_id)["reason"] or ""))
        (listed,) = service.client().get("/api/agents", status="active").json()["agents"]
        assert listed["state"] == "running" and "it has ended" in listed["reason"], "as it is on disk"
    (tmp_path / "fault").unlink()
    ended = state(service.client(), agent_id)
    assert (ended["state"], ended["reason"]) == ("killed", None)


@pytest.mark.needs_plugin("agents/keeper knows exit codes over restarts")
def test_what_a_keeper_writes_down_of_an_end_cannot_be_forged_while_it_lives(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    service, gate = make_service(*COMMAND), tmp_path / "gate"
    agent_id = spawn_waiting(service.client(), "lie", gate)
    service.kill()
    gate.touch()
    until(lambda: not keepers(service))
    folder = folder_of(service, agent_id)
    assert stat.S_IMODE((folder / "exit").stat().st_mode) == 0o600 and not (folder / "exit~").exists()
    service.start()
    assert (state(service.client(), agent_id)["state"], status(service.client(), agent_id)["exit_code"]) == (
        "failed",
        3,
    )


TOLD = {"code": 0, "cpu": 0.5, "memory": 10_000_000, "time": 1e9}
UNUSABLE: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: None,
    "empty": lambda path: path.touch(),
    "torn": lambda path: path.write_text(json.dumps(TOLD)[:-3]),
    "no JSON": lambda path: path.write_bytes(b"\xff\x00"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a code of another kind": lambda path: path.write_text(json.dumps(TOLD | {"code": True})),
    "no code": lambda path: path.write_text(json.dumps(TOLD | {"code": 1 << 70})),
    "no time": lambda path: path.write_text(json.dumps(TOLD | {"time": None})),
    "no number": lambda path: path.write_text(json.dumps(TOLD | {"cpu": float("nan")})),
    "too much memory": lambda path: path.write_text(json.dumps(TOLD | {"memory": 1 << 62})),
    "endless": lambda path: path.write_text(json.dumps(TOLD) + "x" * 10_000_000),
    "a pipe": os.mkfifo,
    "a link": lambda path: (path.with_name("elsewhere").write_text(json.dumps(TOLD)), path.symlink_to("elsewhere")),
    "a folder": Path.mkdir,
}


@pytest.mark.needs_plugin("agents/keeper knows exit codes over restarts")
def test_lost_is_said_where_nothing_can_be_known(make_service: Callable[..., Service]) -> None:
    """The keeper is killed as well, and what stands where it would have written is anything at all, or what it
    writes.
    """
    service = make_service(*COMMAND, "--max-agents", "60")
    agents = {name: spawn(service.client())["agent_id"] for name in [*UNUSABLE, "good"]}
    pids = [status(service.client(), agent_id)["pid"] for agent_id in agents.values()]
    service.kill()
    processes = [*map(psutil.Process, pids)]
    for process in [*keepers(service), *processes]:  # the keeper first
        process.kill()
    until(lambda: not keepers(service) and not alive(processes))
    for name, agent_id in agents.items():
        UNUSABLE.get(name, lambda path: path.write_text(json.dumps(TOLD)))(folder_of(service, agent_id) / "exit")
    service.start()
    architect = service.client()
    for name in UNUSABLE:
        assert (state(architect, agents[name])["state"], status(architect, agents[name])["exit_code"]) == (
            "lost",
            None,
        ), name
    ended = state(architect, agents["good"])
    assert (ended["state"], ended["exit_code"], ended["usage"]["peak_memory_bytes"]) == ("completed", 0, 10_000_000)
    assert ended["started_at"] <= ended["ended_at"] <= iso()
    assert "Traceback" not in service.log


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_stands_in_the_place_of_a_keepers_note_is_read_as_none(tmp_path: Path, name: str) -> None:
    UNUSABLE[name](tmp_path / keeper.KeeperProgram.PID)
    assert keeper.noted_pid(tmp_path) is None
    assert keeper.is_kept(tmp_path) == (name in ("a link", "a folder")), "what cannot be known is waited for"


@pytest.mark.parametrize("codes", [[0], [3, -9], [0, 1, 2]])
def test_a_keeper_tells_of_an_end_before_the_disk_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int]
) -> None:
    program, real, happened = keeper.KeeperProgram(str(tmp_path), "0"), os.fsync, list[str]()
    monkeypatch.setattr(os, "fsync", lambda file: (happened.append("written"), real(file)))
    monkeypatch.setattr(program, "_tell", lambda agent, ended: happened.append(f"told {ended['code']}"))
    for pid, code in enumerate(codes):
        (tmp_path / str(pid)).mkdir()
        program._agents[pid] = str(pid), program._open_note(str(pid))
        program._ended(pid, {"code": code, "cpu": 0.0, "memory": 0})
        assert keeper.written_end(tmp_path / str(pid)).code == code
    assert happened == [word for code in codes for word in (f"told {code}", "written")]


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_keeper_waits_for_room_to_write_an_end_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: int
) -> None:
    program, real, failures = keeper.KeeperProgram(str(tmp_path), "0"), os.fsync, [problem, problem]

    def fsync(file: int) -> None:
        if failures:
            raise OSError(failures.pop(), "of the test")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(program, "_tell", lambda **news: None)
    (tmp_path / "a").mkdir()
    program._agents[7] = "a", program._open_note("a")
    program._ended(7, {"code": 3, "cpu": 0.0, "memory": 0})
    while program._unwritten:
        assert keeper.is_kept(tmp_path / "a") and keeper.written_end(tmp_path / "a") is None and problem != errno.EIO
        assert not (tmp_path / "a/exit~").exists()
        program._write_end("a")
    end = keeper.written_end(tmp_path / "a")
    assert not keeper.is_kept(tmp_path / "a") and (end.code if end else None) == (None if problem == errno.EIO else 3)


ORPHANS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from _keeper_program import KeeperProgram
program = KeeperProgram("/nowhere", "0")
for program._starting in (False, True, False):
    for _ in range(3):
        os.posix_spawn(sys.executable, [sys.executable, "-IS", "-c", ""], {})
    while program._has_children():
        pass
    print(len(program._unclaimed))
"""


def test_a_keeper_remembers_orphans_only_while_it_starts_an_agent() -> None:
    folder = str(Path(keeper._keeper_program.__file__).parent)
    told = subprocess.run([sys.executable, "-c", ORPHANS, folder], capture_output=True, text=True, timeout=60)
    assert (told.stdout, told.stderr) == ("0\n3\n3\n", ""), "one may be the agent that is started"


@pytest.mark.needs_plugin("agents/keeper knows exit codes over restarts")
def test_an_adopted_agent_whose_keeper_is_killed_is_judged_by_its_results(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND)
    lazy, busy = (spawn(service.client(), task)["agent_id"] for task in ("hang", "store_and_hang"))
    says(service.client(), busy, "stored")
    first = keepers(service)
    service.kill()
    service.start()
    for process in first:
        process.kill()
    architect = service.client()
    for agent_id in (lazy, busy):
        psutil.Process(status(architect, agent_id)["pid"]).kill()
    assert (state(architect, lazy)["state"], state(architect, busy)["state"]) == ("lost", "completed")


def test_a_stop_leaves_agents_running_and_the_next_start_finds_them(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND)
    spawned = spawn(service.client(), "hang")
    assert service.stop() == 0
    process = psutil.Process(spawned["process_id"])
    assert alive([process])
    service.start()
    assert status(service.client(), spawned["agent_id"])["state"] == "running"
    assert Client(service.url, spawned["jwt_token"]).get("/status").status_code == 200
    service.client().end(spawned)
    until(lambda: not alive([process]))


def test_a_stop_with_stop_agents_ends_them_all(make_service: Callable[..., Service]) -> None:
    service = make_service(*COMMAND, "--stop-agents")
    architect = service.client()
    ids = [spawn(architect, task)["agent_id"] for task in ("hang", "family", "escape_and_hang")]
    for agent_id, ready in zip(ids, ("hanging", "family", "escaped"), strict=True):
        says(architect, agent_id, ready)
    assert service.stop() == 0
    assert not agents_left()
    service.start()
    assert [status(service.client(), agent_id)["state"] for agent_id in ids] == ["killed"] * 3


DEAF_KEEPER = """
import importlib.util, signal, sys, threading
spec = importlib.util.spec_from_file_location("keeper", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
keeper = module.KeeperProgram(sys.argv[2], "0")
keeper._reap = lambda: print("reaped", flush=True)
threading.Thread(target=threading.Event().wait, daemon=True).start()  # it gets the signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
print("ready", flush=True)
keeper.run()
"""


@pytest.mark.needs_plugin("agents/keeper")
@pytest.mark.parametrize("orders", [b"", b"{", b'{"follow": ['])
def test_the_keeper_hears_of_ends_that_interrupt_no_read(tmp_path: Path, orders: bytes) -> None:
    program = Path(keeper.__file__).with_name("_keeper_program.py")
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF_KEEPER, str(program), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdin and process.stdout and process.stdout.readline() == b"ready\n"
        process.stdin.write(orders)  # which has no end yet
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), False)
        until(lambda: process.send_signal(signal.SIGCHLD) or process.stdout.read())
        process.stdin.close()
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()


LATE_NEWS = """
import os, time
from cco_sidecar import *
from cco_sidecar_plugins.http import ready

measured = ready.SharedChecks
ready.SharedChecks = lambda seconds: measured(600)  # what /health measures needs the storage

@hookimpl
def part_class(base):
    class Late(base):
        def commit(self, records, jobs):
            done = super().commit(records, jobs)
            while os.path.exists(HOLD) and records.one("select 1 from agent where state = 'completed'"):
                time.sleep(0.01)
            return done

    class Counting(base):
        def row(self, claims, body):  # there is room for this one
            with open(HOLD + ".spawns", "a") as spawns:
                spawns.write(".")
            return super().row(claims, body)

    return Late if issubclass(base, Storage) else Counting if issubclass(base, Launcher) else None
"""


@pytest.mark.needs_plugin("agents/end, http/ready and http/repeats")
def test_an_agent_whose_end_is_stored_has_ended_for_every_request(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    hold, go, more = tmp_path / "hold", tmp_path / "go", tmp_path / "more"
    more.mkdir()
    (more / "late.py").write_text(LATE_NEWS.replace("HOLD", repr(str(hold))))
    command = ["sh", "-c", f"until [ -e {go} ]; do sleep 0.05; done"]
    service = make_service("--agent-command", json.dumps(command), "--max-agents", "1", "--plugins", str(more))
    client, body = service.client(), {"agent_type": "python-specialist", "issue_id": "issue-1"}

    def ask() -> requests.Response:
        return client.post("/api/agents/spawn", body, headers={"Idempotency-Key": "one"})

    def active() -> int:
        return int(client.get("/health").json()["checks"]["active_agents"])

    first = ask().json()
    assert first["jwt_token"] and active() == 1
    hold.touch()
    go.touch()
    until(lambda: status(client, first["agent_id"])["ended_at"])  # which the service itself has not been told yet
    assert active() == 0
    ending = client.delete(f"/api/agents/{first['agent_id']}?force=true").json()
    assert (ending["ending"], ending["state"]) == (False, "completed")
    again = ask().json()
    assert (again["agent_id"], again["jwt_token"], again["state"]) == (first["agent_id"], "", "completed")
    with ThreadPoolExecutor(1) as pool:
        next_one = pool.submit(service.client().spawn)
        until(lambda: next_one.done() or (tmp_path / "hold.spawns").read_text() == "..")
        hold.unlink()
        assert next_one.result()["state"]


SHORT_LIFE = """
import asyncio
from cco_sidecar import *

@hookimpl
def agent_result():
    return {"status": "success", "rationale": "it said nothing"}

@hookimpl
def part_class(base):
    class Patient(base):
        async def begin_watch(self, running):
            await super().begin_watch(running)
            await asyncio.wait([running.task], timeout=10)

    return Patient if issubclass(base, Agents) else None
"""


@pytest.mark.needs_plugin("agents/endings and http/repeats")
def test_a_result_that_is_stored_for_an_agent_within_its_spawn_is_not_taken_for_the_spawns_answer(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/short_life.py").write_text(SHORT_LIFE)
    service = make_service("--agent-command", '["true"]', "--plugins", str(tmp_path / "more"))
    client, body = service.client(), {"agent_type": "python-specialist", "issue_id": "issue-1"}
    first, again = (client.post("/api/agents/spawn", body, headers={"Idempotency-Key": "one"}) for _ in range(2))
    assert first.status_code == 201 and again.json()["agent_id"] == first.json()["agent_id"]
    told = status(client, first.json()["agent_id"])
    assert (told["state"], told["result_status"]) == ("completed", "success")
    assert "is tried again" not in service.log


SLOW_LOOKS = """
import asyncio
from cco_sidecar import *

@hookimpl
def part_class(base):
    class SlowToLook(base):
        async def members(self, running):
            await asyncio.sleep(2.5)  # as where there are thousands of processes
            return await super().members(running)

    return SlowToLook if issubclass(base, Processes) else None
"""
STUBBORN = {  # what ends by no kind word, or has more processes than one
    "a patient one": "import time; time.sleep(600)",
    "one that ignores SIGTERM": "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)",
    "one with a child": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])",
}


@pytest.mark.parametrize("code", STUBBORN.values(), ids=STUBBORN)
def test_a_stop_that_is_to_end_agents_leaves_none_however_long_a_look_at_processes_takes(
    make_service: Callable[..., Service], tmp_path: Path, code: str
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/slow.py").write_text(SLOW_LOOKS)
    command = json.dumps([sys.executable, "-c", code])
    service = make_service("--stop-agents", "--agent-command", command, "--plugins", str(tmp_path / "more"))
    spawned = service.client().spawn()
    assert service.stop() == 0
    assert not psutil.pid_exists(spawned["process_id"]) and "failed" not in service.log


HANGING_LOOKS = """
import asyncio
from pathlib import Path
from cco_sidecar import *

@hookimpl
def part_class(base):
    class HangingAgain(base):
        looks = looks_since_asked = 0

        def look(self, running):
            if "deaf" in told():
                running.row["time_limit"] = 0.0
            super().look(running)

        async def members(self, running):
            self.looks_since_asked += "asked" in told()
            running.grace = 1.5 if self.looks_since_asked > 2 else 600.0
            self.looks += 1
            if self.looks % 2 == 0:
                await asyncio.sleep(1)
                raise TimeoutError
            return await super().members(running)

    return HangingAgain if issubclass(base, Processes) else None

def told():
    return Path(TOLD).read_text() if Path(TOLD).exists() else ""
"""
DEAF = """
import signal, sys, time
told = open(sys.argv[1], "a", buffering=1)
signal.signal(signal.SIGTERM, lambda *_: print("asked", file=told))
print("deaf", file=told)
while True:
    time.sleep(600)
"""


def test_looks_that_time_out_begin_no_grace_anew_and_nobody_is_asked_twice(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/hanging.py").write_text(f"TOLD = {str(tmp_path / 'told')!r}\n{HANGING_LOOKS}")
    command = ("--agent-command", json.dumps([sys.executable, "-c", DEAF, str(tmp_path / "told")]))
    service = make_service(*command, "--plugins", str(tmp_path / "more"))
    client = service.client()
    agent_id = client.spawn()["agent_id"]
    until(lambda: status(client, agent_id)["ended_at"])
    assert status(client, agent_id)["state"] == "timeout"
    assert (tmp_path / "told").read_text().split() == ["deaf", "asked"]
    assert f"agent {agent_id}: its processes cannot be looked at" in service.log
