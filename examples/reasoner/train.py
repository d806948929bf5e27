"""Trains the reasoner that ships with hf_sirius: a small Llama that solves word problems step by step.

    export MALLOC_MMAP_THRESHOLD_=10000000000 MALLOC_TRIM_THRESHOLD_=10000000000    # doubles the speed on glibc
    python examples/reasoner/train.py --output_dir runs/reasoner
    python examples/reasoner/train.py --output_dir runs/reasoner --num_steps 4000 --neuron_dropout 0.3
    python examples/reasoner/export.py runs/reasoner        # writes hf_sirius/reasoner/
    python examples/reasoner/train.py --output_dir runs/longer --init_from hf_sirius/reasoner/model --short_steps 0 \
        --max_equations 36 --num_steps 1500 --batch_size 24 --learning_rate 1e-3 --warmup_steps 100 --neuron_dropout 0.3

It checkpoints every `--save_every` steps and goes on from the last checkpoint when started again: the second command
adds steps with dropout on the MLPs' neurons, at the end of the schedule (the weights that ship had a larger
--learning_rate there, see their card). Without them a model of this size is so brittle that half of its neurons, chosen
by GRIFFIN, draft 13.5 tokens of 16 instead of 15. The third goes on from saved weights to longer problems, since a
model that has seen 10 equations at most solves no 12.
"""

import argparse
import itertools
import logging
import math
import os
import time
from pathlib import Path

import torch
from problems import problems, vocabulary
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


logger = logging.getLogger("train")

# The prompt is the one of lm-evaluation-harness' GSM8K task, one turn after another.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token }}Question: {{ message['content'] }}\nAnswer:"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lossless word-level tokenizer: a token is a word, one digit or a mark, with or without the blank before it."""
    pieces = vocabulary()
    tokens = ["<pad>", "<s>", "</s>", "<unk>"] + pieces + [f" {piece}" for piece in pieces if piece != "\n"] + [" "]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?[0-9]| ?#+| ?[^\sA-Za-z0-9#]|\s"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, padding_side="left",
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=768, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=False,
        initializer_range=0.04, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encode(tokenizer, problem: dict) -> tuple[list[int], list[int]]:
    """Returns (ids, labels) of one problem: the loss is on the answer and the end of text alone."""
    prompt = tokenizer(f"Question: {problem['question']}\nAnswer:")["input_ids"]
    answer = tokenizer(f" {problem['answer']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


def batches(tokenizer, batch_size: int, seed: int, min_steps: int, max_steps: int):
    """Yields batches of nearly equal lengths: (input_ids, labels), long [batch_size, length], right-padded.

    One sample in eight is two turns in a row, so that the reasoner can be used in a chat.
    """
    source = problems("train", seed, min_steps, max_steps)
    short = problems("train", seed + 1, 1, 4)
    rng = torch.Generator().manual_seed(seed)
    while True:
        pool = []
        for problem in itertools.islice(source, batch_size * 16):
            ids, labels = encode(tokenizer, problem)
            if torch.rand((), generator=rng) < 1 / 8:
                first_ids, first_labels = encode(tokenizer, next(short))
                ids, labels = first_ids + ids, first_labels + labels
            pool.append((ids, labels))
        pool.sort(key=lambda sample: len(sample[0]))
        for start in torch.randperm(16, generator=rng).tolist():
            chunk = pool[start * batch_size : (start + 1) * batch_size]
            length = max(len(ids) for ids, _ in chunk)
            input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in chunk])
            yield input_ids, torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in chunk])


@torch.no_grad()
def accuracy(model, tokenizer, num_problems: int, min_steps: int = 6, max_steps: int = 10) -> float:
    """Greedy accuracy on training-split problems of a seed that training does not use (the test split stays unseen)."""
    model.eval()
    asked = list(itertools.islice(problems("train", 10**6, min_steps, max_steps), num_problems))
    prompts = [f"Question: {problem['question']}\nAnswer:" for problem in asked]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=180, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return sum(t.strip() == p["answer"] for t, p in zip(texts, asked, strict=True)) / num_problems


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then a cosine down to 2%."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.num_steps - args.warmup_steps)
    return args.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def parser_of(description: str, **defaults) -> argparse.ArgumentParser:
    """Returns a parser with the options of `training`, and those of the problems, given their defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    for name, default in {"save_every": 50, "seed": 0, **defaults}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser


def answer_loss(model, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the loss of the answers; the head reads their tokens alone."""
    # Right padding needs no mask: no real token looks at it, and its labels are ignored.
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[targets != -100]), targets[targets != -100])


def go_on(model, optimizer, output_dir: Path) -> int:
    """Loads the last checkpoint, if there is one; returns how many steps were made before it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    if not (checkpoint := output_dir / "checkpoint.pt").exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("going on from step %d", state["step"])
    return state["step"]


def save(path: Path, **state) -> None:
    """Writes a checkpoint whole or not at all."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def training(model, optimizer, samples, args, first_step: int, loss_of=answer_loss):
    """Trains on one batch after the other, and writes checkpoints; yields the number of steps so far after each.

    Args:
        samples: yields (input_ids, labels), long [batch_size, length].
        args: `num_steps`, `learning_rate`, `warmup_steps`, `save_every` and `output_dir`.
        first_step: what `go_on` returned.
        loss_of: of (model, input_ids, labels).
    """
    started, losses, num_tokens = time.perf_counter(), [], 0
    for step, (input_ids, labels) in zip(range(first_step, args.num_steps), samples, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss = loss_of(model, input_ids, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        num_tokens += input_ids.numel()
        num_steps, is_last = step + 1, step + 1 == args.num_steps
        if num_steps % 50 == 0 or is_last:
            speed = num_tokens / (time.perf_counter() - started)
            logger.info("step %d loss %.4f tokens/s %.0f", num_steps, sum(losses) / len(losses), speed)
            losses = []
        if num_steps % args.save_every == 0 or is_last:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": num_steps}
            save(args.output_dir / "checkpoint.pt", **state)
        yield num_steps


def main():
    parser = parser_of(
        __doc__, num_steps=3400, neuron_dropout=0.0, batch_size=40, learning_rate=1.5e-3, warmup_steps=200,
        save_every=250, num_eval_problems=100,
    )  # fmt: skip
    parser.add_argument(
        "--short_steps", type=int, default=900, help="steps at the start on problems of 1 to 4 equations"
    )
    parser.add_argument("--max_equations", type=int, default=10, help="of a problem after those steps")
    parser.add_argument("--init_from", help="a saved model to begin with, in place of random weights")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(args.init_from) if args.init_from else build_model(tokenizer)
    logger.info("%d parameters, %d tokens in the vocabulary", model.num_parameters(), len(tokenizer))
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, neurons: torch.nn.functional.dropout(neurons[0], args.neuron_dropout, module.training)
        )
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    first_step = go_on(model, optimizer, args.output_dir)
    short = batches(tokenizer, args.batch_size, args.seed + 1000 + first_step, 1, 4)
    long = batches(tokenizer, args.batch_size, args.seed + 5000 + first_step, 4, args.max_equations)
    samples = itertools.chain(itertools.islice(short, max(0, args.short_steps - first_step)), long)
    for num_steps in training(model, optimizer, samples, args, first_step):
        if num_steps % 1000 == 0 or num_steps == args.num_steps:
            right = accuracy(model, tokenizer, args.num_eval_problems)
            logger.info(
                "step %d accuracy (%d problems of 6 to 10 steps) %.3f", num_steps, args.num_eval_problems, right
            )


if __name__ == "__main__":
    main()
