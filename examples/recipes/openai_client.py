"""OpenAI's client: a chat, whole and as a stream, a schema, and the Responses interface."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("HMC_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
asked = [{"role": "user", "content": "Who is the Lord?"}]
model = client.models.list().data[0].id

answer = client.chat.completions.create(model=model, messages=asked, max_tokens=16, temperature=0)
print("chat:", answer.choices[0].message.content)

print("stream:", end=" ")
for chunk in client.chat.completions.create(
    model=model, messages=asked, max_tokens=16, temperature=0, stream=True
):
    print(chunk.choices[0].delta.content or "", end="|")
print()

schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Zion", "Tyre"]}},
    "required": ["city"],
    "additionalProperties": False,
}
held = client.chat.completions.create(
    model=model,
    messages=asked,
    temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
)
print("schema:", held.choices[0].message.content)

response = client.responses.create(
    model=model, input="Who is the Lord?", max_output_tokens=16, temperature=0
)
print("response:", response.output_text)
