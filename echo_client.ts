/**
 * Many concurrent echo clients in one loop. Each sends its messages one after another, waits for
 * each echo in full, and compares every byte; then all of it is reported: speed and fairness.
 *
 * It needs `select_server.ts` beside it, for the selector: a client of a thousand sockets starves
 * some of them just as a server would (see {@linkcode Selector}), and would report that as the
 * server's doing.
 *
 * ```sh
 * deno run --allow-net echo_client.ts --clients 1000 --messages 100
 * ```
 *
 * @module
 */

// The package is named in full so that this file runs where it is copied to, without a deno.json.
import { parseArgs } from "jsr:@std/cli@^1/parse-args";
import { type Operation, parseNumber, refuse, run, Selector, UsageError } from "./select_server.ts";

/** What to send, and where. */
export interface RunOptions {
  /** The server's address or name. */
  host: string;
  /** Its ports; the clients are dealt over them in turn. */
  ports: number[];
  /** How many concurrent clients. */
  clients: number;
  /** Makes the next message of a client, of at least one byte; nothing when it has sent all. */
  message: (client: number, index: number) => Uint8Array | undefined;
  /** How long a connect or an echo may take, in milliseconds. */
  timeout: number;
  /** Whether replies are compared; if not, the first read after a message is sent is its reply. */
  verify: boolean;
  /** Ends the run early; the report is of what has been done by then. */
  signal?: AbortSignal;
  /** Told of every reply. */
  onReply?: (client: number, reply: Uint8Array) => void;
}

/** How a run went. Times are in milliseconds, from the start of the run unless said otherwise. */
export interface Report {
  /** Clients that got every byte back or, not verified, something for each message. */
  succeeded: number;
  /** Clients that did not. */
  failed: number;
  /** How many failed for each reason. */
  reasons: Record<string, number>;
  /** Replies that came in full. */
  echoes: number;
  /** Bytes in them. */
  bytes: number;
  /** How long the run took, in seconds. */
  seconds: number;
  /** Echoes in a second. */
  echoesPerSecond: number;
  /** From sending a message to its last byte's return: percentiles, and the worst. */
  latency: { p50: number; p90: number; p99: number; max: number };
  /** When the first client was done, with the server's end of the stream, and when the last was. */
  finished: { first: number; last: number };
  /** Jain's fairness index of the clients' rates: 1 if all were served alike, 1/n if one was. */
  jain: number;
}

const BUFFER_SIZE = 16 * 1024;
const NOTHING = new Uint8Array(0);

/** How long polls for what an overdue client may have got go on under a load that never ends, in ms. */
const LONGEST_POLLING = 1000;

/** A client that is connecting. */
interface Connecting {
  readonly id: number;
  /** Since when the connection or the echo is being waited for. */
  since: number;
}

/** A client that is connected. */
class Client implements Connecting {
  readonly read: Operation;
  readonly write: Operation;
  open = true;
  since = 0;
  /** What reads fill. */
  readonly buffer = new Uint8Array(BUFFER_SIZE);
  /** The message on its way, or nothing when the end of the stream is being waited for. */
  message: Uint8Array | undefined;
  /** The part of it that is still to be written, and how many of its bytes have come back. */
  unsent: Uint8Array = NOTHING;
  returned = 0;
  /** The reply, once it is complete. */
  reply: Uint8Array | undefined;
  echoes = 0;

  constructor(readonly id: number, readonly conn: Deno.TcpConn, selector: Selector<Completion>) {
    const failed = (error: unknown): Completion => ({ type: "error", client: this, error });
    this.read = selector.register(
      () => conn.read(this.buffer),
      (count) => ({ type: "read", client: this, count }),
      failed,
    );
    this.write = selector.register(
      () => conn.write(this.unsent),
      (count) => ({ type: "write", client: this, count }),
      failed,
    );
  }
}

type Completion =
  | { type: "connect"; client: Connecting; conn: Deno.TcpConn }
  | { type: "connect error"; client: Connecting; error: unknown }
  | { type: "write"; client: Client; count: number }
  | { type: "half-close"; client: Client }
  | { type: "read"; client: Client; count: number | null }
  | { type: "error"; client: Client; error: unknown }
  | { type: "abort" };

/** A client that has ended: after how many milliseconds, with how many echoes. */
type Ended = { after: number; echoes: number };

/**
 * Runs the clients to their end, or until the signal aborts.
 *
 * @param options What to send, and where.
 * @returns How it went. What goes wrong with a client is counted there, under its reason.
 * @throws What `message` or `onReply` throws.
 *
 * @example Two clients whose messages nobody answers
 * ```ts
 * import { runClients, testMessages } from "./echo_client.ts";
 *
 * using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
 * const report = await runClients({
 *   host: "127.0.0.1",
 *   ports: [listener.addr.port],
 *   clients: 2,
 *   message: testMessages(3, 64),
 *   timeout: 100,
 *   verify: true,
 * });
 * console.log(report.reasons); // { "timed out": 2 }
 * ```
 */
