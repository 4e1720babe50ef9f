"""The recipe: one frozen model a section, a docstring under every field. ``docs/recipe.md`` is made from this.

A value out of range raises as the section is built. What takes several sections, or the files that a recipe names,
is checked in :mod:`fire_megatron.config.checks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import field_validator

from fire_megatron.config import kinds
from fire_megatron.config.data import DataConfig, EvaluationConfig
from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.kinds import Count, Fraction, Mass, NonNegative, Positive, Seed, Size, Text
from fire_megatron.config.loss import LossConfig
from fire_megatron.config.section import FilledDict, List, Options, Pair, Plain, Section
from fire_megatron.config.spans import RANKS


class RunConfig(Section):
    """The run as a whole."""

    name: Text
    """Name of the run, for people."""
    dir: Text
    """The run's folder: resolved recipe, metrics, checkpoints. Made when missing; continued when it holds a run."""
    steps: Size
    """Steps to train; a step samples `rollout.prompts_per_step` prompts and learns from the answers."""
    seed: Seed = 1234
    """Seeds the order of prompts and the sampling. The same seed gives the same samples in any layout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA when there is a GPU."""
    collective_timeout: Annotated[float, Gt(0), Le(1e6)] = 600.0
    """Seconds that a rank may wait for others, or show no progress, before the run ends with an error that names it and
    says where each rank is. Sampling may take longer while it makes progress. Loading the largest model must
    take less, since roles with less to load wait for it."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto` continues from the newest whole checkpoint of the run when there is one, `must` fails when there is none,
    `never` fails when the run's folder already holds a run."""
    max_restarts: Count = 3
    """Automatic restarts (by the scripts in `slurm`, by torchrun, by Slurm from its queue) in a row without a new
    checkpoint, also after a stop, after which the run refuses to be restarted. A start by hand counts from 0."""
    threads: Annotated[int, Ge(0), Le(1024)] = 0
    """CPU threads of each rank; 0 shares the machine's cores among its ranks."""
    plugins: List[Text] = ()
    """Python modules imported at the start, so that they can register hooks of their own."""


class ParallelConfig(Section):
    """How one model is laid out over its ranks; data parallelism takes those that are left."""

    tensor: Size = 1
    """Tensor-parallel ranks; divides the model's heads, and is a divisor or a multiple of its key/value heads: ranks
    beyond these share them."""
    pipeline: Size = 1
    """Pipeline stages; at most the model's layers."""
    context: Size = 1
    """Context-parallel ranks, which share each sequence in training and scoring: long answers then take a part of the
    memory on each. In sampling they work on rows of their own."""
    expert: Size = 1
    """Ranks that share out the experts of each layer, for mixture-of-experts models; divides the number of experts,
    and the ranks that are left for `context` and data parallelism."""
    sequence: bool | None = None
    """Sequence parallelism between tensor-parallel ranks; null turns it on when `tensor` is above 1."""


