/**
 * Many concurrent echo clients in one loop, the other side of `select_server.ts`: each sends its messages
 * one after another, waits for each echo in full and compares every byte. Then it reports speed and
 * fairness. It needs `select_server.ts` beside it, for the selector: a client of a thousand sockets would
 * starve some of them just as a server does, and report that as the server's doing.
 *
 * @module
 */
import { parseArgs } from "jsr:@std/cli@^1/parse-args"; // in full: so this file runs where it is copied
import { Buffer } from "node:buffer";
import { Selector } from "./select_server.ts";

// ---- What can complete, and what a client is
type Completion =
  | { type: "connected"; client: Client }
  | { type: "sent"; client: Client; count: number }
  | { type: "received"; client: Client; count: number | null }
  | { type: "failed"; client: Client; error: unknown }
  | { type: "tick" };

const TICK = 100; // ms: time is counted in ticks; a late loop counts one, and blames no server
const NOTHING = new Uint8Array(0);
const encode = (text: string) => new TextEncoder().encode(text);
const decode = (bytes: Uint8Array) =>
  new TextDecoder().decode(bytes).replace(/\p{Cc}+/gu, " ");
class Client {
  conn?: Deno.TcpConn;
  succeededAt?: number; // ms since the start of the run
  ticks = 0; // since it began to connect, or to send its message
  echoes = 0;
  message: Uint8Array = NOTHING; // NOTHING itself: before the first, and after the last
  sentAt = 0;
  unsent: Uint8Array = NOTHING; // the part of the message that is still to be written
  unread: Uint8Array = NOTHING; // the part of its echo that is still to be read
  buffer = NOTHING; // what reads fill: a large one once it is connected

  constructor(
    readonly id: number,
    readonly push: (completion: Completion) => void,
  ) {}

  startRead = () =>
    void this.conn?.read(this.buffer).then(this.onReceived, this.onFailed);
  startWrite = () =>
    void this.conn?.write(this.unsent).then(this.onSent, this.onFailed);
  onReceived = (count: number | null) =>
    this.push({ type: "received", client: this, count });
  onSent = (count: number) => this.push({ type: "sent", client: this, count });
  onFailed = (error: unknown) =>
    this.push({ type: "failed", client: this, error });
}

