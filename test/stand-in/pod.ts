/** The process in a pod, `pod.ts NODE`: it tells its node's name over HTTP, and names of services as CoreDNS does. */
import { createSocket } from "node:dgram";
import { createServer } from "node:http";
import { createServer as createTcp } from "node:net";
import { ADDRESSES, HTTP } from "./services.ts";

const NO_ERROR = 0;
const SERVER_FAILURE = 2;
const NO_NAME = 3;

/** Of names outside the cluster it knows as much as its node's resolver, which a box of the lab has none of. */
export function dnsAnswer(question: Buffer): Buffer {
  const labels: string[] = [];
  let at = 12;
  for (let size = question.readUInt8(at); size; size = question.readUInt8(at)) {
    labels.push(question.toString("latin1", at + 1, at + 1 + size).toLowerCase());
    at += 1 + size;
  }
  const type = question.readUInt16BE(at + 1);
  const [, service] = /^(.+)\.svc\.cluster\.local$/.exec(labels.join(".")) ?? [];
  const ip = ADDRESSES[service as keyof typeof ADDRESSES];
  const code = ip ? NO_ERROR : /(^|\.)cluster\.local$/.test(labels.join(".")) ? NO_NAME : SERVER_FAILURE;
  const answers = ip && type === 1 ? 1 : 0;
  const header = Buffer.from(question.subarray(0, 12));
  header.writeUInt16BE(0x8480 | (header.readUInt16BE(2) & 0x0100) | code, 2);
  for (const [i, count] of [1, answers, 0, 0].entries()) header.writeUInt16BE(count, 4 + 2 * i);
  const record = Buffer.from([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, ...(ip ?? "").split(".").map(Number)]);
  return Buffer.concat([header, question.subarray(12, at + 5), ...(answers ? [record] : [])]);
}

if (process.argv[1]?.endsWith("/pod.ts")) {
  createServer((_, response) => response.end(`${process.argv[2]}\n`)).listen(HTTP);
  const socket = createSocket("udp4", (question, { address, port }) =>
    socket.send(dnsAnswer(question), port, address),
  ).bind(53);
  createTcp((connection) => {
    connection.on("error", () => {});
    connection.on("data", (data: Buffer) => {
      const answer = dnsAnswer(data.subarray(2));
      const size = Buffer.alloc(2);
      size.writeUInt16BE(answer.length);
      connection.write(Buffer.concat([size, answer]));
    });
  }).listen(53);
}
