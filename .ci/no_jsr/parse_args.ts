// Stands in for `@std/cli/parse-args` where jsr.io cannot be reached: the same code, which deno-std
// publishes to npm without its types. Those that the scripts use are here.
// deno-lint-ignore no-import-prefix -- it is a part of no package itself
import { parseArgs as parse } from "npm:deno-std@^1.4.0/cli/parse_args.js";

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

export function parseArgs<
  S extends string,
  B extends string,
  N extends string = never,
>(
  args: string[],
  options: ParseOptions<S, B, N>,
): Parsed<S, B> {
  return parse(args, options);
}
