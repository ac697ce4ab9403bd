"""A generated abdomen: CT volumes with BTCV's 13 organs, written as NIfTI in the layouts of both data sets.

    python -m ct.phantom --out data/phantom
    python -m ct.phantom --layout msd --out data/phantom-msd            labelled patients as others store them

Stands in for AbdomenCT-1K and BTCV where they are absent: the same files, the same conventions, exact labels.
A patient is a table of implicit shapes (ellipsoids and tubes, in mm) evaluated in smoothly warped coordinates,
so no border is a plain ellipse; the same shapes paint the image and the labels. Organs differ by 10 to 80 HU
under correlated noise, and contrast phase, size, fat and orientation on disk vary from patient to patient.

Grey values vary as between real patients, so that a grey value alone does not tell an organ (all taken from
what is published, before any result was looked at):
- tube voltage: from 80 to 140 kV the contrast to water falls by 52 % for iodine, 35 % bone, 21 % fat, 11 % muscle
  (Proc. SPIE, 2004, doi 10.1117/12.535608): powers of the voltage in EXPONENTS, 1 at 120 kV;
- iodine: 0.3 to 0.5 g per kg of body weight, to which enhancement is proportional (AJR, doi 10.2214/AJR.15.15138),
  at one dose 54.8 +- 11 and 50.0 +- 12 HU in the liver (PubMed 33386915), hence a variation of 22 %;
- some scans are unenhanced: 15 %, our choice;
- livers: 58.3 +- 8.9 HU unenhanced, 32.4 +- 13.8 in the 23 of 214 with severe steatosis
  (Int J Legal Med 2019, doi 10.1007/s00414-019-02016-1);
- noise: about 11 HU is usual in abdominal CT at 120 kV; from there to 80 kV it grows 1.9 times at equal tube current
  (J Biomed Biotechnol 2012, doi 10.1155/2012/130169), here by the root of that: the current is raised, too.
Other values are round textbook ones.

Coordinates: x to the patient's left, y posterior, z superior, mm; the origin lies in the middle of the belly at
the lowest slice of an average patient, whose lung bases lie at z = 220.
"""

import gzip
import multiprocessing
import os
import shutil
import signal
import sys
import time
import uuid
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm

from ct import phantom_layouts
from ct.command import Parser, command, cores, whole
from ct.volumes import BadInput

PURPOSE = 4001  # this module's entry in SeedSequence([seed, purpose, patient])
BTCV_IDS = (*range(1, 11), *range(21, 41))  # img0001 is patient 1
UNLABELLED = 1000  # Case_00001 is patient 1001
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI", "ASR")  # of the axes on disk; the affine tells readers which
GAS, FAT = -950, -100
VOLTAGES, SHARES = (80, 100, 120, 140), (0.1, 0.25, 0.5, 0.15)  # kV; shares of patients: our choice
EXPONENTS = {"iodine": 1.31, "bone": 0.77, "fat": 0.42, "soft": 0.21}  # contrast to water ~ (120 / kV) ** exponent
NOISE_EXPONENT = 0.78
UNENHANCED = 0.15


class Ellipsoid(NamedTuple):
    centre: tuple  # x, y, z
    radii: tuple
    turn: float = 0  # degrees in the axial plane, then
    tilt: float = 0  # degrees in the coronal plane

    def scaled(self, about, scale, shift):
        return self._replace(centre=about + scale * (np.array(self.centre) - about) + shift,
                             radii=scale * np.array(self.radii))

    def _axes(self):
        c, s = np.cos(np.radians(self.turn)), np.sin(np.radians(self.turn))
        d, t = np.cos(np.radians(self.tilt)), np.sin(np.radians(self.tilt))
        return np.array([[d, 0, t], [0, 1, 0], [-t, 0, d]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])

    def bounds(self):
        half = np.sqrt(((self._axes() * np.array(self.radii)) ** 2).sum(1))
        return self.centre - half, self.centre + half

    def square(self, x, y, z):
        """Squared relative distance from the centre: 1 on the border."""
        dx, dy, dz = (p - np.float32(c) for p, c in zip((x, y, z), self.centre, strict=True))
        rows = (self._axes() / np.array(self.radii)).T.astype(np.float32)
        return sum((a * dx + b * dy + c * dz) ** 2 for a, b, c in rows)


