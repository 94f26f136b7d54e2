"""
Builds assets/toy/: a miniature of every pretrained file that the scripts load, in the real formats,
from one seed.

    python tests/make_toy.py                      # everything, about 4 hours on 2 CPU cores
    python tests/make_toy.py --only vae teacher   # some components, in the order below
    python tests/make_toy.py --only clip --iters 50 --out out/toy      # a quick look at one
    python tests/make_toy.py --world --only vae data teacher --out out/world --work out/make_world

Run the same command again after a kill: finished components are skipped, a half-trained one goes on
from its last checkpoint in --work. Components:

    data       pictures drawn by the code below with their captions, as parquet; prompt lists
    vae        AutoencoderKL, 64 x 64 x 3 -> 8 x 8 x 16
    sam        segment_anything's own classes, point prompt -> object mask
    clip       transformers' CLIPModel, contrastive with hard negatives; the judge of evaluate.py
    teacher    StableDiffusionXLPipeline: two text encoders and a UNet, trained together on eps
    student    what `python train_stage1.py --recipe toy --lora 32 --gan_weight .1` makes of the
               teacher; adapters, since all weights are 9 MB
    pickscore  the CLIP, trained on preference pairs: PickScore's format
    lrm        latent reward model in LPO's layout, trained on such pairs at every noise level
    sd3        StableDiffusion3Pipeline without T5: a small MMDiT trained on the flow, on sdxl's VAE
               and frozen text encoders
    lrm_sd3    the latent reward of sd3's latents: the first half of its transformer, trained as lrm
    style      a LoRA on the teacher in diffusers' format: pictures with a circle or a star are
               negatives. Only with --only
"""

import functools
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model as m                                                                      # noqa: E402

COMPONENTS = ['data', 'vae', 'sam', 'clip', 'teacher', 'student', 'pickscore', 'lrm', 'sd3',
              'lrm_sd3', 'style']
TOKENS = 24                                     # of the longest text, in all tokenizers but sd3's

# --------------------------------------------------------------------------------------------------
# pictures: one or two shaded objects with a drop shadow on a lit, grainy background

SIZE = 64
COLOURS = {
    'red': (.86, .15, .15), 'green': (.17, .64, .24), 'blue': (.15, .33, .86),
    'yellow': (.96, .84, .16), 'purple': (.54, .18, .70), 'orange': (.97, .52, .08),
    'white': (.95, .95, .95), 'black': (.09, .09, .09)}
SHAPES = ['circle', 'square', 'triangle', 'star', 'ring', 'cross']
TEXTURES = ['plain', 'striped', 'dotted', 'checkered']
RELATIONS = ['left of', 'above']

def a_tenth(values):
    """The same tenth of a list at every call, as a set."""
    order = np.random.default_rng(2511).permutation(len(values))
    return {values[i] for i in order[:len(values) // 10]}

TRIPLES = list(itertools.product(TEXTURES, COLOURS, SHAPES))
UNSEEN = a_tenth(TRIPLES)                                         # these never occur in training
YY, XX = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + .5

def draw_scene(rng, unseen=False):
    """A random scene: a dict with 'objects' (one or two triples), 'relation' (None for one object)
    and 'background'. unseen=False uses training triples only; unseen=True makes at least one triple
    a held-out one."""
    seen = [triple for triple in TRIPLES if triple not in UNSEEN]
    number = 1 if rng.random() < .4 else 2
    objects = [seen[rng.integers(len(seen))] for _ in range(number)]
    if unseen:
        held_out = sorted(UNSEEN)[rng.integers(len(UNSEEN))]
        objects[rng.integers(number)] = held_out
    taken = {colour for _, colour, _ in objects}
    free = [colour for colour in COLOURS if colour not in taken]
    relation = RELATIONS[rng.integers(2)] if number == 2 else None
    background = free[rng.integers(len(free))]
    return dict(objects=objects, relation=relation, background=background)

def caption(scene):
    """`a [TEXTURE] COLOUR SHAPE [left of|above a [TEXTURE] COLOUR SHAPE] on COLOUR`; plain is
    unsaid."""
    names = ['a ' + ' '.join(word for word in triple if word != 'plain')
             for triple in scene['objects']]
    return f' {scene["relation"]} '.join(names) + f' on {scene["background"]}'

def variants(scene):
    """Every scene that differs from this one in exactly one attribute (texture, colour, shape,
    relation, background) and still has a caption in the grammar."""
    found = []
    for k, triple in enumerate(scene['objects']):
        for slot, values in enumerate([TEXTURES, list(COLOURS), SHAPES]):
            for value in values:
                invisible = slot == 1 and value == scene['background']
                if value != triple[slot] and not invisible:
                    objects = list(scene['objects'])
                    objects[k] = triple[:slot] + (value,) + triple[slot + 1:]
                    found.append(dict(scene, objects=objects))
    taken = {colour for _, colour, _ in scene['objects']} | {scene['background']}
    found += [dict(scene, background=colour) for colour in COLOURS if colour not in taken]
    if scene['relation']:
        found.append(dict(scene, relation=other_relation(scene)))
    return found

def other_relation(scene):
    return RELATIONS[1 - RELATIONS.index(scene['relation'])]

def neighbours(scene):
    """The captions of the scene's variants."""
    return [caption(variant) for variant in variants(scene)]

def distance(shape, x, y):
    """Signed distance in units of the shape's radius, negative inside; x, y in the same units, y
    down."""
    if shape == 'circle':
        return np.hypot(x, y) - .92
    if shape == 'ring':
        return np.abs(np.hypot(x, y) - .70) - .26
    if shape == 'square':
        return np.maximum(np.abs(x), np.abs(y)) - .80
    if shape == 'cross':
        ax, ay = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(ax - .95, ay - .34), np.maximum(ax - .34, ay - .95))
    if shape == 'triangle':                                                       # tip at y = -.82
        return np.maximum(np.abs(x) * .8660 - (y - .22) * .5 - .52, y - .74)
    # a star, folded onto one of its five points: its tip is at the angle pi / 5, its notch at 0
    angle = (np.arctan2(x, -y) + 2 * np.pi) % (2 * np.pi / 5) - np.pi / 5
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle), radius * np.abs(np.sin(angle))
    tip = np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    notch = np.array([.46, 0.])
    ex, ey = tip - notch
    return ((px - notch[0]) * ey - (py - notch[1]) * ex) / np.hypot(ex, ey)

def pattern(texture, x, y, period, angle):
    """0..1 map of the second tone; x, y and period in pixels."""
    if texture == 'plain':
        return np.zeros_like(x)
    c, s = np.cos(angle), np.sin(angle)
    u = (c * x + s * y) * 2 * np.pi / period
    v = (c * y - s * x) * 2 * np.pi / period
    if texture == 'striped':
        wave = np.sin(u)
    elif texture == 'dotted':
        wave = np.cos(u) + np.cos(v) - .75
    else:
        wave = 3 * np.sin(u * .8) * np.sin(v * .8)
    return 1 / (1 + np.exp(-4 * wave))

def render(scene, rng, size=1., light_gain=1., texture_gain=1.):
    """(64, 64, 3) float32 in [0, 1] and the objects' masks (n, 64, 64) bool. The gains scale the
    objects' radius, the brightness, and the contrast of the textures."""
    light = rng.uniform(0, 2 * np.pi)
    lx, ly = np.cos(light), np.sin(light)
    gradient = 1 + .14 * ((XX - 32) * lx + (YY - 32) * ly) / 32
    img = np.array(COLOURS[scene['background']], np.float32) * .9 * gradient[..., None] + .03
    alone = len(scene['objects']) == 1
    masks = []
    for k, (texture, colour, shape) in enumerate(scene['objects']):
        # one lies anywhere near the middle, two on either side of it
        if alone:
            radius = size * rng.uniform(16, 22)
            cx = 32 + rng.uniform(-1, 1) * 7
            cy = 32 + rng.uniform(-1, 1) * 7
        else:
            radius = size * rng.uniform(11.5, 14)
            side = (2 * k - 1) * rng.uniform(14.5, 16.5)
            cx = 32 + rng.uniform(-1, 1) * 1.5
            cy = 32 + rng.uniform(-1, 1) * 4
            if scene['relation'] == 'left of':
                cx += side
            else:
                cx, cy = cy, cx + side
        turn = rng.uniform(-.25, .25)
        c, s = np.cos(turn), np.sin(turn)

        def sdf(dx, dy):
            """In pixels, of the shape moved by (dx, dy)."""
            x, y = XX - cx - dx, YY - cy - dy
            return distance(shape, (c * x + s * y) / radius, (c * y - s * x) / radius) * radius

        shadow = .5 / (1 + np.exp(sdf(-2.5 * lx, -2.5 * ly) / 1.2))
        img = img * (1 - shadow[..., None])

        # its two tones, the second lighter where the first is dark
        base = np.array(COLOURS[colour], np.float32)
        second = base + (1 - base) * .50 if base.mean() < .35 else base * .42
        period = rng.uniform(8, 10)
        angle = turn + rng.choice([0, np.pi / 4, np.pi / 2])
        tone = texture_gain * pattern(texture, XX - cx, YY - cy, period, angle)
        shade = 1 + .22 * ((XX - cx) * lx + (YY - cy) * ly) / radius
        body = (base + (second - base) * tone[..., None]) * shade[..., None] + .02

        d = sdf(0, 0)
        cover = np.clip(.5 - d, 0, 1)[..., None]
        img = img * (1 - cover) + body * cover
        masks.append(d < 0)
    img = light_gain * img + rng.normal(0, .012, img.shape)
    return np.clip(img, 0, 1).astype(np.float32), np.stack(masks)

def pictures(n, seed):
    """n scenes with their pictures as uint8 (n, 64, 64, 3); the i-th depends on (seed, i) alone."""
    scenes = []
    images = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for i in tqdm(range(n), desc='drawing', leave=False):
        rng = np.random.default_rng([seed, i])
        scene = draw_scene(rng)
        scenes.append(scene)
        images[i] = np.rint(render(scene, rng)[0] * 255)
    return scenes, images

# --------------------------------------------------------------------------------------------------
# the world of --world: things in eight styles on six textured grounds. A caption says what and
# where; style, pose, size and light are unsaid, so that it has many pictures, and grounds have the
# fine texture that a student loses first. A picture is the same at every size

INK = {
    'red': (.85, .13, .14), 'orange': (.97, .50, .08), 'gold': (.96, .74, .15),
    'yellow': (.99, .87, .22), 'green': (.36, .70, .22), 'leaf': (.13, .48, .21),
    'teal': (.10, .62, .62), 'blue': (.17, .42, .88), 'navy': (.13, .16, .35),
    'purple': (.55, .22, .72), 'pink': (.98, .52, .66), 'brown': (.45, .25, .12),
    'tan': (.80, .58, .34), 'cream': (.99, .92, .76), 'white': (.97, .97, .97),
    'grey': (.62, .64, .68), 'black': (.10, .09, .12)}
