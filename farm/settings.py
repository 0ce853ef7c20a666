"""What the driver tells its workers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How the workers start their ComfyUI. Times in seconds."""

    comfy: str | None  # its folder; None: COMFYUI_PATH, as each machine has it
    python: str | None  # None: the one beside that ComfyUI
    arguments: tuple[str, ...]
    input_directory: str | None  # None: one of its own
    timeout: float
    start_timeout: float
    cpus: int  # 0: a GPU
