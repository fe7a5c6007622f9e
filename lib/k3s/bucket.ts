/** Reads objects of an S3 bucket, signed with AWS Signature Version 4. What writes them is curl, on the server. */
import { createHash, createHmac } from "node:crypto";
import { createWriteStream } from "node:fs";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import type { Settings } from "../settings.ts";
import { Failure } from "../step.ts";

const hex = (text: string) => createHash("sha256").update(text).digest("hex");
const mac = (key: string | Buffer, text: string) => createHmac("sha256", key).update(text).digest();

type Access = Pick<Settings, "S3_REGION" | "S3_ACCESS_KEY" | "S3_SECRET_KEY">;

/** The headers of a GET without a body. */
export function signedHeaders(url: URL, access: Access, now = new Date()): Record<string, string> {
  const date = now.toISOString().replace(/[-:]|\.\d+/g, "");
  const nothing = hex("");
  const headers = { host: url.host, "x-amz-content-sha256": nothing, "x-amz-date": date };
  const names = Object.keys(headers).join(";");
  const lines = Object.entries(headers).map(([name, value]) => `${name}:${value}\n`);
  const request = ["GET", url.pathname, "", lines.join(""), names, nothing].join("\n");
  const scope = [date.slice(0, 8), access.S3_REGION, "s3", "aws4_request"];
  const key = scope.reduce<string | Buffer>(mac, `AWS4${access.S3_SECRET_KEY}`);
  const text = ["AWS4-HMAC-SHA256", date, scope.join("/"), hex(request)].join("\n");
  const { host: _, ...sent } = headers;
  return {
    ...sent,
    authorization: `AWS4-HMAC-SHA256 Credential=${access.S3_ACCESS_KEY}/${scope.join("/")}, SignedHeaders=${names}, Signature=${mac(key, text).toString("hex")}`,
  };
}

async function get(folder: string, name: string, access: Access, seconds: number): Promise<Response> {
  const url = new URL(`${folder.replace(/\/+$/, "")}/${name}`);
  try {
    const signal = AbortSignal.timeout(seconds * 1000);
    return await fetch(url, { headers: signedHeaders(url, access), signal, redirect: "error" });
  } catch (error) {
    const { message, cause } = error as Error & { cause?: Error };
    throw new Failure(`${url.host} does not answer: ${cause?.message ?? message}`);
  }
}

/** How much of an answer's text is read. */
const MUCH = 200_000;
async function textOf(answer: Response): Promise<string> {
  const parts: Uint8Array[] = [];
  let size = 0;
  for await (const part of (answer.body ?? []) as AsyncIterable<Uint8Array>) {
    parts.push(part);
    size += part.length;
    if (size > MUCH) break;
  }
  return Buffer.concat(parts).subarray(0, MUCH).toString();
}

/** @throws {Failure} */
async function refused(name: string, answer: Response): Promise<never> {
  const code = /<Code>(\w{1,60})<\/Code>/.exec(await textOf(answer))?.[1];
  throw new Failure(`The bucket refuses ${name}: status ${answer.status}${code ? `, ${code}` : ""}`);
}

/** A small object's text; undefined if it is not there: who may not list a bucket is answered 403 for that. */
export async function textIn(folder: string, name: string, access: Access): Promise<string | undefined> {
  const answer = await get(folder, name, access, 30);
  if (answer.status === 404) return undefined;
  return answer.ok ? await textOf(answer) : refused(name, answer);
}

/** Writes an object to a new file. @throws {Failure} when it is larger than `most` bytes. */
export async function fetchFrom(
  folder: string,
  name: string,
  access: Access,
  file: string,
  most = 64e9,
): Promise<void> {
  const answer = await get(folder, name, access, 3600);
  if (!answer.ok || !answer.body) await refused(name, answer);
  const body = Readable.fromWeb(answer.body as Parameters<typeof Readable.fromWeb>[0]);
  let size = 0;
  const bounded = async function* (parts: AsyncIterable<Uint8Array>) {
    for await (const part of parts) {
      size += part.length;
      if (size > most) throw new Failure(`The bucket sends more than ${most} bytes for ${name}`);
      yield part;
    }
  };
  await pipeline(body, bounded, createWriteStream(file, { mode: 0o600, flags: "wx" }));
}
