// Stands in for `@std/cli/parse-args` where jsr.io cannot be reached. Both grew out of minimist and
// differ in places; where that shows in what the scripts use, this does as @std/cli does:
//  - `--no-x` negates only what `negatable` names, and is the option `no-x` otherwise;
//  - `--x=`, without a value, is an unknown option;
//  - an option given twice has its last value (minimist collects both);
//  - `unknown` is told the option's name as well, and is not told one that minimist takes for `_`.
import minimist from "npm:minimist@^1.2.8";

interface ParseOptions<S extends string, B extends string, N extends string> {
  string?: readonly S[];
  boolean?: readonly B[];
  negatable?: readonly N[];
  alias?: Record<string, string>;
  default?: Record<string, unknown>;
  unknown?: (arg: string, key?: string, value?: unknown) => unknown;
}

type Parsed<S extends string, B extends string> =
  & { _: (string | number)[] }
  & { [K in S]?: string }
  & { [K in B]: boolean };

export function parseArgs<S extends string, B extends string, N extends string = never>(
  args: string[],
  options: ParseOptions<S, B, N>,
): Parsed<S, B> {
  const { unknown = () => true, negatable = [] } = options;
  const keyOf = (arg: string) => /^-+([^=]+)/.exec(arg)?.[1];
  const end = args.includes("--") ? args.indexOf("--") : args.length;
  const known = args.slice(0, end).flatMap((arg) => {
    const negated = /^--no-(.+)$/.exec(arg)?.[1];
    const refused = negated !== undefined && !negatable.some((name) => name === negated);
    if (!refused && !/^--[^=]+=$/.test(arg)) return [arg];
    unknown(arg, keyOf(arg));
    return [];
  });
  const parsed = minimist([...known, ...args.slice(end)], {
    string: [...options.string ?? []],
    boolean: [...options.boolean ?? []],
    alias: options.alias,
    default: options.default,
    unknown: (arg: string) => unknown(arg, keyOf(arg)) !== false,
  });
  for (const [key, value] of Object.entries(parsed)) {
    if (key !== "_" && Array.isArray(value)) parsed[key] = value.at(-1);
  }
  return parsed;
}