class Tube(NamedTuple):
    points: tuple  # rows of x, y, z, radius

    @property
    def centre(self):
        return np.mean(self.points, axis=0)[:3]

    def scaled(self, about, scale, shift):
        points = np.array(self.points, float) * scale
        points[:, :3] += (1 - scale) * about + shift
        return Tube(points)

    def bounds(self):
        p = np.array(self.points, float)
        return (p[:, :3] - p[:, 3:]).min(0), (p[:, :3] + p[:, 3:]).max(0)

    def square(self, x, y, z):
        """Squared relative distance from the centre line: 1 on the border."""
        points, nearest = np.array(self.points, np.float32), np.float32(np.inf)
        for a, b in zip(points[:-1], points[1:], strict=True):
            step = b - a
            dx, dy, dz = x - a[0], y - a[1], z - a[2]
            t = np.clip((dx * step[0] + dy * step[1] + dz * step[2]) / (step[:3] @ step[:3]), 0, 1)
            squared = (dx - t * step[0]) ** 2 + (dy - t * step[1]) ** 2 + (dz - t * step[2]) ** 2
            nearest = np.minimum(nearest, squared / (a[3] + t * step[3]) ** 2)
        return nearest


# Label: shapes, HU at 120 kV: unenhanced, then in the arterial, portal and late phase. In painting order: where
# two meet, the later one wins, so the small ones come last. The walls of the cavity (spine, muscle, diaphragm)
# always win.
ORGANS = {
    6: ([Ellipsoid((-72, 0, 148), (62, 70, 78), 15, -8), Ellipsoid((-20, -36, 172), (68, 40, 40), 5, -14)],
        (58, 68, 108, 94)),  # liver
    7: ([Tube(((52, 10, 196, 30), (62, -22, 170, 31), (52, -46, 138, 25), (18, -58, 112, 19),
               (-20, -42, 116, 12)))], (40, 80, 92, 80)),  # stomach (its wall)
    1: ([Ellipsoid((96, 30, 168), (25, 44, 46), -28, 14), Ellipsoid((84, 48, 178), (22, 26, 34), -50)],
        (48, 122, 122, 102)),  # spleen
    2: ([Ellipsoid((-62, 44, 80), (26, 27, 51), -25, -10)], (32, 195, 188, 155)),  # right kidney
    3: ([Ellipsoid((62, 42, 96), (26, 27, 52), 25, 10)], (32, 195, 188, 155)),  # left kidney
    11: ([Tube(((-34, 0, 96, 13), (-28, -4, 114, 14), (-8, -16, 124, 10), (22, -12, 134, 11),
                (52, 6, 146, 11), (72, 18, 152, 9)))], (40, 105, 94, 80)),  # pancreas
    4: ([Tube(((-40, -26, 124, 6), (-50, -42, 112, 12), (-56, -56, 98, 15)))], (10, 10, 10, 10)),  # gallbladder
    5: ([Tube(((8, 16, 228, 8), (13, 12, 207, 8), (34, 4, 192, 9)))], (38, 52, 66, 62)),  # esophagus
    10: ([Tube(((-52, -14, 160, 5.5), (-34, -6, 148, 7), (-18, 2, 134, 7.5), (-6, 3, 124, 7), (22, 4, 133, 5.5),
                (50, 18, 147, 5), (76, 28, 156, 4.5)))], (40, 110, 172, 128)),  # portal and splenic veins
    9: ([Tube(((-20, 24, -20, 10), (-20, 22, 90, 10.5), (-23, 20, 150, 12), (-22, 14, 230, 12.5)))],
        (40, 95, 150, 125)),  # IVC
    12: ([Ellipsoid((-32, 39, 139), (3, 13, 15), 8), Ellipsoid((-39, 40, 136), (2.8, 11, 13), 42)],
         (20, 76, 74, 60)),  # right adrenal
    13: ([Ellipsoid((34, 33, 150), (3.3, 13, 14), -18), Ellipsoid((41, 35, 147), (3.2, 12, 13), -50)],
         (20, 76, 74, 60)),  # left adrenal
    8: ([Tube(((7, 27, -20, 8), (10, 24, 80, 9), (11, 24, 150, 10.5), (11, 27, 235, 12)))],
        (40, 300, 162, 122)),  # aorta
}


