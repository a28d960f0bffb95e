"""LangChain: a chain over both interfaces, a structured answer, a tool call."""

import os
from typing import Literal

from langchain_anthropic import ChatAnthropic
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url = os.environ.get("HMC_URL", "http://127.0.0.1:8000")
openai = ChatOpenAI(
    model="tiny", base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=16
)
anthropic = ChatAnthropic(model="tiny", base_url=url, api_key="none", temperature=0, max_tokens=16)
prompt = ChatPromptTemplate.from_template("Who is {who}?")

for name, model in (("openai", openai), ("anthropic", anthropic)):
    print(f"{name}:", (prompt | model).invoke({"who": "the Lord"}).content)

print("stream:", *(piece.text for piece in openai.stream("Who is the Lord?")), sep="|")


class Place(BaseModel):
    """Where."""

    city: Literal["Zion", "Tyre"]


print("structured:", repr(openai.with_structured_output(Place).invoke("Where?")))
