"""What the commands can be told, as plain values; the defaults are those of the command line."""

from dataclasses import dataclass, field

from chunkft.cli.bench import BenchSettings

__all__ = ["Command", "DoctorSettings", "FinetuneSettings", "PlanSettings", "ProfileSettings"]


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Everything that `chunkft finetune` can be told; the defaults are those of the command line."""

    model: str | None = None
    data: str | None = None
    task: str = "causal-lm"
    chunks: int = 16
    interval: int | None = None
    partition: str = "bytes"
    schedule: str = "cyclic"
    slice_dim: int = 0
    always_active: str = "auto"
    residency: str = "chunk"
    update: str = "step"
    page_mib: int = 64
    weights: str = "resident"
    update_on: str = "auto"
    resident_blocks: int = 0
    weights_dir: str | None = None
    offload_inputs: bool = False
    state_dir: str | None = None
    state_bits: int = 32
    optimizer: str = "chunkadamw"
    lr: float = 1e-4
    lr_schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 8
    grad_accum: int = 1
    seq_len: int = 512
    resize_embeddings: bool = False
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    eval_data: str | None = None
    eval_every: int | None = None
    save_every: int = 500
    text_column: str | None = None
    label_column: str | None = None
    out: str | None = None
    quiet: bool = False
    fsdp: bool = False
    dist_timeout: int = 600
    processes: int = 1  # not an option: those that torchrun started

    @property
    def clip_norm(self) -> float:
        """Largest norm of the active gradients; 0 for no limit."""
        if self.max_grad_norm is None:
            return 0.0 if self.update == "backward" else 1.0
        return self.max_grad_norm


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Everything that `chunkft plan` can be told."""

    model: str
    task: str = "causal-lm"
    chunks: int = 16
    partition: str = "bytes"
    slice_dim: int = 0
    always_active: str = "none"
    save: str | None = None
    gpu: str | None = None
    ram: str | None = None
    disk: str | None = None
    tokens: int = 1024
    batch: int = 1
    link: float = 25.0
    tflops: float = 100.0
    world: int = 1
    dtype: str = "bf16"
    json: str | None = None


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """Everything that `chunkft doctor` can be told."""

    dir: str | None = None
    mib: int = 256
    json: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """Everything that `chunkft profile` can be told; `training` holds what it shares with `chunkft finetune`."""

    training: FinetuneSettings = FinetuneSettings()
    steps: int = 3
    warmup: int = 1
    out: str | None = None
    nsight: bool = False


@dataclass(frozen=True, kw_only=True)
class Command:
    """A parsed command line; `given` holds the names of the options that were typed."""

    name: str
    finetune: FinetuneSettings = FinetuneSettings()
    plan: PlanSettings | None = None
    profile: ProfileSettings = ProfileSettings()
    doctor: DoctorSettings = DoctorSettings()
    bench: BenchSettings = field(default_factory=BenchSettings)
    given: frozenset[str] = frozenset()
    resume: bool = False
