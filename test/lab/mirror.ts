/**
 * The web server of a lab: one folder an address, laid out as downloads are on the real sites.
 * It breaks on demand, while it runs, in the ways that mirrors of slow networks do.
 *
 *     mirror.ts FOLDER SOCKET ADDRESS...
 *
 * Requests are logged on standard output, one line each: address, method, path, range, status.
 * PUT /ADDRESS on SOCKET takes a Fault as JSON and answers once it holds.
 */
import { createReadStream, statSync } from "node:fs";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import { join, normalize } from "node:path";
import { Transform } from "node:stream";
import { json } from "node:stream/consumers";
import { pipeline } from "node:stream/promises";
import { setTimeout as sleep } from "node:timers/promises";

export type Fault = {
  /**
   * none; down: connections are refused; hang: no answer ever; slow: `bytes` a second;
   * cut: the connection breaks after `bytes` of an answer; corrupt: the byte at `bytes` is wrong;
   * status: answers with status `bytes`.
   */
  mode: "none" | "down" | "hang" | "slow" | "cut" | "corrupt" | "status";
  bytes?: number;
  /** Only for paths that end so. */
  only?: string;
};

/** Passes on what it gets, as the fault has it; `from` is where in the file the first byte stands. */
function broken({ mode, bytes = 0 }: Fault, from: number) {
  let sent = 0;
  return new Transform({
    async transform(chunk: Buffer, _encoding, done) {
      const start = sent;
      sent += chunk.length;
      if (mode === "cut" && sent >= bytes) {
        this.push(chunk.subarray(0, bytes - start));
        // What was pushed must be on the wire before the connection goes.
        await sleep(50);
        return done(new Error("cut"));
      }
      if (mode === "corrupt" && bytes >= from + start && bytes < from + sent) {
        const at = bytes - from - start;
        chunk[at] = (chunk[at] ?? 0) ^ 0xff;
      }
      if (mode === "slow")
        for (let at = 0; at < chunk.length; at += Math.max(1, bytes / 10)) {
          await sleep(100);
          this.push(chunk.subarray(at, at + Math.max(1, bytes / 10)));
        }
      else this.push(chunk);
      done();
    },
  });
}

async function answer(root: string, fault: Fault, request: IncomingMessage, response: ServerResponse) {
  const path = normalize(decodeURIComponent(new URL(request.url ?? "/", "http://lab").pathname));
  const log = (status: number) =>
    console.log(request.socket.localAddress, request.method, path, request.headers.range ?? "-", status);
  const end = (status: number, headers = {}) => {
    log(status);
    response.writeHead(status, headers).end();
  };
  if (fault.only && !path.endsWith(fault.only)) fault = { mode: "none" };
  if (fault.mode === "hang") return log(0);
  if (fault.mode === "status") return end(fault.bytes ?? 503);

  const file = join(root, path);
  const stat = statSync(file, { throwIfNoEntry: false });
  if (!stat?.isFile()) return end(404);
  const range = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? "");
  const from = Number(range?.[1] ?? 0);
  const to = Math.min(range?.[2] ? Number(range[2]) : stat.size - 1, stat.size - 1);
  if (range && from > to) return end(416, { "content-range": `bytes */${stat.size}` });
  const headers = {
    "accept-ranges": "bytes",
    "content-length": to - from + 1,
    "last-modified": stat.mtime.toUTCString(),
    ...(range ? { "content-range": `bytes ${from}-${to}/${stat.size}` } : {}),
  };
  const status = range ? 206 : 200;
  if (request.method === "HEAD" || stat.size === 0) return end(status, headers);
  log(status);
  response.writeHead(status, headers);
  await pipeline(createReadStream(file, { start: from, end: to }), broken(fault, from), response).catch(() =>
    response.destroy(),
  );
}

function site(root: string, address: string) {
  let fault: Fault = { mode: "none" };
  let server: Server | undefined;
  const listen = async () => {
    server = createServer((request, response) => void answer(root, fault, request, response));
    await new Promise<void>((resolve, reject) => server?.on("error", reject).listen(80, address, resolve));
  };
  const close = async () => {
    server?.close();
    server?.closeAllConnections();
    server = undefined;
  };
  return async (next: Fault) => {
    fault = next;
    // Nothing that began under the old rule goes on under the new one.
    await close();
    if (fault.mode !== "down") await listen();
  };
}

if (process.argv[1] === import.meta.filename) {
  const [folder = "", socket, ...addresses] = process.argv.slice(2);
  const sites = new Map(addresses.map((address) => [address, site(join(folder, address), address)]));
  for (const set of sites.values()) await set({ mode: "none" });
  createServer(async (request, response) => {
    await sites.get(request.url?.slice(1) ?? "")?.((await json(request)) as Fault);
    response.end();
  }).listen(socket);
}
