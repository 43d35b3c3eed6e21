"""A process that runs transformers, alone or as one of torchrun's: `moejax.benchmarks.peers` starts it as a script.

It stands alone, so that torch and XLA never share a process: requests are JSON lines on standard input, answers are
JSON lines on standard output. Under torchrun rank 0 reads and answers, and every rank does the same. The argument is
where it computes: cpu or cuda.
"""

import importlib.metadata
import json
import os
import sys
import time
import traceback

import torch
import transformers

DEVICE = sys.argv[1]


class Peer:
    """One loaded model, and what can be asked of it by the names of its methods."""

    def hello(self) -> dict:
        """Versions and threads."""
        versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
        return versions | {"threads": torch.get_num_threads(), "processes": world_size()}

    def load(self, folder: str, dtype: str) -> dict:
        """Loads a checkpoint and times it; over several processes, each holds its share of the experts alone."""
        options = {}
        if world_size() > 1:
            from transformers.distributed import DistributedConfig

            # Whole experts in each process, heads and the head split over all: as moejax lays ep=N, tp=1 under
            # all_reduce. The plan of experts alone, which its documentation offers, 5.23 refuses.
            options["distributed_config"] = DistributedConfig(tp_plan="auto", ep_size=world_size())
        # Named before the clock starts, since that is when transformers imports the family's code.
        config = transformers.AutoConfig.from_pretrained(folder)
        family = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
        began = time.perf_counter()
        model = family.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True, **options)
        self.model, self.optimizer = model.eval().to(DEVICE), None
        return {"load_s": time.perf_counter() - began}

    def choose(self, experts: str) -> dict:
        """Sets the implementation of the experts."""
        self.model.set_experts_implementation(experts)
        return {}

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict:
        """Greedy continuation with the cache, no end-of-sequence id; only the logits of last tokens are computed.

        A loop over the model's forward, which is what `generate` does less its checks and its bookkeeping.
        """
        tokens = torch.tensor(prompts, device=DEVICE)
        began = time.perf_counter()
        out = self.model(tokens, use_cache=True, logits_to_keep=1)
        new = [out.logits[:, -1].argmax(-1)]
        new[0].tolist()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            out = self.model(new[-1][:, None], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            new.append(out.logits[:, -1].argmax(-1))
        rows = torch.stack(new, 1).tolist()
        return {"first_s": first - began, "later_s": time.perf_counter() - first, "tokens": rows}

    def train_step(self, rows: list[list[int]], dtype: str, learning_rate: float) -> dict:
        """One step of AdamW over f32 weights, forward and backward in `dtype`; the loss before it.

        One optimizer for the model, whatever implementation of the experts a step runs.
        """
        if self.optimizer is None:
            self.model.train()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), learning_rate, weight_decay=1e-4, fused=True)
        tokens = torch.tensor(rows)
        narrow = getattr(torch, dtype)
        began = time.perf_counter()
        with torch.autocast("cpu", narrow, enabled=narrow != torch.float32):
            loss = self.model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"seconds": time.perf_counter() - began, "loss": loss.item()}

    def matmul(self, dtype: str, size: int) -> dict:
        """Seconds of one square product, the best of five; of random numbers, since zeros and ones draw less power."""
        x = torch.randn(size, size, dtype=getattr(torch, dtype), device=DEVICE)
        return {"seconds": best_of_five(lambda: x @ x)}

    def read(self, size: int) -> dict:
        """Seconds to sum up `size` bytes of float32, the best of five."""
        x = torch.ones(size // 4, device=DEVICE)
        return {"seconds": best_of_five(x.sum)}


def best_of_five(function) -> float:
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    function()
    seconds = []
    for _ in range(5):
        wait()
        began = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def main() -> None:
    # Gloo and others print on standard output, which is for answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main_rank = os.environ.get("RANK", "0") == "0"
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if world_size() > 1:
        torch.distributed.init_process_group("gloo")
    peer = Peer()
    while True:
        line = [sys.stdin.readline() if main_rank else ""]
        if world_size() > 1:
            torch.distributed.broadcast_object_list(line)
        if not line[0]:
            break
        name, arguments = json.loads(line[0])
        try:
            answer = getattr(peer, name)(**arguments)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        if main_rank:
            print(json.dumps(answer), file=answers, flush=True)
    if world_size() > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
