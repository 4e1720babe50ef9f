"""The recipe: every key of a run, as frozen dataclasses. Imports no torch.

The string under each field is its documentation; ``docs/recipe.md`` is made from it. What one section can judge
by itself is checked in its ``__post_init__``; what takes several sections is in :mod:`fire_megatron.config.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fire_megatron.config.errors import RecipeError


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raise with the key relative to its section; the loader puts the section's path in front."""
    if not condition:
        raise RecipeError(f"{key}: {value!r} is not allowed; {rule}")


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    dir: str
    """Folder of the run: resolved recipe, metrics, checkpoints. Made when missing."""
    steps: int
    """Steps to train: rollout, scoring and update once each."""
    name: str = ""
    """Name for people; the folder's name when empty."""
    seed: int = 1234
    """Seed of sampling and of the prompt order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: auto takes a GPU when there is one."""
    collective_timeout: float = 600.0
    """Seconds after which a stalled collective ends the run."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto continues from the last checkpoint in the folder, if any; never refuses a folder that holds a run; must refuses one without a checkpoint."""
    threads: int = 0
    """CPU threads a rank; 0 shares the node's cores among its ranks."""
    plugins: tuple[str, ...] = ()
    """Python modules imported at the start, so that they can register hooks."""

    def __post_init__(self) -> None:
        _require(bool(self.dir), "dir", self.dir, "name a folder")
        _require(self.steps >= 1, "steps", self.steps, "give at least 1")
        _require(self.seed >= 0, "seed", self.seed, "give 0 or more")
        _require(self.collective_timeout > 0, "collective_timeout", self.collective_timeout, "give seconds above 0")
        _require(self.threads >= 0, "threads", self.threads, "give 0 or more")


@dataclass(frozen=True)
class ParallelConfig:
    """A role's parallel layout; data parallelism fills the rest of the world."""

    tensor: int = 1
    """Tensor-parallel size; divides heads, key/value heads and FFN width."""
    pipeline: int = 1
    """Pipeline stages; at most the number of layers, which need not divide."""
    context: int = 1
    """Context-parallel size; only 1 so far."""
    expert: int = 1
    """Expert-parallel size; only 1 so far."""
    sequence: bool | None = None
    """Sequence parallelism; null means on when tensor > 1."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context", "expert"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        for name in ("context", "expert"):
            _require(getattr(self, name) == 1, name, getattr(self, name), "only 1 is supported so far")


@dataclass(frozen=True)
class PrecisionConfig:
    """A role's number formats."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Format of weights and activations; gradients and optimizer state are float32."""


@dataclass(frozen=True)
class RoleConfig:
    """A model with a job."""

    checkpoint: str
    """Converted checkpoint folder (made by tools/convert.py, or a step folder of an earlier run)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallel layout."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats."""
    layer_spec: Literal["auto", "local", "te"] = "auto"
    """Layers: te is Transformer Engine's, local megatron-core's own; auto takes te where it works."""
    vocab_multiple: int = 128
    """The vocabulary is padded to a multiple of this times parallel.tensor; padding never gets probability."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any further field of megatron-core's TransformerConfig, passed through and checked against that class."""

    def __post_init__(self) -> None:
        _require(bool(self.checkpoint), "checkpoint", self.checkpoint, "name a folder")
        _require(self.vocab_multiple >= 1, "vocab_multiple", self.vocab_multiple, "give at least 1")


@dataclass(frozen=True)
class StudentConfig(RoleConfig):
    """The model that samples and is trained."""


