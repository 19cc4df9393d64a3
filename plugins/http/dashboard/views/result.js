/** A result: what was decided, which files changed, and how. */
import { get, part } from "../api.js";
import { diffView } from "../diff.js";
import { h, slot } from "../dom.js";
import { shortId } from "../format.js";
import { json, longText } from "../json.js";
import { agentLink, at, badge, facts, foreign, head, issueLink, loading, problem } from "../parts.js";
import { to } from "../router.js";
import { lacks, store } from "../store.js";

const CHANGES = [
  ["files_created", "created", "+"],
  ["files_modified", "modified", "~"],
  ["files_deleted", "deleted", "−"],
];
const KNOWN = new Set([
  "status",
  "decisions",
  "rationale",
  "metrics",
  "artifacts",
  "errors",
  "warnings",
  "next_steps",
  ...CHANGES.map(([name]) => name),
]);

export function view(id, { draw }) {
  const now = { result: store.results.get(id), diff: null, failed: null, noDiff: null };
  const look = async () => {
    now.failed = null;
    try {
      now.result ??= await get(`/api/results/${part(id)}`);
    } catch (error) {
      now.failed = error;
    }
    draw();
    if (!now.result || lacks("GET /api/results/{result_id}/diff")) return;
    await get(`/api/results/${part(id)}/diff`).then(
      (diff) => (now.diff = diffView(diff)),
      (error) => (now.noDiff = error),
    );
    draw();
  };
  return {
    title: "Result",
    attach: look,
    render: () => {
      if (!now.result)
        return [head("Result", { above: back() }), now.failed ? problem(now.failed, look) : loading("the result")];
      return [
        top(now.result),
        h("div.two", { key: "two" }, h("div.wide", null, story(now.result.result), changes(now)), aside(now.result)),
      ];
    },
  };
}

const back = () => h("a", { href: to("results") }, "Results");

const top = (stored) =>
  head(`${stored.agent_type}: ${stored.result.status}`, {
    above: [back(), " / ", issueLink(stored.issue_id)],
    below: h("span.id", null, stored.id),
  });

function story(result) {
  const decisions = result.decisions ?? [];
  return h(
    "section.card.prose",
    { key: "story" },
    h("h2", null, "Decisions"),
    decisions.length
      ? h(
          "ul.bullets",
          null,
          decisions.map((decision) => h("li", null, foreign(decision, "span"))),
        )
      : h("p.faint", null, "None was written down."),
    result.rationale && [h("h3", null, "Why"), h("p", { dir: "auto" }, result.rationale)],
    said("Errors", result.errors, "bad"),
    said("Warnings", result.warnings, "wait"),
    said("Next steps", result.next_steps),
    Object.entries(result.artifacts ?? {}).map(([name, content]) =>
      h(
        "details.artifact",
        { key: `artifact ${name}` },
        h("summary", null, foreign(name)),
        typeof content === "string" ? longText(content) : json(content),
      ),
    ),
    more(result),
  );
}

const said = (title, items, kind = "plain") =>
  items?.length > 0 && [
    h("h3", null, title),
    h(
      `ul.bullets.${kind}`,
      null,
      items.map((item) => h("li", null, typeof item === "string" ? foreign(item, "span") : json(item))),
    ),
  ];

function more(result) {
  const rest = Object.fromEntries(Object.entries(result).filter(([name]) => !KNOWN.has(name)));
  return (
    Object.keys(rest).length > 0 &&
    h("details.artifact", { key: "more" }, h("summary", null, "Further fields"), json(rest))
  );
}

function aside({ result, agent_id, issue_id, agent_type, stored_at }) {
  return h(
    "aside.card.side",
    { "aria-label": "Facts" },
    h("h2", null, "At a glance"),
    facts([
      ["Status", badge(result.status)],
      ["Agent", store.agents.has(agent_id) ? agentLink(agent_id) : foreign(shortId(agent_id))],
      ["Type", agent_type],
      ["Issue", issueLink(issue_id)],
      ["Stored", at(stored_at)],
      ["By", result.source === "sidecar" ? "the service, for an agent that stored none" : null],
    ]),
    h("h2", null, "Files"),
    h(
      "ul.files",
      null,
      CHANGES.flatMap(([name, word, sign]) =>
        (result[name] ?? []).slice(0, 200).map((file) => fileRow(file, word, sign)),
      ),
    ),
    CHANGES.every(([name]) => !result[name]?.length) && h("p.faint", null, "It names none."),
    result.metrics && [
      h("h2", null, "Measured"),
      facts(
        Object.entries(result.metrics).map(([name, value]) => [
          name.replaceAll("_", " "),
          typeof value === "object" && value ? json(value) : String(value),
        ]),
      ),
    ],
  );
}

const fileRow = (file, word, sign) =>
  h(
    `li.${word}`,
    { title: word },
    h("span.sign", { "aria-hidden": "true" }, sign),
    h("span.unseen", null, `${word}: `),
    foreign(typeof file === "string" ? file : file.path, "code"),
  );

function changes(now) {
  if (lacks("GET /api/results/{result_id}/diff")) return null;
  return h(
    "section.card",
    { key: "diff" },
    h("h2", null, "What changed"),
    now.noDiff ? problem(now.noDiff) : now.diff ? slot(now.diff) : h("p.faint", null, "Git is asked …"),
  );
}