class FP8Config(Section):
    """Matrix products of linear layers in 8-bit floating point. Sampling stays in `precision.dtype`."""

    format: Literal["hybrid", "e4m3"] = "hybrid"
    """`hybrid` is E4M3 for inputs and weights and E5M2 for gradients; `e4m3` is E4M3 for all of them."""
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How values are scaled into the format's range: `delayed` by the largest magnitude of earlier steps (a student's
    alone), `tensorwise` by that of the tensor itself, `blockwise` of 128 values or 128 x 128 (Hopper with CUDA 12.9,
    Blackwell), `mxfp8` of 32 values (Blackwell)."""
    first_last_bf16: Count = 0
    """Layers at each end of the model that stay in `precision.dtype`; not with `delayed`."""
    amax_history: Annotated[int, Ge(1), Le(2**16)] = 1024
    """Passes whose largest magnitudes `delayed` considers: micro-batches on a GPU, updates where emulated."""
    amax_algorithm: Literal["max", "most_recent"] = "max"
    """Which of them `delayed` scales by."""
    margin: Annotated[int, Ge(0), Le(32)] = 0
    """Powers of two that `delayed` leaves free above the largest magnitude."""
    param_gather: bool = False
    """Whether the weights of these layers are themselves FP8: a byte a weight in memory, and on the wire where replicas
    gather what each has updated (megatron-core's fp8_param_gather). With recipe `tensorwise` or `blockwise`; a
    student's needs `optimizer.distributed`."""
    emulate: bool = False
    """Round to FP8 on a CPU, to study and test its effect without a GPU: products are of rounded values and as slow as
    without. Refused on a GPU."""

    def _problems(self) -> Iterator[RecipeProblem]:
        if self.recipe != "delayed":
            keys = ("amax_history", "amax_algorithm", "margin")
            yield from self._idle(keys, f"with recipe {self.recipe}", "take recipe delayed")
        if self.recipe == "delayed" and self.first_last_bf16:
            yield RecipeProblem(
                "first_last_bf16",
                f"{self.first_last_bf16}, but with recipe delayed all layers share one FP8 context; leave it 0, or "
                "take recipe tensorwise",
            )
        if self.emulate and self.param_gather:
            yield RecipeProblem(
                "param_gather", "true, but emulation keeps weights in precision.dtype; leave out one of them"
            )


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["float32", "bfloat16", "bf16"] | None = None
    """Format of weights and activations; logits, log-probabilities and losses are float32 always. null is `bfloat16`
    on a GPU and `float32` on a CPU; `bf16` is `bfloat16`."""
    fp8: FP8Config | None = None
    """Linear layers in FP8; null leaves them in `dtype`. Needs Transformer Engine on a GPU, or `fp8.emulate`."""

    @field_validator("dtype")
    @classmethod
    def _one_name(cls, dtype: str | None) -> str | None:
        """In what is compared and saved."""
        return "bfloat16" if dtype == "bf16" else dtype

    def on(self, kind: str) -> PrecisionConfig:
        """These formats on a device of kind ``cpu`` or ``cuda``: a null dtype is what it stands for there."""
        return self if self.dtype else self.replace(dtype="bfloat16" if kind == "cuda" else "float32")


class RoleConfig(Section):
    """A model with a job."""

    checkpoint: Text
    """Folder of a converted checkpoint; `fire-megatron convert hf-to-megatron --hf DIR --out DIR` makes one."""
    ranks: Annotated[str, RANKS] | None = None
    """Ranks that hold this role, first to last, such as `8-15`; null is all ranks. Roles on the same ranks take turns,
    roles on other ranks run at the same time. The student's start at rank 0."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over these ranks."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    layer_spec: Literal["auto", "local", "te"] = "auto"
    """Implementation of the layers: `te` is Transformer Engine (CUDA only), `local` needs megatron-core alone,
    `auto` takes `te` where it works. Checkpoints fit either."""
    vocab_multiple: Annotated[int, Ge(1), Le(2**16)] = 128
    """The vocabulary is padded to a multiple of this times `parallel.tensor`; the padding is masked everywhere."""
    megatron: Options = {}  # noqa: RUF012 - each section gets its own
    """Fields of megatron-core's TransformerConfig, passed through as they are: [which](#fields-of-megatron). For a
    student with experts these are also the switch of the routers' auxiliary losses, which are off unless set:
    `moe_aux_loss_coeff` and `moe_z_loss_coeff`."""
    megatron_untested: bool = False
    """Whether `megatron` may hold fields that nobody has tried here, or that only a newer release has."""
    offload: bool = False
    """Whether the role leaves its device memory to the others on its ranks while it is idle: a teacher's weights wait
    in (pinned) host memory between scorings, the student's weights, gradients and optimizer state while teachers on its
    ranks score."""


class StudentConfig(RoleConfig):
    """The model that samples and learns."""


class TeacherConfig(RoleConfig):
    """A model that scores the student's answers; its vocabulary is the student's."""

    labels: List[Text] = ()
    """Labels of the prompts that this teacher scores; empty means its own name. A label belongs to one teacher."""
    micro_batch_tokens: Size = 8192
    """Tokens scored in one forward pass; lower it when a teacher runs out of memory."""
    chat_template_kwargs: dict[str, Plain] | None = None
    """Variables of the chat template in the prompts that this teacher is given, in place of `data`'s; null gives it the
    student's."""


class RolloutConfig(Section):
    """How the student samples its answers."""

    engine: Literal["megatron"] = "megatron"
    """What generates: `megatron` is the training model itself, in process, with a key/value cache."""
    prompts_per_step: Annotated[int, Ge(1), Le(2**20)]
    """Prompts a step, over all ranks."""
    samples_per_prompt: kinds.Samples = 1
    """Answers sampled for each prompt."""
    max_new_tokens: Size
    """Longest answer, in tokens; longer ones are cut and counted as truncated."""
    temperature: NonNegative = 1.0
    """Divides the logits before sampling; 0 takes the likeliest token."""
    top_p: Mass = 1.0
    """Sample from the likeliest tokens that together have this probability; 1 samples from all."""
    stop_tokens: List[Text] = ()
    """Tokens that end an answer besides the tokenizer's own and those that generation_config.json names, or config.json
    where that names none. A chat template or a teacher that ends answers with another token is reported."""
    batch_size: Count = 0
    """Rows that a data-parallel replica decodes together; 0 decodes all of its rows at once. Where there are more, each
    row that ends makes room for the next. It bounds the memory for keys and values, and changes a sample by rounding
    alone: the same in float32, while in bfloat16 a near tie may fall otherwise."""
    sync_every: Count = 0
    """Tokens that are sampled before the host looks at them; until then, ended rows continue. It changes samples
    no more than `batch_size` does. 0 picks: 16 on a GPU, which then need not wait for the host, 1 on a CPU."""
    cuda_graphs: bool = True
    """Whether a decode step on a GPU is a CUDA graph; models with experts have none."""
    keep_cache: bool | None = None
    """Whether the memory for keys and values is kept from step to step, and with it the CUDA graphs, which otherwise
    are captured again in each step. null keeps it on a GPU where no role has `offload`."""
    group_size: Count = 0
    """Answers of a data-parallel replica that go to teachers on other ranks together, as soon as they are finished and
    while the rest is being sampled; 0 sends a quarter of them at a time."""

    def _problems(self) -> Iterator[RecipeProblem]:
        if self.temperature == 0:
            yield from self._idle(("top_p",), "at temperature 0, which takes the likeliest token", "raise temperature")


class GuardConfig(Section):
    """Updates that are skipped, so that they spoil neither weights nor optimizer state."""

    max_skipped: Count = 3
    """Updates skipped in a row after which the run ends with an error; 0 ends it at the first. An update whose loss or
    gradient is not finite is always skipped, and nothing is saved until one has been made again. As many steps in a row
    may train no row, or none of a teacher's: its scores are not finite, or hooks drop 8 or more of its rows and keep
    none."""
    spike_factor: NonNegative = 0.0
    """Skip an update whose loss or gradient norm (before clipping) is above the median of the last `spike_window`
    updates by more than so many times their spread (1.4826 median absolute deviations, one standard deviation of a
    normal distribution); 0 never does. 10 is a jump by any standard."""
    spike_window: Annotated[int, Ge(1), Le(2**20)] = 64
    """Updates that are looked back on; nothing is a spike before 16 of them, or as many as this if it is fewer."""

    def _problems(self) -> Iterator[RecipeProblem]:
        if self.spike_factor == 0:
            yield from self._idle(("spike_window",), "with spike_factor 0", "set spike_factor")


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: Positive = 1e-5
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate that `linear` and `cosine` end at."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises to `lr`."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    betas: Pair[Fraction] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator of an update."""
    clip_grad: NonNegative = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    micro_batch_size: Size = 1
    """Answers in one forward and backward pass. It changes memory and speed, not the result (except
    through a hook with `scope: microbatch`)."""
    micro_batch_tokens: Count = 0
    """Tokens of prompts and answers in one forward and backward pass, which then holds as many answers as fit; a longer
    one goes alone. 0 packs `micro_batch_size` answers instead. It changes memory and speed, not the result."""
    mini_batches: Size = 1
    """Optimizer updates made from each step's answers."""
    distributed: bool = True
    """Whether data-parallel replicas share the optimizer's state between them."""
    guard: GuardConfig = GuardConfig()
    """Updates that are skipped."""

    def _problems(self) -> Iterator[RecipeProblem]:
        if self.schedule == "constant":
            yield from self._idle(("min_lr",), "with schedule constant", "use linear or cosine")
        elif self.min_lr > self.lr:
            yield RecipeProblem("min_lr", f"{self.min_lr} is above lr, which is {self.lr}; lower it or raise lr")
        if self.micro_batch_tokens and self.micro_batch_size != 1:
            yield RecipeProblem(
                "micro_batch_size",
                f"{self.micro_batch_size} has no effect, since micro_batch_tokens is {self.micro_batch_tokens}; leave "
                "out one of them",
            )


class CheckpointConfig(Section):
    """When the run is saved."""

    every: Count = 0
    """Save after every so many steps; 0 saves at the end and when the run is stopped."""
    dir: Text | None = None
    """Where to; null is `checkpoints` in the run's folder."""
    keep: Size = 2
    """Newest checkpoints to keep; older ones are deleted."""
    final: bool = True
    """Whether to save after the last step."""
    async_save: bool = False
    """Whether to write while training continues: each rank first copies its share of weights and optimizer state to
    host memory, which takes as much host memory. A step counts as saved when all of it is on the disk."""


class MetricsConfig(Section):
    """Where metrics go."""

    console: bool = True
    """Progress on the terminal."""
    jsonl: bool = True
    """`metrics.jsonl` in the run's folder, one object for each step and each evaluation."""
    tensorboard: bool = False
    """TensorBoard files in `tensorboard` of the run's folder, when the package is installed."""
    trackers: List[Literal["wandb", "mlflow"]] = ()
    """Services that are told besides (docs/metrics.md), by their libraries: `pip install -e ".[trackers]"`."""
    samples: Count = 0
    """Answers of each step written to `samples.jsonl` in the run's folder, up to half of them dropped ones; see
    docs/metrics.md."""
    gpu_interval: Annotated[float, Ge(0), Le(86400)] = 1.0
    """Seconds between samples of each rank's GPU (utilisation, memory, power and so on, by nvidia-ml-py); 0 takes none.
    Without a GPU nothing is sampled."""


class Recipe(Section):
    """Everything that a run needs."""

    run: RunConfig
    """The run as a whole."""
    student: StudentConfig
    """The model that samples and learns."""
    teachers: FilledDict[Annotated[str, kinds.TEACHER_NAME], TeacherConfig]
    """The models that score, by name."""
    data: DataConfig
    """The prompts."""
    rollout: RolloutConfig
    """How the student samples its answers."""
    loss: LossConfig = LossConfig()
    """What is minimised."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Reverse KL to each teacher on fixed held-out prompts, and answers to benchmarks."""
    metrics: MetricsConfig = MetricsConfig()
    """Where metrics go."""
