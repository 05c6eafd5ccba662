"""Several chats at once: python examples/async_chat.py [MODEL]"""

import asyncio
import sys

import gemmart

QUESTIONS = ("Why is the sky blue?", "What is a llama?", "Who wrote Hamlet?")


async def ask(model: gemmart.Model, question: str) -> None:
    """Ask, and stop after a hundred tokens or twenty seconds."""
    stream = model.aio.stream_chat([{"role": "user", "content": question}], max_tokens=100)
    try:
        async with asyncio.timeout(20), stream:
            async for delta in stream:
                print("." * len(delta.tokens), end="", flush=True)
    except TimeoutError:
        pass
    print(f"\n{question}\n{stream.text}\n")


async def main() -> None:
    ref = sys.argv[1] if len(sys.argv) > 1 else None
    with await asyncio.to_thread(gemmart.load, ref, parallel=len(QUESTIONS)) as model:
        await asyncio.gather(*(ask(model, question) for question in QUESTIONS))


asyncio.run(main())
