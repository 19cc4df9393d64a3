/** Results: what agents have decided and changed. */
import { h } from "../dom.js";
import { plural, shortId } from "../format.js";
import { badge, choices, empty, foreign, head, issueLink, when } from "../parts.js";
import { to } from "../router.js";
import { store } from "../store.js";
import { listBody, listView } from "./listing.js";

export const view = (_id, { draw }) =>
  listView({
    title: "Results",
    name: "results",
    draw,
    now: { filter: "", status: "" },
    key: (result) => result.id,
    row,
    chosen,
    top: () => [head("Results", { below: store.more.results && "The newest; older ones come at the end of the list" })],
    choice: (now, set) =>
      choices(
        "Status",
        ["", "success", "partial", "failed"].map((status) => [status, status || "all"]),
        now.status,
        (status) => set({ status }),
      ),
    body,
  });

function chosen({ filter, status }) {
  const words = filter.toLowerCase();
  const fits = ({ result, agent_id, issue_id }) =>
    (!status || result.status === status) &&
    (!words || `${agent_id} ${issue_id} ${(result.decisions ?? []).join(" ")}`.toLowerCase().includes(words));
  return [...store.results.values()].filter(fits).toReversed();
}

const body = (list, results) =>
  listBody({
    name: "results",
    list,
    items: results,
    none: "No result has these words and this status.",
    nothing: () =>
      empty(
        "No result yet",
        "Agents store one when they have done their work. You can store one by hand, too:",
        "cco results store --agent me --agent-type python-specialist --issue issue-1 --status success",
      ),
  });

/** What a result says first; of one without a decision, what went wrong. */
const gist = ({ decisions, errors, warnings }) => {
  const first = [decisions, errors, warnings].find((said) => said?.length)?.[0];
  return typeof first === "string" ? first : "No decision was written down";
};

export const fileCount = (result) =>
  ["files_created", "files_modified", "files_deleted"].reduce((sum, name) => sum + (result[name]?.length ?? 0), 0);

function row({ id, agent_id, issue_id, stored_at, result }) {
  const files = fileCount(result);
  return h(
    "div.row.result",
    null,
    h("div.row-state", null, badge(result.status)),
    h(
      "div.row-main",
      null,
      h("a.row-link", { href: to("results", id), "data-focus": true }, foreign(gist(result).slice(0, 300))),
      h("p.row-sub", null, issueLink(issue_id), h("span.faint", null, foreign(shortId(agent_id)))),
    ),
    h(
      "div.row-figures",
      null,
      result.decisions?.length > 1 && h("span", null, plural(result.decisions.length, "decision")),
      files > 0 && h("span", null, plural(files, "file")),
    ),
    h("div.row-when", null, when(stored_at)),
  );
}
