"""The training loop: stages of packed batches, resumable at any step to the bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.models.attention import PackedAttention
from pdiff_runtime.models.decoder import Attend, Decoder, init_weights
from pdiff_runtime.models.safetensors_folder import write_tensors
from pdiff_runtime.plan import ControlTokens
from pdiff_runtime.train.data import (
    DocumentEncoder,
    EncodedDocument,
    PackedBatch,
    PackedDataset,
    TaggedDocument,
)
from pdiff_runtime.train.loss import KIND_SPAN, weights_from_targets
from pdiff_runtime.train.noise import time_from_uniform
from pdiff_runtime.train.recipe import Recipe, Stage
from pdiff_runtime.train.targets import IGNORE

Log = Callable[[dict[str, float | int | str]], None]


@dataclasses.dataclass
class Progress:
    """Where a run stands: all that is needed beside weights and moments to go on."""

    stage_idx: int = 0
    step: int = 0
    num_tokens: int = 0


class Trainer:
    """Trains one decoder through the stages of a recipe.

    Args:
        recipe: What to do.
        documents: The tagged training documents.
        encoder: Turns them into token ids.
        out_dir: Where checkpoints and ``log.jsonl`` go; a checkpoint there is resumed.
        log: Called with every log record.
        device: Where model and moments are. Documents and noise are drawn on the CPU, so they are
            the same on every device.
    """

    def __init__(
        self,
        recipe: Recipe,
        documents: list[TaggedDocument],
        encoder: DocumentEncoder,
        out_dir: Path,
        log: Log = lambda record: None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.recipe, self.encoder, self.out_dir, self.log = recipe, encoder, out_dir, log
        self.tags: ControlTokens = encoder.tags
        self.documents = documents
        self._digest = _digest(documents)
        with torch.device("cpu"):
            self.model = Decoder(recipe.model)
        init_weights(self.model, recipe.seed)
        self.model.to(self.device)
        self.forward = torch.compile(self.model, dynamic=True) if recipe.compile else self.model
        self.progress = Progress()
        self._new_optimizer()
        if self.checkpoint.is_file():
            self._load()

    @property
    def checkpoint(self) -> Path:
        """Weights, moments and progress."""
        return self.out_dir / "checkpoint.safetensors"

    @property
    def log_file(self) -> Path:
        """A record a line."""
        return self.out_dir / "log.jsonl"

    def train(
        self, max_steps: int | None = None, *, is_stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Run to the end of the last stage, or for ``max_steps`` optimiser steps.

        Args:
            max_steps: None for as many as there are.
            is_stopped: Asked before each step whether to save and return.

        Raises:
            ValueError: A malformed document, or one that is longer than the model's positions.
            FloatingPointError: The loss is not finite; nothing is saved over the last checkpoint.
        """
        self.out_dir.mkdir(parents=True, exist_ok=True)
        steps_left = math.inf if max_steps is None else max_steps
        started = time.perf_counter()
        while self.progress.stage_idx < len(self.recipe.stages):
            stage = self.recipe.stages[self.progress.stage_idx]
            dataset = self._dataset(stage)
            for batch in self._batches(dataset, stage):
                if steps_left <= 0 or is_stopped():
                    self.save()
                    return
                record = self._step(batch, stage)
                steps_left -= 1
                if self.progress.step % self.recipe.log_every == 0:
                    record["seconds"] = round(time.perf_counter() - started, 1)
                    self._write_log(record)
                if self.progress.step % self.recipe.save_every == 0:
                    self.save()
            self.progress = Progress(self.progress.stage_idx + 1)
            self._new_optimizer()
            self.save()

    def _dataset(self, stage: Stage) -> PackedDataset:
        """Every document once, in a format drawn with the stage's shares."""
        names, shares = zip(*sorted(stage.formats.items()), strict=True)
        rng = np.random.default_rng([self.recipe.seed, self.progress.stage_idx])
        draws = rng.choice(len(names), len(self.documents), p=np.array(shares) / sum(shares))
        encoded = [self._encoded(idx, names[draw]) for idx, draw in enumerate(draws)]
        return PackedDataset(encoded, self.tags, isolate_spans=self.recipe.isolate_spans)

    def _encoded(self, document_idx: int, form: str) -> EncodedDocument:
        try:
            encoded = self.encoder(self.documents[document_idx], form)
        except ValueError as error:
            raise ValueError(f"document {document_idx + 1}: {error}") from error
        if len(encoded.token_ids) > self.recipe.model.max_position:
            raise ValueError(
                f"document {document_idx + 1}: expected at most "
                f"max_position={self.recipe.model.max_position} tokens, "
                f"got {len(encoded.token_ids)}"
            )
        return encoded

    def _batches(self, dataset: PackedDataset, stage: Stage) -> Iterator[PackedBatch]:
        """Batches from the current step to the end of the stage."""
        step, epoch = 0, 0
        while True:
            for indices in dataset.epoch(self.recipe.seed, epoch, stage.batch_tokens):
                if self.progress.num_tokens >= stage.num_tokens:
                    return
                if step >= self.progress.step:
                    yield dataset.batch(indices)
                step += 1
            epoch += 1

    def _step(self, batch: PackedBatch, stage: Stage) -> dict[str, float | int | str]:
        recipe, progress = self.recipe, self.progress
        generator = torch.Generator().manual_seed(
            (recipe.seed * 1009 + progress.stage_idx) * 10_000_019 + progress.step
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(stage, progress)
        t = stratified_times(len(batch.layouts), generator)
        t = torch.repeat_interleave(t, batch.cu_seqlens.diff())
        u = torch.rand(batch.token_ids.shape, generator=generator, device="cpu")
        noised = torch.where(batch.is_content & (u < t), self.tags.mask, batch.token_ids)
        weights = weights_from_targets(batch.labels, batch.is_span, noised, self.tags.mask, t=t)
        rows = (weights.labels != IGNORE).nonzero()[:, 0]
        labels, weight, kind = weights.labels[rows], weights.weight[rows], weights.kind[rows]

        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.autocast):
            hidden = self.forward(self._here(noised), self._attend(batch))
            logits = self.model.logits(hidden[self._here(rows)])
        result = ops.weighted_cross_entropy(
            logits, self._here(labels), self._here(weight), self._here(kind),
            normaliser=weights.normaliser, inplace_backward=True,
        )  # fmt: skip
        if not torch.isfinite(result.loss):
            raise FloatingPointError(f"loss is {result.loss.item()} at step {progress.step}")
        result.loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
        self.optimizer.step()
        progress.step += 1
        progress.num_tokens += len(batch.token_ids)
        means = result.unweighted_sums / result.counts.clamp(min=1)
        return {
            "stage": stage.name,
            "step": progress.step,
            "tokens": progress.num_tokens,
            "loss": result.loss.item(),
            "loss_ar": means[0].item(),
            "loss_span": means[KIND_SPAN].item(),
            "grad_norm": grad_norm.item(),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def _attend(self, batch: PackedBatch) -> Attend:
        config = self.recipe.model
        plan = ops.AttentionPlan.pack(
            batch.layouts, num_heads_q=config.num_heads_q, num_heads_kv=config.num_heads_kv,
            head_dim=config.head_dim, device=self.device,
        )  # fmt: skip
        positions = self._here(batch.positions)
        return PackedAttention(plan, self.model.cos, self.model.sin, positions)

    def _here(self, tensor: Tensor) -> Tensor:
        """The tensor on the trainer's device."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # so that the copy is not waited for
        return tensor.to(self.device, non_blocking=True)

    def _new_optimizer(self) -> None:
        decayed = [p for p in self.model.parameters() if p.ndim == 2]
        plain = [p for p in self.model.parameters() if p.ndim != 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.recipe.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            betas=self.recipe.betas,
            fused=True,
        )

    def save(self) -> None:
        """Write weights, moments and progress as one file, replaced whole."""
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        metadata = {
            "progress": json.dumps(dataclasses.asdict(self.progress)),
            "documents": self._digest,
            "log_bytes": str(self._log_bytes()),
        }
        write_tensors(self.checkpoint, {k: v.detach() for k, v in tensors.items()}, metadata)

    def _load(self) -> None:
        try:
            with safetensors.safe_open(self.checkpoint, framework="pt") as file:
                metadata = file.metadata()
                self.progress = Progress(**json.loads(metadata["progress"]))
                num_logged = int(metadata.get("log_bytes", self._log_bytes()))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._take(tensors)
        except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"checkpoint: {self.checkpoint} is damaged, or not of this recipe's model ({error})"
            ) from error
        if metadata.get("documents") not in (None, self._digest):
            raise ValueError(
                f"checkpoint: {self.checkpoint} is of other documents; the data have changed since"
            )
        if self._log_bytes() > num_logged:  # the run was killed, and those steps come again
            os.truncate(self.log_file, num_logged)

    @torch.no_grad()
    def _take(self, tensors: dict[str, Tensor]) -> None:
        """Weights and, unless the stage begins, moments."""

        def of_shape(name: str, shape: torch.Size) -> Tensor:
            if (tensor := tensors[name]).shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
            return tensor.to(self.device)

        has_moments = any(name.startswith("optimizer.") for name in tensors)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(of_shape(f"model.{name}", parameter.shape))
            if has_moments:
                self.optimizer.state[parameter] = {
                    "step": of_shape(f"optimizer.step.{name}", torch.Size()),
                    "exp_avg": of_shape(f"optimizer.exp_avg.{name}", parameter.shape),
                    "exp_avg_sq": of_shape(f"optimizer.exp_avg_sq.{name}", parameter.shape),
                }

    def _log_bytes(self) -> int:
        return self.log_file.stat().st_size if self.log_file.exists() else 0

    def _write_log(self, record: dict[str, float | int | str]) -> None:
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.log(record)


def _digest(documents: list[TaggedDocument]) -> str:
    """Equal for equal documents in the same order."""
    text = json.dumps([dataclasses.astuple(document) for document in documents])
    return hashlib.sha256(text.encode()).hexdigest()


def learning_rate(stage: Stage, progress: Progress) -> float:
    """Linear warm-up in steps, then a cosine over the stage's tokens."""
    warmup = min(1.0, (progress.step + 1) / max(1, stage.warmup_steps))
    done = min(1.0, progress.num_tokens / stage.num_tokens)
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    span = stage.learning_rate - stage.final_learning_rate
    return warmup * (stage.final_learning_rate + span * cosine)


def stratified_times(num_documents: int, generator: torch.Generator) -> Tensor:
    """Noise levels ``[num_documents]``, one from each of as many equal slices, in random order.

    The weight 1 / t has a heavy tail; slices keep its mean steady from batch to batch.
    """
    jitter = torch.rand(num_documents, generator=generator, device="cpu")
    slices = torch.randperm(num_documents, generator=generator, device="cpu")
    return time_from_uniform((slices + jitter) / num_documents)
