"""What a run writes down while it trains: `metrics.jsonl`, one greppable line, a progress bar, TensorBoard, W&B.

Nothing here reduces over ranks: the trainer hands finished numbers to the one rank that owns the `RunLog`.

Nothing here ends a run: what cannot be written is said once of each kind, and lines of the .jsonl files are tried
again.

Files in the run directory:

    metrics.jsonl            one strict JSON object an iteration, iterations rising from 1 (completed steps)
    validation.jsonl         the same for validation
    skipped.jsonl            one for each iteration that was not applied (`resilience/skipped.py`)
    curves.png               drawn from both when the log is closed
    *.previous.jsonl         what an earlier run left here, when a run starts from iteration 0 in the same directory

A number that is NaN or infinite (the gradient norm of a skipped step) is written as null: it stays strict JSON, and a
column stays numeric. A field that has no meaning in a run (the teacher's with LaVer off) should be None, also null.
"""

import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from laver_megatron.config.checks import missing_packages
from laver_megatron.run_log.records import JsonLines, drop_after, json_line, truncate_after
from laver_megatron.run_log.tolerance import tolerating

REQUIRED_FIELDS = (
    "iteration", "loss", "lm_loss", "mim_loss", "gram_loss", "grad_norm", "learning_rate", "mask_ratio",
    "num_masked_tokens", "ema_momentum", "visual_token_share", "tokens_per_second", "visual_tokens_per_second",
    "images_per_second", "tflops_per_gpu",
    "mfu", "hfu", "mfu_full_square",  # shares of the peak (`utilisation.py`), None where it is not known
    "peak_memory_bytes", "consumed_samples", "consumed_packs",
    "skipped_iterations",  # since the start of training, not since the last line
    "elapsed_seconds",  # of the step alone: no save, no validation, no logging
    "student_visual_similarity", "teacher_visual_similarity", "teacher_entropy",
)  # fmt: skip

# (name in the line, field, format). Fields that are None or missing leave the line.
LINE_FIELDS = (
    ("learning rate", "learning_rate", ".6E"),
    ("encoder's", "learning_rate_encoder", ".6E"),  # where parts have rates of their own
    ("connector's", "learning_rate_connector", ".6E"),
    ("embedding's and LM head's", "learning_rate_decoupled", ".6E"),
    ("global batch size", "global_batch_size", "5d"),
    ("lm loss", "lm_loss", ".6E"),
    ("mim loss", "mim_loss", ".6E"),
    ("gram loss", "gram_loss", ".6E"),
    ("loss", "loss", ".6E"),
    ("mask ratio", "mask_ratio", ".4f"),
    ("masked tokens", "num_masked_tokens", "6d"),
    ("ema momentum", "ema_momentum", ".6f"),
    ("grad norm", "grad_norm", ".3f"),
    ("tokens/s", "tokens_per_second", ".1f"),
    ("visual tokens/s", "visual_tokens_per_second", ".1f"),
    ("images/s", "images_per_second", ".2f"),
    ("TFLOP/s/GPU", "tflops_per_gpu", ".3f"),
    ("MFU", "mfu", ".1%"),
    ("HFU", "hfu", ".1%"),
    ("peak memory (MiB)", "peak_memory_bytes", ".1f"),
    ("number of skipped iterations", "skipped_iterations", "3d"),
)
BAR_FIELDS = (("lm", "lm_loss"), ("mim", "mim_loss"), ("gram", "gram_loss"))


