"""The HTTP server: OpenAI's endpoints, Anthropic's, Ollama's, and a few of llama.cpp's, over one loaded model.

An ASGI application (`app`) whose handlers (`openai`, `responses`, `anthropic`, `ollama`, `tokens`, `status`; listed in
`endpoints`) read a request (`body`, `schema`), start it in the engine and pass its events on (`generation`,
`answers`). `access` decides who may ask, `errors` what a refusal looks like, `limits` how much is read. `address` finds
a place to listen, `running` runs the application in a thread, and `connection` is what a single connection may take.
"""