class Scene:
    """One patient while being painted: hu and labels (Z, Y, X), and the coordinates shapes are evaluated in."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int]):
        self.rng, uniform = rng, rng.uniform
        slices = max(1, round(shape[0] * rng.integers(36, 45) / 40))
        self.shape = (slices, *shape[1:])
        self.phase = rng.triangular(0, 1, 2)  # 0 arterial, 1 portal, 2 late
        self.kv = int(rng.choice(VOLTAGES, p=SHARES))
        amount = uniform(0.6, 1) * np.exp(0.22 * rng.standard_normal())
        self.iodine = 0.0 if rng.random() < UNENHANCED else float(amount)  # in the blood; 1: 0.5 g per kg
        severe = rng.random() < 23 / 214
        self.liver = max(5.0, float(rng.normal(*((32.4, 13.8) if severe else (58.3, 8.9)))))  # unenhanced
        self.fat_hu = FAT * self.contrast("fat")
        self.oral = rng.random() < 0.25  # positive oral contrast in stomach and bowel
        self.fat = uniform(7, 28)  # mm under the skin
        self.cavity = (128 * uniform(0.96, 1.07), 88 * uniform(0.95, 1.05))  # half axes
        wide, tall = uniform(0.94, 1.06), uniform(0.94, 1.06)
        view = max(345, wide * 2.08 * (self.cavity[0] + 13 + 1.3 * self.fat))
        low, high = uniform(-8, 4), uniform(218, 226)
        self.spacing = ((high - low) * tall / slices, view / shape[2], view / shape[2])
        self.step = np.array(self.spacing) / (tall, wide, wide)
        self.first = np.array([low, *(-(n - 1) / 2 * s for n, s in zip(shape[1:], self.step[1:], strict=True))])
        z, y, x = (np.float32(f) + np.arange(n, dtype=np.float32) * np.float32(s)
                   for f, n, s in zip(self.first, self.shape, self.step, strict=True))
        still = (x, y[:, None], z[:, None, None])
        # body: slow warps only, so that skin and bones stay smooth; warped: organ borders too.
        self.body = [p + 4 * self.smooth(75) for p in still]
        self.warped = [p + 1.7 * self.smooth(20) for p in self.body]
        self.margin = max(float(np.abs(w - p).max()) for w, p in zip(self.warped, still, strict=True))
        self.texture = self.smooth(9)
        self.hu = np.full(self.shape, -1000, np.float32)
        self.labels = np.zeros(self.shape, np.uint8)
        self.free = np.zeros(self.shape, bool)  # the abdominal cavity, where organs may be

    def smooth(self, knot: float) -> np.ndarray:
        """A random field (Z, Y, X) of about unit variance: a cubic B-spline with a knot every `knot` mm."""
        knots = [int(n * step / knot) + 4 for n, step in zip(self.shape, self.step, strict=True)]
        field = 3 * self.rng.standard_normal(knots, dtype=np.float32)
        for axis in (2, 1, 0):  # four knots reach a voxel; by hand, as BLAS threads would fight over the cores
            u = np.arange(self.shape[axis]) * (self.step[axis] / knot)
            at, f = u.astype(int), (u % 1).astype(np.float32)
            weights = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
            field = sum(field.take(at + k, axis) * np.expand_dims(w / 6, tuple({0, 1, 2} - {axis}))
                        for k, w in enumerate(weights))
        return field

    def contrast(self, material: str) -> float:
        """HU of a material at this patient's tube voltage, relative to 120 kV."""
        return (120 / self.kv) ** EXPONENTS[material]

    def now(self, hu: tuple[float, float, float, float]) -> float:
        """HU of this patient, from those at 120 kV: unenhanced, in the arterial, portal and late phase."""
        native, *enhanced = hu
        iodine = self.iodine * (np.interp(self.phase, (0, 1, 2), enhanced) - native)
        return float(native * self.contrast("soft") + iodine * self.contrast("iodine"))

    def swallowed(self, low: float, high: float) -> float:
        """HU of bowel content: diluted iodine where the patient drank some, low to high at 120 kV."""
        return self.rng.uniform(low, high) * self.contrast("iodine")

    def paint(self, shapes: list, hu: float, label: int = 0, where: np.ndarray | None = None):
        """Give the shapes, united, this HU and label, where that is allowed (default: in the abdominal cavity).

        Returns the box (slices of the volume) that holds them and, within it, their mask and the squared
        relative distance (1 on the border) for the finer structure.
        """
        low, high = (np.array(b) for b in zip(*(s.bounds() for s in shapes), strict=True))
        grow = self.margin + 0.1 * (high - low).max()  # the warp, and what the smooth union adds
        first = np.floor((low.min(0)[::-1] - grow - self.first) / self.step).astype(int)
        last = np.ceil((high.max(0)[::-1] + grow - self.first) / self.step).astype(int)
        box = tuple(slice(max(0, a), max(0, b + 1)) for a, b in zip(first, last, strict=True))
        x, y, z = (p[box] for p in self.warped)
        if len(shapes) == 1:
            square = shapes[0].square(x, y, z)
        else:
            square = sum((s.square(x, y, z) + np.float32(1e-3)) ** -4 for s in shapes) ** -0.25
        mask = (square < 1) & (self.free if where is None else where)[box]
        self.hu[box][mask] = hu
        self.labels[box][mask] = label
        return box, mask, square

    def hollow(self, shapes: list, wall: float, content: float, gas: float, lumen: float, label: int = 0):
        """A hollow organ: wall, content, and gas in the front `gas` part, as the patient lies on the back."""
        box, mask, square = self.paint(shapes, wall, label)
        inner = mask & (square < lumen)
        if inner.any():
            self.hu[box][inner] = content
            y = self.body[1][box]
            front, back = y[inner].min(), y[inner].max()
            self.hu[box][inner & (y < front + gas * (back - front))] = GAS
        return box, inner


