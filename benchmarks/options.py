"""What the command lines of benchmarks share."""

import tyro


def usual(of_cpu: str, of_gpu: str) -> object:
    """Returns the words of `--help` for the defaults on each device."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {of_cpu} on a cpu, {of_gpu} on a gpu)")


def frames_and_pixels(size: str, option: str) -> tuple[int, int]:
    """Reads frames and pixels of 9x64; SystemExit for anything else, and for what the models do not take."""
    numbers = size.split("x")
    if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
        frames, pixels = map(int, numbers)
        if frames % 8 == 1 and pixels % 8 == 0 and pixels >= 16:
            return frames, pixels
    raise SystemExit(f"{option} {size}: expected 8k + 1 frames x pixels, a multiple of 8, from 16 on, as 9x64")
