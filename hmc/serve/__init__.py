"""`hmc serve`: a plan behind an HTTP interface that OpenAI's clients speak.

A request's way: app.py checks key and size, bodies.py the fields, prepare.py makes scheduler
requests of it (grammar.py and tools.py for constrained answers), delivery.py carries updates from
the scheduler's thread to the event loop, answers.py turns them into OpenAI's JSON, sse.py streams
it. service.py owns the engine, its scheduler and the watchdog; server.py the socket and signals.

Needs the extra `hmc[serve]`.
"""
