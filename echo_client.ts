/**
 * Many concurrent echo clients in one loop, the other side of `select_server.ts`: each sends its messages
 * one after another, waits for each echo in full and compares every byte. Then it reports speed and
 * fairness. It needs `select_server.ts` beside it, for the selector: a client of a thousand sockets would
 * starve some of them just as a server does, and report that as the server's doing.
 *
 * @module
 */
import { parseArgs } from "jsr:@std/cli@^1/parse-args"; // in full: so this file runs where it is copied
import { Selector } from "./select_server.ts";

// ---- What can complete, and what a client is
type Completion =
  | { type: "connected"; client: Client; conn: Deno.TcpConn }
  | { type: "sent"; client: Client; count: number }
  | { type: "received"; client: Client; count: number | null }
  | { type: "failed"; client: Client; error: unknown }
  | { type: "tick" | "abort" };

const BUFFER_SIZE = 16 * 1024;
const NOTHING = new Uint8Array(0);
const TICK = 100; // ms: time is counted in ticks, so that no server is blamed for this loop's lateness
class Client {
  conn?: Deno.TcpConn;
  outcome?: string; // when it has ended: "succeeded", or why not
  endedAt = 0; // ms since the start of the run
  ticks = 0; // since it began to connect, or to send its message
  echoes = 0;
  message?: Uint8Array; // undefined while it connects, and again when all are out
  sentAt = 0;
  unsent: Uint8Array = NOTHING; // the part of the message that is still to be written
  returned = 0; // bytes of it that have come back
  reply?: Uint8Array; // once it is complete
  buffer = NOTHING; // what reads fill, once it is connected

  constructor(readonly id: number, readonly push: (completion: Completion) => void) {}

  startRead = () => void this.conn?.read(this.buffer).then(this.onReceived, this.onFailed);
  startWrite = () => void this.conn?.write(this.unsent).then(this.onSent, this.onFailed);
  onReceived = (count: number | null) => this.push({ type: "received", client: this, count });
  onSent = (count: number) => this.push({ type: "sent", client: this, count });
  onFailed = (error: unknown) => this.push({ type: "failed", client: this, error });
}

