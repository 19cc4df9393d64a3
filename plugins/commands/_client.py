"""A client of a running service: finds it, speaks for the user, and says in one line why something cannot be."""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import json
import logging
import os
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import jwt
import msgspec

from cco_sidecar import (
    ERRORS,
    REFUSED,
    Settings,
    SidecarInfo,
    StartError,
    bundled_folder,
    load_hooks,
    mint_token,
    settings_from,
)
from cco_sidecar_plugins._called import own_command
from cco_sidecar_plugins._files import denied, read_sidecar_json
from cco_sidecar_plugins._hooks import LoadedPlugin
from cco_sidecar_plugins._trust import context_trusting, own_certificate
from cco_sidecar_plugins.commands._health import about_certificate, ask_health, read_health
from cco_sidecar_plugins.commands._running import about_silent, running_settings, start_it, with_secret

TOKEN_REFUSED = ("AUTH_001", "AUTH_002", "AUTH_003")
NOT_REACHABLE = 3  # beside the core's exit codes


class NotReachable(StartError):
    def __init__(self, message: str) -> None:
        super().__init__(message, NOT_REACHABLE)


class NotAnswering(NotReachable):
    """It lets us wait: who asks again waits as long again."""


class Refused(StartError):
    """The service's own words; ``answer`` is its JSON, empty where what answered is none of ours."""

    def __init__(self, status: int, content: bytes, advice: str = "") -> None:
        self.status, self.content, self.answer = status, content, {}
        try:
            answer = json.loads(content)
            message = f"{status} {answer['code']}: {in_plain_words(answer)}"
            self.answer = answer
        except (ValueError, LookupError, TypeError, RecursionError):
            message = f"{status}: {content[:200].decode('utf-8', 'replace')}"
        super().__init__(f"{message}; {advice}" if advice else message, REFUSED)
        self.unserved = "no plugin in use adds" in str(self.answer.get("message"))
        details = self.answer.get("details")
        self.by_policy = isinstance(details, dict) and "policy" in details


def in_plain_words(answer: dict[str, Any]) -> str:
    """The message of an error; of a field that is wrong its name first, in the place of msgspec's path to it."""
    message, details = str(answer["message"]), answer.get("details")
    path = details.get("path", "") if isinstance(details, dict) else ""
    if not message.endswith(place := f" - at `$.{path}`"):
        return message
    general = ERRORS[answer["code"]][1] if answer["code"] in ERRORS else ""
    return f"{path}: {message.removesuffix(place).removeprefix(f'{general}: ')}"


