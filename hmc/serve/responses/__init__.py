"""OpenAI's Responses interface, of which nothing is kept between requests: body.py its fields,
conversation.py the chat that a body stands for, items.py what answers consist of, writer.py answers
and events.
"""
