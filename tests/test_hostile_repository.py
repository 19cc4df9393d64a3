"""A repository that somebody else has prepared: git, asked about it, runs nothing that it names and tells of nothing
outside it.
"""

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Service, clean_environment, git, make_repository

import cco_sidecar

CONTEXT = "/api/context/issue-1/python-specialist"


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A program that leaves a mark when it runs."""
    program = tmp_path / "trap.sh"
    program.write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/sprung\ncat\n')
    program.chmod(0o755)
    return program


def set_traps(repository: Path, trap: Path) -> None:
    """Everything in a repository that can name a program, as far as git knows it."""
    for name, value in {
        "core.fsmonitor": str(trap), "core.sshCommand": str(trap), "core.pager": str(trap), "core.editor": str(trap), "core.askPass": str(trap),
        "core.hooksPath": str(repository / "hooks"), "core.gitProxy": str(trap), "diff.external": str(trap), "diff.evil.command": str(trap),
        "diff.evil.textconv": str(trap), "filter.evil.clean": str(trap), "filter.evil.smudge": str(trap), "filter.evil.process": str(trap),
        "filter.evil.required": "true", "filter.odd=name.x.clean": str(trap), "gpg.program": str(trap), "gpg.ssh.program": str(trap),
        "log.showSignature": "true", "credential.helper": f"!{trap}", "interactive.diffFilter": str(trap), "pager.log": str(trap),
        "pager.status": str(trap), "pager.diff": str(trap), "alias.status": f"!{trap}", "alias.ls-files": f"!{trap}",
        "uploadpack.packObjectsHook": str(trap),
        "merge.evil.driver": str(trap), "sequence.editor": str(trap), "extensions.partialClone": "origin", "remote.origin.promisor": "true",
        "remote.origin.url": f"ext::{trap}", "protocol.ext.allow": "always", "core.alternateRefsCommand": str(trap),
    }.items():  # fmt: skip
        git(repository, "config", name, value)
    (repository / "hooks").mkdir()
    for hook in ("post-index-change", "post-checkout", "pre-commit", "reference-transaction", "fsmonitor-watchman"):
        for folder in (repository / "hooks", repository / ".git/hooks"):
            folder.mkdir(exist_ok=True)
            (folder / hook).write_text(trap.read_text())
            (folder / hook).chmod(0o755)


def touch_everything(repository: Path) -> None:
    """Makes git read the files anew: their contents have changed, but not their sizes."""
    for path in repository.rglob("*"):
        if path.is_file() and not any(
            part.startswith(".git") or part == "hooks" for part in path.relative_to(repository).parts
        ):
            path.write_text(path.read_text().swapcase())


def test_no_program_that_a_repository_names_is_run(
    make_service: Callable[..., Service], repository: Path, trap: Path, tmp_path: Path
) -> None:
    (repository / ".gitattributes").write_text(
        "*.py filter=evil diff=evil merge=evil\n*.md filter=odd=name.x diff=evil\n"
    )
    git(repository, "add", ".gitattributes")
    git(repository, "commit", "-q", "-m", "Attributes")
    (repository / ".git/info").mkdir(exist_ok=True)
    (repository / ".git/info/attributes").write_text("* filter=evil diff=evil\n")
    set_traps(repository, trap)
    touch_everything(repository)
    (tmp_path / "sprung").unlink(missing_ok=True)
    service = make_service()
    answer = service.client().get(CONTEXT)
    assert answer.status_code == 200
    found = answer.json()["context"]["git_context"]
    assert found["branch"] == "main" and found["recent_commits"]
    assert {"src/main.py", "README.md"} <= {
        change["file"] if "file" in change else change["path"] for change in found["uncommitted_changes"]
    }
    assert service.client().get(CONTEXT, task="greet").status_code == 200
    service.stop()
    assert not (tmp_path / "sprung").exists(), (tmp_path / "sprung").read_text()


def test_the_trap_of_this_test_works(repository: Path, trap: Path, tmp_path: Path) -> None:
    (repository / ".gitattributes").write_text("*.py filter=evil\n")
    git(repository, "config", "filter.evil.clean", str(trap))
    touch_everything(repository)
    git(repository, "status")
    assert (tmp_path / "sprung").exists()


def test_programs_in_a_submodule_are_not_run_either(
    make_service: Callable[..., Service], repository: Path, trap: Path, tmp_path: Path
) -> None:
    inner = make_repository(tmp_path / "inner")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "inner")
    git(repository, "commit", "-q", "-m", "A submodule")
    (repository / "inner/.gitattributes").write_text("*.py filter=evil\n")
    git(repository / "inner", "config", "filter.evil.clean", str(trap))
    git(repository / "inner", "config", "core.fsmonitor", str(trap))
    touch_everything(repository / "inner")
    assert make_service().client().get(CONTEXT).status_code == 200
    assert not (tmp_path / "sprung").exists(), (tmp_path / "sprung").read_text()


@pytest.mark.parametrize(
    "command",
    [
        "clean = no-such-program %f", "clean = false", "clean = kill -9 $$", "process = no-such-program",
        "process = true", "process = false", "process = echo hello", "process = sleep 0.2",
    ],
)  # fmt: skip
def test_where_a_filter_of_the_users_own_fails_git_is_asked_without_it(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    (tmp_path / "gitconfig").write_text(f'[filter "mine"]\n\t{command}\n\trequired = true\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    (repository / ".gitattributes").write_text("*.py filter=mine\n")
    (repository / "src/main.py").write_text("def main():\n    return greet('there')\n")
    cco_sidecar.log_once.cache_clear()
    names, found, _ = cco_sidecar.Project(repository, tmp_path).ask()
    changes = {change.path: change.diff for change in found.uncommitted_changes}
    assert changes == {".gitattributes": None, "src/main.py": "+1 -1"} and "src/greeting.py" in names
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["git is asked without filters, one of which fails: mine"]


def test_where_git_fails_for_another_reason_no_filter_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "gitconfig").write_text('[filter "mine"]\n\tclean = cat\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    root = tmp_path / "begun"
    root.mkdir()
    git(root, "init", "--quiet")
    (root / "main.py").write_text("x = 1\n")
    git(root, "add", "main.py")
    cco_sidecar.log_once.cache_clear()
    names, found, _ = cco_sidecar.Project(root, tmp_path).ask()
    assert names == ["main.py"] and [change.status for change in found.uncommitted_changes] == ["added"]
    assert not caplog.records


def test_a_filter_of_the_users_own_goes_on_working(
    repository: Path, trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gitconfig").write_text(f'[filter "mine"]\n\tclean = {trap}\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    (repository / ".gitattributes").write_text("*.py filter=mine\n")
    touch_everything(repository)
    assert cco_sidecar.run_git(repository, "status", "--porcelain")
    assert (tmp_path / "sprung").exists()


def test_gits_own_variables_lead_nowhere_else(
    repository: Path, tmp_path: Path, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_repository(tmp_path / "other")
    git(other, "checkout", "-q", "-b", "elsewhere")
    for name, value in {
        "GIT_DIR": str(other / ".git"), "GIT_WORK_TREE": str(other), "GIT_INDEX_FILE": str(other / ".git/index"), "GIT_EXTERNAL_DIFF": str(trap),
        "GIT_OBJECT_DIRECTORY": str(tmp_path), "GIT_SSH_COMMAND": str(trap), "GIT_PAGER": str(trap), "GIT_TRACE": str(tmp_path / "trace"),
        "GIT_EXEC_PATH": str(tmp_path),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert (cco_sidecar.run_git(repository, "symbolic-ref", "--short", "HEAD") or b"").strip() == b"main"
    assert cco_sidecar.run_git(repository, "diff", "HEAD~1", "--numstat")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "trace").exists()


def test_a_repository_cannot_claim_the_folders_around_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    repository = make_repository(home / "evil")
    (home / "diary.md").write_text("private\n")
    git(repository, "config", "core.worktree", str(home))
    assert cco_sidecar.discover_root(repository) == repository


def test_links_lead_nothing_of_elsewhere_into_a_context(
    make_service: Callable[..., Service], repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private/diary.md").write_text("a-private-thought\n")
    os.symlink(tmp_path / "private/diary.md", repository / "AGENTS.md")  # the bundled plugin reads it by its name
    os.symlink(tmp_path / "private", repository / "docs/linked")
    os.symlink(tmp_path / "private/diary.md", repository / "src/diary.py")
    os.symlink("/etc/passwd", repository / "README.txt")
    os.symlink("/proc/self/environ", repository / "pyproject2.toml")
    (repository / "pyproject.toml").unlink()
    os.symlink(tmp_path / "private/diary.md", repository / "pyproject.toml")
    os.mkfifo(repository / "src/pipe.py")
    git(repository, "add", "-A", ":!src/pipe.py")
    service = make_service(env=clean_environment())
    for agent_type in ("python-specialist", "documentation-expert"):
        text = service.client().get(f"/api/context/issue-1/{agent_type}", task="diary passwd private thought").text
        assert "a-private-thought" not in text and "root:x:" not in text and "CCO_TEST_MARK" not in text
    assert stat.S_ISFIFO((repository / "src/pipe.py").lstat().st_mode)


@pytest.mark.parametrize("arguments", [[], ["--no-plugins"]], ids=["the plugin's reader", "the module's own"])
def test_a_repository_that_git_cannot_read_is_an_error_that_says_why_and_odd_facts_are_null(
    make_service: Callable[..., Service], repository: Path, arguments: list[str]
) -> None:
    subprocess.run(["git", "-C", repository, "checkout", "-q", "-b", b"caf\xe9"], check=True)
    os.utime(repository / "src/main.py", ns=(2**64, 2**64))
    service = make_service(*arguments)
    answer = service.client().get(CONTEXT, task="greet")
    assert answer.status_code == 200, service.log
    found = answer.json()["context"]
    assert found["git_context"]["branch"] == "caf\ufffd" and len(found["git_context"]["recent_commits"]) == 2
    assert "src/main.py" in [file["path"] for file in found["relevant_files"]]
    (repository / "ignored.log").write_text("never given")
    (repository / ".git/index").write_text("garbage")
    answer = service.client().get(CONTEXT)
    assert (answer.status_code, answer.json()["code"]) == (500, "CTX_001")
    assert "index file smaller than expected" in answer.json()["message"]
    assert str(repository) not in answer.text + service.log.partition("cannot be read")[2]
    (repository / ".git/index").unlink()
    assert service.client().get(CONTEXT).status_code == 200


@pytest.mark.parametrize("arguments", [[], ["--no-plugins"]], ids=["the plugin's reader", "the module's own"])
def test_a_head_that_names_no_branch_is_none_and_hides_no_change(
    make_service: Callable[..., Service], repository: Path, arguments: list[str]
) -> None:
    service = make_service(*arguments)
    for named in ("", "a...b", "M  x", "x.lock"):
        (repository / ".git/HEAD").write_text(f"ref: refs/heads/{named}\n")
        git_context = service.client().get(CONTEXT).json()["context"]["git_context"]
        found = {change["path"]: change["status"] for change in git_context["uncommitted_changes"]}
        assert git_context["branch"] is None and not git_context["recent_commits"], named
        assert found == dict.fromkeys(git(repository, "ls-files").split(), "added"), named
    git(repository, "rm", "-rq", "--cached", ".")
    for name in repository.iterdir():
        if name.name != ".git":
            shutil.rmtree(name) if name.is_dir() else name.unlink()
    git_context = service.client().get(CONTEXT).json()["context"]["git_context"]
    assert git_context["branch"] is None and git_context["uncommitted_changes"] == []


@pytest.mark.parametrize(
    "name", [b"\xff.py", b"caf\xe9 src.py", b"d\xe9/a.py", b"\x80\x81/__init__.py", b"test_\xc3.py"]
)
def test_a_name_that_is_not_utf8_takes_the_rank_and_the_brief_from_no_other_file(
    make_service: Callable[..., Service], repository: Path, name: bytes
) -> None:
    odd = repository / os.fsdecode(name)
    odd.parent.mkdir(exist_ok=True)
    odd.write_text("from greeting import greet\n\ndef oddity():\n    greet('odd')\n")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "An oddity")
    service = make_service()
    for task, best in (("greet", "src/greeting.py"), ("oddity", name.decode("utf-8", "replace"))):
        answer = service.client().get(CONTEXT, task=task).json()["context"]["relevant_files"]
        assert answer[0]["path"] == best and f"defines {task}" in answer[0]["reasons"], service.log
        brief = service.client().get(CONTEXT, task=task, headers={"Accept": "text/markdown"}).text
        assert f"defines {task}" in brief and best.strip("\ufffd") in brief
    assert "plugin relevance" not in service.log and "plugin brief" not in service.log


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [("#!/bin/sh\n", 0o600, []), ("no program", 0o700, []), ("#!/bin/sh\n", 0o700, ["x" * 300_000])],
    ids=["not executable", "no program", "too many arguments"],
)
def test_a_git_that_cannot_be_run_is_a_fault_of_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, mode: int, words: list[str]
) -> None:
    (tmp_path / "git").write_text(content)
    (tmp_path / "git").chmod(mode)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cco_sidecar.GitError, match="git cannot be run"):
        cco_sidecar.ask_git(tmp_path, "rev-parse", *words)


def test_of_a_commit_of_endless_lines_whole_words_are_given(
    make_service: Callable[..., Service], repository: Path
) -> None:
    tree, secret = git(repository, "rev-parse", "HEAD^{tree}").strip(), "Zk9wQ7rT4xLm"
    subject = "fix " * 490 + f"https://user:{secret}{'x' * 4_000}@host/ " + "word " * 1_000_000
    person = {"NAME": "Ada " * 20_000, "EMAIL": "ada@host"}
    environ = clean_environment() | {
        f"GIT_{who}_{name}": person[name] for who in ("AUTHOR", "COMMITTER") for name in person
    }
    message = f"{subject}\n\n{'body ' * 1_000_000}"
    command = ["git", "-C", str(repository), "commit-tree", tree, "-p", "HEAD"]
    made = subprocess.run(command, input=message, env=environ, capture_output=True, text=True, check=True)
    git(repository, "reset", "-q", "--soft", made.stdout.strip())
    answer = make_service().client().get(CONTEXT, task="fix")
    commit = answer.json()["context"]["git_context"]["recent_commits"][0]
    assert commit["message"] == ("fix " * 490).rstrip() and secret not in answer.text
    assert commit["author"].startswith("Ada Ada") and len(commit["author"]) <= 2_000
    assert not answer.json()["truncated"] and len(answer.content) < 100_000


@pytest.mark.parametrize("kind", ["a tree of a billion files", "a subject of 20 MB"])
def test_a_commit_that_git_has_no_room_for_is_left_out(
    make_service: Callable[..., Service], repository: Path, kind: str
) -> None:
    def made(*words: str, text: str) -> str:
        environ = clean_environment() | {
            f"GIT_{who}_{name}": "a" for who in ("AUTHOR", "COMMITTER") for name in ("NAME", "EMAIL")
        }
        command = ["git", "-C", str(repository), *words]
        return subprocess.run(
            command, input=text, env=environ, capture_output=True, text=True, check=True
        ).stdout.strip()

    tree, message = git(repository, "rev-parse", "HEAD^{tree}").strip(), "a" * 20_000_000
    if kind.startswith("a tree"):
        blob = made("hash-object", "-w", "--stdin", text="x")
        inner, message = (
            made("mktree", text="".join(f"100644 blob {blob}\tf{number}\n" for number in range(10))),
            "bomb",
        )
        for _ in range(8):
            inner = made("mktree", text="".join(f"040000 tree {inner}\td{number}\n" for number in range(10)))
        whole = made("mktree", text=git(repository, "ls-tree", tree).rstrip() + f"\n040000 tree {inner}\tbomb\n")
        bomb = made("commit-tree", whole, "-p", "HEAD", text=message)
    else:
        bomb = made("commit-tree", tree, "-p", "HEAD", text=message)
    git(repository, "reset", "-q", "--soft", made("commit-tree", tree, "-p", bomb, text="It is gone"))
    service = make_service()
    answer = service.client().get(CONTEXT, task="fix")
    assert answer.status_code == 200, service.log
    assert answer.json()["context"]["git_context"]["recent_commits"][0]["message"] == "It is gone"
    assert "the history is not known in full: git: fatal: attempting to allocate" in service.log
