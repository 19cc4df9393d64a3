// Reads {schemas: {name: schema}, values: [[name, value]]}; says what keeps each schema from compiling,
// and whether each value satisfies the schema that it names.

import { readFileSync } from "node:fs";
import addFormats from "ajv-formats";
import { Ajv2020 } from "ajv/dist/2020.js";

const { schemas, values } = JSON.parse(readFileSync(0, "utf8"));
const problems = {};
const validators = {};
for (const [name, schema] of Object.entries(schemas)) {
  const ajv = new Ajv2020({ strict: true, allErrors: true });
  addFormats.default(ajv);
  try {
    validators[name] = ajv.compile(schema);
    problems[name] = "";
  } catch (error) {
    problems[name] = error.message;
  }
}
console.log(JSON.stringify({ problems, verdicts: values.map(([name, value]) => validators[name](value)) }));
