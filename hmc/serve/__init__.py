"""`hmc serve`: plans behind an HTTP interface that OpenAI's and Anthropic's clients speak.

A request's way: app.py checks key and size, bodies.py the fields (by the rules of fields.py),
models.py finds the model, which opening.py waits for and holds while the request is answered,
messages/ and responses/ make chats of the bodies of two more interfaces, prepare.py makes scheduler
requests of it (conversation.py the prompt of a chat, grammar.py with schemas.py and tools.py
constrained answers), delivery.py carries updates from the scheduler's thread to the event loop,
generate.py tells thoughts (reasoning.py), text and calls apart, a writer (writing.py) for each
interface turns them into its JSON (chunks.py with answers.py, messages/ and responses/ with
parts.py), sse.py streams it. generations.py is the routes that do so. service.py owns a plan's
engine, its scheduler and the watchdog; room.py knows whether there is memory for one more,
progress.py tells of loading; server.py has the socket and signals;
page/ is what a browser gets.

Needs the extra `hmc[serve]`.
"""
