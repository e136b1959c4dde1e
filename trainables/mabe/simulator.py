"""Writes a simulated data set in the layout of the MABe challenge, for use when no real one is available.

Two mice rest or roam in an arena, and at times one of them sniffs, mounts or attacks the other. Behaviours can be
recognised by how the two move. Some points are not seen at times, and in some videos one mouse is not seen at the end.

Shape suffixes: T frames, P points.
"""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.random import Generator
from numpy.typing import NDArray

from trainables.mabe.config import CLASSES, Simulated

VERSION = 3  # part of the cache's key: increment it whenever the output changes

Floats = NDArray[np.float64]
OTHER, INVESTIGATION, MOUNT, ATTACK = range(len(CLASSES))
ARENA_CM, PIXELS_PER_CM, MARGIN_PX = 40.0, 12.0, 16
BODY_CM = 7.0  # nose to tail base
MEAN_S = (3.0, 2.0, 2.0, 1.0)  # mean duration of each behaviour; OTHER is roaming, until the next behaviour
NEXT = (0.0, 0.55, 0.2, 0.25)  # probabilities of the behaviours that follow roaming
GAIN_PER_S = 4.0  # speed per distance left: how soon a mouse slows down on its way to a goal
DASHES_PER_S = 0.08  # rate at which a roaming mouse dashes off, as fast as in a fight
NOISE_CM = 0.25  # standard deviation of a tracked point's error
SHORT = 8  # one video in this many is shorter than a window
GAP_S, UNSEEN = 0.6, 0.06  # mean time for which a point is out of sight, and the share of frames in which it is
RANDOM_SHARES = (0.70, 0.15, 0.10, 0.05)  # shares of the classes in random labels

# Each point's place on the mouse, in centimetres from its centre: towards the nose, and to the left.
WHOLE = {
    "nose": (3.5, 0.0),
    "ear_left": (2.2, 0.8),
    "ear_right": (2.2, -0.8),
    "neck": (1.5, 0.0),
    "hip_left": (-1.8, 1.1),
    "hip_right": (-1.8, -1.1),
    "tail_base": (-3.5, 0.0),
}
PARTIAL = {"nose": (3.5, 0.0), "neck": (1.5, 0.0), "body_center": (0.0, 0.0), "lateral_left": (0.0, 1.2)}
PARTIAL["tail_base"] = (-3.5, 0.0)


@dataclass(frozen=True)
class Lab:
    name: str
    fps: float
    parts: dict[str, tuple[float, float]]


LABS = (Lab("SimulatedSeven", 30.0, WHOLE), Lab("SimulatedFive", 25.0, PARTIAL))
EVENTS = pa.schema(
    [
        ("agent_id", pa.int64()),
        ("target_id", pa.int64()),
        ("action", pa.string()),
        ("start_frame", pa.int64()),
        ("stop_frame", pa.int64()),
    ]
)
ACTIONS = {INVESTIGATION: ("sniff", "sniffgenital"), MOUNT: ("mount", "attemptmount"), ATTACK: ("attack", "chase")}


