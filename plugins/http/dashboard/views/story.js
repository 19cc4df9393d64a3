/** The rows of an issue's timeline: each kind of entry in its words. */
import { can, spawn } from "../actions.js";
import { plain } from "../ansi.js";
import { h } from "../dom.js";
import { compact, cost, cut, duration, plural, shortId, signalName } from "../format.js";
import { icon } from "../icons.js";
import { json, longText, written } from "../json.js";
import { agentLink, at, badge, facts, foreign } from "../parts.js";
import { to } from "../router.js";
import { card } from "./approvals.js";
import { store } from "../store.js";

/** A row. @param {any} entry @param {{colour: number | null, lanes: any[]}} beside */
export function storyRow(entry, beside, columns, open, toggle) {
  const tell = KINDS[entry.kind] ?? other;
  const { title, state, brief, whole } = tell(entry);
  const more = whole !== undefined && whole !== null;
  return h(
    "div.story-row",
    { class: beside.colour === null ? "lane-none" : `lane-${beside.colour}` },
    laneCells(beside.lanes, columns),
    h(
      "div.story-words",
      null,
      h(
        "div.story-line",
        null,
        h("span.story-icon", null, icon(entry.kind)),
        h(
          "button.story-title",
          {
            type: "button",
            "data-focus": true,
            "aria-expanded": more ? String(open) : null,
            onclick: () => more && toggle(entry.id),
          },
          h("strong", null, title),
          entry.agent_id && [" ", h("span.who", null, foreign(shortId(entry.agent_id)))],
        ),
        state,
        h("span.spring", null),
        at(entry.at),
      ),
      brief && h("div.story-brief", null, brief),
      open && more && h("div.unfold", null, whole()),
    ),
  );
}

function laneCells(lanes, columns) {
  const cells = [];
  for (let column = 0; column < columns; column++) {
    const lane = lanes.find((one) => one.column === column);
    const kinds = lane ? ["above", "below"].filter((name) => lane[name]) : [];
    cells.push(
      h(
        "span.lane",
        { class: [...kinds, lane && lane.colour !== null ? `lane-${lane.colour}` : "lane-none"].join(" ") },
        lane?.dot && h("span.knot"),
      ),
    );
  }
  return h("div.lanes", { "aria-hidden": "true" }, cells);
}

const KINDS = { spawned, event, result, routing, approval, ended };

function spawned(entry) {
  return {
    title: "Started",
    state: outputOf(entry),
    brief: entry.task && h("p.quoted", { dir: "auto" }, cut(entry.task, 280)),
    whole: () => [
      entry.task?.length > 280 && longText(entry.task),
      facts([
        ["Agent", agentLink(entry.agent_id, entry.agent_id)],
        ["Spawned by", entry.parent && agentLink(entry.parent)],
        ["Depth", entry.depth],
        ["May", entry.permissions?.join(", ")],
      ]),
    ],
  };
}

const IMPLIED = new Set(["issue_id", "agent_id", "agent_type"]); // said by the row itself

function inLine(value) {
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return value.map(inLine).join(", ");
  return written(value).replace(/\s+/g, " ");
}

function event(entry) {
  const said = Object.entries(entry.data ?? {}).filter(
    ([name, value]) => !IMPLIED.has(name) && value !== "" && value !== null,
  );
  const preview = cut(said.map(([name, value]) => `${name}: ${inLine(value)}`).join(" · "), 240);
  return {
    title: foreign(entry.event_type ?? entry.title),
    state: entry.topic && h("span.faint.topic", null, foreign(entry.topic)),
    brief: preview && h("p.preview", { dir: "auto" }, preview),
    whole: () => [
      h("p.row-sub", null, h("span.id", null, entry.id), h("span.faint", null, "by ", foreign(entry.publisher ?? ""))),
      json(entry.data ?? {}),
    ],
  };
}