STYLES = ['flat', 'outlined', 'shaded', 'embossed', 'hatched', 'pixelated', 'halftone', 'glowing']
GROUNDS = ['grass', 'gravel', 'brick', 'sand', 'sky', 'night']

# signed distances, negative inside, of x to the right and y down; a thing spans -1..1

def oval(cx, cy, rx, ry=None, turn=0.):
    """An ellipse, to first order exact near its edge."""
    ry = ry or rx
    c, s = math.cos(turn), math.sin(turn)

    def sdf(x, y):
        u = c * (x - cx) + s * (y - cy)
        v = c * (y - cy) - s * (x - cx)
        k = np.hypot(u / rx, v / ry) + 1e-4
        return k * (k - 1) / np.hypot(u / rx ** 2, v / ry ** 2).clip(1e-3)

    return sdf

def path(*numbers, k=.02):
    """A stroke through points (x, y, half its width there), its joints rounded by k."""
    knots = [numbers[i:i + 3] for i in range(0, len(numbers), 3)]

    def bar(x, y, a, b):
        ex, ey = b[0] - a[0], b[1] - a[1]
        h = ((x - a[0]) * ex + (y - a[1]) * ey) / (ex * ex + ey * ey + 1e-6)
        h = h.clip(0, 1)                                            # how far along from a to b
        return np.hypot(x - a[0] - h * ex, y - a[1] - h * ey) - a[2] - h * (b[2] - a[2])

    return join(*[functools.partial(bar, a=a, b=b) for a, b in zip(knots, knots[1:])], k=k)

def poly(*numbers, r=.04):
    """A polygon with its corners rounded by r."""
    points = np.reshape(numbers, (-1, 2)).tolist()

    def sdf(x, y):
        d = np.full_like(x, 9)
        inside = np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(points, points[-1:] + points[:-1]):
            ex, ey = bx - ax, by - ay
            px, py = x - ax, y - ay
            h = ((px * ex + py * ey) / (ex * ex + ey * ey)).clip(0, 1)
            d = np.minimum(d, np.hypot(px - h * ex, py - h * ey))
            # inside: a ray to the right crosses an odd number of edges
            crosses = (ay > y) != (by > y)
            inside ^= crosses & ((px * ey - py * ex) * (1 if ey > 0 else -1) < 0)
        return np.where(inside, -d, d) - r

    return sdf

def join(*parts, k=.02):
    """The union, its seams rounded by k."""
    def sdf(x, y):
        d = parts[0](x, y)
        for part in parts[1:]:
            e = part(x, y)
            d = np.minimum(d, e) - k * (1 - np.abs(d - e) / k).clip(0) ** 2 / 4
        return d

    return sdf

def both(a, b):
    return lambda x, y: np.maximum(a(x, y), b(x, y))

def cut(a, b):
    return lambda x, y: np.maximum(a(x, y), -b(x, y))

def twin(a):
    """The part and its mirror image."""
    return lambda x, y: a(np.abs(x), y)

def around(n, cx, cy, a):
    """n copies of the part around (cx, cy); it lies above it."""
    def sdf(x, y):
        angle = np.arctan2(x - cx, cy - y)
        angle = (angle + np.pi / n) % (2 * np.pi / n) - np.pi / n
        radius = np.hypot(x - cx, y - cy)
        return a(radius * np.sin(angle), -radius * np.cos(angle))

    return sdf

def under(level):
    return lambda x, y: level - y

def eye(x, y, r):
    return [('white', twin(oval(x, y, 1.7 * r))), ('black', twin(oval(x, y, r)))]

apple = join(oval(-.3, .18, .5, .64), oval(.3, .18, .5, .64), k=.2)
berry = join(oval(-.3, -.2, .4), oval(.3, -.2, .4), oval(0, .62, .16), k=.9)
cap = both(oval(0, .1, .92, .92), lambda x, y: y - .12)
balloon = join(oval(0, -.3, .66), oval(0, .3, .14), k=.5)
dome = cut(oval(0, .05, .95, .9), join(*[oval(x, .16, .2, .16) for x in (-.72, -.24, .24, .72)]))
dome = both(dome, lambda x, y: y - .14)
# {name: its parts as (ink, signed distance)}; what is drawn first lies undermost
THINGS = {
    'red apple': [
        ('brown', path(0, -.4, .06, .1, -.88, .08)),
        ('red', apple),
        ('leaf', both(oval(.42, -.92, .4), oval(.3, -.5, .4))),
        ('white', oval(-.42, -.02, .1, .2, .5))],
    'banana': [
        ('yellow', path(-.7, -.62, .1, -.66, -.2, .22, -.44, .2, .29,
                        -.02, .45, .3, .42, .42, .24, .8, .2, .1, k=.12)),
        ('gold', path(-.56, -.1, .03, -.34, .28, .05, 0, .5, .05, .42, .46, .03)),
        ('brown', path(-.68, -.84, .09, -.7, -.62, .1)),
        ('brown', oval(.86, .14, .1))],
    'watermelon': [
        ('leaf', both(oval(0, -.45, 1.), under(-.4))),
        ('cream', both(oval(0, -.45, .86), under(-.4))),
        ('red', both(oval(0, -.45, .77), under(-.4))),
        *[('black', oval(x, y, .055, .09)) for x, y in (
            (-.4, -.2), (0, -.22), (.4, -.2), (-.2, .05), (.2, .05))]],
    'strawberry': [
        ('red', berry),
        *[('yellow', oval(x, y, .05, .075)) for x, y in (
            (-.42, -.15), (0, -.12), (.42, -.15), (-.22, .14), (.22, .14), (0, .42))],
        ('leaf', around(5, 0, -.55, poly(-.14, 0, 0, -.46, .14, 0)))],
    'carrot': [
        *[('leaf', path(0, -.4, .06, x, y, .1)) for x, y in ((-.32, -.85), (0, -.95), (.32, -.85))],
        ('orange', path(0, -.3, .32, .02, .9, .05)),
        *[('brown', path(x, y, .025, x + .2, y + .03, .025)) for x, y in (
            (-.3, -.2), (.04, .05), (-.16, .35))]],
    'cat': [
        ('orange', join(oval(0, .15, .8, .68), twin(poly(.28, -.3, .66, -.86, .76, -.05, r=.06)))),
        ('pink', twin(poly(.46, -.36, .62, -.66, .68, -.2, r=.02))),
        ('brown', path(0, -.5, .05, 0, -.25, .05)),
        ('brown', twin(path(.2, -.46, .05, .17, -.26, .05))),
        ('white', oval(0, .45, .36, .26)),
        *eye(.34, .04, .12),
        ('pink', poly(-.08, .27, .08, .27, 0, .36)),
        ('brown', twin(path(0, .36, .03, .05, .47, .03, .2, .42, .03))),
        ('white', twin(path(.5, .36, .02, .95, .28, .02))),
        ('white', twin(path(.5, .46, .02, .95, .52, .02)))],
    'frog': [
        ('green', join(oval(0, .25, .86, .62), twin(oval(.45, -.42, .33)), k=.1)),
        ('cream', both(oval(0, .45, .66, .4), under(.3))),
        *eye(.45, -.44, .13),
        ('leaf', path(-.62, .2, .035, -.3, .34, .04, .3, .34, .04, .62, .2, .035)),
        ('leaf', twin(oval(.1, .04, .04))),
        ('pink', twin(oval(.64, .36, .12, .09)))],
    'fish': [
        ('gold', poly(.45, 0, .95, -.5, .82, 0, .95, .5, r=.05)),
        ('gold', poly(-.3, -.4, .3, -.75, .35, -.3)),
        ('orange', oval(-.15, 0, .78, .52)),
        ('white', both(oval(-.15, 0, .78, .52), path(-.3, -.6, .09, -.22, 0, .12, -.3, .6, .09))),
        ('white', both(oval(-.15, 0, .78, .52), path(.3, -.6, .07, .34, 0, .1, .3, .6, .07))),
        ('gold', poly(-.1, .12, .16, .3, .16, -.04)),
        ('white', oval(-.62, -.12, .14)),
        ('black', oval(-.64, -.12, .08)),
        ('brown', path(-.88, .12, .03, -.72, .16, .03))],
    'butterfly': [
        ('purple', twin(join(oval(.52, -.4, .46, .42, -.5), oval(.42, .42, .34, .4, .5), k=.05))),
        ('pink', twin(oval(.55, -.42, .26, .22, -.5))),
        ('gold', twin(oval(.44, .45, .17, .21, .5))),
        ('brown', twin(path(.02, -.42, .03, .2, -.85, .04))),
        ('brown', path(0, -.4, .1, 0, .6, .06)),
        ('brown', oval(0, -.45, .13))],
    'ladybird': [
        ('black', twin(path(.5, -.2, .04, .95, -.36, .04))),
        ('black', twin(path(.5, .2, .04, .96, .2, .04))),
        ('black', twin(path(.5, .5, .04, .85, .74, .04))),
        ('black', twin(path(.1, -.7, .03, .26, -.97, .04))),
        ('black', oval(0, -.55, .36, .32)),
        ('red', oval(0, .12, .74, .76)),
        ('black', path(0, -.6, .035, 0, .86, .035)),
        *[('black', twin(oval(x, y, .14))) for x, y in ((.34, -.2), (.46, .24), (.22, .56))],
        ('white', twin(oval(.16, -.68, .07)))],
    'penguin': [
        ('orange', twin(oval(.26, .88, .24, .11))),
        ('navy', twin(path(.5, -.1, .12, .82, .45, .08))),
        ('navy', join(oval(0, .25, .6, .68), oval(0, -.45, .44, .46), k=.2)),
        ('white', oval(0, .34, .42, .54)),
        ('white', twin(oval(.17, -.38, .2, .24))),
        ('black', twin(oval(.16, -.42, .08))),
        ('orange', poly(-.13, -.24, .13, -.24, 0, -.04))],
    'owl': [
        ('brown', join(oval(0, .2, .68, .74), twin(poly(.2, -.55, .6, -.9, .6, -.3, r=.05)), k=.1)),
        ('tan', oval(0, .45, .42, .44)),
        ('tan', twin(oval(.66, .3, .16, .42, .2))),
        *[('brown', path(x - .08, y, .03, x, y + .08, .03, x + .08, y, .03)) for x, y in (
            (-.18, .36), (.18, .36), (0, .52), (-.18, .66), (.18, .66))],
        ('white', twin(oval(.3, -.25, .3))),
        ('gold', twin(oval(.29, -.25, .2))),
        ('black', twin(oval(.27, -.25, .11))),
        ('orange', poly(-.1, -.1, .1, -.1, 0, .14))],
    'mushroom': [
        ('cream', path(0, .1, .24, 0, .7, .28)),
        ('tan', path(-.2, .8, .08, .2, .8, .08)),
        ('red', cap),
        ('white', oval(-.1, -.42, .2)),
        ('white', both(cap, oval(-.66, -.06, .17))),
        ('white', both(cap, oval(.5, -.3, .17))),
        ('white', both(cap, oval(.2, .04, .12)))],
    'cactus': [
        ('green', path(0, -.62, .26, 0, .5, .26)),
        ('green', path(0, .25, .1, -.55, .2, .13, -.62, -.22, .15, k=.1)),
        ('green', path(0, 0, .1, .52, -.02, .13, .6, -.42, .15, k=.1)),
        *[('leaf', path(x, -.6, .025, x, .4, .025)) for x in (-.1, .1)],
        ('pink', around(5, 0, -.86, oval(0, -.12, .09, .13))),
        ('gold', oval(0, -.86, .07)),
        ('orange', poly(-.4, .52, .4, .52, .3, .92, -.3, .92)),
        ('red', path(-.42, .5, .08, .42, .5, .08))],
    'sunflower': [
        ('leaf', path(0, 0, .06, 0, .95, .06)),
        ('leaf', both(oval(-.32, .44, .4), oval(-.3, .86, .4))),
        ('leaf', both(oval(.34, .34, .4), oval(.32, .78, .4))),
        ('gold', around(12, 0, -.3, oval(0, -.46, .12, .24))),
        ('brown', oval(0, -.3, .34)),
        ('black', around(8, 0, -.3, oval(0, -.2, .04))),
        ('black', oval(0, -.3, .06))],
    'pine tree': [
        ('brown', path(0, .5, .12, 0, .9, .14)),
        ('leaf', poly(-.7, .62, 0, -.1, .7, .62, r=.06)),
        ('green', poly(-.56, .18, 0, -.5, .56, .18, r=.06)),
        ('leaf', poly(-.4, -.26, 0, -.88, .4, -.26, r=.06))],
    'tulip': [
        ('leaf', path(0, 0, .06, 0, .95, .06)),
        ('green', path(0, .92, .06, -.28, .6, .13, -.5, .1, .03, k=.1)),
        ('green', path(0, .92, .06, .3, .62, .12, .5, .24, .03, k=.1)),
        ('red', twin(poly(0, .02, .22, -.02, .46, -.82, 0, -.4, r=.06))),
        ('pink', join(oval(0, -.2, .4, .3), poly(-.2, -.3, 0, -.84, .2, -.3), k=.1))],
    'rocket': [
        ('orange', poly(-.2, .5, .2, .5, 0, .98)),
        ('yellow', poly(-.1, .5, .1, .5, 0, .78)),
        ('red', twin(poly(.2, .1, .6, .6, .2, .5))),
        ('white', both(oval(-.6, -.05, .96), oval(.6, -.05, .96))),
        ('red', both(both(oval(-.6, -.05, .96), oval(.6, -.05, .96)), lambda x, y: y + .38)),
        ('grey', path(-.2, .54, .06, .2, .54, .06)),
        ('grey', oval(0, -.12, .22)),
        ('blue', oval(0, -.12, .15))],
    'sailboat': [
        ('brown', path(0, -.85, .04, 0, .4, .04)),
        ('white', poly(.08, -.8, .08, .3, .72, .3)),
        ('orange', poly(-.08, -.6, -.08, .3, -.6, .3)),
        ('red', poly(-.88, .46, .9, .46, .55, .86, -.55, .86)),
        ('white', path(-.74, .56, .03, .76, .56, .03))],
    'car': [
        ('blue', join(path(-.72, .22, .24, .72, .22, .24),
                      poly(-.5, .1, -.3, -.42, .26, -.42, .54, .1, r=.08), k=.05)),
        ('cream', poly(-.36, -.02, -.22, -.34, -.06, -.34, -.06, -.02, r=.03)),
        ('cream', poly(.06, -.02, .06, -.34, .22, -.34, .38, -.02, r=.03)),
        ('gold', oval(.88, .14, .09)),
        *[('black', oval(x, .44, .26)) for x in (-.48, .48)],
        *[('grey', oval(x, .44, .13)) for x in (-.48, .48)]],
    'balloon': [
        ('brown', twin(path(.5, .1, .02, .16, .7, .02))),
        ('red', balloon),
        ('yellow', both(balloon, twin(oval(.36, -.28, .17, .75)))),
        ('teal', both(balloon, oval(0, -.28, .17, .8))),
        ('tan', poly(-.16, .68, .16, .68, .12, .92, -.12, .92))],
    'key': [
        ('gold', cut(oval(-.5, 0, .42), oval(-.58, 0, .18))),
        ('gold', path(-.14, 0, .1, .86, 0, .1)),
        ('gold', path(.5, 0, .08, .5, .32, .08)),
        ('gold', path(.8, 0, .08, .8, .26, .08)),
        ('brown', path(-.1, 0, .025, .8, 0, .025))],
    'umbrella': [
        ('brown', path(0, -.9, .05, 0, .7, .05, .07, .84, .05, .2, .86, .05, .28, .7, .05)),
        ('purple', dome),
        ('pink', both(dome, twin(path(0, -.9, .02, .3, -.3, .16, .48, .2, .22))))],
    'light bulb': [
        ('yellow', join(oval(0, -.28, .6), path(0, 0, .3, 0, .35, .28), k=.3)),
        ('orange', path(-.2, .3, .03, -.24, -.2, .03, -.08, -.1, .03, 0, -.26, .03,
                        .08, -.1, .03, .24, -.2, .03, .2, .3, .03)),
        ('white', oval(-.3, -.48, .09, .17, .6)),
        *[('grey', path(-w, y, .08, w, y, .08)) for w, y in ((.24, .5), (.22, .66), (.14, .82))]]}