@functools.lru_cache(1)
def opener_trusting(secure: bool, certificate: Path | None, _: int) -> urllib.request.OpenerDirector:
    own = [urllib.request.HTTPSHandler(context=context_trusting(certificate))] if secure else []
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirects, *own)


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows none: a sidecar sends nobody elsewhere, and the token would go along."""

    def redirect_request(self, *_: Any) -> None:
        """Leaves the answer as it is."""


def project_of(token: str) -> str:
    """The project that a token says it is for, "" where it cannot be read."""
    with contextlib.suppress(jwt.PyJWTError):
        return str(jwt.decode(token, options={"verify_signature": False}).get("project_id", ""))
    return ""


class Client:
    """Talks to a running service: the one of ``--url``, of the agent's own environment, or of this repository.

    Before each request it makes sure that this one answers: after a kill another one may have the port, and is not
    to get the token.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._environ = os.environ
        self._given = service_url(getattr(options, "url", None), self._environ.get("SIDECAR_URL"))
        self._settings = None if self._given else running_settings(settings_from(options))
        self._cco = own_command(self._settings)
        self.project = self._environ.get("PROJECT_ID", "")
        self.url, self._instance, self._minted = self._given, "", False
        self._look_for_it()
        self.token = self._find_token()

    @property
    def _opener(self) -> urllib.request.OpenerDirector:
        """Proxies are for the world outside. The certificate of the repository's own service is trusted; another one by
        naming it in SSL_CERT_FILE.
        """
        own = own_certificate(self._settings.storage) if self._settings else (None, 0)
        return opener_trusting(self.url.startswith("https:"), *own)

    def _look_for_it(self) -> None:
        """Take where the repository's service is now: it may have been started again. Raises NotReachable."""
        if self._settings:
            info = read_sidecar_json(self._settings.storage)
            if info is None and (problem := denied(self._settings.storage / SidecarInfo.FILE)):
                raise NotReachable(f"whether a sidecar runs for {self._settings.root} cannot be seen: {problem}")
            if info is None:
                raise NotReachable(f"no sidecar runs for {self._settings.root}; {self._advice(self._settings)}")
            self.url, self.project, self._instance = info.url, info.project_id, info.instance_id

    def _advice(self, settings: Settings) -> str:
        return start_it(settings)

    def command(self, words: str) -> str:
        """How the command ``words`` is typed for the same service."""
        return f"{self._cco} --url={self._given} {words}" if self._given else f"{self._cco} {words}"

    def _find_token(self) -> str:
        """The agent's own token, $JWT_TOKEN, or one minted from the storage's secret."""
        if path := self._environ.get("CCO_TOKEN_FILE"):
            with contextlib.suppress(OSError):
                return Path(path).read_text("utf-8", "replace").strip()
        if token := self._environ.get("JWT_TOKEN", "").strip():
            return token
        if self._settings:
            self._minted = True
            known = msgspec.structs.replace(self._settings, no_plugins=True)  # the type is no plugin's, which take time
            return mint_token(with_secret(known), "chief-architect", "cli")  # one subject: repeats of a key are known
        return ""

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: dict[str, Any] | None = None,
        timeout: float = 60,
        key: str | None = None,
        accept: str = "application/json",
    ) -> Any:
        """The decoded answer: text where it is Markdown. Raises Refused (exit code 1) and NotReachable (3)."""
        self._look_for_it()
        self._check_who_answers()
        given = {name: value for name, value in (query or {}).items() if value is not None}
        path += "?" + urllib.parse.urlencode(given) if given else ""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json", "Accept": accept}
        headers |= {"Idempotency-Key": key} if key else {}
        content = None if body is None else json.dumps(body).encode()
        status, answer = self._send(method, path, headers, content, timeout)
        if status >= 300:
            refusal = Refused(status, answer)
            about = self._about_token if status in (401, 403) else self._about_plugins
            raise Refused(status, answer, about(refusal))
        if accept == "text/markdown" and not answer.startswith(b"{"):
            return answer.decode()
        try:
            return json.loads(answer or b"null")
        except (ValueError, RecursionError) as error:
            raise StartError(f"{self.url}{path}: {error}") from None

    def health(self) -> dict[str, Any]:
        """What /health says, of a service that does not work too. Raises Refused and NotReachable."""
        try:
            return dict(self.call("GET", "/health"))
        except Refused as refusal:
            if health := read_health(refusal.content):
                return health
            raise

    def _check_who_answers(self) -> None:
        """Raises NotReachable where that is no sidecar, one of another project than the token's, or another run than
        the one that is announced.
        """
        try:
            status, content = ask_health(self.url, 10)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._explained(error) from None
        refusal, health = Refused(status, content), read_health(content)
        if str(refusal.answer.get("code")) in ERRORS:  # that the Host is none of its own, say
            raise refusal
        project = project_of(self.token) or self.project
        if health and project in ("", health["project_id"]):
            if self._instance in ("", health.get("instance_id")):
                return
            whose = f"another run of project {project} than sidecar.json announces, which may have been killed"
            advice = f"give that one's --storage, or start this one again with `{self._cco}`"
        else:
            whose = f"a sidecar of project {health['project_id']}" if health else "something else"
            whose += f", not by the one of {project}" if project else ", not by a sidecar"
            advice = f"start the service with `{self._cco}`, or give the right --url"
        raise NotReachable(f"{self.url} is answered by {whose}; it was sent no token; {advice}")

    def _send(
        self, method: str, path: str, headers: dict[str, str], content: bytes | None, timeout: float
    ) -> tuple[int, bytes]:
        """(status, body)."""
        try:
            request = urllib.request.Request(self.url + path, content, headers, method=method)
            with self._opener.open(request, timeout=timeout) as answer:
                self.token = answer.headers.get("X-Refreshed-Token") or self.token
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._explained(error) from None

    def _about_token(self, refusal: Refused) -> str:
        """Where a token comes from that the service refused, and what to do; "" where that is not for the token, and
        where there is nothing to do about it.
        """
        if not self.token:
            return "no token was given: set JWT_TOKEN to one that `cco token` prints where that service runs"
        if self._minted:
            other = "the service signs with another secret than this command has"
            return f"{other}: set CCO_SIDECAR_JWT_SECRET as it is set there" if refusal.status == 401 else ""
        if refusal.answer.get("code") not in TOKEN_REFUSED or refusal.by_policy:
            return ""
        if self._environ.get("AGENT_ID"):  # an agent is not told how to have more than was given to it
            return "the token is the agent's own"
        renew = "set it to what `cco token --type TYPE` prints"
        what_to_do = f"{renew} where that service runs" if self._given else f"unset it, or {renew}"
        return f"the token is the one of the variable JWT_TOKEN: {what_to_do}"

    def _about_plugins(self, refusal: Refused) -> str:
        """What to do where the service has no such endpoint, for want of a plugin; "" where it has."""
        if not refusal.unserved:
            return ""
        status, _ = self._send("GET", "/api/plugins", {"Authorization": f"Bearer {self.token}"}, None, 60)
        if status == 404:
            return f"this service runs without plugins: end it, and start it with `{self._cco}`"
        return f"this service lacks the plugin for it: `{self.command('plugins')}` lists what it has"

    def _explained(self, error: Exception) -> StartError:
        """Why the request could not be made, and what to do."""
        if isinstance(error, ValueError):
            return StartError(f"{self.url}: {error}")
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            advice = about_silent(self._settings) if self._settings else ""
            advice = advice or "it may be busy or stopped: try again, or look where it runs"
            return NotAnswering(f"{self.url} does not answer: {reason}; {advice}")
        advice = f"start the service with `{self._cco}`"
        scheme, _, rest = self.url.partition(":")
        if isinstance(reason, ssl.SSLCertVerificationError):
            advice = about_certificate(reason)
        elif isinstance(reason, (ConnectionResetError, http.client.BadStatusLine)) and self._given and scheme == "http":
            advice = f"if it serves HTTPS give --url https:{rest}, else {advice}"
        return NotReachable(f"{self.url} is not reachable: {reason}; {advice}")