export async function runClients(options: RunOptions): Promise<Report> {
  const { host, ports, timeout, verify, signal, onReply } = options;
  const selector = new Selector<Completion>();
  const running = new Set<Connecting | Client>();
  const finished: Ended[] = [];
  const unfinished: Ended[] = [];
  const latencies: number[] = [];
  const reasons: Record<string, number> = {};
  let bytes = 0;

  const ended = new AbortController(); // for what is still connecting then
  let connecting = 0;
  const aborted = Promise.withResolvers<void>();
  const onAbort = () => aborted.resolve();
  signal?.addEventListener("abort", onAbort);
  if (signal?.aborted) onAbort();
  let completions: Completion[] = [];
  using cleanup = new DisposableStack();
  cleanup.defer(() => {
    signal?.removeEventListener("abort", onAbort);
    ended.abort();
    // Somebody is left only if `message` or `onReply` has thrown.
    for (const client of running) if ("conn" in client) client.conn.close();
    for (const completion of completions) {
      if (completion.type === "connect" && running.has(completion.client)) completion.conn.close();
    }
  });
  selector.watch(aborted.promise, () => ({ type: "abort" }), () => ({ type: "abort" }));
  const start = performance.now();
  for (let id = 1; id <= options.clients; id++) connect(id);
  let nextCheck = start + timeout; // nobody is overdue before
  let overdueSince = Infinity; // since when somebody may be, so that select only polls

  while (running.size > 0 || connecting > 0) {
    completions = await selector.select(timeLeft());
    for (const completion of completions) {
      switch (completion.type) {
        case "connect":
          connecting--;
          if (running.delete(completion.client)) open(completion.client.id, completion.conn);
          else completion.conn.close(); // it had failed
          break;
        case "connect error":
          connecting--;
          fail(completion.client, reasonOf(completion.error));
          break;
        case "write": // a part may be left; meanwhile the echo is being read
          wrote(completion.client, completion.count);
          break;
        case "half-close":
          break;
        case "read":
          receive(completion.client, completion.count);
          break;
        case "error":
          fail(completion.client, reasonOf(completion.error));
          break;
        case "abort":
          for (const client of running) fail(client, "interrupted");
          break;
      }
    }
    failOverdue(completions.length);
    if (running.size === 0) ended.abort();
  }
  return report();

  function connect(id: number): void {
    const client: Connecting = { id, since: performance.now() };
    running.add(client);
    connecting++;
    selector.watch(
      Deno.connect({ hostname: host, port: ports[(id - 1) % ports.length], signal: ended.signal }),
      (conn) => ({ type: "connect", client, conn }),
      (error) => ({ type: "connect error", client, error }),
    );
  }

  function open(id: number, conn: Deno.TcpConn): void {
    const client = new Client(id, conn, selector);
    running.add(client);
    try {
      conn.setNoDelay();
    } catch {
      // The server has reset already: the read says so.
    }
    send(client);
    client.read.startNextRound();
  }

  /** Sends the next message or, after the last one, the end of the stream. */
  function send(client: Client): void {
    client.message = options.message(client.id, client.echoes);
    client.returned = 0;
    client.reply = undefined;
    client.since = performance.now();
    if (client.message !== undefined) {
      client.unsent = client.message;
      return client.write.start();
    }
    selector.watch(
      client.conn.closeWrite(),
      () => ({ type: "half-close", client }),
      (error) => ({ type: "error", client, error }),
    );
  }

  function wrote(client: Client, count: number): void {
    if (!client.open) return; // it had failed
    client.unsent = count < client.unsent.length ? client.unsent.subarray(count) : NOTHING;
    if (client.unsent.length > 0) client.write.start();
    else advance(client);
  }

  function receive(client: Client, count: number | null): void {
    if (!client.open) return; // it had failed
    const { buffer, message, returned } = client;
    if (message === undefined) {
      if (count === null) return succeed(client);
      if (verify) return fail(client, "sent too much");
      return client.read.startNextRound();
    }
    if (count === null) return fail(client, "closed by the server");
    if (verify) {
      if (returned + count > message.length) return fail(client, "sent too much");
      for (let i = 0; i < count; i++) {
        if (buffer[i] !== message[returned + i]) return fail(client, "wrong bytes");
      }
    }
    client.returned += count;
    if (!verify) client.reply ??= buffer.slice(0, count);
    else if (client.returned === message.length) client.reply = message;
    advance(client);
    client.read.startNextRound();
  }

  /** Sends the next message when this one is out and its reply is in. */
  function advance(client: Client): void {
    if (client.unsent.length > 0 || client.reply === undefined) return;
    client.echoes++;
    bytes += client.reply.length;
    latencies.push(performance.now() - client.since);
    onReply?.(client.id, client.reply);
    send(client);
  }

  function succeed(client: Client): void {
    running.delete(client);
    close(client);
    finished.push({ after: performance.now() - start, echoes: client.echoes });
  }

  function fail(client: Connecting | Client, reason: string): void {
    if (!running.delete(client)) return; // it had failed
    if ("conn" in client) close(client);
    reasons[reason] = (reasons[reason] ?? 0) + 1;
    const echoes = "conn" in client ? client.echoes : 0;
    unfinished.push({ after: performance.now() - start, echoes });
  }

  function close(client: Client): void {
    client.open = false;
    client.conn.close();
  }

  /** How long select may wait, in milliseconds. */
  function timeLeft(): number {
    const now = performance.now();
    overdueSince = now < nextCheck ? Infinity : Math.min(overdueSince, now);
    return nextCheck - now;
  }

  /** @param found How many completions select has just handed out. */
  function failOverdue(found: number): void {
    if (overdueSince === Infinity) return;
    const now = performance.now();
    // The loop may be late, and what came in time counts: first a poll must have found nothing.
    if (found > 0 && now < overdueSince + LONGEST_POLLING) return;
    nextCheck = now + timeout;
    for (const client of running) {
      if (now >= client.since + timeout) fail(client, "timed out");
      else nextCheck = Math.min(nextCheck, client.since + timeout);
    }
  }

  function report(): Report {
    const seconds = (performance.now() - start) / 1000;
    const sorted = Float64Array.from(latencies).sort();
    const percentile = (q: number) => sorted.at(Math.ceil(sorted.length * q) - 1) ?? 0;
    const rates = [...finished, ...unfinished].map(({ after, echoes }) => echoes / after);
    const sum = rates.reduce((sum, rate) => sum + rate, 0);
    const squares = rates.reduce((sum, rate) => sum + rate ** 2, 0);
    return {
      succeeded: finished.length,
      failed: unfinished.length,
      reasons,
      echoes: latencies.length,
      bytes,
      seconds,
      echoesPerSecond: latencies.length / seconds,
      latency: {
        p50: percentile(0.5),
        p90: percentile(0.9),
        p99: percentile(0.99),
        max: percentile(1),
      },
      finished: { first: finished.at(0)?.after ?? 0, last: finished.at(-1)?.after ?? 0 },
      jain: squares === 0 ? 0 : sum ** 2 / (rates.length * squares),
    };
  }
}