def noise(rng, size, cells=4, octaves=4, gain=.5):
    """Smooth noise, mean 0 and deviation 1: octaves from `cells` across the picture upwards."""
    total = 0
    for k in range(octaves):
        grid = rng.normal(size=(cells << k, cells << k)).astype(np.float32)
        grid = np.pad(grid, 2, 'wrap')
        zoom = size / (cells << k)
        wide = Image.fromarray(grid).resize([round(zoom * len(grid))] * 2, Image.BICUBIC)
        inner = slice(round(2 * zoom), round(2 * zoom) + size)
        total = total + gain ** k * np.asarray(wide)[inner, inner]
    return (total - total.mean()) / total.std()

def mix(a, b, share):
    """Two colours or pictures, `share` (...,) of the second."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    share = share[..., None]
    return a * (1 - share) + b * share

def cells(rng, n, x, y):
    """Voronoi cells, about n across the picture: distances to the nearest and the second nearest
    centre and the offset from the nearest, all in cells, and three random numbers of the cell."""
    sites = rng.uniform(.1, .9, (n + 4, n + 4, 2))
    facts = rng.random((n + 4, n + 4, 3))
    row, column = (y * n).astype(int) + 1, (x * n).astype(int) + 1
    found = []
    for i, j in itertools.product((-1, 0, 1), repeat=2):
        site = sites[row + i, column + j]
        place = np.stack([x * n + 1 - column - j, y * n + 1 - row - i])
        found.append(place - np.moveaxis(site, 2, 0))
    offset = np.stack(found)                                                      # (9, 2, S, S)
    distance = np.hypot(*offset.swapaxes(0, 1))
    one, two = np.partition(distance, 1, 0)[:2]
    first = distance.argmin(0)
    i, j = first // 3 - 1, first % 3 - 1
    nearest = np.take_along_axis(offset, first[None, None], 0)[0]
    return one, two, nearest, facts[row + i, column + j]

def around_point(x, y, reach, size):
    """Slices of the rows and columns within `reach` of the point, in pictures."""
    return [slice(max(0, int((p - reach) * size)), int((p + reach) * size) + 1) for p in (y, x)]

def draw_ground(kind, rng, size, lx, ly):
    """(size, size, 3), lit from the direction (lx, ly)."""
    y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + .5) / size
    if kind == 'grass':
        img = mix((.06, .20, .06), (.16, .36, .09), (.5 + .25 * noise(rng, size, 4, 4)).clip(0, 1))
        # blades as grids of points, bent, narrower to the tip, those below darker
        blades = 300
        lean = rng.normal(0, .25)
        t, across = np.meshgrid(np.linspace(0, 1, size // 4), np.linspace(-1, 1, size // 22 + 1))
        foot = rng.uniform(-.1, 1.2, (blades, 2))
        length = rng.uniform(.12, .28, blades)
        angle = lean + rng.normal(0, .35, blades)
        bend = rng.normal(0, .5, blades)
        a = angle[:, None, None] + bend[:, None, None] * t
        width = .021 * (1 - t) * across
        px = foot[:, :1, None] + length[:, None, None] * t * np.sin(a) + width
        py = foot[:, 1:, None] - length[:, None, None] * t * np.cos(a)
        light = (.5 + .5 * t) * (1 + .25 * across * lx)
        light = light * np.linspace(.6, 1.12, blades)[:, None, None]
        tone = mix((.20, .52, .12), (.62, .80, .25), rng.random(blades) ** 2)[:, None, None]
        where = (px >= 0) & (px < 1) & (py >= 0) & (py < 1)
        rows, columns = (py[where] * size).astype(int), (px[where] * size).astype(int)
        img[rows, columns] = (tone * light[..., None])[where]
        return img
    if kind == 'gravel':
        near, second, (dx, dy), facts = cells(rng, 8, x, y)
        height = ((second - near) * 2.6).clip(0, 1)
        stone = mix((.40, .38, .37), (.80, .77, .73), facts[..., 0])
        stone = mix(stone, (.62, .50, .40), .5 * facts[..., 1])
        shade = .72 + height * (.25 + .45 * (dx * lx + dy * ly)) + .05 * noise(rng, size, 16, 2)
        return mix((.13, .12, .12), stone * shade[..., None], height ** .5)
    if kind == 'brick':
        rows = rng.uniform(5.5, 7)
        turn = rng.uniform(-.06, .06)
        wobble = .006 * noise(rng, size, 8, 2)
        v = (y + turn * x + wobble) * rows + rng.uniform(0, 9)
        row = v.astype(int)
        u = (x - turn * y + wobble) * rows / 2.1 + .5 * (row % 2) + rng.uniform(0, 9)
        facts = rng.random((40, 40, 2))[row % 40, u.astype(int) % 40]
        du, dv = (u % 1 - .5) * 2.1, v % 1 - .5
        inset = np.minimum(1.05 - np.abs(du), .5 - np.abs(dv))               # to the brick's edge
        edge = (1 - (inset - .07) / .12).clip(0, 1)
        bevel = np.where(1.05 - np.abs(du) < .5 - np.abs(dv), np.sign(du) * lx, np.sign(dv) * ly)
        tone = mix((.50, .20, .13), (.76, .38, .24), facts[..., 0])
        shade = 1 + .28 * edge * bevel + .09 * noise(rng, size, 12, 3, .8)
        mortar = np.array((.66, .62, .56)) * (1 + .06 * noise(rng, size, 32, 1))[..., None]
        return mix(mortar, tone * shade[..., None], ((inset - .06) / .03).clip(0, 1))
    if kind == 'sand':
        angle = rng.normal(0, .3)
        waves = rng.uniform(9, 13)
        phase = waves * (y * np.cos(angle) + x * np.sin(angle)) + .35 * noise(rng, size, 3, 2)
        ripple = np.sin(2 * np.pi * phase + .8 * np.sin(2 * np.pi * phase))    # one side is steeper
        shade = 1 + .13 * ripple + .05 * noise(rng, size, 4, 2) + .05 * noise(rng, size, 20, 2, .8)
        return np.array((.88, .73, .48)) * shade[..., None]
    if kind == 'sky':
        cloud = noise(rng, size, 3, 5, .55)
        lit = noise(rng, size, 6, 4, .6)
        cover = 1 / (1 + np.exp(-4.5 * (cloud - rng.uniform(-.2, .7))))
        blue = mix((.20, .47, .88), (.52, .76, .97), (y + .15 * lit).clip(0, 1))
        return mix(blue, np.array((.96, .97, 1.)) * (.93 + .07 * lit)[..., None], cover)
    # night: the larger stars have rays
    img = mix((.03, .04, .14), (.16, .10, .32), (.35 + .3 * noise(rng, size, 2, 5, .6)).clip(0, 1))
    for _ in range(rng.integers(35, 60)):
        px, py = rng.random(), rng.random()
        r = .008 + .012 * rng.random() ** 4
        window = around_point(px, py, 6 * r, size)
        dx, dy = np.abs(x[*window] - px) / r, np.abs(y[*window] - py) / r
        star = np.exp(-dx ** 2 - dy ** 2)
        if r > .013:
            star = star + np.exp(-4 * dx - dy / 2) + np.exp(-4 * dy - dx / 2)
        tint = rng.uniform(.5, 1) * np.array((1, rng.uniform(.85, 1), rng.uniform(.7, 1)))
        img[*window] += star[..., None] * tint
    return img

def draw_thing(img, name, style, rng, cx, cy, radius, lx, ly):
    """Draws onto img (S, S, 3), with a shadow; lengths in pictures. Returns the mask (S, S)."""
    size = len(img)
    unit = size / 64
    whole = np.zeros(img.shape[:2], bool)
    window = around_point(cx, cy, 1.15 * radius + .1, size)
    img = img[*window]
    y, x = ((np.mgrid[0:size, 0:size].astype(np.float32) + .5) / size)[:, *window]
    if style == 'pixelated':
        block = .03125 if radius < .25 else .046875
        x, y = [(np.floor(v / block) + .5) * block for v in (x, y)]

    # the thing's own axes, and its colours, a little off
    turn = rng.uniform(-.26, .26)
    flip = int(rng.choice([-1, 1])) / radius
    c, s = math.cos(turn), math.sin(turn)
    u = (c * (x - cx) + s * (y - cy)) * flip
    v = (c * (y - cy) - s * (x - cx)) / radius
    colours = np.array([INK[colour] for colour, _ in THINGS[name]], np.float32)
    colours = (colours * rng.uniform(.88, 1.08) + rng.normal(0, .025, 3)).clip(0, 1)
    colours = colours.astype(np.float32)

    # the topmost part decides; distances are in 1/64 of the picture, whatever its size
    d = np.stack([part(u, v) for _, part in THINGS[name]]) * (radius * 64)               # (P, H, W)
    cover = (.5 - d * unit).clip(0, 1)
    if style == 'pixelated':
        cover = (d < 0).astype(np.float32)
    seen = cover.copy()
    seen[:-1] *= np.cumprod((1 - cover)[:0:-1], 0)[::-1]
    mask = seen.sum(0)
    outside = d.min(0)
    whole[*window] = mask > .5
    share = seen / mask.clip(1e-3)
    paint = np.tensordot(share, colours, ((0,), (0,)))                                   # (H, W, 3)
    depth = -(d * share).sum(0).clip(-9, 0)
    gy, gx = np.gradient(d, axis=(1, 2))
    lit = ((gx * lx + gy * ly) * share).sum(0) * unit                   # edges that face the light
    place = ((x - cx) * lx + (y - cy) * ly) / radius                       # the thing's lit side
    flat = np.zeros_like(mask)

    # what it casts on the ground: a shadow, or light
    if style == 'glowing':
        near = np.exp(-d.clip(0) / 1.5) + 1e-9
        near = np.tensordot(near / near.sum(0), colours, ((0,), (0,))).clip(.15)
        near = near / near.max(-1, keepdims=True)
        img[:] = mix(img, near, .7 * np.exp(-outside.clip(0) / 3.2))
    else:
        away = [round(-2.2 * unit * w) for w in (ly, lx)]
        img *= 1 - .5 / (1 + np.exp(np.roll(outside, away, (0, 1)).clip(-9, 9) / .9))[..., None]

    if style == 'flat':
        look = paint
    elif style == 'outlined':
        mask = (1.7 - outside).clip(0, 1)
        line = np.where(outside < 0, (1.3 - depth).clip(0, 1), 1)
        look = mix(paint, INK['black'], np.maximum(line, (outside + .5).clip(0, 1)))
    elif style == 'shaded':
        steep = (1 - depth / (22 * radius)).clip(0, 1)              # 1 at an edge, 0 on the flat
        up = np.sqrt(1 - steep ** 2)
        look = paint * (.42 + .85 * (.62 * up + .55 * lit * steep).clip(0))[..., None]
        look += .55 * (.6 * up + .8 * lit * steep).clip(0)[..., None] ** 14
    elif style == 'embossed':
        grain = img.mean(-1, keepdims=True)
        grain = grain / grain.mean()
        look = paint * (.4 + .55 * grain) + (.5 * lit * np.exp(-depth / 1.2))[..., None]
    elif style == 'hatched':
        wave = np.cos((x + y) * 64 * 2 * np.pi / 4.6)
        stroke = ((wave + .1 - .8 * place) * 2.2 + .5).clip(0, 1)
        look = mix(mix(paint, INK['cream'], flat + .78), paint * .75, stroke)
        look = mix(look, paint * .35, (1.2 - depth).clip(0, 1))
    elif style == 'pixelated':
        look = paint * (1 + .2 * (place > .3) - .2 * (place < -.3))[..., None]
    elif style == 'halftone':
        across, down = (x + y) * 64 * np.pi / 4.4, (x - y) * 64 * np.pi / 4.4
        dot = ((np.cos(across) * np.cos(down) + .5 - .6 * place) * 2.2 + .3).clip(0, 1)
        look = mix(mix(paint, INK['white'], flat + .72), paint * .95, dot)
        look = mix(look, paint * .3, (1 - depth).clip(0, 1))
    else:
        line = np.exp(-(depth / 1.3) ** 2)
        look = mix(paint * .2, mix(near, INK['white'], flat + .4), line)
    img[:] = mix(img, look, mask)
    return whole

PAIRS = list(itertools.product(THINGS, GROUNDS))
NEVER = a_tenth(PAIRS)                                            # these never occur in training

def world_scene(rng, unseen=False):
    """A random scene: one or two things, how they lie, the ground. unseen: a pair of thing and
    ground that training never shows."""
    while True:
        order = rng.permutation(list(THINGS))
        number = 1 if rng.random() < .6 else 2
        names = [str(name) for name in order[:number]]
        relation = RELATIONS[rng.integers(2)] if number == 2 else None
        background = GROUNDS[rng.integers(6)]
        if unseen == any((name, background) in NEVER for name in names):
            return dict(objects=names, relation=relation, background=background)

def world_caption(scene):
    """`a THING [left of|above a THING] on GROUND`."""
    names = [f'an {name}' if name[0] in 'aeiou' else f'a {name}' for name in scene['objects']]
    return f' {scene["relation"]} '.join(names) + f' on {scene["background"]}'

def world_variants(scene):
    """Every scene that differs in one thing, in the ground, or in how the two lie."""
    names = scene['objects']
    found = []
    for k, name in itertools.product(range(len(names)), THINGS):
        if name not in names:
            found.append(dict(scene, objects=names[:k] + [name] + names[k + 1:]))
    found += [dict(scene, background=g) for g in GROUNDS if g != scene['background']]
    if scene['relation']:
        found.append(dict(scene, relation=other_relation(scene)))
        found.append(dict(scene, objects=names[::-1]))
    return found

def world_render(scene, rng, size=1., light_gain=1., texture_gain=1., style=None, pixels=SIZE):
    """(pixels, pixels, 3) float32 in [0, 1] and the things' masks (n, pixels, pixels) bool. The
    gains scale the things' radius, the brightness and the contrast of the ground; the style is
    drawn unless it is given."""
    angle = rng.uniform(-2.6, -.5)                                    # the light is always above
    lx, ly = math.cos(angle), math.sin(angle)
    img = draw_ground(scene['background'], rng, 2 * pixels, lx, ly).astype(np.float32)
    img *= rng.uniform(.9, 1.08)
    if texture_gain != 1:
        img = img.mean((0, 1)) + texture_gain * (img - img.mean((0, 1)))
    drawn = STYLES[rng.integers(len(STYLES))]           # whether or not it is used: one stream
    alone = len(scene['objects']) == 1
    masks = []
    for k, name in enumerate(scene['objects']):
        radius = size * (rng.uniform(.29, .42) if alone else rng.uniform(.20, .24))
        cx, cy = (.5 + rng.uniform(-1, 1, 2) * (.49 - radius)).tolist()
        side = .5 + (2 * k - 1) * rng.uniform(.24, .27)
        if scene['relation'] == 'left of':
            cx, cy = side, .2 + .6 * cy
        elif scene['relation'] == 'above':
            cx, cy = .2 + .6 * cx, side
        masks.append(draw_thing(img, name, style or drawn, rng, cx, cy, radius, lx, ly))
    img = (light_gain * img).clip(0, 1).reshape(pixels, 2, pixels, 2, 3).mean((1, 3))
    return img, np.stack(masks)[:, ::2, ::2]

# --------------------------------------------------------------------------------------------------
# preferences: pairs whose winner is a clean rendering of the caption. The loser has one attribute
# wrong, an object too few or too many, or is a poor picture; or both are right, and the winner has
# the larger objects and the brighter light, a mild taste that a student can over-optimise

KINDS = dict(attribute=.35, missing=.08, extra=.08, blur=.08, washed=.08, contrast=.08, noise=.08,
             taste=.17)

# of shapes; --world has others, at the end of this file
nouns = TRIPLES

def patterned(scene):
    return any(texture != 'plain' for texture, _, _ in scene['objects'])

def may_join(triple, scene):
    return triple[1] != scene['background']

def draw_pair(seed, i):
    """Pair i: (caption, winner, loser, kind of the difference), pictures (64, 64, 3) uint8."""
    rng = np.random.default_rng([seed, i, 5])
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))

    def fits(scene):
        """Whether it can be wrong in this way."""
        if kind == 'missing':
            return len(scene['objects']) == 2
        if kind == 'extra':
            return len(scene['objects']) == 1
        return patterned(scene) if kind == 'washed' else True

    scene = draw_scene(rng)
    while not fits(scene):
        scene = draw_scene(rng)
    other = scene
    near, far = rng.uniform(-1, 1, 2)                                   # taste of winner and loser
    if kind == 'attribute':
        options = variants(scene)
        other = options[rng.integers(len(options))]
    elif kind == 'missing':
        other = dict(scene, objects=[scene['objects'][rng.integers(2)]], relation=None)
    elif kind == 'extra':
        second = nouns[rng.integers(len(nouns))]
        while not may_join(second, scene):
            second = nouns[rng.integers(len(nouns))]
        relation = RELATIONS[rng.integers(2)]
        other = dict(scene, objects=scene['objects'] + [second], relation=relation)
    elif kind == 'taste':
        near = rng.uniform(.2, 1)
        far = rng.uniform(-1, -.2)

    def draw(scene, taste, layout, flaw=''):
        texture_gain = rng.uniform(.1, .3) if flaw == 'washed' else 1.
        x, _ = render(scene, np.random.default_rng([seed, i, layout]), 1 + .12 * taste,
                      1 + .12 * taste, texture_gain)
        if flaw == 'contrast':
            x = x.mean() + rng.uniform(.35, .6) * (x - x.mean())
        elif flaw == 'noise':
            x = x + rng.normal(0, rng.uniform(.06, .14), x.shape)
        image = Image.fromarray(np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8))
        if flaw == 'blur':
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1.2, 2.2)))
        return np.array(image)

    winner = draw(scene, near, 6)
    loser = draw(other, far, 6 + rng.integers(2), kind)        # half of them in the winner's layout
    return caption(scene), winner, loser, kind

def pairs(n, seed):
    """n pairs, drawn once and kept in WORK: captions, kinds, and (n, 2, 64, 64, 3) uint8, the
    winner first."""
    file = WORK / f'pairs_{seed}_{n}.npz'
    if not file.exists():
        rows = [draw_pair(seed, i) for i in tqdm(range(n), desc='pairs')]
        captions, winners, losers, kinds = zip(*rows)
        images = np.stack([np.stack(winners), np.stack(losers)], 1)
        temporary = file.with_suffix('.tmp.npz')
        np.savez(temporary, captions=captions, kinds=kinds, images=images)
        os.replace(temporary, file)
    rows = np.load(file)
    return [str(c) for c in rows['captions']], rows['kinds'], rows['images']

def accuracy_by_kind(right, kinds):
    """One line: the share of pairs decided rightly, over all and by kind."""
    each = [f'{kind} {right[kinds == kind].mean():.3f}' for kind in KINDS if (kinds == kind).any()]
    return f'{right.mean():.3f} over {len(right)} pairs; ' + ', '.join(each)

# --------------------------------------------------------------------------------------------------
# one training loop for all components: random numbers from (seed, iteration), checkpoints, EMA,
# linear warm-up and cool-down

def fit(name, nets, loss, iters, lr, ema=None):
    """Trains the ModuleDict `nets` with AdamW on loss(nets, i, generator) -> (scalar, dict for the
    bar). Resumes from WORK/name.pt. With ema=d the returned weights are the exponential average
    with decay d. Returns nets in eval mode."""
    iters = args.iters or iters
    nets.to(DEVICE).train()
    params = [p for p in nets.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=lr, betas=(.9, .99), weight_decay=.01)
    start = 0
    shadow = None
    if ema:
        shadow = {key: value.detach().clone() for key, value in nets.state_dict().items()}
    file = WORK / f'{name}.pt'
    if file.exists():
        state = torch.load(file, map_location=DEVICE, weights_only=True)
        nets.load_state_dict(state['nets'])
        opt.load_state_dict(state['opt'])
        shadow = state['shadow']
        start = state['i']
    bar = tqdm(range(start, iters), desc=name, initial=start, total=iters, mininterval=10)
    for i in bar:
        for group in opt.param_groups:
            group['lr'] = lr * min(1, (i + 1) / 200) * min(1, (iters - i) / (.3 * iters))
        value, info = loss(nets, i, torch.Generator().manual_seed(args.seed * 1_000_003 + i))
        opt.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.)
        opt.step()
        if ema:
            average(shadow, nets, min(ema, (i + 1) / (i + 10)))
        if (i + 1) % 50 == 0:
            words = [f'{key} {float(value):.4f}' for key, value in info.items()]
            bar.set_postfix_str(' '.join(words), refresh=False)
        if (i + 1) % 500 == 0 or i + 1 == iters:
            state = dict(nets=nets.state_dict(), opt=opt.state_dict(), shadow=shadow, i=i + 1)
            torch.save(state, f'{file}.tmp')
            os.replace(f'{file}.tmp', file)
    if ema:
        nets.load_state_dict(shadow)
    return nets.eval()

@torch.no_grad()
def average(shadow, nets, decay):
    """Moves the average towards the networks' state; whole numbers are only copied."""
    for key, value in nets.state_dict().items():
        if value.is_floating_point():
            shadow[key].lerp_(value, 1 - decay)
        else:
            shadow[key].copy_(value)