@dataclass(frozen=True)
class TeacherConfig(RoleConfig):
    """A frozen model that scores the rows routed to it."""

    labels: tuple[str, ...] = ()
    """Labels of the rows that this teacher scores; empty means its own name."""
    micro_batch_tokens: int = 8192
    """Tokens of a scoring micro-batch; a longer row goes alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.micro_batch_tokens >= 1, "micro_batch_tokens", self.micro_batch_tokens, "give at least 1")


@dataclass(frozen=True)
class SourceConfig:
    """A file of prompts."""

    path: str
    """JSONL (also .gz) or a JSON list."""
    label: str | None = None
    """Label of every row of the file; null reads data.label_key from each row."""
    limit: int = 0
    """Use only the first rows; 0 uses all."""

    def __post_init__(self) -> None:
        _require(bool(self.path), "path", self.path, "name a file")
        _require(self.limit >= 0, "limit", self.limit, "give 0 or more")


@dataclass(frozen=True)
class DataConfig:
    """Prompts to train on."""

    train: tuple[SourceConfig, ...]
    """Files of prompts."""
    prompt_key: str = "problem"
    """Key of a row's prompt text; a dotted path reaches into nested objects."""
    messages_key: str = "messages"
    """Key of a row's chat messages, used where prompt_key is missing."""
    label_key: str = "label"
    """Key of a row's label, such as extra_info.opd_teacher."""
    chat_template: Literal["auto", "on", "off"] = "auto"
    """Wrap prompts in the tokenizer's chat template: auto when it has one."""
    system_prompt: str | None = None
    """System message put in front of prompts that have none; needs the chat template."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens with the template."""
    too_long: Literal["error", "drop"] = "drop"
    """What to do with longer prompts; dropped ones are counted."""
    shuffle: bool = True
    """Shuffle the prompts anew each epoch."""

    def __post_init__(self) -> None:
        _require(bool(self.train), "train", list(self.train), "list at least one file of prompts")
        _require(self.max_prompt_tokens >= 1, "max_prompt_tokens", self.max_prompt_tokens, "give at least 1")


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling from the student."""

    prompts_per_step: int
    """Prompts of a step, over all ranks."""
    max_new_tokens: int
    """Longest response."""
    engine: Literal["megatron"] = "megatron"
    """megatron samples in process with the student's own model."""
    samples_per_prompt: int = 1
    """Responses sampled for each prompt."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass; 1 samples from the full distribution."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a response, besides the tokenizer's end-of-sequence tokens."""
    batch_size: int = 0
    """Rows decoded together on each data-parallel replica; 0 means all."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "max_new_tokens", "samples_per_prompt"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        _require(self.temperature >= 0, "temperature", self.temperature, "give 0 (greedy) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "give a number above 0 and at most 1")
        _require(self.batch_size >= 0, "batch_size", self.batch_size, "give 0 or more")


@dataclass(frozen=True)
class ImportanceConfig:
    """Correction for the difference between the rollout engine's and the trainer's probabilities."""

    mode: Literal["truncate", "mask", "off"] = "truncate"
    """truncate bounds the ratio by high; mask drops tokens outside [low, high]; off does not correct."""
    low: float = 0.0
    """Lower bound of the ratio, used by mask."""
    high: float = 2.0
    """Upper bound of the ratio."""

    def __post_init__(self) -> None:
        _require(self.high > 0, "high", self.high, "give a number above 0")
        _require(0 <= self.low < self.high, "low", self.low, f"give a number from 0 to below high ({self.high})")


@dataclass(frozen=True)
class FilterOptions:
    """Options of the filter hook."""

    percentile: float = 20.0
    """Trajectories scoring below this percentile of their group are dropped."""
    scope: Literal["global", "microbatch"] = "global"
    """Rows the percentile is taken over: the global batch, or (as published) each micro-batch."""
    group_by: Literal["teacher", "batch"] = "teacher"
    """One threshold a teacher, or one for all rows (as published)."""
    drop_truncated: bool = False
    """Also drop trajectories that ran into rollout.max_new_tokens."""

    def __post_init__(self) -> None:
        _require(0 <= self.percentile < 100, "percentile", self.percentile, "give a number from 0 to below 100")


@dataclass(frozen=True)
class ReweightOptions:
    """Options of the reweight hook."""

    alpha: float = 1.0
    """Weight of the teacher's confidence."""
    beta: float = 1.0
    """Weight of the student's confusion."""
    scope: Literal["global", "microbatch"] = "global"
    """Tokens the maxima and the mean are taken over: the global batch, or (as published) each micro-batch."""
    group_by: Literal["teacher", "batch"] = "teacher"
    """Entropy maxima by teacher, or over all rows (as published)."""
    normalise_over: Literal["kept", "all"] = "kept"
    """Tokens whose mean weight is 1: those of kept rows, or (as published) of all rows."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")


@dataclass(frozen=True)
class HookConfig:
    """A loss hook: its name and, beside the name, its options."""

    name: str
    """filter, reweight, or a name registered by a module of run.plugins."""
    options: dict[str, Any] = field(default_factory=dict)
    """The other keys of the mapping."""


BUILT_IN_HOOKS = {"filter": FilterOptions, "reweight": ReweightOptions}


@dataclass(frozen=True)
class LossConfig:
    """The loss and its hooks."""

    estimator: Literal["sampled"] = "sampled"
    """sampled is the clipped policy gradient on the sampled tokens' log-ratio."""
    clip: float = 0.2
    """Clip range of the probability ratio."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    """Rollout/trainer correction."""
    hooks: tuple[HookConfig, ...] = (HookConfig("filter"), HookConfig("reweight"))
    """Loss hooks in order; an empty list is plain on-policy distillation."""

    def __post_init__(self) -> None:
        _require(0 < self.clip < 1, "clip", self.clip, "give a number between 0 and 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-5
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step of linear and cosine."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are exempt."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    micro_batch_size: int = 1
    """Rows of a training micro-batch."""
    mini_batches: int = 1
    """Optimizer updates a step, each on its share of the rollouts."""
    distributed: bool = True
    """Shard optimizer state over data-parallel ranks."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", self.lr, "give a number above 0")
        _require(0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"give a number from 0 to lr ({self.lr})")
        for name in ("warmup_steps", "weight_decay", "clip_grad"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        _require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "give two numbers from 0 to below 1")
        _require(self.eps > 0, "eps", self.eps, "give a number above 0")
        for name in ("micro_batch_size", "mini_batches"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving."""

    every: int = 0
    """Steps between checkpoints; 0 saves only at the end and when asked to stop."""
    dir: str | None = None
    """Folder of the checkpoints; null means checkpoints/ in the run's folder."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted. 0 keeps all."""
    final: bool = True
    """Save after the last step."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")


@dataclass(frozen=True)
class EvaluationConfig:
    """Reverse KL to each teacher on held-out prompts."""

    prompts: tuple[SourceConfig, ...] = ()
    """Files of held-out prompts; empty turns evaluation off."""
    num_prompts: int = 0
    """Prompts used of each label; 0 uses all."""
    max_new_tokens: int = 64
    """Longest response in evaluation."""
    every: int = 0
    """Steps between evaluations; 0 evaluates only at start and end."""
    at_start: bool = True
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""
    seed: int = 7
    """Seed of the evaluation's samples, the same each time."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "every", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "give at least 1")


@dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go."""

    console: bool = True
    """Progress on the console."""
    jsonl: bool = True
    """metrics.jsonl in the run's folder, one object a step."""
    tensorboard: bool = False
    """TensorBoard events in the run's folder; needs the tensorboard package."""


@dataclass(frozen=True)
class Recipe:
    """Everything about a run."""

    run: RunConfig
    """The run as a whole."""
    student: StudentConfig
    """The model that samples and is trained."""
    teachers: dict[str, TeacherConfig]
    """Teachers by name."""
    data: DataConfig
    """Prompts to train on."""
    rollout: RolloutConfig
    """Sampling from the student."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss and its hooks."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Where metrics go."""

    def __post_init__(self) -> None:
        _require(bool(self.teachers), "teachers", self.teachers, "name at least one teacher")