function reasonOf(error: unknown): string {
  return error instanceof Error ? error.name === "Error" ? error.message : error.name : "unknown";
}

/**
 * Makes messages of random bytes that differ from client to client and from message to message, so
 * that a reply that went to the wrong client is noticed.
 *
 * @param messages How many messages a client sends.
 * @param size Their length in bytes.
 * @returns What {@linkcode runClients} takes as `message`.
 *
 * @example
 * ```ts
 * import { testMessages } from "./echo_client.ts";
 *
 * const message = testMessages(2, 64);
 * console.log(message(1, 0)?.length, message(1, 2)); // 64 undefined
 * ```
 */
export function testMessages(messages: number, size: number): RunOptions["message"] {
  const QUOTA = 65536; // of random bytes that one call may ask for (Web Cryptography API)
  const random = new Uint8Array(size + QUOTA);
  for (let i = 0; i < random.length; i += QUOTA) {
    crypto.getRandomValues(random.subarray(i, i + QUOTA));
  }
  return (client, index) => {
    if (index >= messages) return undefined;
    const offset = (client * 7919 + index * 104729) % QUOTA; // primes: the offsets repeat late
    return random.subarray(offset, offset + size);
  };
}

const HELP = `\
Echo client: many concurrent clients that compare every byte, and a report.

  deno run --allow-net echo_client.ts [OPTIONS] [MESSAGE...]

  -H, --host HOST       the server's address (127.0.0.1)
  -p, --port PORT       its first port (50007)
      --ports N         its number of ports; clients are dealt over them (2)
  -c, --clients N       concurrent clients (100, or 1 with MESSAGEs)
  -n, --messages N      messages each client sends (10)
  -s, --size BYTES      bytes a message (64)
      --timeout S       give up on a connect or an echo after S seconds (10)
      --no-verify       take whatever comes back as the reply (for --stamp)
      --json            print the report as JSON
  -q, --quiet           print no report
  -h, --help            show this help

With MESSAGEs each client sends these, and without --json replies are printed.
It exits with 0 only if no client failed. Ctrl-C prints the report so far.`;