class RunLog:
    """The run's log, for the one rank that writes it.

    Args:
        run_dir: made if it is not there.
        train_iters: the run's last iteration.
        log_interval: print a line every so many iterations, and at the last one; metrics.jsonl gets every one.
        tensorboard: also write event files to `run_dir/tensorboard`.
        wandb_project: also send to this Weights & Biases project; a resumed run keeps its id.
        resume_iteration: the completed iterations of the checkpoint that is resumed. Lines after it, left by a crash
            after the last checkpoint, are dropped, so that no iteration is there twice.
        config_dict: the resolved configuration, passed on to TensorBoard and W&B; its `global_batch_size` is printed.
        progress_bar: None shows one if standard error is a terminal.

    Raises:
        ValueError: TensorBoard or W&B is asked for and not installed; nothing has been written then.
    """

    def __init__(
        self,
        run_dir: Path,
        train_iters: int,
        log_interval: int,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        resume_iteration: int = 0,
        config_dict: dict[str, Any] | None = None,
        progress_bar: bool | None = None,
    ) -> None:
        errors = missing_packages(tensorboard, wandb_project)
        if errors:
            raise ValueError("; ".join(errors))
        self.run_dir = Path(run_dir)
        self.train_iters = train_iters
        self.log_interval = log_interval
        self.last_iteration = resume_iteration
        self.config_dict = dict(config_dict or {})
        self.metrics_path = self.run_dir / "metrics.jsonl"
        self.validation_path = self.run_dir / "validation.jsonl"
        self.skipped_path = self.run_dir / "skipped.jsonl"
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._files: dict[Path, JsonLines] = {}
        for path in (self.metrics_path, self.validation_path, self.skipped_path):
            self._drop_after(path, resume_iteration)
            self._files[path] = JsonLines(path)
        with tolerating(self.metrics_path.name, self.metrics_path, "its lines are kept in memory and tried again"):
            self._files[self.metrics_path].flush()  # there from the start
        self._last_skipped = resume_iteration
        self._tensorboard = self._wandb = None
        if tensorboard:
            with tolerating("TensorBoard", self.run_dir / "tensorboard", "there will be no events"):
                self._tensorboard = self._open_tensorboard(resume_iteration)
        if wandb_project:
            with tolerating("W&B", self.run_dir / "wandb", "there will be no W&B run"):
                self._wandb = self._open_wandb(wandb_project)
        show = sys.stderr.isatty() if progress_bar is None else progress_bar
        self._bar = tqdm(total=train_iters, initial=resume_iteration, unit="it", disable=not show)
        self._since_line: list[float] = []  # seconds of the iterations after the last line
        self._closed = False

    def log(self, record: dict[str, Any]) -> None:
        """Write down one training iteration. Numbers may be Python's or zero-dimensional tensors; the line shows this
        iteration's values, except the elapsed time, which is the mean of the steps since the line before."""
        missing = [name for name in REQUIRED_FIELDS if name not in record]
        assert not missing, f"the record lacks {missing}"
        record = {name: _plain(value) for name, value in record.items()}
        iteration = record["iteration"]
        assert iteration > self.last_iteration, f"iteration {iteration} after {self.last_iteration}"
        self.last_iteration = iteration
        self._append(self.metrics_path, record)
        self._send(iteration, record, prefix="train")
        self._since_line.append(record["elapsed_seconds"])
        losses = {name: f"{record[field]:.4f}" for name, field in BAR_FIELDS if record[field] is not None}
        self._bar.set_postfix(losses, refresh=False)
        self._bar.update(iteration - self._bar.n)
        if iteration % self.log_interval == 0 or iteration == self.train_iters:
            self._print_line(record)

    def log_validation(self, iteration: int, record: dict[str, Any]) -> None:
        """Write down a validation after this many training iterations; `record` holds at least `lm_loss`."""
        assert "lm_loss" in record, f"the validation record holds {sorted(record)} and no lm_loss"
        record = {"iteration": iteration} | {name: _plain(value) for name, value in record.items()}
        self._append(self.validation_path, record)
        self._send(iteration, record, prefix="validation")
        numbers = [(name, value) for name, value in record.items() if name != "iteration" and _is_number(value)]
        fields = [f"{name.replace('_', ' ')}: {value:.6E}" for name, value in numbers]
        self._print(f" validation at iteration {iteration:8d} | " + " | ".join(fields) + " |")

    def log_skipped(self, record: dict[str, Any] | None) -> None:
        """Write down an iteration that was not applied. The same one a second time, and None, is nothing."""
        if record is not None and record["iteration"] > self._last_skipped:
            self._last_skipped = record["iteration"]
            self._append(self.skipped_path, record)

    def close(self) -> None:
        """Close the files and draw `curves.png`. Safe to call twice, and hides no error that ends the run."""
        if self._closed:
            return
        self._closed = True
        for path, file in self._files.items():
            with tolerating(f"the end of {path.name}", path, f"its last {file.num_waiting} lines are lost"):
                file.close()
        with tolerating("the progress bar", "standard error", "it stays as it is"):
            self._bar.close()
        with tolerating("TensorBoard's last events", self.run_dir / "tensorboard", "they are lost"):
            if self._tensorboard is not None:
                self._tensorboard.close()
        with tolerating("W&B's last records", self.run_dir / "wandb", "they may be lost"):
            if self._wandb is not None:
                self._wandb.finish()
        picture = self.run_dir / "curves.png"
        with tolerating("curves", picture, f"`laver curves {self.run_dir}` draws them later"):
            self._draw(picture)

    def _draw(self, picture: Path) -> None:
        if not self.metrics_path.exists() or self.metrics_path.stat().st_size == 0:
            return
        from laver_megatron.run_log.curves import draw_curves  # here: matplotlib may be missing

        draw_curves(self.metrics_path, picture)

    def _drop_after(self, path: Path, iteration: int) -> None:
        try:
            drop_after(path, iteration)
        except OSError:
            with tolerating(path.name, path, f"it keeps what an earlier start wrote after iteration {iteration}"):
                truncate_after(path, iteration)

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        with tolerating(path.name, path, "its lines are kept in memory and tried again"):
            self._files[path].append(json_line(record))

    def _print_line(self, record: dict[str, Any]) -> None:
        elapsed = sum(self._since_line) / len(self._since_line)
        self._since_line.clear()
        self._print(format_line(record, self.train_iters, elapsed, self.config_dict.get("global_batch_size")))

    def _print(self, line: str) -> None:
        with tolerating("lines of the log", "standard output", "metrics.jsonl has every iteration"):
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _send(self, iteration: int, record: dict[str, Any], prefix: str) -> None:
        numbers = {
            f"{prefix}/{name}": value
            for name, value in record.items()
            if name != "iteration" and _is_number(value) and math.isfinite(value)
        }
        if self._tensorboard is not None:
            with tolerating("TensorBoard", self.run_dir / "tensorboard", "events are missing from here on"):
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb is not None:
            with tolerating("W&B", self.run_dir / "wandb", "records are missing there"):
                self._wandb.log(numbers | {"iteration": iteration})

    def _open_tensorboard(self, resume_iteration: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a crashed run wrote after the checkpoint
        writer = SummaryWriter(self.run_dir / "tensorboard", purge_step=resume_iteration + 1)
        if self.config_dict:
            lines = "\n".join(f"    {name}: {value}" for name, value in self.config_dict.items())
            writer.add_text("config", lines, resume_iteration + 1)
        return writer

    def _open_wandb(self, project: str) -> Any:
        import wandb

        id_path = self.run_dir / "wandb_id"
        run_id = id_path.read_text().strip() if id_path.exists() and self.last_iteration > 0 else None
        run = wandb.init(project=project, id=run_id, resume="allow", dir=str(self.run_dir), config=self.config_dict)
        id_path.write_text(run.id + "\n")
        # our own axis: W&B's refuses steps it has seen, which a resumed run may repeat
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        return run


def format_line(
    record: dict[str, Any], train_iters: int, elapsed_seconds: float, global_batch_size: int | None = None
) -> str:
    """The line of one iteration in Megatron's manner: fields between bars, `name: value`, no field that is None."""
    record = {"global_batch_size": global_batch_size} | record
    parts = [
        f" iteration {record['iteration']:8d}/{train_iters:8d}",
        f"consumed samples: {record['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {1000 * elapsed_seconds:.1f}",
    ]
    for label, field, spec in LINE_FIELDS:
        value = record.get(field)
        if value is None:
            continue
        if field == "peak_memory_bytes":
            value /= 2**20
        if spec.endswith("d") and math.isfinite(value):
            value = int(value)
        elif spec.endswith("d"):
            spec = ".0f"
        parts.append(f"{label}: {value:{spec}}")
    return " | ".join(parts) + " |"


def peak_memory_bytes(device: torch.device | str) -> int:
    """This process's peak memory: on CUDA the most bytes the allocator had given out on that device since the last
    reset; on the CPU the peak resident set size since the process began, which includes the libraries."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
