"""The standard library's documents -> the small GPT-2 that ships with the project, with its byte-level BPE tokenizer, in Hugging Face layout.

1. `interp_assets.corpus.stdlib` gives the documents; 3 % of them, chosen by a hash of the path, are only ever evaluated on.
2. A byte-level BPE of 4,096 tokens is trained on the rest. Its pre-tokenizer keeps a line end and the indentation after it together (Python's
   structure becomes one token), splits digits singly, and lets leading underscores stay with their word.
3. One epoch: documents in a keyed order, each opened by `<|endoftext|>`, cut into contexts of 256 at a keyed offset, contexts permuted. Context
   `i` is a pure function of (documents, seed, i), so a run stopped at any checkpoint continues as if it had never stopped.
4. Muon moves the matrices of the blocks, AdamW the embeddings, norms and biases. The learning rate warms up, stays, then falls linearly to zero: the
   stable part doesn't know how long the run will be, so the decay can be branched off any checkpoint (same `--out`, other `--steps`).
5. Weights are float32 while training (bfloat16 matmuls were slower on a CPU without tile instructions) and cast to bfloat16 once, on export; the
   held-out loss is measured on both.

The shipped weights are one short run of 11.7 million tokens, whose batch was halved on the way:

    python examples/demo_model/train.py --out build/demo_model --batch-contexts 32 --steps 517 --decay-steps 1
    python examples/demo_model/train.py --out build/demo_model --steps 2350 --decay-steps 750

The defaults see nearly twice as many tokens and want about an hour of two quiet cores. What worked and what did not, with numbers: the model card
beside the weights.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from interp_assets.corpus.stdlib import is_held_out, is_test_source, iter_stdlib_documents

END_OF_TEXT = "<|endoftext|>"
PRE_TOKEN = r"[\r\n]+[ \t]*| ?_*\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+(?![^\s])|[ \t]+|\s+"
LOGIT_ROWS = 512
LOG_EVERY_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the trained weights depend on, besides the interpreter's library and the machine."""

    seed: int = 0
    """Root of the weight and data-order streams."""
    vocab_size: int = 4096
    """Tokens, `<|endoftext|>` included."""
    n_layer: int = 4
    """Transformer blocks."""
    d_model: int = 256
    """Size of the residual stream."""
    n_head: int = 4
    """Attention heads."""
    context_tokens: int = 256
    """Token positions per context."""
    batch_contexts: int = 16
    """Contexts per step."""
    library_copies: int = 2
    """Times a library document occurs in an epoch; a test document occurs once."""
    steps: int = 5000
    """Optimizer steps, decay included."""
    decay_steps: int = 1500
    """Last steps, over which the learning rate falls to zero."""
    lr_matrices: float = 0.008
    """Muon's peak learning rate, in AdamW's scale (`match_rms_adamw`)."""
    lr_rest: float = 0.003
    """AdamW's peak learning rate for embeddings, norms and biases."""


WARMUP_STEPS = 100


class Documents(NamedTuple):
    """Token ids of each document, opened by `<|endoftext|>`, and the size of all texts in UTF-8 bytes."""

    token_ids: list[np.ndarray]
    text_bytes: int


class Score(NamedTuple):
    """Summed next-token loss in nats, over this many tokens, which stand for this many bytes of text."""

    nats: float
    tokens: int
    text_bytes: float


class Progress(NamedTuple):
    """Optimizer steps made and contexts consumed: the batch size may change at any checkpoint."""

    steps: int
    contexts: int


class Checkpoints(NamedTuple):
    """Where the training state is kept, and how often."""

    path: Path
    save_every_s: float


def main() -> None:
    """Train, evaluate and export, from the command line."""
    args = _parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_or_train_tokenizer(args.out / "tokenizer.json", recipe.vocab_size)
    train_library, train_tests = (tokenize(tokenizer, held_out=False, tests=tests) for tests in (False, True))
    library, tests = (tokenize(tokenizer, held_out=True, tests=tests) for tests in (False, True))
    model = make_model(recipe, tokenizer.token_to_id(END_OF_TEXT))
    train(
        model,
        recipe,
        join([train_library] * recipe.library_copies + [train_tests]),
        library,
        Checkpoints(args.out / "checkpoint.pt", args.save_every_s),
    )
    export(model, tokenizer, args.out / "model")
    cast = GPT2LMHeadModel.from_pretrained(args.out / "model", dtype=torch.bfloat16).float()
    report("library, before the cast", evaluate(model, library, recipe))
    scores = [evaluate(cast, documents, recipe) for documents in (library, tests) if documents.token_ids]
    for name, score in zip(("library", "tests"), scores, strict=False):
        report(name, score)
    report("all", merge(scores))


