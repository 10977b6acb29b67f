"""What reading and changing a model's inside costs beside bare PyTorch hooks, in one process.

    python benchmarks/bench_garcon.py --quick     a small model, few repeats: within 45 s on 2 cores
    python benchmarks/bench_garcon.py             and a model of 12 layers, d 256; doses with the shipped model

Sketch before code: a trace has to tokenize, to build and check a plan, to set one hook a point, and to copy what is read; the hooks and the
copies are the floor's too. So on a tiny model the difference is a constant (the goal: 0.2 ms), and nothing on a larger one. A forward that stops
at its middle layer saves half of the blocks and all of the head. A sweep's copies run through half of the blocks on average, in matrix products
of many rows instead of one. 1,000 traces must leave no hook and no memory.

    read all       every layer's resid_post read, beside hooks that clone                   goal <= 1.0x + 0.2 ms
    patch          one position of every layer's resid_post replaced, and a logit difference, beside hooks     goal <= 1.0x + 0.2 ms
    gradients      of a logit difference at every layer, beside hooks and `autograd.grad`   goal <= 1.05x
    middle layer   the middle layer read, beside a whole forward                            goal <= 0.8x
    sweep          4 layers x 16 positions, and 4 layers x 4 heads, beside a trace a cell   goal >= 10x and 6x
    1,000 traces   growth of resident memory, and hooks that are left                       goal < 1 MB, 0
    8 users        different plans in one forward, beside one after the other: reads and adds, gradients    goal >= 4x each
    dose           7 strengths x 5 arms x 4 prompts x 32 tokens, beside one generation at a time     goal >= 5x
    small trace    over HTTP on this machine, both ends, beside the same trace here         no goal: what a person waits for besides
    64 MB          of an answer over HTTP, both ends, beside a raw socket                   goal <= 2.5x

Eight plans of 16 tokens cost one forward of 8 rows, in which every matrix product has 8 times the rows and few times the cost, and eight times
what a plan costs by itself: its check, its operations, its copies. A dose's 116 texts and their unedited twins are the rows of one batch: 32 forwards
instead of 3,712, each of which costs a small model hardly more. Over HTTP a tensor's bytes are copied once into the kernel and once out of it by
both; uvicorn's protocol joins each piece once more.

Times are of this process's CPU, the median of rounds in which floor and ours alternate. One JSON line a case: `value` is ours in milliseconds
(of the sweeps and the 1,000 traces what their unit says), `ratio_to_floor` ours over the floor's.
"""

import argparse
import gc
import resource
import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from floors import report
from transformers import AutoModelForCausalLM, GPT2Config

from interp_assets import lab
from interp_assets.garcon.backend import Generated, Token
from interp_assets.garcon.features import AttachedSae, Firings
from interp_assets.garcon.local import LocalBackend
from interp_assets.garcon.plan import Add, GeneratePlan, Grad, LogitDiff, Plan, Read, name_tensor
from interp_assets.garcon.remote.batch import ModelThread
from interp_assets.garcon.run import Run, run_plan, run_together
from interp_assets.garcon.session import Model
from interp_assets.garcon.subject import SubjectModel
from interp_assets.train.sae import Sae
from interp_assets.web.connections import make_server
from interp_assets.web.models import Models, Served
from interp_assets.web.server import Desk, make_app

VOCABULARY = 512


class Words:
    """A tokenizer whose every character is a token, and none is special."""

    SPECIAL_TOKENS_ATTRIBUTES = all_special_ids = ()

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Return one id a character."""
        return {"input_ids": [ord(char) % VOCABULARY for char in text]}

    def decode(self, ids: list[int]) -> str:
        """Return the characters."""
        return "".join(map(chr, ids))


def make_model(n_layers: int, d_model: int) -> Model:
    """Build a GPT-2 with random weights, the same each time."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=n_layers, n_head=4, n_embd=d_model, n_positions=128, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    return Model(SubjectModel(AutoModelForCausalLM.from_config(config), f"{n_layers} layers, d {d_model}"), Words())