def service_url(flag: str | None, variable: str | None) -> str:
    """The address that ``--url`` or the variable names, without the path of the API; "" where neither does. Raises
    StartError.
    """
    text = flag or variable or ""
    try:
        parts = urllib.parse.urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.username
        good = good and not re.search(r"[?#\s\x00-\x1f]", text)
    except ValueError:  # a port that is no number, brackets that do not close
        good = False
    if text and not good:
        raise StartError(f"{'--url' if flag else 'SIDECAR_URL'}: {text!r} is not http://HOST:PORT or https://HOST:PORT")
    return text.rstrip("/").removesuffix("/api")


def loaded_plugins(
    options: argparse.Namespace, *, files_too: bool = False, ask: bool = True
) -> tuple[list[LoadedPlugin], str]:
    """(plugins, whose they are). Where a policy of the service refuses to tell, ``files_too`` has the files looked at:
    the policy may be the plugin that is looked for. Without ``ask`` no service is asked.
    """
    whose = "that the next start would load"
    if ask and not {"plugins", "no_plugins"} & vars(options).keys():
        try:
            client = Client(options)
            answer = client.call("GET", "/api/plugins")
            return msgspec.convert(answer["plugins"], list[LoadedPlugin]), f"of the service that runs on {client.url}"
        except NotReachable:
            if getattr(options, "url", None):
                raise
        except Refused as refusal:
            if not refusal.by_policy or not files_too or getattr(options, "url", None):
                raise
            whose += f"; the running service refuses to tell its own: {refusal}"
    logging.getLogger("cco").setLevel(logging.ERROR)  # what cannot be loaded is in the list
    return load_hooks(settings_from(options)).loaded, whose


def is_own(plugin: LoadedPlugin) -> bool:
    """Whether it is one of the user's. The running service may have its bundled ones elsewhere."""
    known = Path(bundled_folder() or "/nowhere", *Path(plugin.source).parts[-2:])
    return plugin.source != "built in" and not known.is_file()


def told_types(options: argparse.Namespace) -> dict[str, Any] | None:
    """What the running service says of its agent types; None where options say which there are. Raises StartError."""
    if {"agent_types", "plugins", "no_plugins"} & vars(options).keys():
        return None
    return dict(Client(options).call("GET", "/api/agent-types"))


def running_types(options: argparse.Namespace) -> dict[str, Any] | None:
    """The same; None also where no service runs, or it does not tell us."""
    try:
        return told_types(options)
    except (NotReachable, Refused):
        if getattr(options, "url", None):
            raise
    return None
