"""A few fixed prompts asked at each validation: whether the model has begun to reply in the language it is taught."""

from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from nemo.utils import AppState

from nemo_cpt.compatibility import read_base
from nemo_cpt.errors import CptError
from nemo_cpt.rounding import rounded_up
from nemo_cpt.training.metrics import REPLIES_FILE, append_metrics
from nemo_cpt.training.record import template_of

MULTIPLE = 16  # tokens that sequences are padded to, so that sequence parallelism can cut them


class EvaluateReplies(pl.Callback):
    """Asks fixed prompts at each validation, before the first step too; greedy, so that a step's replies are one thing.

    Logs the share of replies in each language asked in as `replies_in_LANGUAGE` to the loggers and
    `metrics/steps.jsonl`, and the replies to `metrics/replies.jsonl` and the loggers that take text. It draws no random
    number and changes no weight: the run's losses are the same with it and without. Every rank computes the same
    replies, since the ranks of a tensor-parallel group need each other. Without a cache of keys and values, a token
    costs a forward pass of all prompts: meant for a few prompts and short replies. Prompts go through the chat template
    that the run's exports carry, else the tokenizer's own, and are plain text without one.

    Args:
        prompts: `[NAME=]FILE` or the name of a shipped set, as of `nemo-cpt evaluate --prompts`.
        every: validations from one time to the next.
        limit: prompts to ask, the first of the set.
        max_tokens: the most tokens of a reply.
        language: that replies should be in, where the prompts do not say.

    Raises:
        CptError: the run's layout or precision does not allow it, or a prompt does not fit the model's sequence.
    """

    def __init__(
        self, prompts: str = "ja", every: int = 1, limit: int = 8, max_tokens: int = 32,
        language: Optional[str] = None,  # noqa: UP045  NeMo-Run cannot parse `| None`
    ) -> None:  # fmt: skip
        if min(every, limit, max_tokens) < 1:
            raise CptError(f"every {every}, limit {limit} and max_tokens {max_tokens} have to be 1 or more")
        self.prompts, self.every, self.limit, self.max_tokens = prompts, every, limit, max_tokens
        self.language = language
        self._validations = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be done right, before the model is built."""
        strategy, config = trainer.strategy, getattr(pl_module, "config", None)
        for name in ("pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"):
            if getattr(strategy, name, 1) > 1:
                raise CptError(
                    f"EvaluateReplies cannot ask a model with {name} {getattr(strategy, name)}: no rank sees the whole "
                    "of it. Leave the callback away, and evaluate the checkpoints (nemo-cpt evaluate --checkpoints RUN)"
                )
        if getattr(config, "fp8", None):
            raise CptError(
                "EvaluateReplies cannot ask a model in fp8: its scaling factors would learn from the replies. Leave "
                "the callback away, and evaluate the checkpoints (nemo-cpt evaluate --checkpoints RUN)"
            )
        self._asked()  # a file that is not there is known at once

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask, judge and log."""
        self._validations += 1
        if (self._validations - 1) % self.every:
            return
        from nemo_cpt.evaluation.language import language_share

        tokenizer = trainer.datamodule.tokenizer.tokenizer
        # An instruction tuning's tokenizer is its base's, which has another template than the one trained on, or none.
        tuned = template_of(trainer)
        asked, template = self._asked(), tuned["text"] if tuned else tokenizer.chat_template
        prompts = [self._encoded(tokenizer, template, each) for each in asked]
        # Also the base's own ends: an untuned model may stop with either.
        ends = {tokenizer.eos_token_id, *_ends(tokenizer), *([tuned["stop"][1]] if tuned else [])}
        texts = self._replies(pl_module, tokenizer, prompts, ends)
        shares: dict[str, float] = {}
        for language in dict.fromkeys(each.language for each in asked if each.language):
            of_it = [text for each, text in zip(asked, texts, strict=True) if each.language == language]
            # None where no reply tells a language: not logged, rather than logged as 0.
            share = language_share(of_it, language).share
            if share is not None:
                shares[f"replies_in_{language}"] = share
        for name, share in shares.items():
            pl_module.log(name, torch.tensor(share, device=pl_module.device), batch_size=1)
        if trainer.is_global_zero:
            append_metrics(AppState().log_dir, {"step": trainer.global_step, **shares})
            self._keep(trainer, asked, texts)

    def _asked(self) -> list[Any]:
        from nemo_cpt.evaluation.reading import prompt_set

        return list(prompt_set(self.prompts, self.language).prompts[: self.limit])

    def _encoded(self, tokenizer: Any, template: str | None, asked: Any) -> list[int]:
        """The prompt's tokens: through the chat template where there is one, else as text to go on from."""
        if isinstance(asked.prompt, str) and not template:
            return tokenizer(asked.prompt).input_ids
        if not template:
            raise CptError(f"{self.prompts} has messages, and neither the run nor its tokenizer has a chat template")
        turns = [{"role": "user", "content": asked.prompt}] if isinstance(asked.prompt, str) else list(asked.prompt)
        return tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True)

    @torch.no_grad()
    def _replies(self, pl_module: Any, tokenizer: Any, prompts: list[list[int]], ends: set[int]) -> list[str]:
        """Greedy replies of the model as it stands, up to one of the tokens that end them."""
        longest = max(map(len, prompts)) + self.max_tokens
        if longest > pl_module.config.seq_length:
            raise CptError(
                f"the longest prompt and its reply have {longest} tokens, the run's sequences "
                f"{pl_module.config.seq_length}: ask shorter prompts, or for fewer tokens (max_tokens)"
            )
        replies: list[list[int]] = [[] for _ in prompts]
        open_ = list(range(len(prompts)))
        for _ in range(self.max_tokens):
            tokens = self._next_tokens(pl_module, len(tokenizer), [prompts[at] + replies[at] for at in open_])
            for at, token in zip(open_, tokens, strict=True):
                replies[at].append(token)
            open_ = [at for at in open_ if replies[at][-1] not in ends]
            if not open_:
                break
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}  # as an engine's replies
        return [tokenizer.decode(reply, **options) for reply in replies]

    def _next_tokens(self, pl_module: Any, vocabulary: int, rows: list[list[int]]) -> list[int]:
        """The most probable successor of each row. Padding stands on the right, where causal attention never looks."""
        width = rounded_up(max(map(len, rows)), MULTIPLE)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for at, row in enumerate(rows):
            tokens[at, : len(row)] = torch.tensor(row)
        tokens = tokens.to(pl_module.device)
        positions = torch.arange(width, device=tokens.device).expand_as(tokens)
        logits = pl_module(tokens, positions)  # [rows, width, this rank's part of the vocabulary]
        last = logits[range(len(rows)), [len(row) - 1 for row in rows]]
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            # Each rank has a part of the vocabulary: without this, it would take the most probable token of its own
            # part.
            last = gather_from_tensor_model_parallel_region(last)
        return last[:, :vocabulary].argmax(-1).tolist()  # the rows behind are padding with random weights

    def _keep(self, trainer: pl.Trainer, asked: list[Any], texts: list[str]) -> None:
        """Append the replies to their file, and show them in the loggers."""
        lines = [
            {"step": trainer.global_step, "id": each.id, "prompt": each.prompt, "reply": text}
            for each, text in zip(asked, texts, strict=True)
        ]
        for line in lines:
            append_metrics(AppState().log_dir, line, REPLIES_FILE)
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):  # Weights & Biases
                rows = [[line["id"], line["prompt"], line["reply"]] for line in lines]
                logger.log_text("replies", columns=["id", "prompt", "reply"], data=rows, step=trainer.global_step)
            elif hasattr(logger.experiment, "add_text"):  # TensorBoard
                text = "\n\n".join(f"**{line['prompt']}**\n\n{line['reply']}" for line in lines)
                logger.experiment.add_text("replies", text, trainer.global_step)


def _ends(tokenizer: Any) -> frozenset[int]:
    """The ids that end a reply by the model's own files, which lie beside its tokenizer."""
    folder = Path(tokenizer.name_or_path)
    return read_base(folder).ends if folder.is_dir() else frozenset()