def _body(s: Scene) -> None:
    """Skin, fat, muscle, ribs, spine, lungs and couch; marks the abdominal cavity as free."""
    x, y, z = s.body
    u, v = x / s.cavity[0], (y + 8) / s.cavity[1]
    square = u * u + v * v - 0.25 * (u * v) ** 2  # a little squarer than an ellipse
    radius = np.hypot(x, y + 8)
    depth = radius - radius / np.sqrt(np.maximum(square, 1e-4))  # mm outside the cavity along the ray
    back = np.clip((y + 8) / (radius + 1) * 2.5 - 1.5, 0, 1)
    muscle = 10 + 23 * back * back + s.texture * 0.5
    fat = muscle + s.fat * (1 - 0.55 * back) * (1 + 0.25 * np.abs(u))
    hu = s.hu
    inside = depth < 0
    hu[depth < fat + 3] = 25  # skin
    hu[depth < fat] = s.fat_hu
    hu[depth < muscle] = s.now((54, 54, 62, 60))
    hu[(depth < muscle - 3) & (depth > 3) & (s.texture > 1.6)] = s.fat_hu  # between the muscles
    seam = np.minimum(np.abs(x), np.abs(np.abs(x) - 62)) < 2
    hu[seam & (depth < muscle) & (y < -30)] = -30  # linea alba, and the outer borders of the rectus muscles

    # Ribs slope down to the front within the wall; the front ends are cartilage.
    slope = z + 0.55 * y
    near = (depth > 0.5) & (depth < 8.5) & (slope > 95) & (np.abs(x) > 24)
    phase = np.abs((slope[near] / 27) % 1 - 0.5) * 27
    shell = np.maximum(phase / 6.5, np.abs(depth[near] - 4.5) / 3.8)
    mineral = s.contrast("bone")
    bone = np.where(shell > 0.6, 520, 230)
    bone = np.where(y[near] < -62, 115, bone) * mineral
    hu[near] = np.where(shell < 1, bone, hu[near])

    # The diaphragm's dome: the lungs reach lowest behind.
    high = np.maximum(z - 128 + 0.4 * (y + 8), 0) / 112
    dome = square + np.where(high < 0.33, 0, high * high)  # no lung thinner than 5 mm
    lung = inside & (dome > 1)
    hu[lung] = -860 + 40 * s.texture[lung]
    hu[lung & (s.texture > 2)] = -150  # vessels
    hu[inside & ~lung] = s.now((50, 50, 60, 58))  # the diaphragm, of which only the border will be seen
    s.free = inside & (dome < 0.97)
    hu[s.free] = s.fat_hu + 8 * s.texture[s.free]
    box, mask, _ = s.paint([Ellipsoid((22, -42, 240), (66, 48, 40), 20)], s.now((40, 190, 140, 115)), where=inside)
    s.free[box] &= ~mask  # the heart
    box, mask, _ = s.paint([Tube(((4, 28, 150, 25), (4, 28, 240, 25)))], s.fat_hu, where=lung)
    s.free[box] |= mask  # the mediastinum

    # Spine: vertebrae and discs; arch, spinous and transverse processes around the canal.
    near = (np.abs(x) < 48) & (y > 28) & (y < 122)
    x, y, z = x[near], y[near], z[near]
    value = hu[near]
    level = np.abs((z / 33) % 1 - 0.5) * 33  # mm from a vertebra's middle
    body = (x / 23) ** 2 + ((y - 56) / 18) ** 2
    canal = (x / 10) ** 2 + ((y - 80) / 8) ** 2
    value[(np.abs(x) < 42 - 0.5 * level) & (np.abs(y - 84 - 0.12 * np.abs(x)) < 4) & (level < 8)] = 300 * mineral
    value[(canal < 2.6) & (level < 13)] = 380 * mineral
    value[(np.abs(x) < 3.5) & (y > 86) & (y < 112) & (level < 11)] = 320 * mineral
    marrow = np.where(body > 0.8, 380, 190 + 30 * np.clip(level - 9, 0, 4))
    value[body < 1] = np.where(level < 13, marrow * mineral, 90)[body < 1]
    value[canal < 1] = 30
    hu[near] = value
    bone = np.zeros_like(s.free)
    bone[near] = body < 1.1
    s.free &= ~bone
    for side in (-1, 1):  # psoas, and the crura of the diaphragm beside the aorta
        for shape in (Tube(((side * 42, 54, -20, 19), (side * 33, 58, 60, 14), (side * 27, 60, 120, 6))),
                      Tube(((side * 15, 38, 95, 4), (side * 17, 33, 150, 6), (side * 19, 28, 195, 4)))):
            box, mask, _ = s.paint([shape], s.now((55, 55, 64, 62)))
            s.free[box] &= ~mask

    # The couch: a curved plate under the back.
    row = np.flatnonzero((hu > -500).any((0, 2)))[-1] * s.step[1] + s.first[1] + 1
    columns = s.first[2] + np.arange(s.shape[2]) * s.step[2]
    rows = s.first[1] + np.arange(s.shape[1]) * s.step[1]
    under = rows[:, None] - row + 0.0009 * columns**2
    shell = np.clip(1 - np.abs(np.abs(under - 12) - 11) / s.step[1], 0, 1)
    couch = np.where((np.abs(under - 12) < 12 + s.step[1]) & (np.abs(columns) < 170), -930 + 900 * shell, -1000)
    np.maximum(hu, couch.astype(np.float32), out=hu)