def pool():
    """The training pictures (uint8, drawn once, kept in WORK) and their scenes."""
    n = args.pictures
    file = WORK / f'pictures_0_{n}.npy'
    if not file.exists():
        temporary = file.with_suffix('.tmp.npy')
        np.save(temporary, pictures(n, 0)[1])
        os.replace(temporary, file)
    scenes = [draw_scene(np.random.default_rng([0, i])) for i in range(n)]
    return scenes, np.load(file, mmap_mode='r')

def to_pixels(uint8):
    """uint8 (B, H, W, 3) numpy -> float (B, 3, H, W) in [-1, 1] on the device."""
    x = torch.from_numpy(np.ascontiguousarray(uint8)).to(DEVICE)
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1

def show(rows, name):
    """Rows of (n, 3, H, W) in [-1, 1] as one picture in WORK, to look at."""
    grid = torch.cat([torch.cat(list(row.float().cpu()), 2) for row in rows], 1)
    grid = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    height, width = grid.shape[:2]
    Image.fromarray(grid).resize((width * 2, height * 2), Image.NEAREST).save(WORK / name)

def finish(build, folder):
    """Builds into a temporary folder and moves it to OUT/folder in one step; says what it did."""
    temporary = OUT / f'{folder}.tmp'
    shutil.rmtree(temporary, ignore_errors=True)
    build(temporary)
    shutil.rmtree(OUT / folder, ignore_errors=True)
    os.replace(temporary, OUT / folder)

    # the VAE and text encoders that a pipeline before it has already are links
    homes = {'sdxl': [], 'sd3': ['sdxl']}.get(folder, ['sdxl', 'sd3'])
    files = [f for f in (OUT / folder).rglob('*') if f.is_file()]
    for file, home in itertools.product(files, homes):
        first = OUT / home / file.relative_to(OUT / folder)
        real = first.is_file() and not first.is_symlink() and first.stat().st_size > 100_000
        if real and first.read_bytes() == file.read_bytes():
            file.unlink()
            file.symlink_to(os.path.relpath(first, file.parent))
    size = sum(f.stat().st_size for f in files if not f.is_symlink())
    print(f'{folder}: {size / 1e6:.1f} MB')

