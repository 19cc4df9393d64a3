/** Dialogs: a question that is asked once, a form, what a key does. Focus goes back to where it was. */
import { newKey } from "./api.js";
import { fill, h } from "./dom.js";

/** What has just been done, for eyes and ears. */
export function say(text) {
  const place = document.querySelector("#said");
  place.replaceChildren(h("p.toast", null, text));
  clearTimeout(say.timer);
  say.timer = setTimeout(() => place.replaceChildren(), 6000);
}

/** Shows a dialog until it is closed. */
function show(title, ...content) {
  const dialog = h(
    "dialog.dialog",
    { "aria-labelledby": "dialog-title" },
    h("h2", { id: "dialog-title" }, title),
    content,
  );
  const before = document.activeElement;
  document.body.append(dialog);
  dialog.showModal();
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (before?.isConnected) before.focus();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
  return dialog;
}

/** Asks before what cannot be undone. @returns {Promise<boolean>} */
export function confirm({ title, text, action, kind = "danger" }) {
  return new Promise((resolve) => {
    const answer = (value) => () => {
      resolve(value);
      dialog.close();
    };
    const dialog = show(
      title,
      h("p", null, text),
      h(
        "div.dialog-actions",
        null,
        h("button.button", { type: "button", onclick: answer(false) }, "Cancel"),
        h(`button.button.${kind}`, { type: "button", onclick: answer(true), autofocus: true }, action),
      ),
    );
    dialog.classList.add("small");
    dialog.addEventListener("close", () => resolve(false));
  });
}

/**
 * @param {object} how
 * @param {string} how.title
 * @param {Array<{name: string, label: string, kind?: string, value?: string, hint?: string, options?: any[],
 *     required?: boolean, more?: object}>} how.fields
 * @param {string} how.action
 * @param {(values: Object<string, string>, headers: object) => Promise<void>} how.submit  what it raises is shown; its
 *     headers tell the service that the same values come again, as where its answer was lost
 */
export function form({ title, intro, fields, action, submit }) {
  const failed = h("div", { role: "alert" });
  const send = h("button.button.primary", { type: "submit" }, action);
  let [sent, key] = ["", ""];
  const onsubmit = async (event) => {
    event.preventDefault();
    const values = Object.fromEntries(new FormData(event.target));
    const now = JSON.stringify(values);
    if (now !== sent) [sent, key] = [now, newKey()];
    send.disabled = true;
    try {
      await submit(values, { "Idempotency-Key": key });
      dialog.close();
    } catch (error) {
      fill(failed, h("p.problem", null, error.message));
      dialog.querySelector(`[name="${CSS.escape(error.details?.path ?? "")}"]`)?.focus();
    } finally {
      send.disabled = false;
    }
  };
  const dialog = show(
    title,
    intro,
    h(
      "form",
      { onsubmit, autocomplete: "off" },
      fields.map(field),
      failed,
      h(
        "div.dialog-actions",
        null,
        h("button.button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
        send,
      ),
    ),
  );
  (
    dialog.querySelector("[name]:placeholder-shown, textarea:placeholder-shown") ?? dialog.querySelector("[name]")
  )?.focus();
  return dialog;
}

function field({ name, label, kind = "text", value = "", hint, options = [], required = false, more = {} }) {
  const id = `field-${name}`;
  const common = { id, name, required, "aria-describedby": hint && `${id}-hint`, spellcheck: "false", ...more };
  let control;
  if (kind === "textarea")
    control = h("textarea", { ...common, rows: "5", placeholder: " ", spellcheck: "true", value });
  else if (kind === "select")
    control = h(
      "select",
      common,
      options.map((one) => h("option", { value: one, selected: one === value }, one)),
    );
  else
    control = h("input", {
      ...common,
      type: kind,
      value,
      placeholder: " ",
      list: options.length ? `${id}-list` : null,
    });
  const list =
    kind !== "select" &&
    options.length > 0 &&
    h(
      "datalist",
      { id: `${id}-list` },
      options.map((one) => h("option", { value: one })),
    );
  return h(
    "div.field",
    null,
    h("label", { for: id }, label),
    control,
    list,
    hint && h("p.hint", { id: `${id}-hint` }, hint),
  );
}

/** A dialog with anything in it, and a way out. */
export const sheet = (title, ...content) => {
  const dialog = show(
    title,
    content,
    h(
      "div.dialog-actions",
      null,
      h("button.button", { type: "button", onclick: () => dialog.close(), autofocus: true }, "Close"),
    ),
  );
  return dialog;
};
