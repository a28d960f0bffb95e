"""Trains the bundled tiny mixture of experts and writes it to examples/tiny-kjv.

A DeepSeek-V3 of 7.7 million parameters learns the King James Bible from the Debian packages
``bible-kjv`` and ``bible-kjv-text``, on the CPU:

    apt-get install bible-kjv bible-kjv-text
    python examples/train_tiny.py --minutes 30

The router is balanced without an auxiliary loss, as in DeepSeek-V3 (arXiv 2412.19437, section
2.1.2): after each step, the correction bias of an expert that had fewer tokens than the mean rises
by a fixed speed, and that of one that had more falls.
"""

import argparse
import ctypes
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

# Big buffers come and go with every step: huge pages save a tenth of the time or more. torch reads
# this once, when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import tiny_export
import tiny_text
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 24,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "tie_word_embeddings": True,
}
Model: TypeAlias = Any  # DeepseekV3ForCausalLM, whose own annotations strict mypy refuses

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of <malloc.h>
TOKENS_PER_STEP = 4096
SHORT_ROW = 256  # tokens of a row at first; the last part of training sees the whole context
LONG_PART = 0.15
CHAT_SHARE = 0.2
HELD_OUT = 0.025
WARM_UP = 0.02
MUON_RATE = 0.02
MUON_DECAY = 0.1
ADAM_RATE = 3e-3
BALANCE_SPEED = 4e-3
SAMPLES = (
    "In the beginning",
    "And the king said unto",
    "<|user|>Tell me about Moses.<|assistant|>",
)


def build_model() -> Model:
    """Return the untrained model, FP32, with the fast paths for training on a CPU."""
    ALL_ATTENTION_FUNCTIONS.register("padded_values", _padded_attention)
    options = SHAPE | {
        "num_nextn_predict_layers": 0,
        "bos_token_id": tiny_text.BEGIN_ID,
        "eos_token_id": tiny_text.END_ID,
        "attn_implementation": "padded_values",
        "experts_implementation": "grouped_mm",
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**options))


def _padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention over query, key [B, H, L, D] and value [B, H, L, V]; gives [B, L, H, V].

    torch's fused kernel wants V = D, so values are padded with zeros.
    """
    width = value.shape[-1]
    padded = F.pad(value, (0, query.shape[-1] - width))
    out = F.scaled_dot_product_attention(query, key, padded, is_causal=True, scale=scaling)
    return out[..., :width].transpose(1, 2), None


def keep_heap() -> None:
    """Make glibc keep freed buffers: giving them back costs a fifth of the time in page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)


class Balancer:
    """Counts the tokens of each expert and moves the routers' correction biases against them."""

    def __init__(self, model: Model) -> None:
        self._gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        self._loads = [torch.zeros(gate.num_experts) for gate in self._gates]
        for gate, load in zip(self._gates, self._loads, strict=True):
            gate.register_forward_hook(self._counter(load))

    @staticmethod
    def _counter(load: Tensor) -> Callable[[nn.Module, Any, Any], None]:
        def count(module: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if module.training:
                load.add_(torch.bincount(output[2].flatten(), minlength=len(load)))

        return count

    def update(self, speed: float) -> float:
        """Move every bias by ``speed`` and return the worst load as a multiple of the mean."""
        worst = 0.0
        for gate, load in zip(self._gates, self._loads, strict=True):
            gate.e_score_correction_bias += speed * torch.sign(load.mean() - load)
            worst = max(worst, float(load.max() / load.mean()))
            load.zero_()
        return worst


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised: K. Jordan, "Muon: an optimizer for hidden layers".

    torch's own takes single matrices; this one takes stacks of them [..., n, k] too, as experts
    come. See README.md for what it gains here.
    """

    def __init__(self, params: list[nn.Parameter], weight_decay: float) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = _orthogonalised(weight.grad.lerp(momentum, group["momentum"]))
                tall = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * tall)


def _orthogonalised(stack: Tensor) -> Tensor:
    """Return each matrix of [..., n, k] with its singular values near 1 (five Newton-Schulz steps).

    The quintic's coefficients are those of the article named at Muon.
    """
    tall = stack.shape[-2] > stack.shape[-1]
    x: Tensor = (stack.mT if tall else stack).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * (a @ a) - 4.7750 * a) @ x
    result: Tensor = (x.mT if tall else x).to(stack.dtype)
    return result


def make_optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for embeddings, routers and norms."""
    hidden: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        block = ".layers." in name and weight.ndim >= 2 and ".gate.weight" not in name
        (hidden if block else other).append(weight)
    adam = torch.optim.AdamW(other, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizers = [Muon(hidden, MUON_DECAY), adam]
    for optimizer, peak in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
        for group in optimizer.param_groups:
            group["peak"] = peak
    return optimizers


def rate_at(done: float) -> float:
    """Return the learning rate as a fraction of its peak, when ``done`` of 1.0 is done."""
    if done < WARM_UP:
        return done / WARM_UP + 1e-3
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))