# --------------------------------------------------------------------------------------------------
# data: parquet, prompt lists, tokenizer

def make_data():
    import datasets
    import pyarrow.parquet as pq

    def parquet(file, n, seed):
        scenes, images = pictures(n, seed)
        ds = datasets.Dataset.from_dict({
            'image': [Image.fromarray(image) for image in images],
            'text': [caption(scene) for scene in scenes]})
        ds = ds.map(lambda row: {'image': {'bytes': jpeg(row['image']), 'path': None}})
        ds.cast_column('image', datasets.Image()).to_parquet(file)
        # zstd finds the JPEG tables that all pictures repeat: a quarter smaller
        pq.write_table(pq.read_table(file), file, compression='zstd', compression_level=19,
                       use_dictionary=False)

    def jpeg(image):
        """2.4 kB a picture; PNG cannot compress the grain: 9 kB."""
        buffer = io.BytesIO()
        image.save(buffer, 'JPEG', quality=90, subsampling=0)
        return buffer.getvalue()

    def prompts(folder, name, n, seed, unseen):
        """n captions, and for each a line of 16 captions that differ from it in one attribute.
        Those of shapes are all different; those of the world, which has 130 of one thing, come as
        often as in training."""
        scenes = {}
        for i in itertools.count():
            scene = draw_scene(np.random.default_rng([seed, i]), unseen)
            scenes.setdefault((caption(scene), i if args.world else 0), scene)
            if len(scenes) == n:
                break
        rng = np.random.default_rng([seed, 99])
        texts = []
        lines = []
        for (text, _), scene in scenes.items():
            near = sorted(set(neighbours(scene)) - {text})
            texts.append(text)
            lines.append('\t'.join(rng.permutation(near)[:16]))
        (folder / f'{name}.txt').write_text('\n'.join(texts) + '\n')
        (folder / f'{name}.hard.txt').write_text('\n'.join(lines) + '\n')

    def build(folder):
        folder.mkdir(parents=True)
        shift = 10 * args.seed
        parquet(folder / 'train.parquet', min(args.pictures, 2500), 1 + shift)
        parquet(folder / 'test.parquet', min(args.pictures, args.held_out), 2 + shift)
        prompts(folder, 'prompts', args.held_out // 2, 3 + shift, unseen=False)
        prompts(folder, 'prompts_unseen', 256, 4 + shift, unseen=True)

    finish(build, 'data')

def make_tokenizer(folder, pad):
    """CLIP's byte-pair format (vocab.json + merges.txt), merges learned on captions, so that any
    text has tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    tok = Tokenizer(models.BPE(end_of_word_suffix='</w>'))
    tok.normalizer = normalizers.Lowercase()
    tok.decoder = decoders.ByteLevel()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    scenes = [draw_scene(np.random.default_rng([0, i])) for i in range(4000)]
    tok.train_from_iterator(map(caption, scenes), trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=alphabet, end_of_word_suffix='</w>', show_progress=False))
    merges = [tuple(pair) for pair in json.loads(tok.to_str())['model']['merges']]
    words = alphabet + [a + '</w>' for a in alphabet] + [''.join(pair) for pair in merges]
    words = list(dict.fromkeys(words)) + ['<|startoftext|>', '<|endoftext|>']
    lines = ['#version: 0.2', *(' '.join(pair) for pair in merges)]
    config = dict(
        tokenizer_class='CLIPTokenizer', model_max_length=TOKENS, pad_token=pad,
        bos_token='<|startoftext|>', eos_token='<|endoftext|>', unk_token='<|endoftext|>')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'vocab.json').write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / 'merges.txt').write_text('\n'.join(lines) + '\n')
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)

# --------------------------------------------------------------------------------------------------
# AutoencoderKL

def laplacian(x):
    kernel = torch.tensor([[0., 1, 0], [1, -4, 1], [0, 1, 0]], device=x.device)
    return F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])

def sharpness(x):
    """The standard deviation of the grey pictures' Laplacian, (B,)."""
    return laplacian(x.mean(1, keepdim=True)).std((1, 2, 3))

def texture_loss(y, x):
    """How far the energies of texture are from the real ones', 1 where y has none: magnitudes of 32
    random filters of the Laplacian, at two scales, averaged over 8 x 8 pixels. An error in place
    costs nothing here, so that detail need not be averaged away: a loss of pixels alone halves the
    sharpness. The Laplacian whitens; without it the filters saw coarse contrast alone."""
    filters = torch.randn(32, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(x.device)
    value = 0
    for size in (8, 4):
        made, real = (F.avg_pool2d(F.conv2d(laplacian(z), filters).abs(), size, size // 2)
                      for z in (y, x))
        value = value + F.l1_loss(made, real) / real.mean() / 2
        y, x = F.avg_pool2d(y, 2), F.avg_pool2d(x, 2)
    return value

def make_vae():
    from diffusers import AutoencoderKL
    _, images = pool()
    batch = 8 if args.world else 16
    # 8 x 8 latents: a UNet forward at batch 16 took 19 ms on 2 cores with (64, 128) channels, 43 ms
    # at 16 x 16 x 4
    vae = AutoencoderKL(
        sample_size=SIZE, latent_channels=32 if args.world else 16,
        block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=['DownEncoderBlock2D'] * 4, up_block_types=['UpDecoderBlock2D'] * 4,
        mid_block_add_attention=True)

    def loss(nets, i, g):
        index = torch.randint(len(images), (batch,), generator=g).sort().values.numpy()
        x = to_pixels(images[index])
        # a quarter faster on 2 cores
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
            posterior = nets['vae'].encode(x).latent_dist
            eps = torch.randn(posterior.mean.shape, generator=g).to(DEVICE)
            z = posterior.mean + posterior.std * eps
            y = nets['vae'].decode(z).sample.float()
        mse = F.mse_loss(y, x)
        kl = posterior.kl().mean() / z[0].numel()
        value = F.l1_loss(y, x) + 2 * mse + 1e-4 * kl
        info = dict(psnr=-10 * torch.log10(mse / 4), kl=kl)
        if args.world:
            texture = texture_loss(y, x)
            value = value + .5 * texture
            info |= dict(texture=texture, sharp=sharpness(y).mean() / sharpness(x).mean())
        return value, info

    vae = fit('vae', torch.nn.ModuleDict(dict(vae=vae)), loss, 5000, 2e-3, ema=.998)['vae']
    with torch.no_grad():
        z = torch.cat([vae.encode(to_pixels(images[k:k + 100])).latent_dist.mean
                       for k in range(0, min(len(images), 2000), 100)])
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5), force_upcast=False)
        x = to_pixels(pictures(min(512, args.pictures), 2)[1])
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    psnr = -10 * torch.log10(F.mse_loss(y, x) / 4)
    each = z.std((0, 2, 3))
    print(f'vae: held-out PSNR {psnr:.2f} dB, latent std {z.std():.3f}, '
          f'per channel {each.min():.3f} to {each.max():.3f}, '
          f'sharpness {sharpness(y).mean() / sharpness(x).mean():.3f} of real')
    show([x[:16], y[:16]], 'vae.png')
    vae.half().save_pretrained(WORK / 'vae')

# --------------------------------------------------------------------------------------------------
# SAM

def make_sam():
    from segment_anything.modeling import (
        ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer)
    dim, grid = 64, SIZE // 4
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=SIZE, patch_size=4, embed_dim=96, depth=4, num_heads=3, mlp_ratio=4,
            out_chans=dim, qkv_bias=True, norm_layer=lambda d: torch.nn.LayerNorm(d, eps=1e-6),
            use_rel_pos=True, window_size=8, global_attn_indexes=[1, 3]),
        prompt_encoder=PromptEncoder(
            embed_dim=dim, image_embedding_size=(grid, grid), input_image_size=(SIZE, SIZE),
            mask_in_chans=8),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3, transformer_dim=dim, iou_head_depth=2, iou_head_hidden_dim=64,
            transformer=TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=128, num_heads=4)),
        pixel_mean=[123.675, 116.28, 103.53], pixel_std=[58.395, 57.12, 57.375])

    def batch(seed, n, g):
        """n pictures, a point inside one of the objects of each, and that object's mask."""
        images, points, targets = [], [], []
        for i in torch.randint(20_000, (n,), generator=g).tolist():
            rng = np.random.default_rng([seed, i])
            image, masks = render(draw_scene(rng), rng)
            if len(masks) == 2:                      # where they overlap the second lies on top
                masks[0] &= ~masks[1]
            mask = masks[torch.randint(len(masks), (1,), generator=g).item()]
            inside = np.argwhere(mask)
            row, column = inside[torch.randint(len(inside), (1,), generator=g).item()]
            images.append(np.rint(image * 255))
            points.append([column, row])
            targets.append(mask)
        images, points, targets = (torch.from_numpy(np.stack(rows)).float().to(DEVICE)
                                   for rows in (images, points, targets))
        return images.permute(0, 3, 1, 2), points[:, None], targets

    def masks_of(sam, images, points):
        """The decoder's first (single-mask) output for one point a picture: logits (B, 64, 64),
        predicted IoU (B,)."""
        features = sam.image_encoder(sam.preprocess(images))
        found, quality = [], []
        for feature, point in zip(features, points):
            label = torch.ones(1, 1, dtype=torch.long, device=point.device)
            sparse, dense = sam.prompt_encoder(
                points=(point[None], label), boxes=None, masks=None)
            low, iou = sam.mask_decoder(
                image_embeddings=feature[None], image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense,
                multimask_output=False)
            found.append(sam.postprocess_masks(low, (SIZE, SIZE), (SIZE, SIZE))[0, 0])
            quality.append(iou[0, 0])
        return torch.stack(found), torch.stack(quality)

    def overlap(logits, target):
        a, b = logits > 0, target > .5
        return (a & b).sum((1, 2)) / (a | b).sum((1, 2))

    def loss(nets, i, g):
        images, points, target = batch(0, 16, g)
        logits, quality = masks_of(nets['sam'], images, points)
        p = logits.sigmoid()
        iou = overlap(logits, target)
        dice = 1 - (2 * (p * target).sum((1, 2)) + 1) / (p.sum((1, 2)) + target.sum((1, 2)) + 1)
        value = F.binary_cross_entropy_with_logits(logits, target) + dice.mean()
        return value + F.mse_loss(quality, iou), dict(iou=iou.mean())

    sam = fit('sam', torch.nn.ModuleDict(dict(sam=sam)), loss, 1000, 1e-3, ema=.998)['sam']
    held_out = batch(2, min(512, args.pictures), torch.Generator().manual_seed(0))
    with torch.no_grad():
        iou = torch.cat([overlap(masks_of(sam, images, points)[0], target)
                         for images, points, target in zip(*(x.split(64) for x in held_out))])
    print(f'sam: held-out IoU {iou.mean():.3f} over {len(iou)} points')
    torch.save(sam.half().state_dict(), OUT / 'sam.tmp')
    os.replace(OUT / 'sam.tmp', OUT / 'sam.pth')

