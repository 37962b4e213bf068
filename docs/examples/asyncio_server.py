"""AsyncEngine in a plain asyncio server: a JSON request per line in, a JSON event per line out.

    python docs/examples/asyncio_server.py 8765
    echo '{"prompt": "Tell me about Peru: capital, exports.", "timeout_s": 5}' | nc localhost 8765

A client that hangs up cancels its request; SIGTERM lets the running ones finish.
"""

import asyncio
import contextlib
import dataclasses
import json
import signal
import sys
from functools import partial

import pdiff_runtime as pdiff
from pdiff_runtime.engine import Finished, PlanReady, Text


async def serve(engine, reader, writer):
    def send(**fields):
        writer.write(json.dumps(fields).encode() + b"\n")

    with contextlib.suppress(ConnectionError, asyncio.CancelledError):
        while True:
            try:
                line = await reader.readline()
                if not line:
                    break
                request = json.loads(line)
                params = dataclasses.replace(engine.llm.default_params, **request.get("params", {}))
                events = engine.stream(
                    request["prompt"], params, timeout_s=request.get("timeout_s")
                )
                async with contextlib.aclosing(events):
                    async for event in events:
                        if isinstance(event, PlanReady):
                            send(plan=event.topics)
                        elif isinstance(event, Text):
                            send(text=event.text)
                        elif isinstance(event, Finished):
                            send(done=event.output.finish_reason)
                        await writer.drain()
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
                send(error=f"{type(error).__name__}: {error}")
    writer.close()


async def main(port):
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with pdiff.AsyncEngine(pdiff.LLM()) as engine:
        server = await asyncio.start_server(partial(serve, engine), "127.0.0.1", port)
        print("listening on", server.sockets[0].getsockname()[1], flush=True)
        await stop.wait()
        server.close()
        await engine.drain(timeout_s=10)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