def compare(floor: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Return the medians of both, in milliseconds of CPU, from alternating rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    for job in (floor, ours):
        job()
    for _ in range(rounds):
        for job, kept in zip((floor, ours), times, strict=True):
            start = time.process_time()
            job()
            kept.append(1e3 * (time.process_time() - start))
    return statistics.median(times[0]), statistics.median(times[1])


class Bare:
    """The same work by hooks of one's own: what somebody who knows PyTorch would write."""

    def __init__(self, llm: Model, text: str) -> None:
        """Take the same model and text."""
        self.net, self.ids = llm.subject.net, torch.tensor(llm.tokenize(text))
        self.blocks = list(self.net.get_submodule("transformer.h").children())

    def with_hooks(self, hook: Callable[..., Any], run: Callable[[], Any]) -> Any:
        """Set one hook a block, run, and remove them."""
        handles = [block.register_forward_hook(hook) for block in self.blocks]
        try:
            return run()
        finally:
            for handle in handles:
                handle.remove()

    def read_all(self) -> list[torch.Tensor]:
        """Clone what leaves every block."""
        kept: list[torch.Tensor] = []
        with torch.no_grad():
            self.with_hooks(lambda _m, _a, out: kept.append(out.clone()), lambda: self.net.base_model(self.ids, use_cache=False))
        return kept

    def patch(self, value: torch.Tensor) -> float:
        """Replace one position after every block and measure."""

        def put(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[:, 3] = value
            return out

        with torch.no_grad():
            logits = self.with_hooks(put, lambda: self.net(self.ids, use_cache=False, logits_to_keep=1).logits)
        return float(logits[0, -1, 5] - logits[0, -1, 9])

    def gradients(self) -> list[torch.Tensor]:
        """Differentiate a logit difference at every block."""
        kept: list[torch.Tensor] = []
        start = self.net.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_())
        logits = self.with_hooks(lambda _m, _a, out: kept.append(out), lambda: self.net(self.ids, use_cache=False, logits_to_keep=1).logits)
        start.remove()
        return list(torch.autograd.grad(logits[0, -1, 5] - logits[0, -1, 9], kept))

    def forward(self) -> torch.Tensor:
        """Run to the end."""
        with torch.no_grad():
            return self.net(self.ids, use_cache=False).logits


def time_traces(llm: Model, text: str, rounds: int) -> list[dict[str, Any]]:
    """Compare single traces with bare hooks."""
    bare, vector = Bare(llm, text), torch.ones(llm.subject.d_model)

    def patch() -> None:
        with llm.trace(text) as t:
            for layer in range(len(bare.blocks)):
                t.patch(f"resid_post.{layer}", vector[None], pos=3)
            t.logit_diff(5, 9)

    def gradients() -> None:
        with llm.trace(text) as t:
            t.grad(t.logit_diff(5, 9), at="resid_post.*")

    middle = f"resid_post.{len(bare.blocks) // 2 - 1}"
    cases: list[tuple[str, Callable[[], Any], Callable[[], Any], str]] = [
        ("read all", bare.read_all, lambda: llm.run(text, read="resid_post.*"), "<= 1.0x + 0.2 ms"),
        ("patch", lambda: bare.patch(vector), patch, "<= 1.0x + 0.2 ms"),
        ("gradients", bare.gradients, gradients, "<= 1.05x"),
        ("middle layer", bare.forward, lambda: llm.run(text, read=middle), "<= 0.8x"),
    ]
    lines = []
    for name, floor, ours, goal in cases:
        base, value = compare(floor, ours, rounds)
        lines.append(
            {
                "name": f"{name}, {llm.subject.name}, {len(text)} tokens",
                "value": value,
                "unit": "ms",
                "extra_ms": value - base,
                "ratio_to_floor": value / base,
                "goal": goal,
            }
        )
    return lines


def time_sweeps(llm: Model, rounds: int) -> list[dict[str, Any]]:
    """Compare sweeps with a trace a cell; `ratio_to_floor` is how many times faster."""
    text, other = "the cat sat on a", "the dog ran to b"
    metric, lines = llm.logit_diff(5, 9), []
    for by, kind, goal in (("position", "resid_post", ">= 10x"), ("head", "z", ">= 6x")):
        names = [f"{kind}.{layer}" for layer in range(4)]
        source = llm.run(other, read=names)
        cells = [(name, i) for name in names for i in range(len(text) if by == "position" else 4)]

        def serial(cells: Any = cells, source: Any = source, by: str = by) -> None:
            for name, i in cells:
                with llm.trace(text) as t:
                    t.patch(name, source[name], **({"pos": i} if by == "position" else {"heads": [i]}))
                    t.measure(metric)

        slow, fast = compare(serial, lambda names=names, source=source, by=by: llm.sweep(names, text, source, metric, by=by), rounds)
        lines.append(
            {
                "name": f"sweep {len(names)} x {len(cells) // len(names)} by {by}, {llm.subject.name}",
                "value": fast,
                "unit": "ms",
                "ratio_to_floor": slow / fast,
                "goal": goal,
            }
        )
    return lines


def count_leaks(llm: Model, n: int) -> dict[str, Any]:
    """Run many traces and return what memory grew by, and the hooks that are left."""

    def once() -> None:
        with llm.trace("a few words") as t:
            t.scale("z.0", 0.5)
            t.grad(t.logit_diff(5, 9), at=["resid_post.*", "pattern.*"])

    for _ in range(100):
        once()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(n):
        once()
    gc.collect()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in llm.subject.net.modules())  # noqa: SLF001 - no other way to count
    return {"name": f"{n:,} traces", "value": grown, "unit": "MB grown", "hooks_left": hooks, "goal": "< 1 MB, 0 hooks"}