// ---- The run
/** Runs the clients to their end, or until the signal aborts, and reports what they have done. */
async function run(options: ReturnType<typeof parseCommandLine>, signal: AbortSignal) {
  const selector = new Selector<Completion>();
  const push = (completion: Completion) => selector.push(completion);
  const nextTick = () => selector.after(TICK, () => push({ type: "tick" }));
  const clients = Array.from({ length: options.clients }, (_, i) => new Client(i + 1, push));
  const latencies: number[] = [];
  const ended = new AbortController(); // aborts the connects that are still pending then
  const progress = setInterval(showProgress, 200);
  const start = performance.now();
  let running = clients.length;
  let bytes = 0;
  let timer = nextTick();
  signal.addEventListener("abort", () => push({ type: "abort" }));
  for (const client of clients) startConnect(client);

  while (running > 0) {
    for (const completion of await selector.select()) {
      if ("client" in completion && completion.client.outcome !== undefined) continue; // it has ended
      switch (completion.type) {
        case "connected": // send the first message, and read what comes back
          welcome(completion.client, completion.conn);
          break;
        case "sent": // perhaps a part only; meanwhile its echo is being read
          send(completion.client, completion.client.unsent.subarray(completion.count));
          break;
        case "received": // null is the end of the stream
          receive(completion.client, completion.count);
          break;
        case "failed": // refused, reset, broken pipe
          end(completion.client, reasonOf(completion.error));
          break;
        case "tick": // some time has passed: who has waited for too long?
          for (const client of clients) charge(client);
          timer = nextTick();
          break;
        case "abort":
          for (const client of clients) end(client, "interrupted");
          break;
      }
    }
  }
  clearTimeout(timer);
  clearInterval(progress);
  return report();

  function startConnect(client: Client): void {
    const port = options.ports[(client.id - 1) % options.ports.length];
    Deno.connect({ hostname: options.host, port, signal: ended.signal }).then((conn) => {
      client.conn = conn;
      if (client.outcome === undefined) push({ type: "connected", client, conn });
      else conn.close();
    }, client.onFailed);
  }

  function welcome(client: Client, conn: Deno.TcpConn): void {
    client.buffer = new Uint8Array(BUFFER_SIZE);
    try {
      conn.setNoDelay();
    } catch { /* the server has reset already: the read says so */ }
    startMessage(client);
    selector.nextRound(client.startRead);
  }

  /** Starts the next message or, after the last one, sends the end of the stream. */
  function startMessage(client: Client): void {
    client.message = options.message(client.id, client.echoes);
    client.returned = 0;
    client.reply = undefined;
    client.ticks = 0;
    client.sentAt = performance.now();
    if (client.message !== undefined) send(client, client.message);
    else client.conn?.closeWrite().catch(client.onFailed);
  }

  function send(client: Client, bytes: Uint8Array): void {
    client.unsent = bytes;
    if (bytes.length > 0) client.startWrite();
    else advance(client);
  }

  function receive(client: Client, count: number | null): void {
    const { buffer, message, returned } = client;
    if (count === null) return end(client, message === undefined ? "succeeded" : "closed early");
    if (options.verify) {
      const expected = message ?? NOTHING;
      if (returned + count > expected.length) return end(client, "sent too much");
      for (let i = 0; i < count; i++) {
        if (buffer[i] !== expected[returned + i]) return end(client, "wrong bytes");
      }
      if (returned + count === message?.length) client.reply = message;
    } else client.reply ??= buffer.slice(0, count);
    client.returned += count;
    advance(client);
    selector.nextRound(client.startRead);
  }

  /** Goes on to the next message when this one is out and its reply is in. */
  function advance(client: Client): void {
    const { message, unsent, reply } = client;
    if (message === undefined || unsent.length > 0 || reply === undefined) return;
    client.echoes++;
    bytes += reply.length;
    latencies.push(performance.now() - client.sentAt);
    if (options.words.length > 0 && !options.json) {
      console.log(`client ${client.id} received: ${new TextDecoder().decode(reply)}`);
    }
    startMessage(client);
  }

  function charge(client: Client): void {
    const waited = TICK * client.ticks++; // the first tick may come at once: it does not count
    if (waited >= 1000 * options.timeout) end(client, "timed out");
  }

  function end(client: Client, outcome: string): void {
    if (client.outcome !== undefined) return;
    client.outcome = outcome;
    client.endedAt = performance.now() - start;
    client.conn?.close();
    if (--running === 0) ended.abort();
  }

  function showProgress(): void {
    if (options.quiet || options.words.length > 0 || !Deno.stderr.isTerminal()) return;
    Deno.stderr.writeSync(new TextEncoder().encode(`\r${latencies.length} echoes\x1b[K\r`));
  }

  /** Times are in milliseconds, but for the seconds of the run. */
  function report() {
    const seconds = (performance.now() - start) / 1000;
    const sorted = Float64Array.from(latencies).sort();
    const at = (q: number) => sorted.at(Math.ceil(sorted.length * q) - 1) ?? 0;
    const outcomes: Record<string, number> = {};
    for (const { outcome = "" } of clients) outcomes[outcome] = (outcomes[outcome] ?? 0) + 1;
    const { succeeded = 0, ...reasons } = outcomes;
    const done = clients.filter((client) => client.outcome === "succeeded");
    const ends = Float64Array.from(done, (client) => client.endedAt).sort();
    const rates = clients.map((client) => client.echoes / client.endedAt);
    const sum = rates.reduce((sum, rate) => sum + rate, 0);
    const squares = rates.reduce((sum, rate) => sum + rate ** 2, 0);
    return {
      succeeded,
      failed: clients.length - succeeded,
      reasons,
      echoes: latencies.length,
      bytes,
      seconds,
      echoesPerSecond: latencies.length / seconds,
      latency: { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1) },
      latencies: sorted,
      finished: { first: ends.at(0) ?? 0, last: ends.at(-1) ?? 0 },
      jain: squares === 0 ? 0 : sum ** 2 / (rates.length * squares),
    };
  }
}

function reasonOf(error: unknown): string {
  const { ConnectionRefused, ConnectionReset, BrokenPipe, NotConnected } = Deno.errors;
  if (error instanceof ConnectionRefused) return "refused";
  const reset = [ConnectionReset, BrokenPipe, NotConnected].some((kind) => error instanceof kind);
  return reset ? "reset" : error instanceof Error ? error.message : Deno.inspect(error);
}

/**
 * Makes messages of random bytes that differ from client to client and from message to message, so that a
 * reply that went to the wrong client is noticed.
 */
function randomMessages(messages: number, size: number) {
  const random = new Uint8Array(size + 65536).map(() => Math.random() * 256);
  return (client: number, index: number) => {
    const offset = (client * 7919 + index * 104729) % 65536; // primes: the offsets repeat late
    return index < messages ? random.subarray(offset, offset + size) : undefined;
  };
}

