/** Signing in: what to run, and a field for the code or a token. */
import { signIn } from "../api.js";
import { fill, h, owned, slot } from "../dom.js";

/** @param {() => void} done @param {string} [reason] */
export function view(done, reason) {
  const failed = owned(h("div", { role: "alert" }, reason && h("p.problem", null, reason)));
  let asked = false; // a code that came twice would end the token that it gave
  const onsubmit = async (event) => {
    event.preventDefault();
    if (asked) return;
    asked = true;
    try {
      await signIn(new FormData(event.target).get("code"));
      done();
    } catch (error) {
      fill(failed, h("p.problem", null, error.message));
    } finally {
      asked = false;
    }
  };
  return {
    title: "Sign in",
    attach: () => document.querySelector("#code").focus(),
    render: () => h("section.signin", { key: "signin" }, words(), fields(onsubmit), slot(failed)),
  };
}

const words = () => [
  h("h1", { tabindex: "-1" }, "Sign in"),
  h("p", null, "This tab has no token, or its time is over. In the repository, type"),
  h("pre.command", { tabindex: "0" }, "cco dashboard"),
  h("p", null, "which opens the page with a code that is good once. Or paste its address, the code, or a token, here:"),
];

function fields(onsubmit) {
  const field = {
    id: "code",
    name: "code",
    required: true,
    autocomplete: "off",
    spellcheck: "false",
    type: "password",
  };
  return h(
    "form",
    { onsubmit },
    h("div.field", null, h("label", { for: "code" }, "Code or token"), h("input", field)),
    h("button.button.primary", { type: "submit" }, "Sign in"),
  );
}
