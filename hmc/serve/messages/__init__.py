"""Anthropic's Messages interface: body.py its fields, conversation.py the chat that a body stands
for, writer.py answers and events, faults.py errors.
"""