// ---- The report and the command line
/** How many echoes took how long, from the shortest to the longest, on a logarithmic scale. */
function bars(sorted: Float64Array): string {
  const [least = 0, most = 0] = [sorted.at(0), sorted.at(-1)];
  const counts = new Array<number>(50).fill(0);
  for (const time of sorted) {
    const share = Math.log(time / least) / Math.log(most / least); // NaN if all took the same time
    counts[Math.floor(share * (counts.length - 1)) || 0]++;
  }
  const highest = Math.max(1, ...counts);
  const line = counts.map((count) => "▁▂▃▄▅▆▇█"[Math.ceil(7 * count / highest)]).join("");
  return `${least.toFixed(2)} ms ${line} ${most.toFixed(2)} ms`;
}

function format(report: Awaited<ReturnType<typeof run>>): string {
  const { latency, finished } = report;
  const reasons = Object.entries(report.reasons).map(([reason, n]) => `, ${n} ${reason}`).join("");
  const times = Object.entries(latency).map(([name, ms]) => `${name} ${ms.toFixed(2)} ms`);
  return `\
clients   ${report.succeeded} succeeded, ${report.failed} failed${reasons}
echoes    ${report.echoes}, ${report.bytes} bytes in ${report.seconds.toFixed(3)} s
speed     ${Math.round(report.echoesPerSecond)} echoes/s
latency   ${times.join(", ")}
          ${report.echoes > 0 ? bars(report.latencies) : "no echo has come back"}
finished  first client after ${finished.first.toFixed()} ms, last after ${finished.last.toFixed()} ms
fairness  ${report.jain.toFixed(3)} (Jain's index: 1 if all clients were served alike)`;
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

function parseCommandLine() {
  const words: string[] = [];
  const args = parseArgs(Deno.args, {
    string: ["host", "port", "ports", "clients", "messages", "size", "timeout"],
    boolean: ["verify", "json", "quiet", "help"],
    negatable: ["verify"],
    default: { verify: true },
    alias: { host: "H", port: "p", clients: "c", messages: "n", size: "s", quiet: "q", help: "h" },
    unknown: (arg, option) => {
      if (option === undefined) return words.push(arg) < 0; // `_` would have numbers for digits
      throw new RangeError(`${arg}: expected one of the options that --help shows`);
    },
  });
  words.push(...args._.map(String)); // what comes after --
  const { host = "127.0.0.1", json, quiet, help, verify } = args;
  if (host === "") throw new RangeError("--host: expected an address or a name");
  if (words.includes("")) throw new RangeError('"": expected a MESSAGE of at least one byte');
  if (words.length > 0 && (args.messages ?? args.size) !== undefined) {
    throw new RangeError(`${words[0]}: expected either MESSAGEs or --messages and --size`);
  }
  const number = (option: string, text: string | undefined, value: number, most: number) => {
    if (text === undefined) return value;
    if (/^[1-9]\d*$/.test(text) && Number(text) <= most) return Number(text);
    throw new RangeError(`${option} ${text}: expected a whole number from 1 to ${most}`);
  };
  const first = number("--port", args.port, 50007, 65535);
  const length = number("--ports", args.ports, 2, 65536 - first);
  const ports = Array.from({ length }, (_, i) => first + i);
  const clients = number("--clients", args.clients, words.length > 0 ? 1 : 100, 1e6);
  const messages = number("--messages", args.messages, 10, 1e9);
  const random = randomMessages(messages, number("--size", args.size, 64, 2 ** 30));
  const timeout = Number(args.timeout ?? 10);
  if (!(timeout > 0)) throw new RangeError(`--timeout ${args.timeout}: expected seconds above 0`);
  const lines = words.map((word) => new TextEncoder().encode(word));
  const message = words.length > 0 ? (_: number, index: number) => lines.at(index) : random;
  return { host, ports, clients, message, timeout, words, verify, json, quiet, help };
}

async function main(): Promise<void> {
  const options = parseCommandLine();
  if (options.help) return console.log(HELP);
  const stop = new AbortController();
  Deno.addSignalListener("SIGINT", () => stop.abort());
  const { latencies, ...report } = await run(options, stop.signal);
  if (report.failed > 0) Deno.exitCode = 1;
  if (options.json) return console.log(JSON.stringify(report));
  const { host, ports } = options;
  if (report.reasons.refused === options.clients) {
    console.error(`echo_client: nobody listens on ${host} port ${ports.join(" or ")}`);
  } else if (!options.quiet && (options.words.length === 0 || report.failed > 0)) {
    console.log(format({ ...report, latencies }));
  }
}

if (import.meta.main) {
  await main().catch((error) => {
    console.error(`echo_client: ${error instanceof Error ? error.message : error}`);
    Deno.exitCode = error instanceof RangeError ? 2 : 1; // 2: bad use
  });
  Deno.exit(); // in Deno 2.8, what was pending when a connection was closed keeps the process
}
