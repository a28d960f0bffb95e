"""Predicts what a plan will do on its machine: time to the first token, tokens a second, what each
resource does meanwhile, and whether goals are met.

The plan's own steps run over its resources (`hmc.predict.timeline`) with the durations of the cost
model (`hmc.predict.cost`); nothing here knows a schedule, a model or a machine by name.
"""
