/**
 * An S3 server with one bucket, as strict about signatures as Amazon's: AWS Signature Version 4, with the hash of the
 * payload, every x-amz header signed, the clock within 15 minutes, and the names of bucket, key and region right.
 *
 *     bucket.ts FOLDER ADDRESS PORT
 *
 * FOLDER has key.pem and certificate.pem, and spec.json: what it is at each request.
 */
import { createHash, createHmac, timingSafeEqual } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import type { IncomingMessage, ServerResponse } from "node:http";
import { createServer } from "node:https";
import { dirname, join } from "node:path";
import { buffer } from "node:stream/consumers";

export interface Spec {
  bucket: string;
  /** The host of which BUCKET.HOST is a virtual host. */
  host: string;
  region: string;
  id: string;
  secret: string;
  /** How many bytes it takes; what may not be done. */
  room?: number;
  forbidden?: string[];
}

const hex = (data: string | Buffer) => createHash("sha256").update(data).digest("hex");
const mac = (key: string | Buffer, text: string) => createHmac("sha256", key).update(text).digest();
type Refusal = [status: number, code: string];

/** Why a request is refused; undefined for a good one. */
export function wrongIn(
  spec: Spec,
  request: { method: string; url: string; headers: Record<string, string | undefined>; body: Buffer },
  now: number,
): Refusal | undefined {
  const { method, headers, body } = request;
  const url = new URL(request.url, "https://x");
  const form =
    /^AWS4-HMAC-SHA256 Credential=([^/]+)\/(\d{8})\/([^/]+)\/([^/]+)\/aws4_request, ?SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})$/;
  if (!headers.authorization) return [403, "AccessDenied"];
  const [, id, day = "", region = "", service = "", names = "", signature = ""] =
    form.exec(headers.authorization) ?? [];
  if (!id || service !== "s3" || region !== spec.region) return [400, "AuthorizationHeaderMalformed"];
  if (id !== spec.id) return [403, "InvalidAccessKeyId"];
  const date = headers["x-amz-date"] ?? "";
  const [, y, mo, d, h, mi, s] = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z$/.exec(date) ?? [];
  if (!y || !date.startsWith(day)) return [403, "AccessDenied"];
  if (Math.abs(Date.parse(`${y}-${mo}-${d}T${h}:${mi}:${s}Z`) - now) > 900_000)
    return [403, "RequestTimeTooSkewed"];
  const hash = headers["x-amz-content-sha256"];
  if (!hash) return [400, "MissingSecurityHeader"];
  const signed = names.split(";");
  const due = ["host", ...Object.keys(headers).filter((name) => name.startsWith("x-amz-"))];
  if (due.some((name) => !signed.includes(name)) || signed.join() !== [...signed].sort().join())
    return [403, "AccessDenied"];
  const lines = signed.map((name) => `${name}:${(headers[name] ?? "").trim().replace(/ +/g, " ")}\n`);
  const query = [...url.searchParams]
    .map((pair) => pair.map(encodeURIComponent).join("="))
    .sort()
    .join("&");
  const canonical = [method, url.pathname, query, lines.join(""), names, hash].join("\n");
  const scope = [day, region, service, "aws4_request"];
  const key = scope.reduce<string | Buffer>(mac, `AWS4${spec.secret}`);
  const own = mac(key, ["AWS4-HMAC-SHA256", date, scope.join("/"), hex(canonical)].join("\n"));
  if (!timingSafeEqual(own, Buffer.from(signature, "hex"))) return [403, "SignatureDoesNotMatch"];
  if (hash !== "UNSIGNED-PAYLOAD" && hash !== hex(body)) return [400, "XAmzContentSHA256Mismatch"];
  if (method === "PUT" && headers["content-length"] === undefined) return [411, "MissingContentLength"];
  return undefined;
}

/** The key of an object, by a path or by a virtual host; a refusal for another bucket. */
export function keyIn(spec: Spec, host: string, path: string): string | Refusal {
  const name = host.replace(/:\d+$/, "");
  const [bucket, key] =
    name === spec.host
      ? [path.split("/")[1], path.split("/").slice(2).join("/")]
      : [name.endsWith(`.${spec.host}`) ? name.slice(0, -spec.host.length - 1) : "", path.slice(1)];
  if (bucket !== spec.bucket) return [404, "NoSuchBucket"];
  return key ? decodeURIComponent(key) : [405, "MethodNotAllowed"];
}

async function answer(folder: string, request: IncomingMessage, response: ServerResponse) {
  const spec = JSON.parse(readFileSync(join(folder, "spec.json"), "utf8")) as Spec;
  const { method = "", url = "" } = request;
  const headers = request.headers as Record<string, string | undefined>;
  const end = (status: number, body: string | Buffer = "") => {
    console.log(method, url, status);
    response
      .writeHead(status, { "content-length": Buffer.byteLength(body) })
      .end(method === "HEAD" ? "" : body);
  };
  const refuse = ([status, code]: Refusal) =>
    end(
      status,
      `<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>${code}</Code><Message>no</Message></Error>`,
    );
  const body = await buffer(request);
  const wrong = wrongIn(spec, { method, url, headers, body }, Date.now());
  if (wrong) return refuse(wrong);
  const key = keyIn(spec, headers.host ?? "", new URL(url, "https://x").pathname);
  if (typeof key !== "string") return refuse(key);
  const file = join(folder, "objects", key);
  if (spec.forbidden?.includes(method)) return refuse([403, "AccessDenied"]);
  if (method === "PUT") {
    if (spec.room !== undefined && body.length > spec.room) return refuse([403, "QuotaExceeded"]);
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, body);
    return end(200);
  }
  if (method === "DELETE") {
    rmSync(file, { force: true });
    return end(204);
  }
  if (method !== "GET" && method !== "HEAD") return refuse([405, "MethodNotAllowed"]);
  return existsSync(file) ? end(200, readFileSync(file)) : refuse([404, "NoSuchKey"]);
}

if (process.argv[1] === import.meta.filename) {
  const [folder = "", address, port] = process.argv.slice(2);
  const [key, cert] = ["key.pem", "certificate.pem"].map((name) => readFileSync(join(folder, name)));
  createServer({ ...(key && cert ? { key, cert } : {}) }, (request, response) => {
    answer(folder, request, response).catch(() => response.destroy());
  }).listen(Number(port), address);
}
