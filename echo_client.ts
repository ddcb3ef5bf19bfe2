/**
 * Many concurrent echo clients in one loop: the other side of
 * `select_server.ts`. Each client sends its messages one after another, waits
 * for the whole echo of each, and compares every byte. The report at the end
 * says how fast and how fair the server was.
 *
 * It needs `select_server.ts` beside it, for the selector. A thousand clients
 * in a plain loop would starve each other, and the server would get the blame.
 *
 * @module
 */
import { Buffer } from "node:buffer";
import { Selector } from "./select_server.ts";

// ---- What can complete, and what a client is
type Completion =
  | { type: "connected"; client: Client }
  | { type: "sent"; client: Client; count: number }
  | { type: "received"; client: Client; count: number | null }
  | { type: "failed"; client: Client; error: unknown }
  | { type: "tick" | "interrupt" };

// Time is counted in ticks of so many ms. A loop that is late counts one tick,
// so its own delay is not blamed on the server.
const TICK = 100;
const NOTHING = new Uint8Array(0);
const { ConnectionRefused, ConnectionReset, BrokenPipe, NotConnected } =
  Deno.errors;
const encoder = new TextEncoder();
const decoder = new TextDecoder();

/** It reads while it writes: the echo of a long message comes in parts. */
class Client {
  conn?: Deno.TcpConn;
  succeededAt?: number; // ms since the start of the run
  ticks = 0; // since it began to connect, or to send its message
  echoes = 0;
  message: Uint8Array | undefined; // none before the first and after the last
  sentAt = 0;
  unsent: Uint8Array = NOTHING; // the part of the message still to be written
  unread: Uint8Array = NOTHING; // the part of its echo still to be read
  buffer = NOTHING; // what reads fill: a large one once it is connected

  constructor(
    readonly id: number,
    readonly push: (completion: Completion) => void,
  ) {}

