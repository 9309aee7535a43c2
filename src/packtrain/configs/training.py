"""train_config: the model, the batches, how long, how fast, and where results go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DatasetName = Literal[
    "samsum_dataset",
    "grammar_dataset",
    "alpaca_dataset",
    "custom_dataset",
    "llamaguard_toxicchat_dataset",
    "synthetic_dataset",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The run itself."""

    model_name: str | None = None
    """The model to fine-tune: a Hugging Face folder, or a hub id."""

    tokenizer_name: str | None = None
    """A tokenizer's folder or hub id, where it is not the model's."""

    random_init: str | None = None
    """Instead of model_name: a config.json (or its folder) whose model starts from random weights."""

    enable_fsdp: bool = False
    """Shard over all workers. More than one worker always does, with or without this flag."""

    low_cpu_fsdp: bool = False
    """Load without a whole model in host memory. Loading always does: each worker reads its shard only."""

    nproc_per_node: int = 0
    """Workers that `packtrain train` starts on this machine; 0 means one a GPU, or one without a GPU."""

    run_validation: bool = True
    """Evaluate at the end of every epoch."""

    eval_steps: int = 0
    """Evaluate every so many optimizer steps too; 0 means at the ends of epochs only."""

    eval_first: bool = False
    """Evaluate before the first step too, as step 0."""

    batch_size_training: int = 4
    """Rows (packed: packs) of one micro-batch of one worker."""

    val_batch_size: int = 1
    """Rows (packed: packs) of one evaluation batch of one worker."""

    batching_strategy: Literal["packing", "padding"] = "packing"
    """Packing puts several samples into one row, each isolated; padding gives each a row of its own."""

    context_length: int = 4096
    """Tokens of a pack, and the longest sample; longer ones are cut and counted."""

    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimizer step."""

    gradient_clipping: bool = False
    """Clip the gradient's norm."""

    gradient_clipping_threshold: float = 1.0
    """The norm that gradient_clipping allows."""

    num_epochs: int = 3
    """Passes over the data."""

    max_train_step: int = 0
    """Stop after so many optimizer steps; 0 means no limit."""

    max_eval_step: int = 0
    """Evaluate at most so many batches a worker; 0 means all."""

    num_workers_dataloader: int = 1
    """0 makes batches within the step; anything else makes them ahead, in the background."""

    lr: float = 1e-4
    """The learning rate, at its highest."""

    weight_decay: float = 0.0
    """AdamW's weight decay, on every trained tensor."""

    lr_scheduler: Literal["gamma", "constant", "linear", "cosine"] = "gamma"
    """How lr goes on: times gamma after each epoch, or constant, linear or cosine by step."""

    gamma: float = 0.85
    """What lr is multiplied with after each epoch, with lr_scheduler gamma."""

    warmup_steps: int = 0
    """Optimizer steps over which lr rises from 0."""

    seed: int = 42
    """Decides the order of the data, new weights and dropout."""

    use_fp16: bool = False
    """Compute in fp16 with gradient scaling."""

    mixed_precision: bool = True
    """Compute in bf16 on GPUs; False computes in fp32 everywhere."""

    dataset: DatasetName = "samsum_dataset"
    """What to train on; its own settings are in the section of that name."""

    on_bad_rows: Literal["error", "skip"] = "error"
    """Stop at rows that cannot be trained on, or go on without them and list them in run/skipped.jsonl."""

    use_peft: bool = False
    """Train an adapter; without it every weight is trained."""

    peft_method: Literal["lora", "llama_adapter", "prefix"] | None = "lora"
    """Which adapter use_peft trains."""

    from_peft_checkpoint: str = ""
    """Go on from a saved adapter: a folder or a hub id; its own adapter_config.json holds."""

    freeze_layers: bool = False
    """Full fine-tuning that leaves the first layers as they are."""

    num_freeze_layers: int = 1
    """How many layers freeze_layers leaves."""

    freeze_LLM_only: bool = False  # noqa: N815
    """Of vision models: train all but the language layers. packtrain has no vision models."""

    quantization: Literal["4bit", "8bit", "fp8"] | None = None
    """Hold the frozen base in fewer bits, under an adapter; alone it means 8bit."""

    one_gpu: bool = False
    """Use one GPU. The number of workers decides that."""

    attention: Literal["auto", "sdpa", "flash", "flex", "eager"] = "auto"
    """Which attention kernel; auto takes the fastest that the hardware has."""

    use_fast_kernels: bool = False
    """Use the fastest attention for the hardware, which attention auto does anyway."""

    activation_checkpointing: Literal["auto", "none", "selective", "full", "offload"] = "auto"
    """What a backward computes again: nothing, all but attention, layers; offload: with their inputs on the host."""

    gpu_memory_limit: float = 0.0
    """GiB of a GPU's memory that a worker may take, where others use the GPU too; 0 means what is free."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient that is no number: end, go on without that update, or go back and on without its rows."""

    on_spike: Literal["ignore", "warn", "stop", "skip", "rollback"] = "warn"
    """The same for a loss or gradient norm far above those of the last steps; warn only says so."""

    max_skipped_steps: int = 20
    """Steps that skip and rollback may treat in a run; one more, or a sixth in a row, ends it."""

    rollback_steps: int = 50
    """With rollback, keep a good state in host memory every so many steps."""

    on_oom: Literal["stop", "split"] = "stop"
    """Out of memory: end and say what would fit, or split micro-batches and take the step again (not if sharded)."""

    verify_steps: int = 2
    """Steps that `packtrain verify` takes before it stops a run, and after it goes on."""

    deterministic: bool = False
    """Only kernels that give the same bits every time."""

    output_dir: str | None = None
    """Where results go; without it the dist_checkpoint folders if given, else ./packtrain-out."""

    overwrite_output_dir: bool = False
    """Start afresh in a folder that already holds a run."""

    save_model: bool = True
    """Save the model, and a checkpoint of the run, at every evaluation and at the end."""

    save_steps: int = 0
    """Save a checkpoint, which the run can go on from, every so many optimizer steps; 0 means at every evaluation."""

    save_minutes: float = 0.0
    """Save one every so many minutes too; with save_steps or save_minutes an evaluation alone saves none."""

    keep_checkpoints: int = 1
    """How many of the newest checkpoints stay, besides that of the best evaluation; 0 means all."""

    allow_change: tuple[str, ...] = ()
    """Go on with a run although these settings, or its train_data, validation_data or weights, are others now."""

    save_optimizer: bool = False
    """Keep the optimizer's state in the last checkpoint too; those before it always have it, to go on from."""

    dist_checkpoint_root_folder: str | None = None
    """Full fine-tuning's results go to ROOT/FOLDER-MODEL: this is ROOT."""

    dist_checkpoint_folder: str = "fine-tuned"
    """And this is FOLDER."""

    grace_seconds: float = 30.0
    """How long a signal leaves to write a checkpoint; then, or at a second signal, what has not ended is killed."""

    max_restarts: int = 0
    """How often workers that die or hang are replaced, the run going on from its newest checkpoint."""

    hang_timeout: float = 600.0
    """Seconds for which a worker may stand still before that counts as a failure; 0 means for ever."""

    use_wandb: bool = False
    """Send metrics to Weights & Biases."""

    save_metrics: bool = False
    """Write llama-recipes' metrics file too."""

    flop_counter: bool = False
    """Count the floating-point operations of a step, and say how fast they are done."""

    flop_counter_start: int = 3
    """Steps before the one that flop_counter counts; the next one is timed."""

    use_profiler: bool = False
    """Record steps 4 to 6: a trace, the heaviest operators, on CUDA the memory."""

    profiler_dir: str | None = None
    """Where use_profiler writes; without it OUTPUT_DIR/run/profile."""
