"""A generated patient while being painted: shapes in mm, the physics of grey values, the volume they go to.

A patient is a table of implicit shapes (ellipsoids and tubes, in mm) evaluated in smoothly warped coordinates,
so no border is a plain ellipse; the same shapes paint the image and the labels. Organs differ by 10 to 80 HU
under correlated noise, and contrast phase, size and fat vary from patient to patient.

Grey values vary as between real patients, so that a grey value alone does not tell an organ (all taken from
what is published, before any result was looked at):
- tube voltage: from 80 to 140 kV the contrast to water falls by 52 % for iodine, 35 % bone, 21 % fat, 11 % muscle
  (Proc. SPIE, 2004, doi 10.1117/12.535608): powers of the voltage in EXPONENTS, 1 at 120 kV;
- iodine: 0.3 to 0.5 g per kg of body weight, to which enhancement is proportional (AJR, doi 10.2214/AJR.15.15138),
  at one dose 54.8 +- 11 and 50.0 +- 12 HU in the liver (PubMed 33386915), hence a variation of 22 %;
- some scans are unenhanced: 15 %, our choice;
- livers: 58.3 +- 8.9 HU unenhanced, 32.4 +- 13.8 in the 23 of 214 with severe steatosis
  (Int J Legal Med 2019, doi 10.1007/s00414-019-02016-1).
Other values are round textbook ones.

Coordinates: x to the patient's left, y posterior, z superior, mm; the origin lies in the middle of the belly at
the lowest slice of an average patient, whose lung bases lie at z = 220.
"""

from typing import NamedTuple

import numpy as np

GAS, FAT = -950, -100
VOLTAGES, SHARES = (80, 100, 120, 140), (0.1, 0.25, 0.5, 0.15)  # kV; shares of patients: our choice
EXPONENTS = {"iodine": 1.31, "bone": 0.77, "fat": 0.42, "soft": 0.21}  # contrast to water ~ (120 / kV) ** exponent
UNENHANCED = 0.15


class Ellipsoid(NamedTuple):
    """Centre and radii (x, y, z) in mm, turned."""

    centre: tuple  # x, y, z
    radii: tuple
    turn: float = 0  # degrees in the axial plane, then
    tilt: float = 0  # degrees in the coronal plane

    def scaled(self, about, scale, shift):
        """Scaled about a point, then shifted, in mm."""
        return self._replace(centre=about + scale * (np.array(self.centre) - about) + shift,
                             radii=scale * np.array(self.radii))

    def _axes(self):
        c, s = np.cos(np.radians(self.turn)), np.sin(np.radians(self.turn))
        d, t = np.cos(np.radians(self.tilt)), np.sin(np.radians(self.tilt))
        return np.array([[d, 0, t], [0, 1, 0], [-t, 0, d]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])

    def bounds(self):
        """The corners of its box: lowest and highest (x, y, z)."""
        half = np.sqrt(((self._axes() * np.array(self.radii)) ** 2).sum(1))
        return self.centre - half, self.centre + half

    def square(self, x, y, z):
        """Squared relative distance from the centre: 1 on the border."""
        dx, dy, dz = (p - np.float32(c) for p, c in zip((x, y, z), self.centre, strict=True))
        rows = (self._axes() / np.array(self.radii)).T.astype(np.float32)
        return sum((a * dx + b * dy + c * dz) ** 2 for a, b, c in rows)


class Tube(NamedTuple):
    """Round and smooth along a centre line, its radius changing from point to point, in mm."""

    points: tuple  # rows of x, y, z, radius

    @property
    def centre(self):
        """The mean of its points, (x, y, z)."""
        return np.mean(self.points, axis=0)[:3]

    def scaled(self, about, scale, shift):
        """Scaled about a point, then shifted, in mm."""
        points = np.array(self.points, float) * scale
        points[:, :3] += (1 - scale) * about + shift
        return Tube(points)

    def bounds(self):
        """The corners of its box: lowest and highest (x, y, z)."""
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
