// An HTTP server on Node.js: answers /CONNECTION/QUESTION if the question is the next one of that connection.
const http = require("http");
const crypto = require("crypto");

const last = new Map();
let garbage = [];

const server = http.createServer((request, response) => {
  const [connection, question] = request.url.slice(1).split("/").map(Number);
  const before = last.get(connection) ?? 0;
  last.set(connection, question);
  garbage.push(Buffer.alloc(10000, question), { connection, question });
  if (garbage.length > 2000) garbage = [];
  if (question !== before + 1) {
    response.writeHead(500);
    response.end(`${question} after ${before}`);
    return;
  }
  // Through the thread pool of libuv.
  crypto.pbkdf2("word", "salt", 10, 16, "sha256", () => {
    const text = `${connection}:${question}:${"x".repeat(question % 1000)}`;
    response.writeHead(200, { "Content-Length": text.length });
    response.end(text);
  });
});
// The default of 5 s would close connections by itself where a slow machine freezes for longer.
server.keepAliveTimeout = 600_000;
server.listen(8000, "0.0.0.0");