// ---- The run
/** Runs the clients to their end, or until Ctrl-C, and reports what they have done. */
async function run(options: ReturnType<typeof parseCommandLine>) {
  const selector = new Selector<Completion>();
  const push = (completion: Completion) => selector.push(completion);
  const nextTick = () => selector.after(TICK, () => push({ type: "tick" }));
  const clients = Array.from(
    { length: options.clients },
    (_, i) => new Client(i + 1, push),
  );
  const running = new Set(clients);
  const outcomes: Record<string, number> = { succeeded: 0 };
  const latencies: number[] = [];
  const start = performance.now();
  let bytes = 0;
  const interrupt = () =>
    running.forEach((client) => client.onFailed("interrupted"));
  Deno.addSignalListener("SIGINT", interrupt);
  clients.forEach(startConnect);
  nextTick();

  while (running.size > 0) {
    for (const completion of await selector.select()) {
      if ("client" in completion && !running.has(completion.client)) continue; // it has ended
      switch (completion.type) {
        case "connected": // send the first message, and read what comes back
          startMessage(completion.client);
          selector.nextRound(completion.client.startRead);
          break;
        case "sent": // perhaps a part only; meanwhile its echo is being read
          send(
            completion.client,
            completion.client.unsent.subarray(completion.count),
          );
          break;
        case "received": // null is the end of the stream
          receive(completion.client, completion.count);
          break;
        case "failed": // refused, reset, broken pipe, interrupted
          end(completion.client, reasonOf(completion.error));
          break;
        case "tick": // some time has passed: who has waited for too long?
          tick();
          break;
      }
    }
  }
  return report();

  function startConnect(client: Client): void {
    const port = options.ports[(client.id - 1) % options.ports.length];
    Deno.connect({ hostname: options.host, port }).then((conn) => {
      if (!running.has(client)) return conn.close(); // too late
      client.conn = conn;
      client.buffer = new Uint8Array(16 * 1024);
      conn.setNoDelay();
      push({ type: "connected", client });
    }).catch(client.onFailed);
  }

  /** Starts the next message or, after the last one, sends the end of the stream. */
  function startMessage(client: Client): void {
    client.message = options.message(client.id, client.echoes) ?? NOTHING;
    client.unread = client.message;
    client.ticks = 0;
    client.sentAt = performance.now();
    if (client.message !== NOTHING) send(client, client.message);
    else client.conn?.closeWrite().catch(client.onFailed);
  }

  function send(client: Client, unsent: Uint8Array): void {
    client.unsent = unsent;
    if (unsent.length > 0) client.startWrite();
    else advance(client);
  }

  function receive(client: Client, count: number | null): void {
    const { id, message, unread, buffer } = client;
    if (count === null) {
      return end(client, message === NOTHING ? "succeeded" : "closed early");
    }
    const expected = (options.verify ? unread : buffer).subarray(0, count); // or whatever came
    const came = buffer.subarray(0, expected.length);
    if (Buffer.compare(came, expected) !== 0) return end(client, "wrong bytes");
    if (expected.length < count) return end(client, "sent too much");
    bytes += count;
    client.unread = options.verify ? unread.subarray(count) : NOTHING;
    if (
      options.words.length > 0 && !options.json && client.unread.length === 0
    ) {
      console.log(
        `client ${id} received: ${decode(options.verify ? message : came)}`,
      );
    }
    advance(client);
    selector.nextRound(client.startRead);
  }

  /** Goes on to the next message when this one is out and its echo is in. */
  function advance(client: Client): void {
    if (
      client.message === NOTHING || client.unsent.length > 0 ||
      client.unread.length > 0
    ) return;
    client.echoes++;
    latencies.push(performance.now() - client.sentAt);
    startMessage(client);
  }

  function tick(): void {
    for (const client of running) { // its first may come at once: it does not count
      if (TICK * client.ticks++ >= 1000 * options.timeout) {
        end(client, "timed out");
      }
    }
    if (options.progress) {
      Deno.stderr.writeSync(encode(`\r${latencies.length} echoes\x1b[K\r`));
    }
    nextTick();
  }

  function end(client: Client, outcome: string): void {
    running.delete(client);
    outcomes[outcome] = (outcomes[outcome] ?? 0) + 1;
    if (outcome === "succeeded") client.succeededAt = performance.now() - start;
    client.conn?.close();
  }

  function report(): void {
    const { succeeded, ...reasons } = outcomes;
    const failed = clients.length - succeeded;
    const echoes = latencies.length;
    const seconds = (performance.now() - start) / 1000;
    const echoesPerSecond = echoes / seconds;
    const sorted = Float64Array.from(latencies).sort();
    const at = (share: number) => sorted.at(Math.ceil(echoes * share) - 1) ?? 0;
    const latency = { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1) };
    const ends = clients.flatMap(({ succeededAt }) => succeededAt ?? []).sort((
      a,
      b,
    ) => a - b);
    const finished = { first: ends.at(0) ?? 0, last: ends.at(-1) ?? 0 };
    const rates = clients.map((client) =>
      client.echoes / (client.succeededAt ?? 1000 * seconds)
    );
    const sum = rates.reduce((total, rate) => total + rate, 0);
    const squares = rates.reduce((total, rate) => total + rate ** 2, 0);
    const jain = squares === 0 ? 0 : sum ** 2 / (rates.length * squares);
    if (failed > 0) Deno.exitCode = 1;
    if (options.json && !options.quiet) {
      const counts = { succeeded, failed, reasons, echoes, bytes };
      const figures = { seconds, echoesPerSecond, latency, finished, jain };
      return console.log(JSON.stringify({ ...counts, ...figures }));
    }
    if (options.quiet || (options.words.length > 0 && failed === 0)) return;
    const failures = Object.entries(reasons).map(([reason, n]) =>
      `, ${n} ${reason}`
    ).join("");
    const times = Object.entries(latency).map(([name, ms]) =>
      `${name} ${ms.toFixed(2)} ms`
    );
    console.log(`\
clients   ${succeeded} succeeded, ${failed} failed${failures}
echoes    ${echoes}, ${bytes} bytes in ${seconds.toFixed(3)} s
speed     ${Math.round(echoesPerSecond)} echoes/s
latency   ${times.join(", ")}
          ${echoes > 0 ? bars(sorted) : "no echo has come back"}
finished  first client after ${finished.first.toFixed()} ms, last after ${finished.last.toFixed()} ms
fairness  ${
      jain.toFixed(3)
    } (Jain's index: 1 if all clients were served alike)`);
  }
}

const { ConnectionRefused, ConnectionReset, BrokenPipe, NotConnected } =
  Deno.errors;
function reasonOf(error: unknown): string {
  if (error instanceof ConnectionRefused) return "refused";
  const reset = [ConnectionReset, BrokenPipe, NotConnected].some((kind) =>
    error instanceof kind
  );
  return reset
    ? "reset"
    : error instanceof Error
    ? error.message
    : String(error);
}