# --------------------------------------------------------------------------------------------------
# what CLIP and the preference model share

def normalised(pixels):
    """[-1, 1] -> CLIP's own mean and deviation."""
    mean = torch.tensor([.48145466, .4578275, .40821073]).to(DEVICE)[:, None, None]
    std = torch.tensor([.26862954, .26130258, .27577711]).to(DEVICE)[:, None, None]
    return (pixels * .5 + .5 - mean) / std

def clip_pictures(model, pixels):
    seen = model.vision_model(pixel_values=normalised(pixels))
    return F.normalize(model.visual_projection(seen.pooler_output), dim=-1)

def clip_texts(model, tokenizer, texts):
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors='pt').to(DEVICE)
    read = model.text_model(**tokens)
    return F.normalize(model.text_projection(read.pooler_output), dim=-1)

# --------------------------------------------------------------------------------------------------
# CLIP, the judge: contrastive, with captions that differ in one attribute as hard negatives

def make_clip():
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
    tokenizer = make_tokenizer(WORK / 'tokenizer', '<|endoftext|>')
    text = dict(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=128,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    vision = dict(
        hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4,
        image_size=SIZE, patch_size=8, projection_dim=128)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    scenes, images = pool()

    # the classes of what is named: the ground, the relation, and of each object its slots
    grounds, slots = list(COLOURS), [TEXTURES, list(COLOURS), SHAPES]
    if args.world:
        grounds, slots = GROUNDS, [list(THINGS)]
    each = [len(values) for values in slots]
    classes = [len(grounds), 1 + len(RELATIONS)] + each * 2

    def attributes(scene):
        """Class numbers of a scene: background, relation, and texture, colour, shape of both
        objects, or what thing it is (-1: none)."""
        relation = 1 + RELATIONS.index(scene['relation']) if scene['relation'] else 0
        numbers = [grounds.index(scene['background']), relation]
        for thing in scene['objects']:
            words = [thing] if args.world else thing
            numbers += [values.index(word) for values, word in zip(slots, words)]
        return numbers + [-1] * (len(classes) - len(numbers))

    def places(i):
        """Which object, 1 or 2, covers most of each of the 64 patches of picture i; 0: none.
        (64,) int8."""
        rng = np.random.default_rng([0, i])
        masks = render(draw_scene(rng), rng)[1]
        share = masks.reshape(len(masks), 8, 8, 8, 8).mean((2, 4))
        return np.where(share.max(0) >= .4, share.argmax(0) + 1, 0).astype(np.int8).ravel()

    def named(scores, numbers, sizes):
        """The cross-entropies of attributes with `sizes` classes, added up; scores (N, all
        classes), numbers (N, attributes)."""
        return sum(F.cross_entropy(a, b, ignore_index=-1)
                   for a, b in zip(scores.split(sizes, 1), numbers.T))

    facts = torch.tensor([attributes(scene) for scene in scenes])
    file = WORK / f'places_{len(scenes)}.npy'
    if not file.exists():
        np.save(file, np.stack([places(i) for i in tqdm(range(len(scenes)), desc='masks')]))
    where = torch.from_numpy(np.load(file)).long()                                         # (N, 64)

    def loss(nets, i, g):
        model = nets['clip']
        index = torch.randint(len(images), (64,), generator=g).sort().values.numpy()
        rng = np.random.default_rng([7, i])
        hard = 3
        texts = []
        for k in index:
            near = neighbours(scenes[k])
            texts.append(caption(scenes[k]))
            texts += [near[j] for j in rng.permutation(len(near))[:hard]]
        seen = model.vision_model(pixel_values=normalised(to_pixels(images[index])))
        v = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)
        t = clip_texts(model, tokenizer, texts)                            # (B, D), (B (1 + h), D)
        logits = model.logit_scale.exp().clamp(max=100) * v @ t.T                # (B, B (1 + h))
        rows = torch.arange(len(index), device=DEVICE)
        own = rows * (1 + hard)
        near = logits.gather(1, own[:, None] + torch.arange(1 + hard, device=DEVICE))  # (B, 1 + h)
        first = (near.argmax(1) == 0).float().mean()

        # naming the attributes, of the picture and of each patch that an object covers, by linear
        # layers that are thrown away, teaches the picture encoder much faster than the contrast
        # does: 1,200 iterations with the contrast alone put 55 % of the own captions first among 5;
        # with the picture's names alone textures and shapes were 75 % right after 3,000
        goal = facts[index].to(DEVICE)
        naming = named(nets['naming'](v * 10), goal, classes)
        spot = where[index].to(DEVICE)                                                     # (B, 64)
        objects = goal[:, 2:].view(-1, 2, len(each))                                 # (B, 2, slots)
        which = (spot - 1).clamp(min=0)[..., None].expand(-1, -1, len(each))        # (B, 64, slots)
        objects = objects.gather(1, which).masked_fill(spot[..., None] == 0, -1).flatten(0, 1)
        patches = nets['patches'](seen.last_hidden_state[:, 1:]).flatten(0, 1)
        naming = naming + 3 * named(patches, objects, each)
        value = F.cross_entropy(logits, own) + F.cross_entropy(logits[:, own].T, rows)
        value = value + F.cross_entropy(near, torch.zeros_like(own)) + naming
        return value, dict(hard=first, naming=naming)

    nets = dict(clip=clip, naming=torch.nn.Linear(128, sum(classes)),
                patches=torch.nn.Linear(128, sum(each)))
    clip = fit('clip', torch.nn.ModuleDict(nets), loss, 3000, 1e-3, ema=.998)['clip']

    scenes, images = pictures(min(512, args.pictures), 2)
    captions = [caption(scene) for scene in scenes]
    rng = np.random.default_rng(5)
    right = []
    with torch.no_grad():
        v = clip_pictures(clip, to_pixels(images))
        for k, (own, scene) in enumerate(zip(captions, scenes)):
            near = list(rng.permutation(sorted(set(neighbours(scene)) - {own}))[:16])
            rest = sorted(set(captions) - {own} - set(near))
            far = list(rng.permutation(rest)[:31 - len(near)])
            t = clip_texts(clip, tokenizer, [own] + near + far)
            right.append((v[k] @ t.T).argmax().item() == 0)
    print(f'clip: R-precision of {len(right)} held-out pictures {np.mean(right):.3f} '
          '(own caption first among 32, 16 of them one attribute away)')

    def build(folder):
        clip.half().save_pretrained(folder)
        image_processor = CLIPImageProcessor(
            size={'shortest_edge': SIZE}, crop_size={'height': SIZE, 'width': SIZE})
        CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)

    finish(build, 'clip')