function parseCommandLine(args: string[]) {
  const words: string[] = [];
  const parsed = parseArgs(args, {
    string: ["host", "port", "ports", "clients", "messages", "size", "timeout"],
    boolean: ["verify", "json", "quiet", "help"],
    negatable: ["verify"],
    default: { verify: true },
    alias: { host: "H", port: "p", clients: "c", messages: "n", size: "s", quiet: "q", help: "h" },
    unknown: (arg, key) => {
      // Numbers among the positional arguments are converted, so their text is taken here.
      if (key === undefined) return words.push(arg) < 0;
      refuse(arg);
    },
  });
  words.push(...parsed._.map(String)); // what came after --
  const { verify, json, quiet, help, host = "127.0.0.1" } = parsed;
  if (json && quiet) throw new UsageError("--quiet --json: expected one of them");
  if (host === "") throw new UsageError("--host without a value: expected an address or a name");
  if (words.includes("")) throw new UsageError('"": expected a MESSAGE of at least one byte');
  if (words.length > 0 && (parsed.messages ?? parsed.size) !== undefined) {
    throw new UsageError(`${words[0]}: expected either MESSAGEs or --messages and --size`);
  }
  const first = parseNumber("--port", parsed.port ?? "50007", 1, 65535);
  const ports = parseNumber("--ports", parsed.ports ?? "2", 1, 65536 - first);
  const clients = parsed.clients ?? (words.length > 0 ? "1" : "100");
  return {
    verify,
    json,
    quiet,
    help,
    words,
    host,
    ports: Array.from({ length: ports }, (_, i) => first + i),
    clients: parseNumber("--clients", clients, 1, 1_000_000),
    messages: parseNumber("--messages", parsed.messages ?? "10", 1, 1e9),
    size: parseNumber("--size", parsed.size ?? "64", 1, 2 ** 30),
    timeout: 1000 * parseNumber("--timeout", parsed.timeout ?? "10", 0.001, 1e6, "a number"),
  };
}

function format(report: Report): string {
  const { latency, finished } = report;
  const ms = (time: number) => `${time.toFixed(2)} ms`;
  const reasons = Object.entries(report.reasons).map(([reason, n]) => `, ${n} ${reason}`).join("");
  return `\
clients   ${report.succeeded} succeeded, ${report.failed} failed${reasons}
echoes    ${report.echoes}, ${report.bytes} bytes in ${report.seconds.toFixed(3)} s
speed     ${Math.round(report.echoesPerSecond)} echoes/s
latency   p50 ${ms(latency.p50)}, p90 ${ms(latency.p90)}, p99 ${ms(latency.p99)}, max ${
    ms(latency.max)
  }
finished  first client after ${ms(finished.first)}, last after ${ms(finished.last)}
fairness  ${report.jain.toFixed(3)} (Jain's index: 1 if all clients were served alike)`;
}

async function main(args: string[]): Promise<number> {
  const command = parseCommandLine(args);
  const { words, clients, messages, host, ports } = command;
  if (command.help) {
    console.log(HELP);
    return 0;
  }
  const lines = words.map((word) => new TextEncoder().encode(word));
  const stop = new AbortController();
  const onSignal = () => stop.abort();
  Deno.addSignalListener("SIGINT", onSignal);
  let replies = 0;
  const showProgress = Deno.stderr.isTerminal() && !command.quiet && words.length === 0;
  const progress = (text: string) =>
    Deno.stderr.writeSync(new TextEncoder().encode(`\r${text}\x1b[K`));
  const timer = showProgress
    ? setInterval(() => progress(`${replies} of ${clients * messages} echoes`), 200)
    : undefined;
  const report = await runClients({
    ...command,
    message: words.length > 0 ? (_, index) => lines[index] : testMessages(messages, command.size),
    signal: stop.signal,
    onReply: (client, reply) => {
      replies++;
      if (words.length > 0 && !command.json) {
        console.log(`client ${client} received: ${new TextDecoder().decode(reply)}`);
      }
    },
  });
  clearInterval(timer);
  if (showProgress) progress("");
  Deno.removeSignalListener("SIGINT", onSignal);
  if (command.json) console.log(JSON.stringify(report));
  if (report.reasons[Deno.errors.ConnectionRefused.name] === clients) {
    throw new Error(
      `nobody listens on ${host} port ${ports.join(" or ")}; start the server: ` +
        `deno run --allow-net select_server.ts --port ${ports[0]} --ports ${ports.length}`,
    );
  }
  if (!command.json && !command.quiet && (words.length === 0 || report.failed > 0)) {
    console.log(format(report));
  }
  return report.failed === 0 ? 0 : 1;
}

if (import.meta.main) Deno.exitCode = await run("echo_client", main);