def _bowel(s: Scene) -> None:
    """Everything in the cavity that BTCV does not label: bowel, duodenum, mesenteric vessels."""
    rng, uniform, wall = s.rng, s.rng.uniform, s.now((40, 78, 92, 80))
    for _ in range(24):  # vessels from the root of the mesentery to the gut
        start = np.array([uniform(-12, 12), uniform(0, 12), uniform(20, 100)])
        end = np.array([uniform(-90, 90), uniform(-80, 0), start[2] + uniform(-50, 20)])
        middle = (start + end) / 2 + uniform(-18, 18, 3)
        s.paint([Tube(((*start, 3.2), (*middle, 2.5), (*end, 1.5)))], s.now((40, 150, 140, 110)))
    for points in (((58, 36, 94, 5), (16, 13, 97, 4), (-16, 20, 97, 5)), ((-56, 38, 80, 5), (-20, 22, 88, 5))):
        s.paint([Tube(points)], s.now((40, 120, 160, 125)))  # renal veins
    for _ in range(54):
        a = np.array([uniform(-80, 88), uniform(-82, 25), uniform(-20, 88)])
        b, c = a + uniform(-1, 1, 3) * (26, 20, 16), a + uniform(-1, 1, 3) * (40, 30, 24)
        r = uniform(8, 14)
        content = s.swallowed(160, 320) if s.oral and rng.random() < 0.6 else uniform(5, 60)
        gas = uniform(0.2, 0.6) if rng.random() < 0.25 else 0
        s.hollow([Tube(((*a, r), (*b, r), (*c, r)))], wall, content, gas, 0.55)
    s.hollow([Tube(((-34, -34, 116, 11), (-50, 2, 104, 12), (-46, 14, 76, 12), (-12, 9, 66, 10), (24, 9, 72, 11),
                    (36, -14, 88, 11)))], wall, s.swallowed(250, 250) if s.oral else 25, 0, 0.5)  # duodenum
    flexure = uniform(118, 150)
    colon = (
        ((-98, 8, -25, 22), (-100, 10, 10, 25), (-98, 2, 40, 21), (-88, -14, 66, 20)),
        ((-88, -14, 66, 19), (-58, -58, 72, 17), (0, -74, uniform(45, 85), 17), (56, -62, 92, 18),
         (98, -12, flexure, 18)),
        ((98, -12, flexure, 17), (106, 24, 100, 14), (106, 18, 40, 13), (98, 6, -25, 14)),
    )
    for points in colon:
        segment = [Tube(points).scaled(0, 1, uniform(-5, 5, 3))]
        box, inner = s.hollow(segment, wall, uniform(20, 60), uniform(0, 0.55), 0.7)
        stool = inner & (s.hu[box] > 0)
        s.hu[box][stool] += np.where(s.texture[box] > 1.3, -500, 25 * s.texture[box])[stool]


