"""A generated abdomen, painted: the body, BTCV's 13 organs, all that lies between them; and the scanner's noise.

About 11 HU of noise is usual in abdominal CT at 120 kV; from there to 80 kV it grows 1.9 times at equal tube current
(J Biomed Biotechnol 2012, doi 10.1155/2012/130169), here by the root of that: the current is raised, too.
Coordinates as in phantom_scene.py.
"""

import numpy as np
from scipy.ndimage import gaussian_filter1d

from ct.phantom_scene import Ellipsoid, Scene, Tube

PURPOSE = 4001  # the phantom's entry in SeedSequence([seed, purpose, patient])
NOISE_EXPONENT = 0.78

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


def _body(s: Scene) -> None:
    """Skin, fat, muscle, ribs, spine, lungs and couch; marks the abdominal cavity as free."""
    square, depth = _wall(s)
    _ribs(s, depth)
    _lungs(s, square, depth < 0)
    _spine(s)
    _couch(s)


def _wall(s: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Skin, fat and muscle. Returns the cavity's squared relative radius, and the depth in the wall, mm outside it."""
    x, y, _ = s.body
    u, v = x / s.cavity[0], (y + 8) / s.cavity[1]
    square = u * u + v * v - 0.25 * (u * v) ** 2  # a little squarer than an ellipse
    radius = np.hypot(x, y + 8)
    depth = radius - radius / np.sqrt(np.maximum(square, 1e-4))  # along the ray
    back = np.clip((y + 8) / (radius + 1) * 2.5 - 1.5, 0, 1)
    muscle = 10 + 23 * back * back + s.texture * 0.5
    fat = muscle + s.fat * (1 - 0.55 * back) * (1 + 0.25 * np.abs(u))
    hu = s.hu
    hu[depth < fat + 3] = 25  # skin
    hu[depth < fat] = s.fat_hu
    hu[depth < muscle] = s.now((54, 54, 62, 60))
    hu[(depth < muscle - 3) & (depth > 3) & (s.texture > 1.6)] = s.fat_hu  # between the muscles
    seam = np.minimum(np.abs(x), np.abs(np.abs(x) - 62)) < 2
    hu[seam & (depth < muscle) & (y < -30)] = -30  # linea alba, and the outer borders of the rectus muscles
    return square, depth


def _ribs(s: Scene, depth: np.ndarray) -> None:
    """They slope down to the front within the wall; the front ends are cartilage."""
    x, y, z = s.body
    slope = z + 0.55 * y
    near = (depth > 0.5) & (depth < 8.5) & (slope > 95) & (np.abs(x) > 24)
    phase = np.abs((slope[near] / 27) % 1 - 0.5) * 27
    shell = np.maximum(phase / 6.5, np.abs(depth[near] - 4.5) / 3.8)
    bone = np.where(shell > 0.6, 520, 230)
    bone = np.where(y[near] < -62, 115, bone) * s.contrast("bone")
    s.hu[near] = np.where(shell < 1, bone, s.hu[near])


def _lungs(s: Scene, square: np.ndarray, inside: np.ndarray) -> None:
    """Lungs, diaphragm, heart and mediastinum; what is below them in the cavity is free."""
    hu, (_, y, z) = s.hu, s.body
    # the diaphragm's dome: the lungs reach lowest behind
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


def _spine(s: Scene) -> None:
    """Vertebrae and discs; arch, spinous and transverse processes around the canal; the muscles beside them."""
    x, y, z = s.body
    near = (np.abs(x) < 48) & (y > 28) & (y < 122)
    x, y, z = x[near], y[near], z[near]
    value, mineral = s.hu[near], s.contrast("bone")
    level = np.abs((z / 33) % 1 - 0.5) * 33  # mm from a vertebra's middle
    body = (x / 23) ** 2 + ((y - 56) / 18) ** 2
    canal = (x / 10) ** 2 + ((y - 80) / 8) ** 2
    value[(np.abs(x) < 42 - 0.5 * level) & (np.abs(y - 84 - 0.12 * np.abs(x)) < 4) & (level < 8)] = 300 * mineral
    value[(canal < 2.6) & (level < 13)] = 380 * mineral
    value[(np.abs(x) < 3.5) & (y > 86) & (y < 112) & (level < 11)] = 320 * mineral
    marrow = np.where(body > 0.8, 380, 190 + 30 * np.clip(level - 9, 0, 4))
    value[body < 1] = np.where(level < 13, marrow * mineral, 90)[body < 1]
    value[canal < 1] = 30
    s.hu[near] = value
    bone = np.zeros_like(s.free)
    bone[near] = body < 1.1
    s.free &= ~bone
    for side in (-1, 1):  # psoas, and the crura of the diaphragm beside the aorta
        for shape in (Tube(((side * 42, 54, -20, 19), (side * 33, 58, 60, 14), (side * 27, 60, 120, 6))),
                      Tube(((side * 15, 38, 95, 4), (side * 17, 33, 150, 6), (side * 19, 28, 195, 4)))):
            box, mask, _ = s.paint([shape], s.now((55, 55, 64, 62)))
            s.free[box] &= ~mask


def _couch(s: Scene) -> None:
    """A curved plate under the back."""
    row = np.flatnonzero((s.hu > -500).any((0, 2)))[-1] * s.step[1] + s.first[1] + 1
    columns = s.first[2] + np.arange(s.shape[2]) * s.step[2]
    rows = s.first[1] + np.arange(s.shape[1]) * s.step[1]
    under = rows[:, None] - row + 0.0009 * columns**2
    shell = np.clip(1 - np.abs(np.abs(under - 12) - 11) / s.step[1], 0, 1)
    couch = np.where((np.abs(under - 12) < 12 + s.step[1]) & (np.abs(columns) < 170), -930 + 900 * shell, -1000)
    np.maximum(s.hu, couch.astype(np.float32), out=s.hu)


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
