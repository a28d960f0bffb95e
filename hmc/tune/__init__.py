"""Changes a finished plan: by hand, or by search on this machine. Everything tried ends in the plan
as a decision "by tune" with what was measured.

    settings.py  what can be set, how it is written, and how a plan takes it
    replan.py    schedules emitted anew for another placement or ring
    pins.py      experts put where they are asked for
    measure.py   a plan in memory: greedy output, tokens a second, two plans taking turns
    trials.py    one change after the other, kept only when measured better
"""
