/** The navigation: where one is, and how many wait there. At the side, or below on a phone. */
import { h } from "./dom.js";
import { icon } from "./icons.js";
import { help } from "./keys.js";
import { live } from "./live.js";
import { to } from "./router.js";
import { activeAgents, openApprovals, store } from "./store.js";

const PLACES = [
  ["issues", "Issues", ["issues", "issue"]],
  ["agents", "Agents", ["agents", "agent"]],
  ["results", "Results", ["results", "result"]],
  ["events", "Events", ["events"]],
  ["approvals", "Approvals", ["approvals"]],
  ["health", "Health", ["health"]],
];
const STATES = { starting: "Connecting", live: "Live", resting: "Paused", lost: "Not reachable", ended: "Signed out" };

export function nav(current) {
  const numbers = {
    agents: [activeAgents().length, "at work"],
    approvals: [openApprovals().length, "waiting for you"],
  };
  return h(
    "nav.nav",
    { "aria-label": "Views", key: "nav" },
    h(
      "a.brand",
      { href: to("issues") },
      mark(),
      h(
        "span.brand-words",
        null,
        h("strong", null, store.info?.project_id ?? "cco"),
        h("span.faint", null, store.info?.root_name ?? "orchestration sidecar"),
      ),
    ),
    h(
      "ul",
      null,
      PLACES.map(([name, label, names]) =>
        h("li", { key: name }, place(name, label, names.includes(current), numbers[name])),
      ),
    ),
    h(
      "div.nav-end",
      null,
      h(`p.link.${live.state}`, null, h("span.light", { "aria-hidden": "true" }), STATES[live.state]),
      h(
        "button.quiet",
        { type: "button", onclick: switchTheme, title: "Light or dark", "aria-label": "Switch between light and dark" },
        icon("theme"),
      ),
      h("button.quiet", { type: "button", onclick: help, title: "Keys (?)", "aria-label": "Keys" }, icon("keys")),
    ),
  );
}

function place(name, label, current, [number, what] = [0, ""]) {
  return h(
    "a.place",
    { href: to(name), "aria-current": current ? "page" : null, class: number && name === "approvals" ? "calls" : null },
    icon(name),
    h("span.place-name", null, label),
    number > 0 && h("span.number", null, number, h("span.unseen", null, ` ${what}`)),
  );
}

const mark = () =>
  h(
    "svg.mark",
    { viewBox: "0 0 32 32", "aria-hidden": "true" },
    h("path", { d: "M10 7v18M10 12c0 5 12 2 12 8v5" }),
    h("circle", { cx: 10, cy: 8, r: 3 }),
    h("circle.far", { cx: 22, cy: 24, r: 3 }),
  );

export function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("cco-theme", root.dataset.theme);
}
