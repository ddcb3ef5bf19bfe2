// Stands in for `@std/assert` where jsr.io cannot be reached: what the tests use of it, over
// `node:assert/strict`. The messages differ, what passes and what fails does not, but that
// @std/assert compares what `assertEquals` is given without looking at classes of plain data.
import nodeAssert from "node:assert/strict";

type ErrorClass<E extends Error> = new (...args: never[]) => E;

export function assert(
  condition: unknown,
  message = "expected a truthy value",
): asserts condition {
  nodeAssert.ok(condition, message);
}

export function assertEquals<T>(
  actual: T,
  expected: T,
  message?: string,
): void {
  nodeAssert.deepStrictEqual(actual, expected, message);
}

export function assertMatch(
  actual: string,
  expected: RegExp,
  message?: string,
): void {
  nodeAssert.match(actual, expected, message);
}

function check<E extends Error>(
  error: unknown,
  errorClass: ErrorClass<E>,
  includes: string,
): E {
  nodeAssert.ok(
    error instanceof errorClass,
    `expected ${errorClass.name}, got ${error}`,
  );
  nodeAssert.ok(
    error.message.includes(includes),
    `expected "${error.message}" to include "${includes}"`,
  );
  return error;
}

export async function assertRejects<E extends Error>(
  fn: () => PromiseLike<unknown>,
  errorClass: ErrorClass<E>,
  includes = "",
): Promise<E> {
  try {
    await fn();
  } catch (error) {
    return check(error, errorClass, includes);
  }
  throw new nodeAssert.AssertionError({ message: "expected it to reject" });
}