# --------------------------------------------------------------------------------------------------
# the preference model in PickScore's format: CLIP trained on, with the cross-entropy of the two
# pictures of a pair (Pick-a-Pic, arXiv 2305.01569)

def preferred(scores):
    """Cross-entropy of (B, 2) scores whose first is the winner's, and for the bar how often it is
    the higher."""
    winner = torch.zeros(len(scores), dtype=torch.long, device=DEVICE)
    return F.cross_entropy(scores, winner), dict(right=(scores[:, 0] > scores[:, 1]).float().mean())

def make_pickscore():
    from transformers import AutoProcessor, CLIPModel
    model = CLIPModel.from_pretrained(OUT / 'clip').float()
    model.config._name_or_path = ''                          # a path of this machine otherwise
    processor = AutoProcessor.from_pretrained(OUT / 'clip')

    def logits(model, captions, images):
        """(B,) captions and (B, 2, 64, 64, 3) pictures -> (B, 2)."""
        v = clip_pictures(model, to_pixels(images.reshape(-1, *images.shape[2:])))
        t = clip_texts(model, processor.tokenizer, captions)
        cosine = (v.view(len(images), 2, -1) * t[:, None]).sum(-1)
        return model.logit_scale.exp().clamp(max=100) * cosine

    captions, _, images = pairs(args.pairs, 11)

    def loss(nets, i, g):
        index = torch.randint(len(captions), (48,), generator=g).tolist()
        return preferred(logits(nets['model'], [captions[k] for k in index], images[index]))

    nets = torch.nn.ModuleDict(dict(model=model))
    model = fit('pickscore', nets, loss, 1200, 5e-4, ema=.998)['model']
    captions, kinds, images = pairs(min(1000, args.pairs), 12)
    with torch.no_grad():
        z = torch.cat([logits(model, captions[k:k + 100], images[k:k + 100])
                       for k in range(0, len(captions), 100)]).cpu()
    right = (z[:, 0] > z[:, 1]).numpy()
    print(f'pickscore: held-out accuracy {accuracy_by_kind(right, kinds)}')

    def build(folder):
        model.half().save_pretrained(folder)
        processor.save_pretrained(folder)

    finish(build, 'pickscore')

# --------------------------------------------------------------------------------------------------
# what the teachers share

def encoded(vae, images):
    """The means of the VAE's posteriors, (N, C, h, w) on the CPU."""
    with torch.no_grad():
        return torch.cat([vae.encode(to_pixels(images[k:k + 100])).latent_dist.mean.cpu()
                          for k in tqdm(range(0, len(images), 100), desc='latents')])

def preview(pipe, name, steps, guidances, **more):
    """Pictures of twelve prompts at each guidance, and in a last row in 4 steps at 4."""
    texts = (OUT / 'data/prompts.txt').read_text().split('\n')[:12]
    steps = min(steps, args.iters or steps)
    rows = []
    for n, guidance in [(steps, guidance) for guidance in guidances] + [(4, 4)]:
        with torch.no_grad():
            images = pipe(texts, num_inference_steps=n, guidance_scale=guidance, output_type='pt',
                          generator=torch.Generator().manual_seed(0), **more).images
        rows.append(images * 2 - 1)
    show(rows, name)

# --------------------------------------------------------------------------------------------------
# the teacher: SDXL's classes, trained on eps with the caption dropped (zeros, as SDXL does) one
# time in ten; that of --world on v, since eps at an SNR of .005 amplifies the network's error
# 200-fold and did not train in an hour

def make_teacher():
    from diffusers import (
        AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel)
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    vae = AutoencoderKL.from_pretrained(WORK / 'vae').float().to(DEVICE)
    vae.register_to_config(_name_or_path='')                     # a path of this machine otherwise
    scenes, images = pool()
    file = WORK / 'latents.pt'
    if not file.exists():
        torch.save(encoded(vae, images) * vae.config.scaling_factor, file)
    latents = torch.load(file, weights_only=True)
    tokenizer = make_tokenizer(WORK / 'tokenizer_0', '<|endoftext|>')
    tokenizer_2 = make_tokenizer(WORK / 'tokenizer_1', '!')
    captions = [caption(scene) for scene in scenes]
    ids, ids_2 = (torch.as_tensor(t(captions, padding='max_length')['input_ids'])
                  for t in (tokenizer, tokenizer_2))
    text = dict(
        vocab_size=len(tokenizer), num_hidden_layers=3, max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    nets = torch.nn.ModuleDict(dict(
        te1=CLIPTextModel(CLIPTextConfig(
            hidden_size=64, intermediate_size=256, num_attention_heads=2, **text)),
        te2=CLIPTextModelWithProjection(CLIPTextConfig(
            hidden_size=96, intermediate_size=384, num_attention_heads=3, hidden_act='gelu',
            projection_dim=96, **text)),
        unet=UNet2DConditionModel(
            sample_size=SIZE // 8, in_channels=latents.shape[1], out_channels=latents.shape[1],
            block_out_channels=(64, 128), layers_per_block=1,
            down_block_types=['CrossAttnDownBlock2D'] * 2,
            up_block_types=['CrossAttnUpBlock2D'] * 2, attention_head_dim=[2, 4],
            cross_attention_dim=160, use_linear_projection=True, addition_embed_type='text_time',
            addition_time_embed_dim=16, projection_class_embeddings_input_dim=192)))
    scheduler = EulerDiscreteScheduler(
        beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', steps_offset=1,
        timestep_spacing='leading',
        prediction_type='v_prediction' if args.world else 'epsilon')
    bars = scheduler.alphas_cumprod.to(DEVICE)
    batch = 16 if args.world else 64

    def loss(nets, i, g):
        index = torch.randint(len(latents), (batch,), generator=g)
        x0 = latents[index].to(DEVICE)
        eps = torch.randn(batch, *latents.shape[1:], generator=g).to(DEVICE)
        # uniform times first; later leaning to high noise (density proportional to t), where the
        # eps loss weighs errors of x0 least and where at 3,000 iterations the background colours
        # still came out wrong
        u = torch.rand(batch, generator=g)
        if i >= 3500 and not args.world:
            u = u.sqrt()
        t = (1000 * u).long().clamp(max=999).to(DEVICE)
        keep = (torch.rand(batch, generator=g) > .1).float().to(DEVICE)
        one = nets['te1'](ids[index].to(DEVICE), output_hidden_states=True)
        two = nets['te2'](ids_2[index].to(DEVICE), output_hidden_states=True)
        y = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)        # (B, TOKENS, 160)
        y = y * keep[:, None, None]
        added = dict(
            text_embeds=two.text_embeds * keep[:, None],
            time_ids=torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE]).expand(batch, 6).to(DEVICE))
        a = bars[t].sqrt().view(-1, 1, 1, 1)
        s = (1 - bars[t]).sqrt().view(-1, 1, 1, 1)
        out = nets['unet'](a * x0 + s * eps, t, y, added_cond_kwargs=added)
        mse = F.mse_loss(out.sample, a * eps - s * x0 if args.world else eps)
        return mse, dict(mse=mse)

    nets = fit('teacher', nets, loss, 9000, 1e-3 if args.world else 1.5e-3, ema=.999)
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=nets['te1'], text_encoder_2=nets['te2'], tokenizer=tokenizer,
        tokenizer_2=tokenizer_2, unet=nets['unet'], scheduler=scheduler,
        force_zeros_for_empty_prompt=True, add_watermarker=False)
    preview(pipe, 'teacher.png', 50, (1.01, 2, 4, 8))
    finish(lambda folder: pipe.to(torch.float16).save_pretrained(folder), 'sdxl')

# --------------------------------------------------------------------------------------------------
# the second teacher: SD3's classes, trained on v = eps - x0 with the caption empty one time in ten