def _organs(s: Scene) -> None:
    """The 13 labelled organs with what is seen inside them."""
    rng, uniform = s.rng, s.rng.uniform
    kidneys, adrenals = uniform(-0.09, 0.09, 2)  # pairs vary together
    shared = {2: kidneys, 3: kidneys, 12: adrenals, 13: adrenals}
    spread = {1: 0.11, 4: 0.11, 5: 0.11, 6: 0.17, 8: 0.16, 9: 0.2} | dict.fromkeys(shared, 0.07)
    for label, (shapes, hu) in ORGANS.items():
        scale = np.exp(shared.get(label, 0) + spread.get(label, 0.13) * uniform(-1, 1))
        about = np.mean([shape.centre for shape in shapes], axis=0)
        shift = rng.normal(0, (2, 2, 2.5) if label in (5, 8, 9, 10, 12, 13) else (3, 3, 4))
        shapes = [shape.scaled(about, scale, shift) for shape in shapes]
        fatty = s.liver - hu[0] if label == 6 else 0  # takes up contrast like a healthy one
        value = s.now(tuple(h + fatty for h in hu)) + rng.normal(0, 9 if label in (6, 8, 9) else 5)
        if label == 7:
            content = s.swallowed(150, 260) if s.oral else uniform(0, 60)
            s.hollow(shapes, value, content, uniform(0, 0.3), 0.72, label)
            continue
        box, mask, square = s.paint(shapes, value, label)
        here, texture = s.hu[box], s.texture[box]
        if label == 6:
            _liver_vessels(s, about + shift)
        elif label == 1:  # early on, the spleen takes up contrast in stripes
            here[mask] += s.iodine * 45 * max(0, 1 - s.phase) * np.sin(3 * texture[mask])
        elif label in (2, 3):
            medulla = mask & (square < 0.62 + 0.1 * texture)
            here[medulla] = s.now((32, 95, 165, 162))
            side = -1 if label == 2 else 1
            centre = shapes[0].centre - np.array([side * 15, 5, 0]) * scale
            sinus = [Ellipsoid(centre, np.array([15, 10, 24]) * scale, 25 * side)]
            s.paint(sinus, s.fat_hu)  # the sinus is fat and urine, not kidney
            s.paint([sinus[0].scaled(centre, 0.45, 0)], s.now((5, 60, 90, 230)))
        elif label == 11:  # lobules with fat between them
            here[mask] -= 45 * np.clip(texture[mask] - 0.7, 0, 1.2)
        elif label == 5:
            here[mask & (square < 0.12)] = uniform(-500, 30)
        elif label == 8 and rng.random() < 0.5:  # calcified wall
            here[mask & (square > 0.6) & (texture > 1.1)] = 520 * s.contrast("bone")


