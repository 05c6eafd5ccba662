"""Stream a chat: python examples/stream_chat.py [MODEL]"""

import sys

import gemmart

with gemmart.load(sys.argv[1] if len(sys.argv) > 1 else None) as model:
    chat = model.session()
    while question := input(">>> "):
        for delta in chat.stream(question):
            print(delta.text, end="", flush=True)
        print()
