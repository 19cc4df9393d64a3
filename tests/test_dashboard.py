"""The dashboard in a real browser: a team is watched and steered through the page, whatever agents write is shown as
text, and nothing is missed over a stop or a crash of the service.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import npm
import pytest
from agent_harness import COMMAND
from chromium import Browser
from conftest import PROJECT, Client, Service, end_stragglers, serving, until

import cco_sidecar

ENTER, ESCAPE = "\ue007", "\ue00c"
EVENTS, AGENTS = 10_000, 500
VIEWS = ["issues", "agents", "results", "events", "approvals", "health"]
AXE = "axe-core@4.14.1"
QUIET = """
window.violations = []; window.hacked = false;
addEventListener('securitypolicyviolation', event => {
    window.violations.push(`${event.violatedDirective} ${event.blockedURI}`) });
"""


# -- a page and what one does with it


class Page:
    """The dashboard in the browser, as somebody sees it who has just typed `cco dashboard`."""

    def __init__(self, browser: Browser, service: Service) -> None:
        self.browser, self.service = browser, service
        browser.cdp("Page.addScriptToEvaluateOnNewDocument", source=QUIET)
        browser.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(browser.folder))

    def open(self) -> None:
        code = self.service.client().post("/api/dashboard/code").json()["code"]
        self.browser.open("about:blank")
        self.browser.open(f"{self.service.url}/dashboard#code={code}")
        self.see("Issues", "h1")
        self.js_true("return document.querySelector('.link.live') !== null")

    def js(self, script: str, **names: Any) -> Any:
        return self.browser.run(script, **names)

    def js_true(self, script: str, seconds: float = 30, **names: Any) -> Any:
        """The first true value of a script."""
        return until(lambda: self.js(script, **names), seconds)

    def text(self, selector: str = "main") -> str:
        return str(self.js("return [...document.querySelectorAll(s)].map(e => e.innerText).join('\\n')", s=selector))

    def see(self, text: str, selector: str = "main") -> None:
        until(lambda: text in self.text(selector), 30)

    def go(self, place: str) -> None:
        self.js("location.hash = place; await new Promise(done => setTimeout(done, 50))", place=f"#/{place}")

    def click(self, text: str, within: str = "body") -> None:
        """A button or a link, by its words, as soon as it is there."""
        script = """const all = document.querySelectorAll(`${within} :is(button:enabled, a, summary)`);
            const found = [...all].find(one =>
            one.innerText.trim().startsWith(text) || one.ariaLabel === text);
            found?.focus(); found?.click(); return Boolean(found)"""
        self.js_true(script, text=text, within=within)

    def fill(self, **fields: str) -> None:
        for name, value in fields.items():
            self.js("document.querySelector(`dialog [name=${name}]`).value = value", name=name, value=value)

    def size(self, width: int, height: int) -> None:
        self.browser.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def scheme(self, name: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.browser.cdp("Emulation.setEmulatedMedia", features=features)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("dashboard"), *COMMAND) as running:
        yield running
    end_stragglers()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    logging = {"goog:loggingPrefs": {"browser": "ALL"}}
    running = Browser(tmp_path_factory.mktemp("browser"), "--force-prefers-reduced-motion", "--lang=en-US", **logging)
    yield running
    running.close()


@pytest.fixture(scope="module")
def opened(browser: Browser, service: Service) -> Page:
    page = Page(browser, service)
    page.open()
    return page


@pytest.fixture
def page(opened: Page) -> Iterator[Page]:
    """The page, wide and light. Afterwards it has complained of nothing, and asked nobody but the service."""
    opened.size(1280, 820)
    opened.scheme("light")
    yield opened
    assert opened.browser.console() == []
    assert opened.js("return [window.violations, window.hacked]") == [[], False]
    asked = opened.js("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [url for url in asked if not url.startswith((opened.service.url, "blob:"))] == []


def agent(service: Service, name: str, **claims: Any) -> Client:
    return service.client("python-specialist", sub=name, bound=True, **claims)


# -- a team at work


def test_the_code_is_taken_off_the_address_and_the_page_says_what_to_do_first(page: Page) -> None:
    assert page.js("return [location.pathname, location.hash]") == ["/dashboard", "#/issues"]
    assert page.js("return [history.length > 0, Object.keys(localStorage).length]") == [True, 0]
    for view, words in [
        ("agents", "cco agent spawn"),
        ("results", "cco results store"),
        ("events", "cco events publish"),
    ]:
        page.go(view)
        page.see(words)
    page.go("approvals")
    page.see("Nobody waits for you")


def test_an_agent_is_spawned_followed_and_ended(page: Page, issue: str) -> None:
    page.go("agents")
    page.js("document.activeElement.blur()")
    page.browser.press("n")
    page.js_true("return document.querySelector('dialog[open] [name=agent_type]') === document.activeElement")
    page.fill(agent_type="python-specialist", issue_id=issue, task="hang")
    page.click("Spawn", "dialog")
    page.see("hanging", "pre.log")
    page.see("running", "h1")
    (spawned,) = page.service.client().get("/api/agents", issue_id=issue).json()["agents"]
    page.click("End agent")
    page.see("End this agent?", "dialog")
    page.browser.press(ESCAPE)
    page.js_true("return !document.querySelector('dialog') && document.activeElement.innerText === 'End agent'")
    page.browser.press(ENTER)
    page.js_true("return document.querySelector('dialog') !== null")
    page.browser.press(ENTER)  # on the button that says so, where the focus is
    page.see("killed", "h1")
    assert page.service.client().get(f"/api/agents/{spawned['agent_id']}/status").json()["state"] == "killed"


LOSING = """crypto.randomUUID = undefined; // as on a page of no secure origin
    const whole = window.fetch;
    window.fetch = async (path, how) => {
        const answer = await whole(path, how);
        if (how.method !== 'POST') return answer;
        window.fetch = whole;
        delete crypto.randomUUID;
        throw new TypeError('lost');
    }"""
AGENT, EVENT = {"agent_type": "python-specialist", "task": "nothing"}, {"event_type": "sent_again", "data": "nothing"}


@pytest.mark.parametrize(
    ("action", "fields", "changed", "number"),
    [("Spawn", AGENT, {}, 1), ("Publish", EVENT, {}, 1), ("Spawn", AGENT, {"task": "nothing else"}, 2)],
)
def test_what_is_sent_again_as_its_answer_was_lost_is_done_once(
    page: Page, issue: str, action: str, fields: dict[str, str], changed: dict[str, str], number: int
) -> None:
    """And what is not the same any more is done, too."""
    page.go("issues")
    page.click(action)
    page.js_true("return document.querySelector('dialog[open]')")
    page.fill(issue_id=issue, **fields)
    page.js(LOSING)
    page.click(action, "dialog")
    page.see("The service does not answer", "dialog")
    page.fill(**changed)
    page.click(action, "dialog")
    page.js_true("return !document.querySelector('dialog')")
    client = page.service.client()
    agents = client.get("/api/agents", issue_id=issue).json()["agents"]
    events = client.get("/api/events", type="sent_again", limit=1000).json()["events"]
    done = agents if action == "Spawn" else [event for event in events if event["data"].get("issue_id") == issue]
    assert len(done) == number


def test_a_log_follows_can_be_paused_and_shows_colours_only(page: Page, issue: str, tmp_path: Path) -> None:
    gate, said = (
        tmp_path / "gate",
        "\x1b[31mred\x1b[0m\x1b]0;title\x07 \x1b[2Jplain <b>bold</b>\n" + "x" * 100_000 + "\nend\n",
    )
    told = {"TEST_GATE": str(gate), "TEST_THEN": "edit", "SAY": said}
    body = {"agent_type": "python-specialist", "issue_id": issue, "task": "wait", "environment": told}
    spawned = page.service.client().post("/api/agents/spawn", body).json()["agent_id"]
    page.go(f"agents/{spawned}")
    page.see("waiting", "pre.log")
    page.js("document.activeElement.blur()")
    page.browser.press("f")
    page.see("Paused", ".log-tools")
    gate.touch()
    page.see("completed", "h1")
    assert "plain" not in page.text("pre.log")
    page.browser.press("f")
    page.see("end", "pre.log")
    assert "red plain <b>bold</b>" in page.text("pre.log") and "\x1b" not in page.text("pre.log")
    assert page.text("pre.log .ansi-red") == "red"
    assert len(page.text("pre.log")) < 10_000 and "96 kB more" in page.text("pre.log")
    page.see("The whole output", ".log-tools")


def test_an_issue_is_a_story_with_results_and_routing_and_is_exported(page: Page, issue: str) -> None:
    body = {"agent_type": "python-specialist", "issue_id": issue, "task": "work well\n\nand say **why**"}
    spawned = page.service.client().post("/api/agents/spawn", body).json()["agent_id"]
    page.go("issues")
    page.click("work well", f".issues [role=listitem]:has([href='#/issues/{issue}'])")
    page.see("Ended", ".story")
    kinds = page.js("return [...document.querySelectorAll('.story-title strong')].map(one => one.innerText)")
    assert kinds == ["Started", "progress", "Stored a result", "Proposed next", "Ended"]
    assert "test-engineer" in page.text(".proposals") and "coding-success" in page.text(".proposals")
    assert "python-specialist has worked" in page.text(".story") and "exit code 0" in page.text(".story")
    page.click("Task")
    assert page.text(".task strong:not(summary *)") == "why"
    page.click("Spawn test-engineer")
    assert page.js("return [...document.querySelectorAll('dialog [name]')].slice(0, 2).map(one => one.value)") == [
        "test-engineer",
        issue,
    ]
    page.browser.press(ESCAPE)
    for words, ending in [("Markdown", "md"), ("JSON", "json")]:
        page.click("Export")
        page.click(words, ".menu-items")
        exported = page.browser.folder / f"{issue}.{ending}"
        until(lambda path=exported: path.exists() and path.stat().st_size)
        assert spawned in exported.read_text()
    page.click("1 file", ".story")
    page.see("python-specialist has worked")
    page.see("src/main.py", "aside")
    page.js("history.back()")
    page.click(f"Output of {spawned}", ".story")
    page.see("The whole output", ".log-tools")
    by = """const names = [...document.querySelectorAll('aside dt')];
        return names.find(one => one.innerText === 'Spawned by')?.parentNode.innerHTML"""
    assert "<a" not in page.js_true(by)  # as it was no agent
    page.service.client().post("/api/agents/spawn", body | {"agent_type": "test-engineer", "task": "hang"})
    page.js("history.back()")
    page.see("started since", ".proposals")
    page.js("const f = document.querySelector('[data-filter]'); f.value = 'hang'; f.dispatchEvent(new Event('input'))")
    page.js_true("return document.querySelectorAll('.story [role=listitem]').length === 1")


def test_a_result_shows_what_git_says_of_its_files_and_an_agent_the_brief_that_it_got(page: Page, issue: str) -> None:
    client, changed = page.service.client(), page.service.root / "src/greeting.py"
    before = changed.read_text()
    changed.write_text(f"{before}# <script>hacked=1</script> \u202e\n")
    stored = client.store(issue=issue, files_modified=["src/greeting.py"], decisions=["Say it twice"])["id"]
    page.go(f"results/{stored}")
    page.see("+# <script>hacked=1</script> ⟨U+202E⟩", ".diff .add")
    assert page.text(".diff summary").split() == ["src/greeting.py", "+1", "−0"]
    changed.write_text(before)
    body = {"agent_type": "python-specialist", "issue_id": issue, "task": "succeed in greeting politely"}
    page.go(f"agents/{client.post('/api/agents/spawn', body).json()['agent_id']}")
    page.see("The whole output")
    assert "Pause" not in page.text(".log-tools")
    page.go(f"issues/{issue}")
    page.click("Run")
    page.js_true("return document.querySelector('dialog [name=task]').value === task", task=body["task"])
    page.browser.press(ESCAPE)
    page.js("history.back()")
    page.click("Brief")
    page.see("src/greeting.py")
    page.see("Say it twice")
    page.click("Task")
    page.see("succeed in greeting politely")


def test_an_approval_is_answered_by_keyboard(page: Page, issue: str) -> None:
    coder = agent(page.service, f"coder-{issue}")
    asked = {"kind": "approval", "text": "Bash: git push", "command": "git push origin main", "issue_id": issue}
    wanted = coder.post("/api/approvals", asked).json()["approval_id"]
    question = {"kind": "question", "text": "Which storage?", "choices": ["sqlite", "redis"], "issue_id": issue}
    wondered = coder.post("/api/approvals", question).json()["approval_id"]
    page.js_true("return document.title.startsWith('(2)')")
    page.js("document.activeElement.blur()")
    page.browser.press("g", "p")
    page.see("git push origin main", f"[data-approval='{wanted}'] pre")
    page.browser.press("j", "a")
    page.see("git push origin main", "dialog")
    page.browser.press(ENTER)
    until(lambda: page.service.client().get(f"/api/approvals/{wanted}").json()["answer"] == "approve")
    page.js_true("return document.querySelectorAll('[data-approval]').length === 1")
    page.browser.press("2")
    page.see("redis", "dialog")
    page.browser.press(ENTER)
    until(lambda: page.service.client().get(f"/api/approvals/{wondered}").json()["answer"] == "redis")
    page.see("Nobody waits for you")
    page.see("answer: redis")


def test_a_double_click_answers_one_request(page: Page, issue: str) -> None:
    coder = agent(page.service, f"coder-{issue}")
    asked = [{"kind": "approval", "text": f"Bash: make part-{n}", "issue_id": issue} for n in range(3)]
    ids = [coder.post("/api/approvals", body).json()["approval_id"] for body in asked]
    page.go("issues")
    page.go("approvals")
    page.js_true("return document.querySelectorAll('[data-approval]').length === 3")
    place = (
        "const {x, y} = document.querySelector('[data-answer=approve]').getBoundingClientRect(); return [x + 9, y + 9]"
    )
    x, y = map(int, page.js(place))
    page.browser.click_at(x, y)
    page.js_true("return document.querySelectorAll('[data-approval]').length === 2")
    page.browser.click_at(x, y)  # on what has moved up
    page.see("this click answered none", "#said")
    states = [page.service.client().get(f"/api/approvals/{one}").json()["state"] for one in ids]
    assert states == ["answered", "open", "open"]
    for one in ids[1:]:
        page.service.client().post(f"/api/approvals/{one}/answer", {"answer": "deny"})
    page.see("Nobody waits for you")


def test_an_event_is_published_and_seen(page: Page, issue: str) -> None:
    page.go("events")
    page.click("Publish")
    page.fill(event_type="Not a type", topic="t", data="{")
    page.click("Publish", "dialog")
    assert page.js("return document.querySelector('dialog input:invalid').name") == "event_type"
    page.fill(event_type="design_approved", data="{")
    page.click("Publish", "dialog")
    page.see("JSON", "dialog [role=alert]")
    page.fill(data='{"by": "ada"}', issue_id=issue)
    page.click("Publish", "dialog")
    page.see("design_approved")
    told = page.service.client().wait("design_approved", since="earliest", timeout=0)["events"][-1]
    assert told["data"] == {"by": "ada", "issue_id": issue}


def test_a_token_is_renewed_before_it_ends_and_one_that_is_refused_asks_to_sign_in(page: Page) -> None:
    kept = "return sessionStorage.getItem('cco-token')"
    before = page.js(kept)
    script = "sessionStorage.setItem('cco-token', token); location.reload()"
    short = page.service.token("operator", sub="ada", exp=int(time.time()) + 200)
    page.js(script, token=short)
    page.js_true(f"{kept} !== {json.dumps(short)} && document.querySelector('.link.live') !== null")
    page.js(script, token=short[:-4] + "0000")
    page.see("cco dashboard", ".signin")
    assert page.js(kept) is None and page.js("return document.activeElement.id") == "code"
    page.js("document.activeElement.value = token", token=before)
    page.browser.press(ENTER)
    page.js_true("return document.querySelector('.link.live') !== null")
    refused = page.browser.console()
    assert refused and [line for line in refused if "401" not in line] == []


def test_the_pipeline_is_run_on_an_issue_and_stopped(page: Page, issue: str) -> None:
    page.service.client().publish("hello", {"issue_id": issue})
    page.go(f"issues/{issue}")
    page.click("Run")
    page.fill(task="hang")
    page.click("Run", "dialog")
    page.see("running", ".card.task")
    until(
        lambda: [
            one
            for one in page.service.client().get("/api/agents", issue_id=issue).json()["agents"]
            if one["agent_type"] == "chief-architect"
        ]
    )
    page.click("Stop run")
    page.see("ended", "dialog")
    page.browser.press(ENTER)
    page.see("stopped", ".card.task")
    page.click("Run", ".actions")
    page.see("Run the pipeline", "dialog")
    page.browser.press(ESCAPE)


def test_who_may_only_read_is_offered_nothing_else(page: Page) -> None:
    script = "sessionStorage.setItem('cco-token', token); location.reload()"
    page.js(script, token=page.service.token("operator", permissions=["read_context"]))
    page.go("issues")
    page.js_true("return document.querySelector('.link.live') && document.querySelector('.issues')")
    assert page.js("return [...document.querySelectorAll('.actions button')].map(one => one.innerText)") == []
    page.browser.press("n", "e")
    assert page.js("return document.querySelector('dialog')") is None
    page.open()


def test_a_second_tab_has_the_token_of_the_first_and_nobody_else_has(page: Page) -> None:
    back = page.browser.new_tab()
    page.browser.open(f"{page.service.url}/dashboard#/health")
    page.see("healthy", "h1")
    page.browser.close_tab(back)
    page.js("sessionStorage.removeItem('cco-token'); location.reload()")
    page.see("cco dashboard", ".signin")
    page.open()


# -- hostile contents

SCRIPT = "<img src=x onerror='hacked=1'><script>hacked=1</script><svg onload=hacked=1>"
HOSTILE = f"{SCRIPT} \u202eevil\u2066 \x1b[31mred\x07 javascript:hacked=1"
PROTO = '{"__proto__": {"hacked": 1}, "constructor": "mine", "big": 123456789012345678901234567890, "small": 1e-400}'


def publish_raw(client: Client, data: str) -> None:
    """An event whose data is this very text."""
    body = f'{{"publisher": {json.dumps(HOSTILE)}, "topic": {json.dumps(HOSTILE)}, "data": {data}}}'
    answer = client.request("POST", "/api/events/hostile", data=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 202, answer.text


def harmless(page: Page) -> bool:
    """No element, link or attribute came out of a text."""
    script = """const none = 'img, script, iframe, object, embed, [onerror], [onload]';
        const odd = document.querySelectorAll(`main :is(${none}), #nav img`);
        const links = [...document.querySelectorAll('a')].filter(a => !/^(#|http:..127)/.test(a.getAttribute('href')));
        const hidden = /[\\x1b\\x07\\u202e\\u2066]/.test(document.body.innerText);
        return odd.length === 0 && links.length === 0 && window.hacked === false && !hidden"""
    return bool(page.js(script))


def test_what_agents_write_is_text(page: Page, issue: str) -> None:
    client = page.service.client()
    files = ["a\"b'<i>.py", "../../etc/passwd", HOSTILE, "x" * 5000]
    stored = client.store(issue=issue, decisions=[HOSTILE, "y" * 100_000], files_created=files, rationale=HOSTILE,
        artifacts={HOSTILE: HOSTILE, "__proto__": {"a": HOSTILE}}, warnings=[HOSTILE],
        next_steps=[{HOSTILE: HOSTILE}])  # fmt: skip
    publish_raw(client, PROTO)
    asked = {"kind": "question", "text": HOSTILE, "choices": [HOSTILE[:150], "javascript:alert(1)"], "issue_id": issue}
    assert agent(page.service, f"evil-{issue}").post("/api/approvals", asked).status_code == 201
    body = {"agent_type": "python-specialist", "issue_id": issue, "task": f"fail {HOSTILE}"}
    spawned = client.post("/api/agents/spawn", body).json()["agent_id"]
    page.go(f"results/{stored['id']}")
    for text in ("<script>hacked=1</script>", "⟨U+202E⟩evil", "␛[31mred␇", "a\"b'<i>.py", "../../etc/passwd"):
        page.see(text)
    assert harmless(page)
    for view in [*VIEWS, f"agents/{spawned}", f"issues/{issue}", "issues/%3Cscript%3E", "nowhere/%E0%A4%A"]:
        page.go(view)
        page.js_true("return document.querySelector('h1') && !document.querySelector('.loading')")
        assert harmless(page), view
        assert page.js("return document.documentElement.scrollWidth <= innerWidth"), view
    assert [line for line in page.browser.console() if "/api/issues/%3Cscript%3E" not in line] == []
    assert page.js("return [({}).hacked, Object.prototype.a]") == [None, None]


def test_data_is_shown_as_it_came(page: Page) -> None:
    publish_raw(page.service.client(), PROTO)
    page.go("events")
    page.js_true(
        """const rows = [...document.querySelectorAll('.row-button')];
        const it = rows.find(one => one.innerText.includes('hostile')); it?.click(); return Boolean(it)"""
    )
    page.see('"__proto__": {', "pre.json")
    page.see('"big": 123456789012345678901234567890', "pre.json")


ODD = '{"toString": 1, "valueOf": 2}'  # JavaScript makes no text of it by itself


def test_one_odd_thing_takes_no_view_down(page: Page, issue: str) -> None:
    client, unseen = page.service.client(), "\u061c\u00ad\u3164\u2800\U000e0041"
    for data in (
        f'{{"issue_id": {ODD}}}',
        f'{{"issue_id": [1, {ODD}]}}',
        f'{{"issue_id": "{issue}", "agent_id": {ODD}}}',
    ):
        publish_raw(client, data)
    name = f"odd-{issue}"
    asked = {"kind": "question", "text": f"Which{unseen}?", "issue_id": issue, "command": "ls\n" * 900}
    asked |= {"choices": ["yes", "no"], "timeout_seconds": 60}
    approval = agent(page.service, name).post("/api/approvals", asked).json()["approval_id"]
    page.go("events?filter=hostile")
    page.see("hostile", ".event-type")
    page.go("approvals")
    page.see("Which⟨U+061C⟩⟨U+00AD⟩⟨U+3164⟩⟨U+2800⟩⟨U+E0041⟩?", "article h2")
    page.see("901 lines, 2,700 characters", f"[data-approval={approval}]")
    answer = """const it = document.querySelector(`[data-approval=${id}] [data-answer=no]`);
        if (f) dispatchEvent(new Event('focus')); it.click()"""
    page.js(answer, id=approval, f=True)  # as if another page had laid this one under a second click
    page.see("only just come to the front", "#said")
    assert client.get(f"/api/approvals/{approval}").json()["state"] == "open"
    page.js("await new Promise(done => setTimeout(done, 600))")
    page.js(answer, id=approval, f=False)
    until(lambda: client.get(f"/api/approvals/{approval}").json()["answer"] == "no")
    script = """const { VirtualList } = await import('/dashboard/list.js');
        const row = number => { if (number === 1) throw Error('odd'); return document.createElement('p') };
        const list = new VirtualList({ label: 'odd', key: String, row });
        const main = document.querySelector('main'); main.prepend(list.element); main.scrollTop = 0; list.set([0, 1, 2]); list.detach();
        return list.element.innerText"""
    assert "This row cannot be drawn: odd" in page.js(script)
    assert all("Error: odd" in line for line in page.browser.console())


def test_what_is_no_token_of_this_service_is_not_kept(page: Page) -> None:
    kept = page.js(
        "const kept = sessionStorage.getItem('cco-token'); sessionStorage.clear(); location.reload(); return kept"
    )
    page.see("cco dashboard", ".signin")
    foreign = jwt.encode({"sub": "a", "project_id": "other"}, "k" * 32, algorithm="HS256")
    for given, words in (("ü.ü.ü", "run `cco dashboard` again"), (foreign, "token"), (f"#code={'x' * 43}", "used")):
        page.js("const field = document.querySelector('#code'); field.value = given; field.focus()", given=given)
        page.browser.press(ENTER)
        page.see(words, ".signin [role=alert]")
        assert page.js("return sessionStorage.length") == 0, given
        page.js("document.querySelector('.signin [role=alert]').replaceChildren()")
    page.js("document.querySelector('#code').value = given; document.querySelector('#code').focus()", given=kept)
    page.browser.press(ENTER)
    page.js_true("return document.querySelector('.link.live') !== null")
    assert [line for line in page.browser.console() if "401" not in line] == []


# -- many of everything


def fill_storage(service: Service) -> None:
    """Thousands of events and hundreds of agents, written by the service's own Records while it does not run."""
    connection = cco_sidecar.connect_database(service.storage / "sidecar.db")
    records, began = cco_sidecar.Records(connection), time.time() - 3600
    connection.execute("begin")
    for number in range(EVENTS):
        data = {"number": number, "issue_id": f"many-{number % 40}"}
        body = {"publisher": f"agent-{number % 7}", "topic": "test", "data": data}
        records.insert_event(cco_sidecar.new_event(PROJECT, "counted", body))
    for number in range(AGENTS):
        row = {"id": f"python-specialist-{number:012x}", "project": PROJECT, "type": "python-specialist"}
        row |= {"issue": f"many-{number % 40}", "task": f"task {number}", "parent": None, "state": "completed"}
        row |= {"started": began + number, "time_limit": 60.0, "depth": 1, "permissions": [], "only_issue": False}
        records.insert_agent(row)
        records.update_agent(row["id"], ended=began + number + 5, exit_code=0)
    connection.execute("commit")
    connection.close()


def scroll_to_the_end(page: Page) -> None:
    page.js("""const main = document.querySelector('main'); let before = -1;
        while (main.scrollTop !== before) { before = main.scrollTop; main.scrollTop = main.scrollHeight;
            await new Promise(done => setTimeout(done, 120)) }""")  # fmt: skip


def last_row(page: Page, most: int) -> str:
    """The text of the last row of a list of ``most`` rows or more, once it is drawn."""
    script = """const all = [...document.querySelectorAll('[role=listitem]')];
        const it = all.sort((one, other) => one.ariaPosInSet - other.ariaPosInSet).at(-1);
        return it && it.ariaPosInSet === it.ariaSetSize && it.ariaSetSize >= most ? it.innerText : ''"""
    return str(until(lambda: (scroll_to_the_end(page), page.js(script, most=most))[1], 30))


ROWS = "return document.querySelectorAll('[role=listitem]').length"


def test_thousands_of_events_and_hundreds_of_agents_stay_fluid(page: Page) -> None:
    page.browser.open("about:blank")
    page.service.stop()
    fill_storage(page.service)
    page.service.start()
    page.open()
    page.go("events")
    page.see("1,000 of the newest")
    until(lambda: (scroll_to_the_end(page), "all that is kept" in page.text(".head"))[1], 60)
    oldest = page.service.client().get("/api/events", since="earliest", limit=1).json()["events"][0]
    assert oldest["event_type"] in last_row(page, EVENTS)
    assert page.js(ROWS) < 200
    page.browser.press("g", "a")
    page.see("Agents", "h1")
    page.js_true("return document.querySelectorAll('[role=listitem]').length > 3")  # which come after the heading
    page.browser.press("j", "j", "j")
    held = page.js("return document.activeElement.innerText")
    page.browser.press(ENTER)
    page.js_true("return location.hash.split('/').length === 3")
    page.browser.press(ESCAPE)
    page.js_true("return document.querySelectorAll('[role=listitem]').length > 3")
    page.browser.press("j")
    assert page.js("return document.activeElement.innerText") == held
    last_row(page, AGENTS)
    assert page.js(ROWS) < 200
    page.browser.press("/")
    page.js_true("return document.activeElement.type === 'search'")
    page.browser.press(*"task 77")
    page.js_true("return document.querySelectorAll('[role=listitem]').length === 1")
    page.browser.press(ESCAPE, "j", ENTER)
    page.see("python-specialist-00000000004d")


def test_the_focus_stays_while_rows_come(page: Page) -> None:
    page.go("events")
    page.js("document.querySelector('main').scrollTop = 0")
    page.browser.press("j", "j", "j")
    focused = (
        "return [document.activeElement.innerText, document.activeElement.closest('[role=listitem]').ariaPosInSet]"
    )
    text, place = page.js(focused)
    for number in range(20):
        page.service.client().publish("new", {"number": number})
    page.js_true(f"return document.activeElement.closest('[role=listitem]').ariaPosInSet === '{int(place) + 20}'")
    assert page.js(focused)[0] == text


REFUSING = """const {store, changed} = await import('/dashboard/store.js');
    const asked = [], held = [], whole = window.fetch, later = window.setTimeout;
    const turns = async (most, enough) => {
        for (let turn = 0; turn < most && !enough(); turn++) {
            changed(name);
            await new Promise(done => later(done, 50));
        }
        return asked.length;
    };
    window.fetch = (path, how) => {
        if (/wait/.test(path)) return whole(path, how);
        if (/since=(evt|earliest)/.test(path)) asked.push(path);
        return Promise.reject(new TypeError('refused'));
    };
    window.setTimeout = (call, wait) => wait === 5000 ? held.push(call) : later(call, wait);
    try {
        await turns(200, () => { store.more[name] ||= !asked.length; return asked.length });
        const before = await turns(20, () => false);
        held.forEach(call => call());
        return [before, await turns(200, () => asked.length > 1)];
    } finally {
        Object.assign(window, {fetch: whole, setTimeout: later});
        store.more[name] = false;
    }"""


@pytest.mark.parametrize("name", ["agents", "events"])
def test_older_rows_that_cannot_be_had_are_asked_for_again_after_a_while(page: Page, issue: str, name: str) -> None:
    page.service.client().spawn(issue, "test-engineer", task="nothing")
    page.go(name)
    page.js_true("return document.querySelector('[role=listitem]')")
    page.js("document.querySelector('main').scrollTop = 1e9")
    assert page.js(REFUSING, name=name) == [1, 2]


# -- a service that goes and comes

LOST = (
    "net::ERR_CONNECTION_REFUSED",
    "net::ERR_EMPTY_RESPONSE",
    "net::ERR_CONNECTION_RESET",
    "net::ERR_INCOMPLETE_CHUNKED_ENCODING",
    "net::ERR_SOCKET_NOT_CONNECTED",
)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_lost_service_is_told_and_found_again_without_a_gap(page: Page, how: str) -> None:
    page.go("events")
    page.size(1280, 4000)  # so that all rows are in sight
    client = page.service.client()
    expected = [client.publish(f"{how}ped", {"number": number})["event_id"] for number in range(5)]
    getattr(page.service, how)()
    page.see("The service does not answer", ".banner")
    page.service.start()
    client = page.service.client()
    expected += [client.publish(f"{how}ped", {"number": number})["event_id"] for number in range(5, 10)]
    page.js_true("return !document.querySelector('.banner')")
    page.js(
        """const field = document.querySelector('[data-filter]');
        field.value = words; field.dispatchEvent(new Event('input'))""",
        words=f"{how}ped",
    )
    page.js_true("return document.querySelectorAll('[role=listitem]').length === 10")
    page.js("for (const row of document.querySelectorAll('.row-button[aria-expanded=false]')) row.click()")
    shown = page.js_true(
        """const ids = [...document.querySelectorAll('.unfold .id')].map(one => one.innerText);
        return ids.length === 10 && ids"""
    )
    assert shown == expected[::-1]
    lost = page.browser.console()
    assert lost and [line for line in lost if not any(reason in line for reason in LOST)] == []


OVERDUE = """window.held = [];
    const later = window.setTimeout;
    window.setTimeout = (call, wait) => (wait === 45000 || wait === 20000 ? window.held.push(call) : later(call, wait));
    window.restore = () => (window.setTimeout = later)"""


def test_a_service_that_hangs_is_told_and_found_again(page: Page) -> None:
    page.go("health")
    page.go("events")
    page.js(OVERDUE)
    page.service.client().publish("hung")  # after it the page polls anew
    page.js_true("return window.held.length")
    assert page.service.process
    page.service.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(3):  # however often it is asked
            page.js_true("const due = window.held.splice(0); for (const call of due) call(); return due.length")
            page.see("The service does not answer", ".banner")
    finally:
        page.service.process.send_signal(signal.SIGCONT)
        page.js("window.restore()")
    page.js_true("return !document.querySelector('.banner') && document.querySelector('.link.live')")
    page.service.client().publish("found")
    page.see("found", ".rows")
    assert "hung" in page.text(".rows")


HIDE = """Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
    document.dispatchEvent(new Event('visibilitychange'))"""


def test_a_hidden_page_rests_and_catches_up_also_where_its_cursor_is_no_longer_known(page: Page) -> None:
    page.go("health")
    page.go("events")
    client = page.service.client()
    page.js(HIDE, hidden=True)
    client.publish("before")  # ends the poll that waits
    page.see("Paused", ".nav .link")
    client.publish("meanwhile")
    page.js("const {live} = await import('/dashboard/live.js'); live.cursor = 'evt-00000000-000000000001'")
    assert "meanwhile" not in page.text(".events")
    page.js(HIDE, hidden=False)
    page.see("meanwhile", ".events")
    page.see("Live", ".nav .link")
    client.publish("after")
    page.see("after", ".events")
    types = page.js("return [...document.querySelectorAll('.event-type')].slice(0, 3).map(one => one.innerText)")
    assert types == ["after", "meanwhile", "before"]
    refused = page.browser.console()
    assert len(refused) == 1 and "410" in refused[0]


# -- functions that need no service

TABLE = {
    r"ansi.plain('\x1b[1;31mred\x1b[0m \x1b]8;;http://a\x07link\x1b]8;;\x07 \x1b(B\x1b[?25l\x1bPq\x1b\\end')":
        "red link end",
    r"ansi.overwritten('10%\r20%\r\x1b[Kdone\r')": "\x1b[Kdone",
    r"ansi.pieces('a\x1b[38;5;1mb\x1b[31;1mc\x1b[22;39md', ansi.fresh())":
        [["a", ""], ["b", ""], ["c", "ansi-red bold"], ["d", ""]],
    r"ansi.pieces('\x1b[', ansi.fresh())": [],
    r"format.visible('a\u202eb\x00c\td\r')": "a⟨U+202E⟩b␀c\td␍",
    "[0, 999, 1000, 12345678, 5e15].map(format.bytes)": ["0 B", "999 B", "1.0 kB", "12 MB", "5000 TB"],
    "[null, 0.04, 9.96, 65, 3600, 90061].map(format.duration)":
        ["–", "0.0 s", "10.0 s", "1 min 5 s", "1 h", "1 d 1 h"],
    "format.relative('2026-01-01T00:00:00Z', Date.parse('2026-01-01T00:03:00Z'))": "3 min. ago",
    "format.relative('garbage')": "–",
    "format.shortId('python-specialist-8f0c2d6b1a3e')": "python-specialist·8f0c",
    """json.written(api.parse('{"__proto__": [1e400, 12345678901234567890], "a": {}}'))""":
        '{\n  "__proto__": [\n    1e400,\n    12345678901234567890\n  ],\n  "a": {}\n}',
    r"""diff.split('diff --git a/x y.py b/x y.py\n--- a/x y.py\n+++ b/x y.py\n@@ -1 +1 @@\n--- old\n+++ new')
        .map(file => [file.path, file.added, file.removed])""": [["x y.py", 1, 1]],
    "diff.split('').length": 0,
    r"""[...markdown.markdown('# A\n\n- b\n- **c**\n\n    code\n\n```\n# d').children].map(one => one.tagName)""":
        ["H2", "UL", "PRE", "PRE"],
    "router.route('#/issues/a%2Fb%3Cc').id": "a/b<c",
    "router.route('#/issues/%E0%A4%A').id": "%E0%A4%A",
    "router.route('#/nowhere').name": "lost",
    """lanes.lanes([{agent_id: 'a'}, {agent_id: 'b'}, {agent_id: 'a'}, {agent_id: 'c'}], new Set('b'))
        .rows.map(row => row.lanes.map(lane => [lane.column, lane.above, lane.below]))""":
        [[[1, False, True]], [[1, True, True], [2, False, True]], [[1, True, False], [2, True, True]],
         [[0, False, False], [2, True, True]]],
}  # fmt: skip


def test_the_functions_of_the_page_give_what_they_say(page: Page) -> None:
    modules = "ansi format json api diff markdown router lanes".split()
    load = "".join(f"const {name} = await import('/dashboard/{name}.js');" for name in modules)
    for expression, expected in TABLE.items():
        assert page.js(f"{load} return {expression}") == expected, expression


# -- how it looks


def test_it_fits_every_screen_and_accessibility_finds_nothing_serious(page: Page) -> None:
    client = page.service.client()
    result, issue = (client.get("/api/results").json()["results"][0][name] for name in ("id", "issue_id"))
    agent_id = client.get("/api/agents").json()["agents"][-1]["agent_id"]
    axe = (npm.install(AXE).parent / "axe-core/axe.min.js").read_text()
    page.browser.cdp("Runtime.evaluate", expression=axe)
    run = """const found = await axe.run(document, {resultTypes: ['violations']});
        const bad = found.violations.filter(one => ['serious', 'critical'].includes(one.impact));
        return bad.map(one => [one.id, one.nodes[0].html, one.nodes[0].failureSummary])"""
    for width, scheme in [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")]:
        page.size(width, 740)
        page.scheme(scheme)
        for view in [*VIEWS, f"issues/{issue}", f"agents/{agent_id}", f"results/{result}"]:
            page.go(view)
            page.js_true("return document.querySelector('h1') && !document.querySelector('.loading')")
            assert page.js("return document.documentElement.scrollWidth <= innerWidth"), (view, width)
            page.js("document.querySelectorAll('.menu').forEach(menu => { menu.open = true })")
            inside = """return [...document.querySelectorAll('main, .menu-items')].every(one =>
                one.scrollWidth <= one.clientWidth && one.getBoundingClientRect().right <= innerWidth)"""
            assert page.js(inside), (view, width)
            page.js("document.querySelectorAll('.menu').forEach(menu => { menu.open = false })")
            assert page.js(run) == [], (view, width, scheme)
    page.go(f"agents/{agent_id}")
    page.js_true("return document.querySelector('pre.log') !== null")
    tops = "return ['.wide .choices', 'pre.log'].map(one => document.querySelector(one).getBoundingClientRect().top)"
    assert sorted(found := page.js(tops)) == found


def test_a_filter_is_seen_as_long_as_it_holds(page: Page) -> None:
    page.service.client().publish("seen", {})
    page.go("events")
    page.js_true("return document.querySelectorAll('[role=listitem]').length > 0")
    page.browser.press("/", *"no such word")
    page.see("None fits")
    page.browser.press(ESCAPE)
    page.js_true("return document.activeElement === document.body")
    assert page.js("return document.querySelector('[data-filter]').value") == "no such word"
    page.browser.press("/", "\ue003")  # Backspace, as what is there is selected
    page.js_true("return document.querySelectorAll('[role=listitem]').length > 0")


def test_the_scheme_can_be_chosen(page: Page) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.js(ground)
    page.click("Switch between light and dark")
    assert page.js(ground) != light
    page.click("Switch between light and dark")
    assert page.js(ground) == light