def _liver_vessels(s: Scene, liver: np.ndarray) -> None:
    """Hepatic and portal veins within the liver, which remain liver in the labels, and sometimes cysts."""
    rng, uniform = s.rng, s.rng.uniform
    inside, vein = s.labels == 6, s.now((40, 90, 160, 135))
    roots = {(-22, 16, 202): ((-92, 10, 178), (-70, -45, 188), (-22, -52, 190)),  # hepatic veins
             (-50, -14, 160): ((-100, 0, 150), (-85, -40, 128), (-5, -48, 168))}  # portal vein
    for root, ends in roots.items():
        for end in np.array(ends) + rng.normal(0, 6, (3, 3)):
            s.paint([Tube(((*root, 5), (*end, 2)))], vein, 6, inside)
    for _ in range(rng.choice(4, p=(0.55, 0.25, 0.12, 0.08))):
        centre = liver + uniform(-1, 1, 3) * (45, 45, 50)
        s.paint([Ellipsoid(centre, uniform(4, 14, 3))], uniform(5, 60), 6, inside)


def patient(seed: int, number: int, shape: tuple[int, int, int] = (40, 192, 192)):
    """Generate one patient.

    Returns hu (Z, Y, X) int16, labels (Z, Y, X) uint8 with BTCV's ids 0..13, and the spacing (z, y, x) in mm.
    Slice 0 is the most inferior, row 0 anterior, column 0 the patient's right. Z lies within 10 % of shape[0];
    Y and X are shape's. The same seed, number and shape give the same patient.
    """
    s = Scene(np.random.default_rng(np.random.SeedSequence([seed, PURPOSE, number])), shape)
    _body(s)
    _bowel(s)
    _organs(s)
    # The scanner: texture where there is tissue, then noise; one in-plane point spread blurs both, so that
    # borders are soft and the noise is correlated, as a reconstruction kernel leaves them.
    s.hu += np.where(s.hu > -300, 5 * s.texture, 0)
    noise = s.rng.uniform(22, 42) * (120 / s.kv) ** NOISE_EXPONENT  # 10 to 18 HU at 120 kV, once blurred
    s.hu += np.float32(noise) * s.rng.standard_normal(s.shape, dtype=np.float32)
    for axis in (1, 2):
        s.hu = gaussian_filter1d(s.hu, 0.65, axis, truncate=3)
    return np.clip(np.rint(s.hu), -1024, 3071).astype(np.int16), s.labels, tuple(float(v) for v in s.spacing)


def _save(path: Path, array: np.ndarray, spacing: tuple[float, float, float], axes: str) -> None:
    """Write (Z, Y, X) as NIfTI whose axes on disk point to `axes`, with the affine that says so."""
    size = np.array(spacing[::-1])
    affine = np.diag([*(size * (-1, -1, 1)), 1.0])
    affine[:3, 3] = -(np.array(array.shape[::-1]) - 1) / 2 * np.diag(affine)[:3]
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    image = image.as_reoriented(ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(axes)))
    image.header["descrip"] = b"phantom"
    image.header.set_xyzt_units("mm")
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    path.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


def _write_patient(seed: int, number: int, shape: tuple, image: Path, label: Path | dict[int, Path] | None) -> int:
    hu, labels, spacing = patient(seed, number, shape)
    axes = ORIENTATIONS[number % len(ORIENTATIONS)]
    _save(image, hu, spacing, axes)
    for organ, path in _masks(label).items():
        _save(path, labels if organ is None else (labels == organ).astype(np.uint8), spacing, axes)
    return len(hu)


