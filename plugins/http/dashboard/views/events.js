/** Events: the whole log, the newest first, as far back as it is kept. */
import { can, publish } from "../actions.js";
import { h } from "../dom.js";
import { count, oneLine } from "../format.js";
import { json } from "../json.js";
import { VirtualList } from "../list.js";
import { at, badge, button, empty, filterField, foreign, head, issueLink } from "../parts.js";
import { older, store } from "../store.js";
import { listBody } from "./listing.js";

const ROW = 45;

export function view(_id, { draw, query }) {
  const now = { filter: query.get("filter") ?? "", open: new Set() };
  const toggle = (id) => {
    now.open[now.open.has(id) ? "delete" : "add"](id);
    draw();
  };
  const list = new VirtualList({
    label: "Events",
    key: (event) => event.event_id,
    row: (event) => row(event, now.open.has(event.event_id), toggle),
    estimate: ROW,
    atEnd: older("events", draw),
  });
  const filter = (words) => {
    now.filter = words;
    draw();
  };
  return {
    title: "Events",
    list,
    stop: () => list.detach(),
    drawn: () => list.set(chosen(now.filter)),
    render: () => [top(), tools(now, filter), body(list, chosen(now.filter))],
  };
}

function top() {
  const rest = store.more.events ? " of the newest; older ones come as you scroll" : ", which are all that is kept";
  return head("Events", {
    below: store.events.length > 0 && count(store.events.length) + rest,
    actions: [can.publish() && button("Publish", "send", () => publish(), { class: "primary" })],
  });
}

const tools = (now, filter) =>
  h("div.tools", { key: "tools" }, filterField(now.filter, filter, "Filter events by type, topic, publisher or issue"));

function chosen(filter) {
  const words = filter.toLowerCase();
  const fits = (event) =>
    `${event.event_type} ${event.topic} ${event.publisher} ${oneLine(event.data?.issue_id)} ${event.event_id}`
      .toLowerCase()
      .includes(words);
  return (words ? store.events.filter(fits) : store.events).toReversed();
}

const body = (list, events) =>
  listBody({
    name: "events",
    list,
    items: events,
    kind: ".events",
    none: "No event that is loaded has these words.",
    nothing: () =>
      empty(
        "Nothing has happened yet",
        "Agents publish events as they work. Publish one yourself:",
        'cco events publish hello --topic coordination --data \'{"issue_id": "issue-1"}\'',
      ),
  });

function row(event, open, toggle) {
  const issue = event.data?.issue_id;
  return h(
    "div.row.event",
    { class: open ? "unfolded" : null },
    h(
      "button.row-button",
      { type: "button", "data-focus": true, "aria-expanded": String(open), onclick: () => toggle(event.event_id) },
      at(event.timestamp),
      h("span.event-type", null, foreign(event.event_type)),
      h("span.faint.topic", null, foreign(event.topic)),
      h("span.publisher", null, foreign(event.publisher)),
      h("span.of-issue", null, typeof issue === "string" && foreign(issue)),
    ),
    open &&
      h(
        "div.unfold",
        null,
        h(
          "p.row-sub",
          null,
          h("span.id", null, event.event_id),
          event.priority !== "normal" && badge(event.priority),
          typeof issue === "string" && issueLink(issue),
          event.correlation_id && h("span.faint", null, "correlation ", foreign(event.correlation_id)),
        ),
        json(event.data),
      ),
  );
}