def row_loss(model: Model, ids: Tensor, labels: Tensor, half: bool) -> Tensor:
    """Return the mean cross-entropy (nats) of predicting ``labels`` [B, L] one token ahead."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
    loss: Tensor = F.cross_entropy(
        logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=tiny_text.IGNORED
    )
    return loss


@torch.no_grad()
def held_out_loss(model: Model, chapters: list[list[int]], half: bool) -> float:
    """Return the mean loss in nats per token over chapters cut to the context, one at a time."""
    model.eval()
    total, count = 0.0, 0
    for chapter in chapters:
        ids = torch.tensor([chapter[: SHAPE["max_position_embeddings"]]])
        total += float(row_loss(model, ids, ids, half)) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    model.train()
    return total / count


def bytes_per_token(tokenizer: Any, chapters: list[list[int]]) -> float:
    """Return UTF-8 bytes per predicted token (END counts as a token of none)."""
    cut = [chapter[: SHAPE["max_position_embeddings"]] for chapter in chapters]
    size = sum(len(text.encode()) for text in tokenizer.decode_batch(cut))
    return size / sum(len(chapter) - 1 for chapter in cut)


@torch.no_grad()
def sample(model: Model, tokenizer: Any, prompt: str, seed: int = 1) -> str:
    """Return ``prompt`` and up to 120 tokens sampled at temperature 0.8, top-p 0.95."""
    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=120,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        pad_token_id=tiny_text.END_ID,
    )
    return str(tokenizer.decode(out[0].tolist(), skip_special_tokens=False))


def train(options: argparse.Namespace) -> None:
    """Train, report on the way, export, reload what was exported and report on that too."""
    say = print if options.verbose else lambda *_, **__: None
    keep_heap()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    train_chapters, held_chapters = tiny_text.split_chapters(
        tiny_text.read_verses(options.text), HELD_OUT, options.seed
    )
    tokenizer = tiny_text.train_tokenizer(train_chapters, SHAPE["vocab_size"])
    held = tiny_text.held_out_rows(tokenizer, held_chapters)
    width = bytes_per_token(tokenizer, held)
    rows = tiny_text.Rows(tokenizer, train_chapters, CHAT_SHARE, options.seed)
    model = build_model().train()
    balancer = Balancer(model)
    optimizers = make_optimizers(model)
    config = tiny_export.hub_config(SHAPE)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {width:.3f} bytes per token")

    start = exported = time.monotonic()
    step, recent = 0, []
    while True:
        spent = (time.monotonic() - start) / 60
        done = step / options.steps if options.steps else spent / options.minutes
        if done >= 1:
            break
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * rate_at(done)
        length = SHORT_ROW if done < 1 - LONG_PART else SHAPE["max_position_embeddings"]
        ids, labels = (torch.from_numpy(a) for a in rows.batch(TOKENS_PER_STEP // length, length))
        loss = row_loss(model, ids, labels, half=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        worst = balancer.update(BALANCE_SPEED * rate_at(done))
        recent.append(float(loss.detach()))
        step += 1
        if step % 100 == 0:
            speed = step * TOKENS_PER_STEP / (time.monotonic() - start)
            note = f", held out {held_out_loss(model, held, True):.4f}" if step % 400 == 0 else ""
            say(
                f"step {step:5d} {done:6.1%} {spent:5.1f} min {speed:5.0f} tok/s: "
                f"loss {sum(recent) / len(recent):.4f}{note}, busiest expert {worst:.2f}x"
            )
            recent.clear()
        if options.export_every and time.monotonic() - exported > 60 * options.export_every:
            exported = time.monotonic()
            tiny_export.export(options.out, model.state_dict(), config, tokenizer)

    minutes = (time.monotonic() - start) / 60
    print(f"trained {step} steps of {TOKENS_PER_STEP} tokens in {minutes:.1f} min")
    tiny_export.export(options.out, model.state_dict(), config, tokenizer)
    again = tiny_export.reload(options.out)
    for name, which in (("FP32, as trained", model), ("FP8 blocks, reloaded", again)):
        loss_token = held_out_loss(which, held, False)
        bits = loss_token / width / math.log(2)
        print(f"{name}: held-out loss {loss_token:.4f} nats per token, {bits:.4f} bits per byte")
    again.eval()
    for prompt in SAMPLES:
        print(f"\n{sample(again, tokenizer, prompt)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train the bundled tiny mixture of experts (DeepSeek-V3, FP8 blocks) on the "
        "King James Bible of the Debian packages bible-kjv and bible-kjv-text."
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=30.0, help="train this long (30)")
    length.add_argument("--steps", type=int, help="train this many steps instead")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "tiny-kjv", help="checkpoint to write"
    )
    parser.add_argument("--text", type=Path, help="file of lines 'Ge1:1 In the beginning ...'")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights, rows and samples (1)")
    parser.add_argument("--export-every", type=float, help="write --out every so many minutes too")
    parser.add_argument("--quiet", dest="verbose", action="store_false", help="no progress lines")
    options = parser.parse_args()
    try:
        train(options)
    except tiny_text.TextError as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