def _masks(label: Path | dict[int, Path] | None) -> dict[int | None, Path]:
    """{organ, None of all: file} of a patient's label."""
    return label if isinstance(label, dict) else {None: label} if label else {}


def write(folder: str | os.PathLike, seed: int = 0, labelled: int = 30, unlabelled: int = 40,
          shape: tuple[int, int, int] = (40, 192, 192), workers: int | None = None, layout: str | None = None) -> int:
    """Write the phantom: `labelled` patients under BTCV's ids, `unlabelled` ones as AbdomenCT-1K's cases.

    BTCV/RawData/Training/{img/img,label/label}0001.nii.gz are patient(seed, 1) and so on;
    AbdomenCT-1K/Case_00001_0000.nii.gz is patient(seed, 1001). In one of phantom_layouts.LAYOUTS the labelled ones lie
    in `folder` itself, as there. Returns the number of slices. The folder appears whole or not at all. Raises BadInput
    when it exists or the numbers are out of range.
    """
    folder = Path(folder)
    if not 0 <= labelled <= len(BTCV_IDS) or unlabelled < 0 or labelled + unlabelled == 0:
        raise BadInput(f"{labelled} labelled and {unlabelled} unlabelled patients; "
                       f"give 0 to {len(BTCV_IDS)} labelled ones, any number unlabelled, and one at least")
    if seed < 0:
        raise BadInput(f"seed {seed} is negative; give 0 or more")
    if os.path.lexists(folder):
        raise BadInput(f"{folder}: exists already; remove it or give another folder")
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    training = Path("BTCV", "RawData", "Training")
    jobs = [(seed, UNLABELLED + i, shape, part / "AbdomenCT-1K" / f"Case_{i:05d}_0000.nii.gz", None)
            for i in range(1, unlabelled + 1)]
    for i in BTCV_IDS[:labelled]:
        files = (phantom_layouts.places(layout, part, i) if layout else
                 (part / training / "img" / f"img{i:04d}.nii.gz", part / training / "label" / f"label{i:04d}.nii.gz"))
        jobs.append((seed, i, shape, *files))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    try:
        for *_, image, label in jobs:
            for path in (image, *_masks(label).values()):
                path.parent.mkdir(parents=True, exist_ok=True)
        if layout:
            phantom_layouts.describe(layout, part, BTCV_IDS[:labelled])
        slices = 0
        with ProcessPoolExecutor(min(workers or cores(), len(jobs)), context, signal.signal,
                                 (signal.SIGINT, signal.SIG_IGN)) as pool:  # Ctrl-C: the parent answers it
            try:
                futures = [pool.submit(_write_patient, *job) for job in jobs]
                for future in tqdm(as_completed(futures), "phantom", len(jobs), unit="patient", disable=None):
                    slices += future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            raise BadInput(f"{folder}: was made by another process meanwhile; use it as it is") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return slices


def ensure(folder: str | os.PathLike = "data/phantom") -> Path:
    """The phantom's folder, made with the defaults first when it is missing; safe from several processes."""
    folder = Path(folder)
    if not folder.exists():
        try:
            write(folder)
        except BadInput:
            if not folder.exists():
                raise
    return folder


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Write a generated abdomen in both data sets' layouts.")
    parser.add_argument("--out", type=Path, default=Path("data/phantom"), help="folder to make (%(default)s)")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--layout", choices=phantom_layouts.LAYOUTS, help="labelled patients alone, in this layout")
    parser.add_argument("--labelled", type=whole(0), default=30, help="patients under BTCV's ids, at most 30")
    parser.add_argument("--unlabelled", type=whole(0), help="patients as cases of AbdomenCT-1K (40, or 0)")
    args = parser.parse_args(argv)
    if args.layout and args.unlabelled:
        parser.error(f"--layout {args.layout} has labelled patients alone; leave --unlabelled out")
    if args.unlabelled is None:
        args.unlabelled = 0 if args.layout else 40
    start = time.perf_counter()
    slices = write(args.out, args.seed, args.labelled, args.unlabelled, layout=args.layout)
    print(f"{args.labelled} labelled and {args.unlabelled} unlabelled patients, {slices} slices in {args.out}, "
          f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
