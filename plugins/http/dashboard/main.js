/** The page: signs in, draws navigation and view, and draws them again as things happen. */
import { askOtherTabs, hasToken, onRefusal, readToken, signIn } from "./api.js";
import { fill, h } from "./dom.js";
import { listenToKeys } from "./keys.js";
import { live, start, stop, tryNow } from "./live.js";
import { nav } from "./nav.js";
import { problem } from "./parts.js";
import { route, takeCode } from "./router.js";
import { changed, loadAll, openApprovals, store, takeEvents, watch } from "./store.js";
import * as agent from "./views/agent.js";
import * as agents from "./views/agents.js";
import * as approvals from "./views/approvals.js";
import * as events from "./views/events.js";
import * as health from "./views/health.js";
import * as issue from "./views/issue.js";
import * as issues from "./views/issues.js";
import * as lost from "./views/lost.js";
import * as result from "./views/result.js";
import * as results from "./views/results.js";
import * as signin from "./views/signin.js";

/**
 * @typedef {object} View
 * @property {string} title
 * @property {() => any} render  its tree
 * @property {() => void} [attach]  it stands in the document
 * @property {() => void} [drawn]  it was drawn again
 * @property {() => void} [stop]
 * @property {(names: Set<string>) => void} [heard]  what has changed in the store
 * @property {{move: (step: number) => void}} [list]
 * @property {Object<string, () => void>} [keys]
 */
const VIEWS = { agent, agents, approvals, events, health, issue, issues, lost, result, results };
const CLOCK_MS = 10_000; // relative times go on

const places = {};
const scrolled = new Map(); // how far each list was scrolled when one left it
/** @type {View | null} */
let view = null;
let shown = "";
let asked = 0;

function build() {
  Object.assign(places, {
    nav: h("div#nav"),
    banner: h("div", { class: "banners" }),
    main: h("main", { id: "main", tabindex: "-1" }),
    said: h("div", { id: "said", role: "status" }),
    told: h("div.unseen", { role: "status" }),
  });
  const skip = h(
    "a.skip",
    {
      href: "#main",
      onclick: (event) => {
        event.preventDefault();
        places.main.focus();
      },
    },
    "Skip to content",
  );
  document.body.append(skip, places.nav, h("div.page", null, places.banner, places.main), places.said, places.told);
}

function open() {
  if (!hasToken())
    return become(
      "signin",
      signin.view(() => begin()),
    );
  const { name, id, query } = route();
  const address = `${name}/${id}`;
  if (address === shown) return;
  become(address, VIEWS[name].view(id, { query, draw }));
}

function become(address, next) {
  const first = !shown;
  if (shown) scrolled.set(shown, places.main.scrollTop);
  view?.stop?.();
  view = next;
  shown = address;
  places.main.replaceChildren();
  draw();
  places.main.scrollTop = address.endsWith("/") ? (scrolled.get(address) ?? 0) : 0;
  if (!first) (places.main.querySelector("h1") ?? places.main).focus({ preventScroll: true });
  view.attach?.();
}

function draw() {
  try {
    fill(places.main, view.render());
    view.drawn?.();
  } catch (error) {
    console.error(error);
    fill(places.main, problem(new Error(`This view cannot be drawn: ${error.message}`), draw));
  }
  drawAround();
}

function drawAround() {
  const signedIn = hasToken();
  const waiting = openApprovals().length;
  fill(places.nav, signedIn && nav(route().name));
  fill(places.banner, signedIn && banner());
  document.title = `${waiting ? `(${waiting}) ` : ""}${view.title} · ${store.info?.project_id ?? "cco"}`;
}

function banner() {
  if (live.state !== "lost") return null;
  const [what, how] = live.reason?.status
    ? [`The service answers: ${live.reason.message}. `, "The page asks again by itself."]
    : [
        "The service does not answer. ",
        [
          "The page goes on by itself, without a gap, as soon as it is back. Start it with ",
          h("code", null, "cco"),
          ".",
        ],
      ];
  return h(
    "div.banner",
    { role: "alert", key: "lost" },
    h("p", null, h("strong", null, what), how),
    h("button.button", { type: "button", onclick: tryNow }, "Try now"),
  );
}

function hear(names) {
  if (!view) return;
  view.heard?.(names);
  draw();
  if (names.has("approvals")) tellOfApprovals();
}

function tellOfApprovals() {
  const now = openApprovals().length;
  if (now > asked) places.told.textContent = now === 1 ? "One approval waits for you" : `${now} approvals wait for you`;
  asked = now;
}

function begin() {
  start(takeEvents, loadAll, () => changed("live"));
  shown = "";
  open();
}

async function boot() {
  build();
  readToken();
  onRefusal(() => {
    stop();
    open();
  });
  watch(hear);
  listenToKeys(() => view);
  addEventListener("hashchange", () => (location.hash.startsWith("#code=") ? enter() : open()));
  setInterval(() => !document.hidden && hasToken() && draw(), CLOCK_MS);
  await enter();
}

async function enter() {
  const code = takeCode();
  if (code) {
    try {
      await signIn(code);
    } catch (error) {
      if (!hasToken())
        return become(
          "signin",
          signin.view(() => begin(), error.message),
        );
    }
  }
  if (hasToken() || (await askOtherTabs())) begin();
  else open();
}

boot();
