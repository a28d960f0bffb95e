"""LiteLLM by OpenAI's interface and by Anthropic's."""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no list of prices is fetched
import litellm

litellm.suppress_debug_info = True
url = os.environ.get("HMC_URL", "http://127.0.0.1:8000")
asked = [{"role": "user", "content": "Who is the Lord?"}]
same = {"messages": asked, "api_key": "none", "max_tokens": 16, "temperature": 0}

answer = litellm.completion(model="hosted_vllm/tiny", api_base=f"{url}/v1", **same)
print("openai:", answer.choices[0].message.content)

answer = litellm.completion(model="anthropic/tiny", api_base=url, **same)
print("anthropic:", answer.choices[0].message.content)

print("stream:", end=" ")
for chunk in litellm.completion(
    model="hosted_vllm/tiny", api_base=f"{url}/v1", stream=True, **same
):
    print(chunk.choices[0].delta.content or "", end="|")
print()