  // Arrow functions keep their `this`, so they can be passed on.
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
/** Runs the clients to their end, or until a signal, and prints the report. */
async function run(options: Options): Promise<void> {
  const { host, port, ports, words, verify, json, quiet } = options;
  const selector = new Selector<Completion>();
  const push = (completion: Completion) => selector.push(completion);
  const clients = Array.from(
    { length: options.clients },
    (_, i) => new Client(i + 1, push),
  );
  const running = new Set(clients);
  const reasons: Record<string, number> = {}; // how many clients failed why
  const ends: number[] = []; // ms, when each client succeeded
  const latencies: number[] = []; // ms, how long each echo took
  let shares: number[] = []; // all clients' echoes when the first succeeded
  let bytes = 0;
  let canShow = Deno.stderr.isTerminal() && !quiet && words.length === 0;
  const messageOf = makeMessages(options);
  const start = performance.now();
  // SIGINT is Ctrl-C, SIGTERM comes from `timeout`, SIGHUP from a terminal that
  // is closed; on Windows SIGBREAK is Ctrl-Break.
  const signals: Deno.Signal[] = Deno.build.os === "windows"
    ? ["SIGINT", "SIGBREAK"]
    : ["SIGINT", "SIGTERM", "SIGHUP"];
  for (const signal of signals) {
    Deno.addSignalListener(signal, () => push({ type: "interrupt" }));
  }
  clients.forEach(startConnect);
  startTick();

  while (running.size > 0) {
    for (const completion of await selector.select()) {
      if ("client" in completion && !running.has(completion.client)) {
        continue; // it has ended meanwhile
      }
      switch (completion.type) {
        case "connected": // send the first message, and read what comes back
          startMessage(completion.client);
          selector.nextRound(completion.client.startRead);
          break;
        case "sent": // perhaps a part only; its echo is being read meanwhile
          sendRest(completion.client, completion.count);
          break;
        case "received": // null is the end of the stream
          receive(completion.client, completion.count);
          break;
        case "failed": // refused, reset, broken pipe
          end(completion.client, reasonOf(completion.error));
          break;
        case "tick": // some time has passed: which client has waited too long?
          tick();
          break;
        case "interrupt": // a signal: the report is about what is done by now
          for (const client of running) end(client, "interrupted");
          break;
        default:
          completion satisfies never;
      }
    }
  }
  await show(""); // the report stands in the place of the progress
  return report();

  function startConnect(client: Client): void {
    const nth = (client.id - 1) % ports; // so clients are dealt over the ports
    Deno.connect({ hostname: host, port: port + nth }).then((conn) => {
      if (!running.has(client)) return conn.close(); // too late
      client.conn = conn;
      // Where nobody listens, the system may give a client the very port that
      // it connects to. TCP then connects it to itself (RFC 9293, 3.5), and it
      // would get every byte back.
      const { localAddr, remoteAddr } = conn;
      if (
        localAddr.port === remoteAddr.port &&
        localAddr.hostname === remoteAddr.hostname
      ) throw new ConnectionRefused();
      client.buffer = new Uint8Array(16 * 1024);
      conn.setNoDelay();
      push({ type: "connected", client });
    }).catch(client.onFailed);
  }

  /** Starts the next message or, after the last, ends the stream. */
  function startMessage(client: Client): void {
    client.message = messageOf(client.id, client.echoes);
    client.unsent = client.unread = client.message ?? NOTHING;
    client.ticks = 0;
    client.sentAt = performance.now();
    if (client.message !== undefined) client.startWrite();
    else client.conn?.closeWrite().catch(client.onFailed);
  }

  function sendRest(client: Client, count: number): void {
    client.unsent = client.unsent.subarray(count);
    if (client.unsent.length > 0) client.startWrite();
    else advance(client);
  }

  function receive(client: Client, count: number | null): void {
    const { id, message, unread, buffer } = client;
    if (count === null) {
      const complete = message === undefined;
      return end(client, complete ? "succeeded" : "closed early");
    }
    const came = buffer.subarray(0, count);
    const expected = verify ? unread.subarray(0, count) : came;
    if (Buffer.compare(came.subarray(0, expected.length), expected) !== 0) {
      return end(client, "wrong bytes");
    }
    if (count > expected.length) return end(client, "sent too much");
    bytes += count;
    client.unread = verify ? unread.subarray(count) : NOTHING;
    if (words.length > 0 && !json && client.unread.length === 0) {
      const text = decoder.decode(verify ? message : came);
      console.log(`client ${id} received: ${text.replace(/\p{Cc}+/gu, " ")}`);
    }
    advance(client);
    selector.nextRound(client.startRead);
  }

  /** Goes on to the next message when this one is out and its echo is in. */
  function advance(client: Client): void {
    const { message, unsent, unread } = client;
    if (message === undefined || unsent.length > 0 || unread.length > 0) return;
    client.echoes++;
    latencies.push(performance.now() - client.sentAt);
    startMessage(client);
  }

  function startTick(): void {
    selector.after(TICK, () => push({ type: "tick" }));
  }

  function tick(): void {
    for (const client of running) {
      const waited = TICK * client.ticks;
      client.ticks++; // the first may come at once, so it does not count
      if (waited >= 1000 * options.timeout) end(client, "timed out");
    }
    if (running.size === 0) return;
    const asked = clients.length * options.messages;
    const percent = Math.floor(100 * latencies.length / asked);
    const seconds = (performance.now() - start) / 1000;
    show(`${percent}%, ${Math.round(latencies.length / seconds)} echoes/s`);
    startTick();
  }

  /** Shows a line on the terminal, if there is one, in place of the last. */
  async function show(line: string): Promise<void> {
    if (!canShow) return;
    canShow = false; // until the line is out: a terminal may be paused
    try {
      await Deno.stderr.write(encoder.encode(`\r${line}\x1b[K\r`));
      canShow = true;
    } catch { /* a terminal that is gone must not end the run */ }
  }

  function end(client: Client, outcome: string): void {
    running.delete(client);
    client.conn?.close();
    if (outcome === "succeeded") {
      client.succeededAt = performance.now() - start;
      ends.push(client.succeededAt);
      if (ends.length > 1) return;
      shares = clients.map(({ echoes }) => echoes).sort((a, b) => a - b);
    } else {
      reasons[outcome] = (reasons[outcome] ?? 0) + 1;
    }
  }

  function report(): void {
    const succeeded = ends.length;
    const failed = clients.length - succeeded;
    if (failed > 0) Deno.exitCode = 1;
    if (reasons.refused === clients.length) {
      const last = port + Math.min(ports, clients.length) - 1; // that was tried
      const tried = last > port ? `ports ${port} to ${last}` : `port ${port}`;
      const line = `nobody listens on ${host}, ${tried}`;
      console.error(`echo_client: ${line}: is select_server.ts running?`);
      if (!json) return;
    }
    if (quiet || (words.length > 0 && failed === 0 && !json)) return;

    // What cannot be told, as there was no echo, is NaN; JSON makes it null.
    const echoes = latencies.length;
    const seconds = (performance.now() - start) / 1000;
    const echoesPerSecond = echoes / seconds;
    const times = Float64Array.from(latencies).sort();
    const at = (share: number) => quantile(times, share);
    const latency = { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1) };
    const [first = NaN, last = NaN] = [ends.at(0), ends.at(-1)];
    const ten = Array.from({ length: 10 }, (_, i) => quantile(shares, i / 9));
    const finished = { first, last, shares: ten };
    const rates = clients.map((client) =>
      client.echoes / (client.succeededAt ?? 1000 * seconds)
    );
    const sum = rates.reduce((total, rate) => total + rate, 0);
    const squares = rates.reduce((total, rate) => total + rate ** 2, 0);
    const jain = sum ** 2 / (rates.length * squares);
    if (json) {
      const counts = { succeeded, failed, reasons, echoes, bytes };
      const figures = { seconds, echoesPerSecond, latency, finished, jain };
      return console.log(JSON.stringify({ ...counts, ...figures }));
    }
    const print = (name: string, text: string) =>
      console.log(name.padEnd(10) + text);
    const ms = (time: number) => `${time.toFixed(2)} ms`;
    const outcomes = Object.entries({ succeeded, failed, ...reasons })
      .map(([what, n]) => `${n} ${what}`);
    const percentiles = Object.entries(latency)
      .map(([name, time]) => `${name} ${ms(time)}`);
    print("clients", outcomes.join(", "));
    if (echoes === 0) return print("echoes", "no echo has come back");
    print("echoes", `${echoes}, ${bytes} bytes in ${seconds.toFixed(3)} s`);
    print("speed", `${Math.round(echoesPerSecond)} echoes/s`);
    print("latency", percentiles.join(", "));
    print("", `${ms(at(0))} ${bars(histogram(times))} ${ms(at(1))}`);
    if (succeeded > 0) {
      print(
        "finished",
        `first client after ${ms(first)}, last after ${ms(last)}`,
      );
      const had = `${shares.at(0)} ${bars(ten)} ${shares.at(-1)} echoes`;
      print("", `when the first finished, the clients had ${had}`);
    }
    const meaning = "Jain's index: 1 if all clients were served alike";
    print("fairness", `${jain.toFixed(3)} (${meaning})`);
  }
}