def report(name: str, score: Score) -> None:
    """Print one line about a part of the held-out documents."""
    nats, bits = score.nats / score.tokens, score.nats / score.text_bytes / math.log(2)
    print(f"held-out {name}: {nats:.4f} nats/token, {bits:.4f} bits/byte, {score.tokens} tokens", flush=True)


def load_or_train_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer at `path`, or train it on the documents that are not held out and save it there."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text for source, text in iter_stdlib_documents() if not is_held_out(source)), trainer)
    tokenizer.save(str(path))
    return tokenizer


def tokenize(tokenizer: Tokenizer, *, held_out: bool, tests: bool) -> Documents:
    """Tokenize one side of the split, either of the library itself or of its test packages."""
    texts = [text for source, text in iter_stdlib_documents() if is_held_out(source) == held_out and is_test_source(source) == tests]
    opening = tokenizer.token_to_id(END_OF_TEXT)
    token_ids = [np.array([opening, *encoding.ids], dtype=np.int64) for encoding in tokenizer.encode_batch_fast(texts)]
    return Documents(token_ids, sum(len(text.encode()) for text in texts))


def join(parts: list[Documents]) -> Documents:
    """Put the documents of all parts into one list, in order."""
    return Documents([ids for part in parts for ids in part.token_ids], sum(part.text_bytes for part in parts))


