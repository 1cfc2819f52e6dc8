"""An HTTP server on asyncio: answers /CONNECTION/QUESTION if the question is the next one of that connection."""

import asyncio

last = {}


async def serve(reader, writer):
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        connection, question = map(int, head.split(b" ")[1].strip(b"/").split(b"/"))
        status, text = "200 OK", f"{connection}:{question}:" + "x" * (question % 1000)
        if question != last.get(connection, 0) + 1:
            status, text = "500 Wrong", f"{question} after {last.get(connection)}"
        last[connection] = question
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()
        # The loop's own timers, and the thread pool.
        await asyncio.sleep(0.001)
        await asyncio.get_running_loop().run_in_executor(None, sum, range(100))


async def main():
    server = await asyncio.start_server(serve, "0.0.0.0", 8000)
    await server.serve_forever()


asyncio.run(main())