/** Makes a function that knows the nth message of a client, if it has one. */
function makeMessages({ words, messages, size }: Options) {
  const lines = words.map((word) => encoder.encode(word));
  const random = new Uint8Array(words.length > 0 ? 0 : size + 65536);
  for (let i = 0; i < random.length; i += 65536) { // no more in one call
    crypto.getRandomValues(random.subarray(i, i + 65536));
  }
  return (client: number, nth: number): Uint8Array | undefined => {
    if (words.length > 0) return lines[nth];
    if (nth >= messages) return undefined;
    // Messages differ, so the echo of another one is noticed. The steps are
    // odd: a client has every offset once before it has one again.
    const offset = (client * 7919 + nth * 104729) % 65536;
    return random.subarray(offset, offset + size);
  };
}

function reasonOf(error: unknown): string {
  if (error instanceof ConnectionRefused) return "refused";
  const reset = [ConnectionReset, BrokenPipe, NotConnected];
  if (reset.some((kind) => error instanceof kind)) return "reset";
  return error instanceof Error ? error.message : String(error);
}

/** The value that this share of the sorted values does not exceed, or NaN. */
function quantile(sorted: ArrayLike<number>, share: number): number {
  return sorted[Math.max(Math.ceil(sorted.length * share) - 1, 0)] ?? NaN;
}

