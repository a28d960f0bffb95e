"""What other servers tell their clients of the model and its slots: /props as llama-server has it,
/server_info as SGLang has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hmc.runtime.tokens.sampler import SamplingParams
from hmc.serve.models import Model
from hmc.serve.service import Service
from hmc.version import VERSION


def props(service: Service) -> dict[str, Any]:
    """The model served; a slot is a request under way. Raises `ApiError` until it is loaded."""
    engine, _ = service.ready()
    text, limits = engine.text, service.plan.limits
    params = SamplingParams.resolve({}, text.generation_config if text else {})
    return {
        "default_generation_settings": {
            "n_ctx": limits.max_context,
            "params": {
                "temperature": params.temperature,
                "top_k": params.top_k,
                "top_p": params.top_p,
                "min_p": params.min_p,
                "repeat_penalty": params.repetition_penalty,
            },
        },
        "total_slots": limits.max_batch,
        "model_alias": service.settings.name,
        "model_path": str(Path(service.settings.checkpoint or service.plan.checkpoint.path)),
        "modalities": {"vision": False, "audio": False},
        "chat_template": text.chat.source if text and text.chat else "",
        "build_info": f"hmc {VERSION}",
    }


def server_info(model: Model) -> dict[str, Any]:
    """A model, loaded or not, by which SGLang's router knows what a server behind it serves."""
    return {
        "served_model_name": model.name,
        "max_running_requests": model.plan.limits.max_batch,
        "version": f"hmc {VERSION}",
    }
