/** An address that is no view. */
import { empty, head } from "../parts.js";

export const view = () => ({
  title: "Not found",
  render: () => [
    head("There is no such view"),
    empty("Choose one at the side", "The address may be that of an older version."),
  ],
});