/** How many of the times fall into each of 50 steps of a logarithmic scale. */
function histogram(sorted: Float64Array): number[] {
  const counts = new Array<number>(50).fill(0);
  const [least, most] = [quantile(sorted, 0), quantile(sorted, 1)];
  const scale = most > least ? 49 / Math.log(most / least) : 0;
  for (const time of sorted) {
    const step = Math.floor(scale * Math.log(time / least));
    counts[step] = (counts[step] ?? 0) + 1;
  }
  return counts;
}

function bars(values: number[]): string {
  const most = Math.max(...values);
  return values.map((n) => "▁▂▃▄▅▆▇█"[Math.ceil(7 * n / most)]).join("");
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
  -s, --size BYTES      bytes per message (64)
      --timeout S       give up on connect, echo or close after S seconds (10)
      --no-verify       take what one read brings as the reply (for --stamp)
      --json            print the report as JSON
  -q, --quiet           print no report
  -h, --help            show this help

With MESSAGEs each client sends these, and without --json replies are printed.
It exits with 0 only if no client failed. Ctrl-C, SIGTERM and SIGHUP end the
run with the report so far.`;

const DEFAULTS = {
  host: "127.0.0.1",
  port: 50007,
  ports: 2,
  clients: 100,
  messages: 10,
  size: 64,
  timeout: 10, // seconds
  words: new Array<string>(), // the MESSAGEs
  verify: true,
  json: false,
  quiet: false,
  help: false,
};
type Options = typeof DEFAULTS;

async function parseCommandLine(): Promise<Options> {
  if (Deno.args.length === 0) return DEFAULTS;
  // Imported only now, so that without arguments no registry is needed. Its
  // name is in full, so that this file runs where it is copied to.
  const { parseArgs } = await import("jsr:@std/cli@^1/parse-args");
  const refuse = (arg: string, expected: string): never => {
    throw new RangeError(`${arg}: expected ${expected}`);
  };
  const words: string[] = [];
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
    unknown: (arg, option) => {
      if (option !== undefined) refuse(arg, "one of the options in --help");
      words.push(arg); // here, as parseArgs would make a number of 007
      return false; // and not there
    },
  });
  words.push(...args._.map(String)); // what comes after --
  const { host = DEFAULTS.host, json, quiet, help } = args;
  if (host === "") refuse("--host", "an address or a name");
  if (words.includes("")) refuse('""', "a MESSAGE of at least one byte");
  const hasLoad = args.messages !== undefined || args.size !== undefined;
  if (words[0] !== undefined && hasLoad) {
    refuse(words[0], "either MESSAGEs or -n and -s");
  }
  const number = (
    name: "port" | "ports" | "clients" | "messages" | "size",
    most: number,
    fallback = DEFAULTS[name],
  ): number => {
    const text = args[name] ?? `${fallback}`;
    return /^[1-9]\d*$/.test(text) && Number(text) <= most
      ? Number(text)
      : refuse(`--${name} ${text}`, `a whole number from 1 to ${most}`);
  };
  const port = number("port", 65535);
  const ports = number("ports", 65536 - port);
  const clients = number("clients", 1e5, words.length > 0 ? 1 : undefined);
  // The time of each echo is kept, so there are no more than 1e8 of them.
  const messages = number("messages", Math.floor(1e8 / clients));
  const size = number("size", 2 ** 30);
  const timeout = Number(args.timeout ?? DEFAULTS.timeout);
  if (!(timeout > 0)) refuse(`--timeout ${args.timeout}`, "seconds above 0");
  const verify = !args["no-verify"];
  const load = { clients, messages, size, words, timeout };
  return { host, port, ports, ...load, verify, json, quiet, help };
}

if (import.meta.main) {
  try {
    const options = await parseCommandLine();
    if (options.help) console.log(HELP);
    else await run(options);
  } catch (error) {
    console.error(
      `echo_client: ${error instanceof Error ? error.message : error}`,
    );
    Deno.exitCode = error instanceof RangeError ? 2 : 1; // 2: bad use
  }
  // What may still be pending must not keep the process: a tick, a late
  // connect or, in Deno 2.8, the read of a closed connection.
  Deno.exit();
}