function result(entry) {
  const files =
    entry.files && typeof entry.files === "object"
      ? Object.values(entry.files).reduce((sum, number) => sum + Number(number), 0)
      : entry.files;
  const decisions = entry.decisions ?? [];
  return {
    title: "Stored a result",
    state: [
      badge(entry.status),
      " ",
      h("a.open-result", { href: to("results", entry.result_id) }, files ? plural(files, "file") : "open"),
    ],
    brief:
      decisions.length > 0 &&
      h(
        "ul.bullets",
        null,
        decisions.slice(0, 5).map((decision) => h("li", null, foreign(cut(String(decision), 400), "span"))),
      ),
    whole: () => [
      decisions.length > 5 &&
        h(
          "ul.bullets",
          null,
          decisions.slice(5).map((decision) => h("li", null, foreign(String(decision), "span"))),
        ),
      h("p", null, h("a", { href: to("results", entry.result_id) }, "Files, reasons and git's difference")),
    ],
  };
}

function routing(entry) {
  const next = entry.next_agents ?? [];
  return {
    title: next.length ? "Proposed next" : "Nobody more is proposed",
    brief:
      next.length > 0 &&
      h(
        "ul.proposals",
        null,
        next.map((proposal) =>
          h(
            "li",
            { key: proposal.agent_type },
            h("strong", null, foreign(proposal.agent_type)),
            proposal.priority && badge(proposal.priority),
            h("span.faint.reason", null, foreign(proposal.reason ?? "")),
            spawnNext(entry, proposal.agent_type),
          ),
        ),
      ),
  };
}

/** What a person can do about a proposal, or that somebody has. */
function spawnNext({ issue_id, started }, type) {
  if (started?.has(type)) return h("span.faint", null, "started since");
  const onclick = () => spawn(issue_id, type);
  return can.spawn() && h("button.more", { type: "button", "aria-label": `Spawn ${type}`, onclick }, "Spawn");
}

function approval(entry) {
  const known = store.approvals.get(entry.approval_id);
  const state = known?.state ?? entry.state;
  const answered = known?.answer ?? entry.answer;
  if (known?.state === "open")
    return {
      title: known.kind === "question" ? "Asks you" : "Wants your approval",
      state: badge("waiting", "waits for you"),
      brief: card(known),
    };
  return {
    title: (known?.kind ?? entry.approval_kind) === "question" ? "Asked" : "Wanted approval",
    state: badge(answered === "deny" ? "deny" : state, answered ? cut(String(answered), 60) : state),
    brief: h("p.quoted", { dir: "auto" }, cut(String(entry.text ?? ""), 400)),
    whole: known
      ? () => [
          known.command && longText(known.command),
          facts([
            ["Answered by", known.answered_by],
            ["Message", known.message],
          ]),
        ]
      : null,
  };
}

const outputOf = ({ agent_id }) =>
  h("a.open-result", { href: to("agents", agent_id), "aria-label": `Output of ${agent_id}` }, "output");

function ended(entry) {
  const lines = (entry.last_lines ?? entry.output_tail ?? []).map(plain);
  const how = [
    entry.duration_seconds !== null &&
      entry.duration_seconds !== undefined &&
      `after ${duration(entry.duration_seconds)}`,
    entry.signal
      ? `by ${signalName(entry.signal)}`
      : entry.exit_code !== null && entry.exit_code !== undefined && `exit code ${entry.exit_code}`,
    entry.output_tokens > 0 && `${compact((entry.input_tokens ?? 0) + entry.output_tokens)} tokens`,
    entry.cost_usd !== null && entry.cost_usd !== undefined && cost(entry.cost_usd),
  ].filter(Boolean);
  const bad = !["completed", "killed"].includes(entry.state);
  return {
    title: "Ended",
    state: [badge(entry.state), " ", h("span.faint", null, how.join(", ")), " ", outputOf(entry)],
    brief: [
      entry.reason && h("p.quoted.bad", { dir: "auto" }, entry.reason),
      bad && lines.length > 0 && h("p.preview", { dir: "auto" }, cut(lines.at(-1), 300)),
    ],
    whole: lines.length ? () => longText(lines.join("\n")) : null,
  };
}

const other = (entry) => ({ title: foreign(entry.title ?? entry.kind), whole: () => json(entry) });
