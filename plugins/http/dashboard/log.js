/** The output of an agent: follows as it is written, can be paused, and holds a bounded part of it. */
import { fresh, overwritten, pieces } from "./ansi.js";
import { get, part } from "./api.js";
import { h, owned } from "./dom.js";
import { bytes } from "./format.js";

const LINES_OF_PART = 200;
const PARTS = 30; // kept in the document
const LINE = 4000; // characters of a line before one has to ask for more
const BEGINNING = 1000; // lines that are read at first
const EVERY_MS = 1000;

export class Log {
  /** @param {string} agentId @param {() => boolean} ended */
  constructor(agentId, ended) {
    Object.assign(this, {
      agentId,
      ended,
      offset: 0,
      from: 0,
      following: true,
      rest: "",
      style: fresh(),
      timer: 0,
      closed: false,
      over: false,
    });
    this.text = h("pre.log", { tabindex: "0", role: "region", "aria-label": `Output of ${agentId}` });
    this.text.addEventListener("scroll", () => this.scrolled(), { passive: true });
    this.button = h("button.button", { type: "button", onclick: () => this.toggle() });
    this.note = h("span.faint", null);
    this.earlier = h(
      "button.more",
      { type: "button", hidden: true, onclick: () => this.again() },
      "Read from the beginning",
    );
    this.tail = h("div.log-part", null);
    this.element = owned(
      h("section.log-frame", null, h("div.log-tools", null, this.note, this.earlier, this.button), this.text),
    );
    this.text.append(this.tail);
    this.show();
  }

  start() {
    this.look({ tail: BEGINNING });
  }

  stop() {
    this.closed = true;
    clearTimeout(this.timer);
  }

  toggle() {
    this.following = !this.following;
    this.show();
    clearTimeout(this.timer);
    if (!this.following) return;
    this.bottom();
    if (!this.over) this.look({ since: this.offset });
  }

  /** All of it, as far as it is kept. */
  again() {
    this.text.replaceChildren(this.tail);
    this.tail.replaceChildren();
    Object.assign(this, { offset: 0, from: 0, rest: "", style: fresh(), following: true, over: false });
    this.look({ since: 0 });
  }

  async look(query) {
    clearTimeout(this.timer);
    if (this.looking) return;
    this.looking = true;
    const wasEnded = this.ended();
    const began = this.offset;
    let more = false;
    try {
      const answer = await get(`/api/agents/${part(this.agentId)}/logs`, query);
      if (!this.following || this.offset !== began) return; // paused, or begun anew: it is read again
      if (query.tail) this.from = answer.offset;
      else if (answer.offset > this.offset) this.add(`\n[${bytes(answer.offset - this.offset)} are no longer kept]\n`);
      more = answer.next_offset > this.offset && answer.text.length > 0;
      this.offset = answer.next_offset;
      this.add(answer.text);
      this.over = wasEnded && !more;
      this.failed = "";
    } catch (error) {
      this.failed = error.message;
      this.over = error.status === 404;
    } finally {
      this.looking = false;
      this.show();
      if (!this.closed && this.following && !this.over) this.soon(more && wasEnded ? 0 : EVERY_MS);
    }
  }

  /** Reads on after a while, or once the page is seen again. */
  soon(wait) {
    this.timer = setTimeout(() => (document.hidden ? this.soon(EVERY_MS) : this.look({ since: this.offset })), wait);
  }

  /** Adds text, in whole lines; what is no line yet is shown at the end, and anew with what follows it. */
  add(text) {
    if (!text) return;
    const lines = (this.rest + text).split("\n");
    this.rest = lines.pop();
    for (let from = 0; from < lines.length; from += LINES_OF_PART) this.put(lines.slice(from, from + LINES_OF_PART));
    const held = { colour: this.style.colour, marks: new Set(this.style.marks) };
    this.tail.replaceChildren(...(this.rest ? line(this.rest, held) : []));
    while (this.text.childElementCount > PARTS + 1) this.text.firstElementChild.remove();
    if (this.following) this.bottom();
  }

  put(lines) {
    const last = this.tail.previousElementSibling;
    const room = last && (last.$lines ?? LINES_OF_PART) + lines.length <= LINES_OF_PART;
    const place = room ? last : h("div.log-part", null);
    if (!room) this.tail.before(place);
    place.$lines = (room ? last.$lines : 0) + lines.length;
    for (const one of lines) place.append(...line(one, this.style), "\n");
  }

  bottom() {
    this.quiet = Date.now() + 300; // the scroll that follows is ours
    this.text.scrollTop = this.text.scrollHeight;
  }

  scrolled() {
    const below = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight;
    if (this.following && below > 60 && Date.now() > (this.quiet ?? 0) && !this.over) this.toggle();
  }

  show() {
    this.button.textContent = this.following ? "Pause" : "Follow";
    this.button.hidden = this.over;
    this.button.setAttribute("aria-pressed", String(this.following));
    this.earlier.hidden = this.from === 0;
    const state =
      this.failed ||
      (this.over
        ? this.offset
          ? "The whole output"
          : "It has written nothing"
        : this.following
          ? "Follows"
          : "Paused");
    this.note.textContent = `${state}${this.offset ? ` · ${bytes(this.offset)}` : ""}`;
  }
}

/** The nodes of a line. */
function line(text, style) {
  const shown = overwritten(text);
  const nodes = pieces(shown.slice(0, LINE), style).map(([piece, classes]) =>
    classes ? h("span", { class: classes }, piece) : document.createTextNode(piece),
  );
  if (shown.length <= LINE) return nodes;
  const more = h("button.more", { type: "button" }, `… ${bytes(shown.length - LINE)} more`);
  more.addEventListener("click", () =>
    more.replaceWith(...pieces(shown.slice(LINE), fresh()).map(([piece]) => document.createTextNode(piece))),
  );
  return [...nodes, more];
}
