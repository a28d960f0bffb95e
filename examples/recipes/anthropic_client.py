"""Anthropic's client: a message, whole and as a stream."""

import os

from anthropic import Anthropic

client = Anthropic(base_url=os.environ.get("HMC_URL", "http://127.0.0.1:8000"), api_key="none")
asked = [{"role": "user", "content": "Who is the Lord?"}]
greedy = {"temperature": 0}  # which the newest models of Anthropic's, and so the client, lack

answer = client.messages.create(model="tiny", max_tokens=16, messages=asked, extra_body=greedy)
print("message:", answer.content[0].text)
print("usage:", answer.usage.input_tokens, "in,", answer.usage.output_tokens, "out")

print("stream:", end=" ")
with client.messages.stream(
    model="tiny", max_tokens=16, messages=asked, extra_body=greedy
) as stream:
    for text in stream.text_stream:
        print(text, end="|")
print()