@dataclass
class Mouse:
    """The state of a mouse: centre in centimetres, heading in radians, speed in centimetres per second."""

    place: Floats
    heading: float
    speed: float = 5.0

    def along(self, cm: float) -> Floats:
        """Return the point on the body's axis `cm` from its centre towards the nose."""
        return self.place + cm * np.array([np.cos(self.heading), np.sin(self.heading)])

    def turn(self, wanted: float, rate: float, dt: float) -> None:
        """Turn towards the heading `wanted`, at most at `rate` radians per second."""
        off = (wanted - self.heading + np.pi) % (2 * np.pi) - np.pi
        self.heading += float(np.clip(off, -rate * dt, rate * dt))

    def advance(self, dt: float) -> None:
        self.place = np.clip(self.along(self.speed * dt), 3.0, ARENA_CM - 3.0)

    def roam(self, dt: float, rng: Generator, mean_speed: float = 6.0) -> None:
        self.speed += (mean_speed - self.speed) * dt / 0.5 + 8.0 * np.sqrt(dt) * rng.standard_normal()
        self.speed = 45.0 if rng.random() < DASHES_PER_S * dt else float(np.clip(self.speed, 0.0, 45.0))
        off = ARENA_CM / 2 - self.place
        if np.abs(off).max() > ARENA_CM / 2 - 5:  # a wall is near
            self.turn(float(np.arctan2(off[1], off[0])), 4.0, dt)
        self.heading += 1.5 * np.sqrt(dt) * rng.standard_normal()
        self.advance(dt)

    def approach(self, goal: Floats, speed: float, rate: float, dt: float) -> float:
        """Move the nose towards `goal` at most at `speed`; return the nose's distance from it before the move."""
        off = goal - self.along(BODY_CM / 2)
        self.turn(float(np.arctan2(*(goal - self.place)[::-1])), rate, dt)
        distance = float(np.hypot(*off))
        self.speed = min(speed, GAIN_PER_S * distance)
        self.advance(dt)
        return distance


def act(behaviour: int, agent: Mouse, target: Mouse, dt: float, rng: Generator) -> bool:
    """Move both mice by one frame; return whether the behaviour shows, which it does once the agent is near enough."""
    if behaviour == OTHER:
        agent.roam(dt, rng)
        target.roam(dt, rng)
        return False
    if behaviour == INVESTIGATION:
        target.roam(dt, rng, mean_speed=2.0)
        return agent.approach(target.along(-BODY_CM / 2), 18.0, 6.0, dt) < 2.0
    if behaviour == MOUNT:
        target.roam(dt, rng, mean_speed=0.7)
        goal = target.along(-1.0)
        off = goal - agent.place
        agent.turn(target.heading, 8.0, dt)
        step = off * min(1.0, 20.0 * dt / max(float(np.hypot(*off)), 1e-6))
        agent.place = agent.place + step + 0.15 * rng.standard_normal(2)  # thrusts
        return float(np.hypot(*off)) < 2.0
    flight = target.place - agent.place
    target.turn(float(np.arctan2(flight[1], flight[0])) + rng.normal(0, 0.6), 8.0, dt)
    target.speed = float(rng.uniform(20, 45))
    target.advance(dt)
    agent.approach(target.place, 55.0, 14.0, dt)
    agent.heading += rng.normal(0, 0.25)
    return True


def play(frames: int, fps: float, rng: Generator) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Return place and heading of both mice, (T, 2, 3), and each frame's behaviour, (T,), and agent, 0 or 1, (T,)."""
    mice = [Mouse(rng.uniform(8, ARENA_CM - 8, 2), float(rng.uniform(-np.pi, np.pi))) for _ in range(2)]
    poses, shown, agents = np.empty((frames, 2, 3)), np.zeros(frames, dtype=np.int64), np.zeros(frames, dtype=np.int64)
    behaviour, agent, shows, left_s = OTHER, 0, False, float(rng.exponential(MEAN_S[OTHER]))
    for t in range(frames):
        shows = act(behaviour, mice[agent], mice[1 - agent], 1 / fps, rng) or shows
        poses[t] = [[*mouse.place, mouse.heading] for mouse in mice]
        shown[t], agents[t] = behaviour if shows else OTHER, agent
        if shows or behaviour == OTHER:
            left_s -= 1 / fps
        if left_s <= 0:
            behaviour = int(rng.choice(4, p=NEXT)) if behaviour == OTHER else OTHER
            agent, shows, left_s = int(rng.integers(2)), False, float(rng.gamma(4.0, MEAN_S[behaviour] / 4))
    return poses, shown, agents


