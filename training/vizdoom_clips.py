"""Make the clips that the video models learn: eight scenarios of vizdoom (Freedoom's assets), played at random, seeded.

    python training/vizdoom_clips.py --out clips.npz --clips 600 --frames 8 --clip-seed 0

The scenario is the class. Clip k of a scenario depends on (seed, split, scenario, k) alone, so that a longer file begins with a
shorter one, and the clips of the split "test" are other games than those of "train".
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

SCENARIOS = (
    "basic",
    "defend_the_center",
    "defend_the_line",
    "health_gathering",
    "my_way_home",
    "predict_position",
    "take_cover",
    "deadly_corridor",
)
SPLITS = ("train", "test")
# The square in the middle of a screen of 160 x 120.
LEFT, RIGHT = 20, 140
TICS = 3  # from frame to frame, at 35 tics a second
MOST_LEAD = 40  # tics played before the first frame, so that clips begin in different situations
HELD = 4  # a random action is kept for up to so many frames
ATTEMPTS = 100


@dataclass(frozen=True)
class Settings:
    """What a file of clips was made with.

    Attributes:
        clips: of each scenario.
        frames: of each clip.
        size: pixels of a frame's side.
        seed, split: of the games; ``"test"`` is for evaluation only.
    """

    clips: int = 600
    frames: int = 8
    size: int = 32
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r}; write one of {', '.join(SPLITS)}")
        if min(self.clips, self.frames, self.size) < 1 or self.seed < 0:
            raise ValueError(f"{self}: clips, frames and size are above 0, and a seed is not negative")


@contextmanager
def playing(scenario: str) -> Iterator[Any]:
    """A game without window or sound. It writes into the folder that it is started in, so that is a temporary one."""
    import vizdoom

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        game = vizdoom.DoomGame()
        game.load_config(str(Path(vizdoom.scenarios_path) / f"{scenario}.cfg"))
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        os.chdir(folder)
        try:
            game.init()
            yield game
        finally:
            game.close()
            os.chdir(before)


def clip(game: Any, entropy: tuple[int, ...], frames: int, size: int) -> NDArray[np.uint8]:
    """One clip, shape (frames, size, size, 3). A game that ends too early is played again with another seed.

    Raises:
        RuntimeError: no game lasts long enough.
    """
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng((*entropy, attempt))
        game.set_seed(int(rng.integers(2**31)))
        game.new_episode()
        if (found := played(game, rng, frames, size)) is not None:
            return found
    raise RuntimeError(f"no game of {ATTEMPTS} lasts {frames} frames; make shorter clips")


def played(game: Any, rng: np.random.Generator, frames: int, size: int) -> NDArray[np.uint8] | None:
    """The frames of one game after a lead, or None where it ends before the last of them."""
    buttons = np.eye(game.get_available_buttons_size(), dtype=int).tolist()
    lead, seen, left = int(rng.integers(1, MOST_LEAD)), [], 0
    for k in range(frames):
        if left == 0:
            action, left = buttons[rng.integers(len(buttons))], int(rng.integers(1, HELD + 1))
        left -= 1
        game.make_action(action, TICS if k else lead)
        if game.is_episode_finished():
            return None
        frame = Image.fromarray(np.ascontiguousarray(game.get_state().screen_buffer[:, LEFT:RIGHT]))
        seen.append(np.asarray(frame.resize((size, size), Image.Resampling.BOX)))
    return np.stack(seen)


def play(settings: Settings, label: int, chosen: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
    """The chosen clips of one scenario, each (frames, size, size, 3)."""
    with playing(SCENARIOS[label]) as game:
        for k in chosen:
            yield clip(game, (settings.seed, SPLITS.index(settings.split), label, k), settings.frames, settings.size)


def generate(settings: Settings, progress: bool = True) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Clips (n, 3, frames, size, size) and their classes (n,), scenario after scenario."""
    clips = []
    with tqdm(total=len(SCENARIOS) * settings.clips, disable=not progress) as bar:
        for label in range(len(SCENARIOS)):
            for found in play(settings, label, range(settings.clips)):
                clips.append(found)
                bar.update()
    return np.stack(clips).transpose(0, 4, 1, 2, 3), np.repeat(np.arange(len(SCENARIOS)), settings.clips)


def load(path: Path, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The clips in a file, which is made where there is none: bytes (n, 3, frames, size, size), and their classes (n,).

    Raises:
        ValueError: the file was made with other settings.
    """
    wanted = json.dumps(asdict(settings), sort_keys=True)
    if not path.exists():
        clips, labels = generate(settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".new.npz")
        np.savez_compressed(partial, clips=clips, labels=labels, settings=np.array(wanted))
        partial.replace(path)
    with np.load(path) as file:
        if str(file["settings"]) != wanted:
            raise ValueError(f"{path} was made with {file['settings']}, and not with {wanted}; give another path, or remove it")
        return torch.from_numpy(file["clips"]), torch.from_numpy(file["labels"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that ``settings_from`` reads."""
    defaults = Settings()
    parser.add_argument("--clips", type=int, default=defaults.clips, help="of each scenario")
    parser.add_argument("--frames", type=int, default=defaults.frames, help="of each clip")
    parser.add_argument("--clip-seed", type=int, default=defaults.seed, help="of the games")


def settings_from(args: argparse.Namespace, split: str = "train") -> Settings:
    return Settings(clips=args.clips, frames=args.frames, seed=args.clip_seed, split=split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the .npz to make, or to check")
    parser.add_argument("--split", choices=SPLITS, default="train", help="test: for evaluation only")
    add_arguments(parser)
    args = parser.parse_args()
    clips, labels = load(args.out, settings_from(args, args.split))
    print(f"{args.out}: {tuple(clips.shape)}, {len(set(labels.tolist()))} classes")


if __name__ == "__main__":
    main()