def make_model(recipe: Recipe, end_of_text: int) -> GPT2LMHeadModel:
    """Build the untrained model: GPT-2's architecture without dropout, weights drawn from the recipe's own generator."""
    config = GPT2Config(
        vocab_size=recipe.vocab_size,
        n_positions=recipe.context_tokens,
        activation_function="gelu_pytorch_tanh",
        n_embd=recipe.d_model,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            std = 0.02 / math.sqrt(2 * recipe.n_layer) if name.endswith("c_proj.weight") else 0.02
            nn.init.normal_(weight, std=std, generator=generator)
    return model


def contexts(documents: Documents, recipe: Recipe, *, first: int) -> Iterator[Tensor]:
    """Yield the token ids `[context_tokens + 1]` of each context from the `first` on, one epoch after the other."""
    per_epoch = (sum(map(len, documents.token_ids)) - 1 - recipe.context_tokens) // recipe.context_tokens
    epoch, position = divmod(first, per_epoch)
    while True:
        random = np.random.Generator(np.random.Philox(key=[recipe.seed, epoch]))
        order = random.permutation(len(documents.token_ids))
        stream = np.concatenate([documents.token_ids[i] for i in order])[random.integers(recipe.context_tokens) :]
        for start in (random.permutation(per_epoch) * recipe.context_tokens)[position:]:
            yield torch.from_numpy(stream[start : start + recipe.context_tokens + 1])
        epoch, position = epoch + 1, 0


def lr_share(step: int, recipe: Recipe) -> float:
    """Give the learning rate of a step as a share of its peak: linear rise, constant, linear fall to zero."""
    rise = (step + 1) / WARMUP_STEPS
    fall = (recipe.steps - step) / max(1, recipe.decay_steps)
    return min(1.0, rise, fall)


def make_optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Give the blocks' matrices to Muon and all else to AdamW, whose weight decay spares what is not a matrix."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".h." in name]
    tables = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".h." not in name]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    muon = torch.optim.Muon(matrices, lr=recipe.lr_matrices, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": tables, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return [muon, torch.optim.AdamW(groups, lr=recipe.lr_rest, betas=(0.9, 0.95), fused=True)]


def train(model: GPT2LMHeadModel, recipe: Recipe, documents: Documents, held_out: Documents, checkpoints: Checkpoints) -> None:
    """Train the model in place up to the recipe's last step, going on from the checkpoint if there is one."""
    optimizers = make_optimizers(model, recipe)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    first_step, n_contexts = _load_checkpoint(checkpoints.path, model, optimizers)
    stream = contexts(documents, recipe, first=n_contexts)
    trunk = torch.compile(model.transformer)
    started = saved = time.monotonic()
    losses: list[float] = []
    for step in range(first_step, recipe.steps):
        token_ids = torch.stack(list(islice(stream, recipe.batch_contexts)))
        for optimizer, lrs in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * lr_share(step, recipe)
        loss = training_loss(trunk, model.lm_head.weight, token_ids)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        done, n_contexts = step + 1, n_contexts + recipe.batch_contexts
        if done % LOG_EVERY_STEPS == 0:
            rate = (done - first_step) * token_ids[:, 1:].numel() / (time.monotonic() - started)
            recent = losses[-LOG_EVERY_STEPS:]
            print(f"step {done}  loss {sum(recent) / len(recent):.4f}  lr {lr_share(step, recipe):.3f}  {rate:,.0f} tokens/s", flush=True)
        if done == recipe.steps or time.monotonic() - saved > checkpoints.save_every_s:
            saved = time.monotonic()
            _save_checkpoint(checkpoints.path, model, optimizers, Progress(done, n_contexts))
            score = evaluate(model, held_out, recipe, max_contexts=128)
            report(f"library, at step {done}", score)


def training_loss(trunk: Callable[..., tuple[Tensor, ...]], table: Tensor, token_ids: Tensor) -> Tensor:
    """Mean next-token loss in nats, with the logits taken in chunks."""
    hidden = trunk(token_ids[:, :-1], use_cache=False, return_dict=False)[0]
    return ChunkedCrossEntropy.apply(hidden.flatten(0, 1), table, token_ids[:, 1:].flatten())


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ table.T` that never holds more than one chunk of logits, and takes both gradients while it has them.

    At this size the logits are a quarter of the arithmetic and would be 134 MB, written and read several times a step.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """Sum the loss over chunks of rows; keep the gradients for `backward`."""
        grad_hidden, grad_table = torch.empty_like(hidden), torch.zeros_like(table)
        total = torch.zeros(())
        for start in range(0, len(hidden), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            loss, grad_logits = _loss_and_logit_gradient(hidden[rows] @ table.T, targets[rows], len(hidden))
            total += loss
            torch.mm(grad_logits, table, out=grad_hidden[rows])
            grad_table.addmm_(grad_logits.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_table)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Scale the kept gradients."""
        grad_hidden, grad_table = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_table, None


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, documents: Documents, recipe: Recipe, *, max_contexts: int | None = None) -> Score:
    """Sum the loss over disjoint contexts in document order: a token is predicted from what precedes it in its own context."""
    stream = np.concatenate(documents.token_ids)
    n_contexts = min((len(stream) - 1) // recipe.context_tokens, max_contexts or len(stream))
    starts = np.arange(n_contexts) * recipe.context_tokens
    total = 0.0
    for chosen in np.array_split(starts, math.ceil(n_contexts / recipe.batch_contexts)):
        token_ids = _take(stream, chosen, recipe.context_tokens)
        logits = model(token_ids[:, :-1], use_cache=False).logits.flatten(0, 1)
        total += functional.cross_entropy(logits, token_ids[:, 1:].flatten()).item() * len(chosen)
    tokens = n_contexts * recipe.context_tokens
    return Score(total * recipe.context_tokens, tokens, documents.text_bytes * tokens / len(stream))


def merge(scores: list[Score]) -> Score:
    """Add up the scores of several parts."""
    return Score(*(sum(column) for column in zip(*scores, strict=True)))


def export(model: GPT2LMHeadModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the bfloat16 weights, the configs and the tokenizer in Hugging Face layout."""
    cast = GPT2LMHeadModel(model.config)
    cast.load_state_dict(model.state_dict())
    cast.generation_config.pad_token_id = cast.config.eos_token_id
    cast.to(torch.bfloat16).save_pretrained(folder)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=model.config.n_positions, **special
    )
    wrapped.save_pretrained(folder)


@torch.compile
def _loss_and_logit_gradient(logits: Tensor, targets: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Give a chunk's share of the mean loss and its gradient."""
    log_probs = logits.log_softmax(dim=-1)
    is_target = torch.arange(logits.shape[1])[None] == targets[:, None]
    loss = -log_probs.gather(1, targets[:, None]).sum() / n_rows
    return loss, (log_probs.exp() - is_target.float()) / n_rows


def _take(stream: np.ndarray, starts: np.ndarray, context_tokens: int) -> Tensor:
    """Take one context and the token after it at each start."""
    return torch.from_numpy(stream[starts[:, None] + np.arange(context_tokens + 1)])


def _save_checkpoint(path: Path, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer], progress: Progress) -> None:
    """Write to a temporary file, then rename: a killed run leaves the last whole checkpoint."""
    temporary = path.with_suffix(".tmp")
    state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    torch.save(progress._asdict() | state, temporary)
    temporary.replace(path)


def _load_checkpoint(path: Path, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Restore the state at `path`, if there is one, and return how far it has come."""
    if not path.exists():
        return Progress(0, 0)
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(state["steps"], state["contexts"])


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo subject model on the standard library.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer, the checkpoint (gone on from if there) and the model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument("--save-every-s", type=float, default=240.0, help="seconds between checkpoints")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"part of the recipe (default: {default})")
    return parser.parse_args()


if __name__ == "__main__":
    main()
