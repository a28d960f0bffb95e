"""What a model reads of a chat, as a live server encodes it."""

from __future__ import annotations

import httpx

from hmc.serve.bodies import ChatBody


def prompt_of(url: str, chat: ChatBody) -> tuple[str, int]:
    """The text without special tokens, and how many tokens it has."""
    told = chat.model_dump(exclude_unset=True, exclude_none=True)
    names = ("messages", "tools", "chat_template_kwargs", "continue_final_message")
    with httpx.Client(base_url=url, timeout=60) as client:
        body = {name: told[name] for name in names if name in told}
        ids = client.post("/tokenize", json=body).json()["tokens"]
        return client.post("/detokenize", json={"tokens": ids}).json()["prompt"], len(ids)