def make_users(llm: Model, n: int, *, derived: bool) -> list[tuple[Plan, dict[str, torch.Tensor]]]:
    """Return different plans of `n` people over 16 tokens each."""
    found = []
    for user in range(n):
        vector = torch.randn(llm.subject.d_model, generator=torch.Generator().manual_seed(user))
        name = name_tensor(vector)
        row = tuple((user * 31 + i * 7) % VOCABULARY for i in range(16))
        operations: list[Any] = [Add(point=f"resid_pre.{user % 4}", value=name, pos=user), Read(name="a", point="resid_post.3")]
        if derived:
            operations = [LogitDiff(name="d", token=user, other=9), Grad(name="g", of="d", at=tuple(f"resid_post.{layer}" for layer in range(4)))]
        found.append((Plan(rows=(row,), operations=tuple(operations)), {name.tensor: vector}))
    return found


def time_users(llm: Model, rounds: int) -> list[dict[str, Any]]:
    """Compare one forward of several people's plans with one after the other; `ratio_to_floor` is how many times faster."""
    lines = []
    for what, derived in (("reads and adds", False), ("gradients", True)):
        users = make_users(llm, 8, derived=derived)

        def serial(users: Any = users) -> None:
            for plan, tensors in users:
                run_plan(llm.subject, plan, tensors)

        def together(users: Any = users) -> None:
            run_together([Run(llm.subject, plan, tensors) for plan, tensors in users])

        slow, fast = compare(serial, together, rounds)
        name = f"8 users, {what}, {llm.subject.name}, 16 tokens"
        lines.append({"name": name, "value": fast, "unit": "ms", "ratio_to_floor": slow / fast, "goal": ">= 4x"})
    return lines


class Recorder(LocalBackend):
    """A model that remembers the plans by which it generated."""

    plans: tuple[tuple[GeneratePlan, Any], ...] = ()

    def generate(self, plan: GeneratePlan, tensors: Any, on_token: Callable[[Token], None] | None = None) -> Generated:
        """Generate."""
        self.plans = (*self.plans, (plan, tensors))
        return super().generate(plan, tensors, on_token)