/** How many echoes took how long, from the shortest to the longest, on a logarithmic scale. */
function bars(sorted: Float64Array): string {
  const [least = 0, most = 0] = [sorted.at(0), sorted.at(-1)];
  const counts = new Array<number>(50).fill(0);
  const scale = (counts.length - 1) / Math.log(most / least); // infinite if all took the same
  // The first bar for NaN, which is infinity times 0.
  for (const time of sorted) {
    counts[Math.floor(scale * Math.log(time / least)) || 0]++;
  }
  const line = counts.map((n) =>
    "▁▂▃▄▅▆▇█"[Math.ceil(7 * n / Math.max(...counts))]
  ).join("");
  return `${least.toFixed(2)} ms ${line} ${most.toFixed(2)} ms`;
}

// ---- The command line
const HELP = `\
Echo client: many concurrent clients that compare every byte, and a report.

  deno run --allow-net echo_client.ts [OPTIONS] [MESSAGE...]

  -H, --host HOST       the server's address (127.0.0.1)
  -p, --port PORT       its first port (50007)
      --ports N         its number of ports; clients are dealt over them (2)
  -c, --clients N       concurrent clients (100, or 1 with MESSAGEs)
  -n, --messages N      messages each client sends (10)
  -s, --size BYTES      bytes a message (64)
      --timeout S       give up on connect, echo or close after S seconds (10)
      --no-verify       take what one read brings as the reply (for --stamp)
      --json            print the report as JSON
  -q, --quiet           print no report
  -h, --help            show this help

With MESSAGEs each client sends these, and without --json replies are printed.
It exits with 0 only if no client failed. Ctrl-C prints the report so far.`;

function parseCommandLine() {
  const words: string[] = [];
  const refuse = (arg: string, expected: string): never => {
    throw new RangeError(`${arg}: expected ${expected}`);
  };
  const args = parseArgs(Deno.args, {
    string: ["host", "port", "ports", "clients", "messages", "size", "timeout"],
    boolean: ["no-verify", "json", "quiet", "help"],
    alias: {
      host: "H",
      port: "p",
      clients: "c",
      messages: "n",
      size: "s",
      quiet: "q",
      help: "h",
    },
    // `< 0` is false: it is kept here, as parseArgs would make a number of 007
    unknown: (arg, option) =>
      option === undefined
        ? words.push(arg) < 0
        : refuse(arg, "one of the options in --help"),
  });
  words.push(...args._.map(String)); // what comes after --
  const { host = "127.0.0.1", json, quiet, help } = args;
  if (host === "") refuse("--host", "an address or a name");
  if (words.includes("")) refuse('""', "a MESSAGE of at least one byte");
  if (words[0] && (args.messages ?? args.size)) {
    refuse(words[0], "either MESSAGEs or -n and -s");
  }
  const number = (option: string, text: string, most: number) =>
    /^[1-9]\d*$/.test(text) && Number(text) <= most
      ? Number(text)
      : refuse(`${option} ${text}`, `a whole number from 1 to ${most}`);
  const first = number("--port", args.port ?? "50007", 65535);
  const length = number("--ports", args.ports ?? "2", 65536 - first);
  const ports = Array.from({ length }, (_, i) => first + i);
  const clients = number(
    "--clients",
    args.clients ?? (words.length > 0 ? "1" : "100"),
    1e5,
  );
  // No more than 1e8 in all, as the time of each is kept.
  const messages = number(
    "--messages",
    args.messages ?? "10",
    Math.floor(1e8 / clients),
  );
  const size = number("--size", args.size ?? "64", 2 ** 30);
  const timeout = Number(args.timeout ?? 10);
  if (!(timeout > 0)) refuse(`--timeout ${args.timeout}`, "seconds above 0");
  const lines = words.map(encode);
  const random = new Uint8Array(size + 65536).map(() => Math.random() * 256);
  /** Random bytes differ by client and message, so that a reply to the wrong client is noticed. */
  const message = (client: number, index: number): Uint8Array | undefined => {
    if (words.length > 0) return lines[index];
    const offset = (client * 7919 + index * 104729) % 65536; // odd steps: all come before one repeats
    return index < messages
      ? random.subarray(offset, offset + size)
      : undefined;
  };
  const verify = !args["no-verify"];
  const progress = !quiet && words.length === 0 && Deno.stderr.isTerminal();
  return {
    host,
    ports,
    clients,
    message,
    timeout,
    words,
    verify,
    json,
    quiet,
    help,
    progress,
  };
}

if (import.meta.main) {
  try {
    const options = parseCommandLine();
    if (options.help) console.log(HELP);
    else await run(options);
  } catch (error) {
    console.error(
      `echo_client: ${error instanceof Error ? error.message : error}`,
    );
    Deno.exitCode = error instanceof RangeError ? 2 : 1; // 2: bad use
  }
  Deno.exit(); // or a tick, a late connect or, in Deno 2.8, a closed connection keeps the process
}