def tracked(poses_T23: Floats, lab: Lab, rng: Generator) -> Floats:
    """Return the points of both mice in pixels, (T, 2, P, 2); NaN where out of sight."""
    frames = len(poses_T23)
    along, left = np.array(list(lab.parts.values())).T
    cos, sin = np.cos(poses_T23[..., 2:]), np.sin(poses_T23[..., 2:])
    x = poses_T23[..., :1] + cos * along - sin * left
    y = poses_T23[..., 1:2] + sin * along + cos * left
    points = np.stack([x, y], axis=-1) + NOISE_CM * rng.standard_normal((*x.shape, 2))
    for mouse, part in np.ndindex(2, len(along)):
        for start in np.flatnonzero(rng.random(frames) < UNSEEN / lab.fps / GAP_S):
            points[start : start + 1 + int(rng.exponential(GAP_S * lab.fps)), mouse, part] = np.nan
    if rng.random() < 0.15:
        points[int(0.9 * frames) :, 1] = np.nan
    return points * PIXELS_PER_CM + MARGIN_PX


def events(shown_T: NDArray[np.int64], agents_T: NDArray[np.int64], rng: Generator) -> list[dict[str, int | str]]:
    """Return the annotation's rows: runs of one behaviour by one agent, the stop frame exclusive."""
    key_T = np.where(shown_T == OTHER, 0, 2 * shown_T + agents_T)
    edges = np.flatnonzero(np.diff(key_T, prepend=-1, append=-1)).tolist()
    rows: list[dict[str, int | str]] = []
    for start, stop in itertools.pairwise(edges):
        if shown_T[start] != OTHER:
            agent = int(agents_T[start])
            action = ACTIONS[int(shown_T[start])][int(rng.random() < 0.3)]
            ids: dict[str, int | str] = {"agent_id": agent + 1, "target_id": 2 - agent}
            rows.append({**ids, "action": action, "start_frame": start, "stop_frame": stop})
    return rows


def simulate(root: Path, settings: Simulated) -> None:
    """Write train.csv and every file that it names to `root`."""
    rows: list[dict[str, float | str]] = []
    for number in range(settings.videos):
        rng = np.random.default_rng([settings.seed, number])
        lab = LABS[number % len(LABS)]
        seconds = 2 if number % SHORT == SHORT - 1 else settings.seconds
        frames = int(seconds * lab.fps)
        poses_T23, shown_T, agents_T = play(frames, lab.fps, rng)
        points = tracked(poses_T23, lab, rng)
        if settings.labels == "random":
            shown_T = rng.choice(len(CLASSES), frames, p=RANDOM_SHARES)
        _write(root / "train_tracking" / lab.name / f"{number}.parquet", pa.table(_tracking(points, lab)))
        annotation = pa.Table.from_pylist(events(shown_T, agents_T, rng), EVENTS)
        _write(root / "train_annotation" / lab.name / f"{number}.parquet", annotation)
        size = int(ARENA_CM * PIXELS_PER_CM) + 2 * MARGIN_PX
        rows.append(
            {
                "lab_id": lab.name,
                "video_id": number,
                "frames_per_second": lab.fps,
                "video_duration_sec": seconds,
                "pix_per_cm_approx": PIXELS_PER_CM,
                "video_width_pix": size,
                "video_height_pix": size,
                "arena_width_cm": ARENA_CM,
                "arena_height_cm": ARENA_CM,
                "arena_shape": "square",
                "body_parts_tracked": json.dumps(list(lab.parts)),
            }
        )
    with (root / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _tracking(points_T2P2: Floats, lab: Lab) -> dict[str, NDArray[np.generic]]:
    """Return the columns of the long format; a point out of sight has a row, of NaN, only in every third frame."""
    seen = np.asarray(~np.isnan(points_T2P2).any(-1))
    frame, mouse, part = np.nonzero(seen | (np.arange(len(seen)) % 3 == 0)[:, None, None])
    return {
        "video_frame": frame.astype(np.int32),
        "mouse_id": (mouse + 1).astype(np.int8),
        "bodypart": np.array(list(lab.parts))[part],
        "x": points_T2P2[frame, mouse, part, 0].astype(np.float32),
        "y": points_T2P2[frame, mouse, part, 1].astype(np.float32),
    }


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