def time_dose(llm: Model) -> dict[str, Any]:
    """Compare a dose sweep, its tables included, with the same texts one after the other; `ratio_to_floor` is how many times faster."""
    d, n = llm.subject.d_model, 256
    W_enc, zeros = torch.randn((d, n), generator=torch.Generator().manual_seed(0)) / d**0.5, torch.zeros(n)
    sae = Sae(kind="relu", W_enc=W_enc, b_enc=zeros, W_dec=W_enc.T.contiguous(), b_dec=torch.zeros(d), threshold=zeros, k=0)
    firings = Firings(torch.ones(n), torch.linspace(0, 1, n), lambda _latent, share: share)
    backend: Any = Recorder(llm.subject, llm.tokenizer, {"sae": AttachedSae(sae, "resid_post.1", firings=firings)})
    ours = Model.over(backend)
    prompts, strengths = ["the cat sat", "a dog ran to it", "some words", "more"], [-10, -2, 0, 1, 2, 5, 10]
    ours.dose([{"sae": "sae", "latent": 7, "clamp": "1 max"}], prompts=prompts, strengths=strengths, new_tokens=2)
    backend.plans = ()
    start = time.process_time()
    dose = ours.dose([{"sae": "sae", "latent": 7, "clamp": "1 max"}], prompts=prompts, strengths=strengths, new_tokens=32)
    dose.table()
    fast = time.process_time() - start
    start, texts = time.process_time(), []
    for plan, tensors in backend.plans:
        for i, row in enumerate(plan.rows):
            edits = [edit for edit in plan.edits if edit.write.rows is not None and i in edit.write.rows]
            own = tuple(edit.model_copy(update={"write": edit.write.model_copy(update={"rows": (0,)})}) for edit in edits)
            texts += LocalBackend.generate(backend, plan.model_copy(update={"rows": (row,), "edits": own}), tensors).texts
    slow = time.process_time() - start
    alike = [[token.token for token in text.tokens] for text in texts]
    same = sum(llm.backend.decode(tokens) == text for tokens, text in zip(alike, dose.texts["text"], strict=True)) / len(texts)
    name = f"dose, {len(texts)} texts of 32 tokens, {llm.subject.name}"
    return {"name": name, "value": 1e3 * fast, "unit": "ms", "ratio_to_floor": slow / fast, "same_texts": same, "goal": ">= 5x"}


class Socket:
    """A raw socket that sends the same bytes whenever it is asked."""

    def __init__(self, content: bytes) -> None:
        """Listen on this machine."""
        self._content = content
        self._listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()
        self._client = socket.create_connection(self._listening.getsockname())

    def _serve(self) -> None:
        there, _ = self._listening.accept()
        while there.recv(1):
            there.sendall(self._content)

    def fetch(self) -> bytearray:
        """Ask, and read into one buffer."""
        body = bytearray(len(self._content))
        self._client.sendall(b"x")
        view, reached = memoryview(body), 0
        while reached < len(body):
            reached += self._client.recv_into(view[reached:])
        return body


def time_http(llm: Model, rounds: int) -> list[dict[str, Any]]:
    """Compare a server on this machine with doing it here, and with a raw socket."""
    served = Served("tiny", llm.backend, ModelThread(llm.subject), {"model": "tiny"})
    models = Models([served])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = make_server(make_app([], desk=Desk(models=models)), "127.0.0.1", port)
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    remote = lab.connect(f"http://127.0.0.1:{port}", "tiny")

    def trace(llm: Model) -> None:
        with llm.trace("the cat sat on a") as t:
            t.scale("resid_post.1", 2.0, pos=3)
            t.read("resid_post.3")
            t.logit_diff(5, 9)

    here, there = compare(lambda: trace(llm), lambda: trace(remote), rounds)
    rows = [[(row + i) % VOCABULARY for i in range(128)] for row in range(32)]

    def read(llm: Model) -> None:
        with llm.trace(rows) as t:  # the forward ends at the embedding; each of its 64 copies has a megabyte
            for _ in range(64):
                t.read("embed")

    raw = Socket(bytes(64 << 20))
    copies, whole = compare(lambda: read(llm), lambda: read(remote), max(3, rounds // 10))
    floor, _ = compare(raw.fetch, raw.fetch, max(3, rounds // 10))
    ours = whole - copies
    server.should_exit = True
    return [
        {"name": "small trace over HTTP", "value": there, "unit": "ms", "extra_ms": there - here, "ratio_to_floor": there / here, "goal": ""},
        {"name": "64 MB over HTTP", "value": ours, "unit": "ms", "ratio_to_floor": ours / floor, "goal": "<= 2.5x"},
    ]


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny model alone, few rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    tiny = make_model(4, 64)
    lines = [
        *time_traces(tiny, "the cat sat on a", 30 if quick else 200),
        *time_sweeps(tiny, 3 if quick else 10),
        count_leaks(tiny, 300 if quick else 1000),
        *time_users(tiny, 10 if quick else 100),
        time_dose(tiny),
        *time_http(tiny, 30 if quick else 200),
    ]
    if not quick:
        lines.append(time_dose(lab.load("builtin:pystdlib_gpt2", device="cpu")))
        lines += time_traces(make_model(12, 256), "the cat sat on a mat " * 3, 30)
    for line in lines:
        report({**line, "ours": True, "ratio_to_best_peer": None})


if __name__ == "__main__":
    main()
