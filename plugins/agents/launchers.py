"""More known programs that run agents, each in its headless form: goose, qwen, cursor-agent, copilot."""

from __future__ import annotations

from cco_sidecar import LAUNCHERS, AgentCommand, AgentLaunch, hookimpl, known_command

# Unasked each may edit files, call the service with curl and see its own folder in the storage; more only by its own
# settings, except for cursor-agent and copilot, which cannot be told so finely.
MORE = {
    "goose": AgentCommand(["goose", "run", "--no-session", "-t", "{prompt}"]),
    "qwen": AgentCommand(
        ["qwen", "--approval-mode", "auto-edit", "--allowed-tools", "run_shell_command(curl)", "--add-dir",
         "{agent_folder}", "-p", "{prompt}"]),
    "cursor-agent": AgentCommand(["cursor-agent", "-p", "--force", "--trust", "{prompt}"]),
    "copilot": AgentCommand(
        ["copilot", "--allow-all-tools", "--allow-all-urls", "--no-ask-user", "--add-dir", "{agent_folder}",
         "-p", "{prompt}"]),
}  # fmt: skip
KNOWN = LAUNCHERS | MORE


@hookimpl
def agent_command(launch: AgentLaunch) -> AgentCommand | None:
    command = known_command(launch.configured, KNOWN)
    return command if isinstance(command, AgentCommand) and command in MORE.values() else None