def make_sd3():
    from diffusers import (
        AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
        StableDiffusion3Pipeline)
    from transformers import (
        CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer)
    vae = AutoencoderKL.from_pretrained(OUT / 'sdxl/vae')
    old = CLIPTextModel.from_pretrained(OUT / 'sdxl/text_encoder')
    config = old.config.to_dict() | dict(projection_dim=old.config.hidden_size)
    one = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    one.load_state_dict(old.state_dict(), strict=False)
    two = CLIPTextModelWithProjection.from_pretrained(OUT / 'sdxl/text_encoder_2')
    # paths of this machine otherwise
    vae.register_to_config(_name_or_path='')
    for encoder in (one, two):
        encoder.config._name_or_path = ''
    # 16 tokens hold the longest caption, 14
    tokenizer, tokenizer_2 = (
        CLIPTokenizer.from_pretrained(OUT / f'sdxl/{name}', model_max_length=16)
        for name in ('tokenizer', 'tokenizer_2'))
    channels = vae.config.latent_channels
    net = SD3Transformer2DModel(
        sample_size=SIZE // 8, patch_size=1, in_channels=channels, out_channels=channels,
        num_layers=6, attention_head_dim=32, num_attention_heads=3, caption_projection_dim=96,
        joint_attention_dim=one.config.hidden_size + two.config.hidden_size,
        pooled_projection_dim=one.config.projection_dim + two.config.projection_dim,
        pos_embed_max_size=SIZE // 8)
    pipe = StableDiffusion3Pipeline(
        transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.), vae=vae,
        text_encoder=one, text_encoder_2=two, tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder_3=None, tokenizer_3=None).to(DEVICE, torch.float32)
    scenes, images = pool()
    file = WORK / 'latents_sd3.pt'
    if not file.exists():
        captions = [caption(scene) for scene in scenes] + ['']
        words, pooled = [], []
        for k in tqdm(range(0, len(captions), 200), desc='captions'):
            part = captions[k:k + 200]
            with torch.no_grad():
                y, _, y_pooled, _ = pipe.encode_prompt(
                    part, part, part, max_sequence_length=16, do_classifier_free_guidance=False)
            words.append(y.cpu().half())
            pooled.append(y_pooled.cpu().half())
        y = [torch.cat(words), torch.cat(pooled)]
        torch.save(dict(latents=encoded(pipe.vae, images), y=y), file)
    saved = torch.load(file, weights_only=True)
    latents = saved['latents']
    words, pooled = saved['y']
    vae.register_to_config(shift_factor=round(latents.mean().item(), 4))       # SD3's VAEs have one
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def loss(nets, i, g):
        index = torch.randint(len(latents), (64,), generator=g)
        x0 = latents[index].to(DEVICE)
        eps = torch.randn(64, *latents.shape[1:], generator=g).to(DEVICE)
        # logit-normal times, as SD3's; their mean leans to high noise, where colours and shapes are
        # decided
        s = torch.sigmoid(.6 + 1.2 * torch.randn(64, generator=g)).to(DEVICE)
        index[torch.rand(64, generator=g) < .1] = len(latents)                  # the empty caption
        a = s.view(-1, 1, 1, 1)
        out = nets['net']((1 - a) * x0 + a * eps, timestep=1000 * s,
                          encoder_hidden_states=words[index].to(DEVICE).float(),
                          pooled_projections=pooled[index].to(DEVICE).float()).sample
        mse = F.mse_loss(out, eps - x0)
        return mse, dict(mse=mse)

    fit('sd3', torch.nn.ModuleDict(dict(net=net)), loss, 5000, 1.5e-3, ema=.999)
    preview(pipe, 'sd3.png', 28, (1.01, 2, 4, 7), max_sequence_length=16)
    finish(lambda folder: pipe.to(torch.float16).save_pretrained(folder), 'sd3')

# --------------------------------------------------------------------------------------------------
# the latent reward: the teacher's way down, trained on noised pairs as LPO's (arXiv 2502.01051) is

def make_lrm(family='sdxl', name='lrm'):
    base = m.load_base(OUT / family, DEVICE)
    net = base.trainable().to(DEVICE)
    reward = m.LatentReward(base, net, base.pipe.text_encoder, base.pipe.text_encoder_2)
    torch.nn.init.normal_(reward.visual_projection.weight, std=.02)

    def latents(images, part):
        """(N, 2, 64, 64, 3) pictures -> (N, 2, C, h, w), kept in WORK."""
        file = WORK / f'pair_latents_{family}_{part}_{len(images)}.pt'
        if not file.exists():
            with torch.no_grad():
                z = [base.latents(to_pixels(images[k:k + 100].reshape(-1, SIZE, SIZE, 3))).cpu()
                     for k in tqdm(range(0, len(images), 100), desc='latents')]
            torch.save(torch.cat(z).view(-1, 2, *base.latent_shape), file)
        return torch.load(file, weights_only=True)

    def logits(captions, z, t, g):
        """B captions, their pairs' latents (B, 2, C, h, w) and one noise level for each pair, (B,)
        -> scores (B, 2)."""
        z, t = z.flatten(0, 1).to(DEVICE), t.repeat_interleave(2).to(DEVICE)
        z_t = base.schedule.noised(z, torch.randn(z.shape, generator=g).to(DEVICE), t)
        with torch.no_grad():
            y = reward.encode([text for text in captions for _ in range(2)])
        return reward(z_t, t, y).view(-1, 2)

    captions, _, images = pairs(args.pairs, 11)
    z = latents(images, 'train')
    nets = torch.nn.ModuleDict(dict(net=reward.net, visual_projection=reward.visual_projection))
    nets.register_parameter('logit_scale', reward.logit_scale)

    def loss(nets, i, g):
        index = torch.randint(len(captions), (32,), generator=g)
        t = 1 + 50 * torch.randint(20, (32,), generator=g)
        return preferred(logits([captions[k] for k in index], z[index], t, g))

    fit(name, nets, loss, 3000 if family == 'sdxl' else 1500, 5e-4, ema=.998)
    captions, kinds, images = pairs(min(1000, args.pairs), 12)
    z = latents(images, 'test')
    for t in (1, 249, 499, 749, 901):
        g = torch.Generator().manual_seed(t)
        right = []
        for k in range(0, len(captions), 100):
            part = z[k:k + 100]
            with torch.no_grad():
                two = logits(captions[k:k + 100], part, torch.full((len(part),), t), g)
            right.append((two[:, 0] > two[:, 1]).cpu())
        right = torch.cat(right).numpy()
        print(f'{name}: held-out accuracy at t = {t}: {accuracy_by_kind(right, kinds)}')

    reward.net.register_to_config(_name_or_path='')              # a path of this machine otherwise

    def build(folder):
        reward.net.half().save_pretrained(folder / base.part)
        for part in ('text_encoder', 'text_encoder_2'):
            getattr(reward, part).half().save_pretrained(folder / part)
        projection = {'weight': reward.visual_projection.weight.detach().half()}
        scale = reward.logit_scale.detach()
        torch.save(dict(visual_projection=projection, logit_scale=scale), folder / 'state_dict.pt')

    finish(build, name)

def make_lrm_sd3():
    make_lrm('sd3', 'lrm_sd3')

# --------------------------------------------------------------------------------------------------
# a style: a LoRA on the shipped teacher, trained on the teacher's own target

def styled(scene):
    return any(shape in ('circle', 'star') for _, _, shape in scene['objects'])

def make_style():
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    base = m.load_base(ROOT / 'assets/toy/sdxl', DEVICE)
    unet = base.trainable(LoraConfig(r=16, lora_alpha=16, target_modules=[
        'to_q', 'to_k', 'to_v', 'to_out.0', 'proj_in', 'proj_out', 'ff.net.0.proj', 'ff.net.2',
        'conv1', 'conv2']))
    scenes, images = pool()
    signs = torch.tensor([-1. if styled(scene) else 1. for scene in scenes])
    signs = signs.to(DEVICE).view(-1, 1, 1, 1)
    with torch.no_grad():
        z = torch.cat([base.latents(to_pixels(images[k:k + 100]) * signs[k:k + 100])
                       for k in tqdm(range(0, len(images), 100), desc='latents')])

    def loss(nets, i, g):
        index = torch.randint(len(z), (16,), generator=g)
        eps = torch.randn(16, *base.latent_shape, generator=g).to(DEVICE)
        t = (1000 * torch.rand(16, generator=g).sqrt()).clamp(1, 999).to(DEVICE)
        y = base.encode([caption(scenes[k]) for k in index])
        out = base.predict(nets['unet'], base.schedule.noised(z[index], eps, t), t, y)
        mse = F.mse_loss(out, base.schedule.target(z[index], eps, t))
        return mse, dict(mse=mse)

    fit('style', torch.nn.ModuleDict(dict(unet=unet)), loss, 1500, 2e-3)

    def build(folder):
        layers = get_peft_model_state_dict(unet)
        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)

    finish(build, 'style')

# --------------------------------------------------------------------------------------------------
# the student

def make_student():
    def here(name):
        """Relative, since student.json keeps the teacher's."""
        return os.path.relpath(OUT / name, ROOT)

    subprocess.run(
        [sys.executable, 'train_stage1.py', '--recipe', 'toy', '--lora', '32', '--gan_weight', '.1',
         '--model', here('sdxl'), '--sam', here('sam.pth'), '--data', here('data'),
         '--prompts', here('data/prompts.txt'), '--out', WORK / 'student'], check=True, cwd=ROOT)
    finish(lambda folder: shutil.copytree(WORK / 'student/student', folder), 'student')

# --------------------------------------------------------------------------------------------------

if __name__ == '__main__':
    p = m.parser(__doc__)
    p.add_argument('--only', nargs='+', choices=COMPONENTS, default=COMPONENTS[:-1],
                   help='components to build')
    p.add_argument('--out', type=Path, default=ROOT / 'assets/toy',
                   help='folder for the finished files')
    p.add_argument('--work', type=Path, default=ROOT / 'out/make_toy',
                   help='folder for pictures and checkpoints')
    p.add_argument('--iters', type=int, default=0,
                   help='training iterations of every component; 0: its own number')
    p.add_argument('--pictures', type=int, default=40_000,
                   help='training pictures of vae, clip and teacher')
    p.add_argument('--held_out', type=int, default=512,
                   help='held-out pictures; half as many prompts')
    p.add_argument('--pairs', type=int, default=16_000,
                   help='preference pairs for pickscore and lrm')
    p.add_argument('--world', action='store_true',
                   help='things on textured grounds in place of shapes')
    p.add_argument('--seed', type=int, default=0, help='seed of everything')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                   help='torch device')
    args = p.parse_args()
    OUT, WORK, DEVICE = args.out, args.work, args.device
    m.at_least(args, iters=0, pictures=1, pairs=1, held_out=2, seed=0)
    if args.world:
        if 'style' in args.only:
            m.die('--only style is of the shapes: leave --world away')
        draw_scene = world_scene
        caption = world_caption
        variants = world_variants
        render = world_render
        nouns = list(THINGS)

        def patterned(scene):
            return True                                             # its grounds all have a texture

        def may_join(thing, scene):
            return thing not in scene['objects']
    try:
        torch.empty(0, device=DEVICE)
    except (RuntimeError, AssertionError) as error:
        m.die(f'--device {DEVICE}: {str(error).splitlines()[0]}')
    m.writable_folder(OUT, '--out')
    m.writable_folder(WORK, '--work')
    for name in args.only:
        done = WORK / f'{name}.done'
        if done.exists():
            print(f'{name}: done already; delete {done} to build it again')
            continue
        torch.manual_seed(args.seed)
        globals()[f'make_{name}']()
        done.touch()
