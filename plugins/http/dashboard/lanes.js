/** The lanes of a timeline: a column for each agent from its start to its end, given to another one after that. */

const MOST = 7;
const COLOURS = 8;

/**
 * For each entry the lanes beside it: `{column, colour, above, below, dot}`.
 * @param {any[]} entries  of a timeline, oldest first
 * @param {Set<string>} working  agents that have not ended: their lanes go on
 * @returns {{rows: Array<{colour: number | null, lanes: any[]}>, columns: number, colours: Map<string, number>}}
 */
export function lanes(entries, working) {
  const last = lastEntries(entries, working);
  const living = new Map(); // column by agent
  const colours = new Map();
  let columns = 1;
  const rows = entries.map((entry, number) => {
    const own = entry.agent_id;
    const before = new Map(living);
    if (own && !living.has(own) && last.get(own) > number) {
      const free = firstFree(new Set(living.values()));
      if (free <= MOST) living.set(own, free);
    }
    if (own && !colours.has(own)) colours.set(own, colours.size % COLOURS);
    const column = living.get(own) ?? 0;
    const after = new Map(living);
    if (own && last.get(own) === number) {
      living.delete(own);
      after.delete(own);
    }
    columns = Math.max(columns, ...[...living.values(), column].map((value) => value + 1));
    return { colour: colours.get(own) ?? null, lanes: drawn(before, after, living.get(own) ?? column, own, colours) };
  });
  return { rows, columns, colours };
}

/** The number of the entry with which each agent's lane ends. */
function lastEntries(entries, working) {
  const last = new Map();
  entries.forEach((entry, number) => {
    if (entry.agent_id) last.set(entry.agent_id, working.has(entry.agent_id) ? Infinity : number);
  });
  return last;
}

function firstFree(taken) {
  let column = 1;
  while (taken.has(column)) column++;
  return column;
}

function drawn(before, after, column, own, colours) {
  const found = new Map();
  const lane = (at) =>
    found.get(at) ?? found.set(at, { column: at, colour: null, above: false, below: false, dot: false }).get(at);
  for (const [agent, at] of before) Object.assign(lane(at), { above: true, colour: colours.get(agent) });
  for (const [agent, at] of after) Object.assign(lane(at), { below: true, colour: colours.get(agent) });
  Object.assign(lane(column), { dot: true, colour: colours.get(own) ?? null });
  return [...found.values()].sort((one, other) => one.column - other.column);
}
