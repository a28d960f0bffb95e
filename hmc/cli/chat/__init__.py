"""`hmc run --chat`: a conversation at a terminal, or line by line through pipes.

loop.py      turn by turn until the end; Ctrl-C
messages.py  what a person says: one line, or several
terminal.py  a line with editing and history; history.py its file
session.py   what has been said, what of it fits the context, one answer
commands.py  what begins with a slash
settings.py  how answers are drawn, by `/set`
screen.py    where text, thoughts and notes go
"""
